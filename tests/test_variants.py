"""The variants' rules by hand-computed values, their gradients, and how --algo finds a file."""

import json
import math
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
from conftest import examples, generate, gradient_of, metric_lines, readme_example
from transformers import AutoModelForImageTextToText

import papo
import train
from losses import kl_k3, policy_loss, response_mean
from masking import mask_prompt
from papo import pack_loss, prepare, preset
from support import StepError
from support.batch import cat_view, mini_batches, pad_and_cat, responses_with_image, seeded
from support.config import parse_flags
from support.variants import variant_names
from variants import dyco_rl, noisy_rollout, pgpo, tor, vppo


def close(found, expected, atol=1e-6):
    expected = torch.as_tensor(expected, dtype=found.dtype)
    torch.testing.assert_close(found, expected, atol=atol, rtol=0)


# --------------------------------------------------------------------------------- rules, by hand


def test_vppo_response_weights():
    """x = 0, 1/3, 1 with mean 4/9, so w = 0.9 + 0.1 * 9/4 * x."""
    of_all = torch.tensor([0.5, 1.0, 2.0])
    close(vppo.response_weights(of_all, of_all, least=0.9), [0.9, 0.975, 1.125])
    close(vppo.response_weights(torch.tensor([1.0]), of_all, least=0.9), [0.975])
    equal = torch.full((3,), 0.7)
    close(vppo.response_weights(equal, equal, least=0.9), [1.0, 1.0, 1.0])


def test_vppo_trains_the_tokens_of_largest_dependency():
    """ceil(0.4 n) = 2 of 4, 1 of 2, 2 of 5; of equal ones the first."""
    dependency = torch.tensor([[3.0, 1, 2, 5, 9], [0.0, 7, 8, 9, 9], [1.0, 1, 1, 1, 1]])
    mask = torch.arange(5) < torch.tensor([4, 2, 5])[:, None]
    expected = [[1, 0, 0, 1, 0], [0, 1, 0, 0, 0], [1, 1, 0, 0, 0]]
    close(vppo.top_tokens(dependency, mask, share=0.4), expected)
    long = torch.ones(1, 25, dtype=torch.bool)
    assert vppo.top_tokens(torch.rand(1, 25), long, share=0.28).sum() == 7  # not 8, by rounding


def test_dependency_is_k3_of_the_masked_view_up_to_ten(groups):
    """And a response's is the mean over its own tokens: the second has one."""
    group = groups[0]
    group.old_log_probs = -1.0 * group.response_mask
    group.view_log_probs["mask"] = (math.log(2) - 1) * group.response_mask
    group.view_log_probs["mask"][0, 0] = 9.0
    close(vppo.visual_dependency(group)[0, :2], [10, 2 - math.log(2) - 1])
    close(vppo.response_dependency(group)[1], 2 - math.log(2) - 1)


def test_pgpo_token_weights():
    """I = 0, 1/4, 1/2, 1, and w = 0, 0.25/0.4, 1 + 2 (0.1/0.6), 3, then scaled to sum 4."""
    dependency = torch.tensor([[1.0, 2.0, 3.0, 5.0, 0.0, 9.0]]).expm1()
    mask = torch.tensor([[True] * 4 + [False] * 2])  # padding may be lower and higher
    raw = torch.tensor([0.0, 0.625, 1 + 2 / 6, 3.0, 0.0, 0.0])
    close(pgpo.token_weights(dependency, mask, 0.4, 2.0)[0], raw * 4 / raw.sum())
    equal = pgpo.token_weights(torch.full((1, 6), 0.3), mask, 0.4, 2.0)
    close(equal, [[1, 1, 1, 1, 0, 0]])


def test_pgpo_development_weights():
    """I = 0, 1/4, 1/2, 1; of 4 tokens the one of rank floor(1.6) = 1 is the threshold 1/4.

    w = max(0, 0.1), 1, 1 + 2 (1/4) / (3/4), 3, and no rescaling. Of 5 the threshold is rank 2.
    """
    dependency = torch.tensor([[0.0, 1, 2, 4, 0], [0.0, 0, 0, 0, 0], [4.0, 3, 2, 1, 0]]).expm1()
    dependency[0, 4] = 99.0  # padding
    mask = torch.arange(5) < torch.tensor([4, 5, 5])[:, None]
    expected = [[0.1, 1, 1 + 2 / 3, 3, 0], [1, 1, 1, 1, 1], [3, 2, 1, 0.5, 0.1]]
    close(pgpo.development_weights(dependency, mask, 0.4, 2.0), expected)


def flat(groups, values):
    """The values at response tokens."""
    return torch.cat(
        [each[group.response_mask] for group, each in zip(groups, values, strict=True)]
    )


def test_tor_weights(groups):
    """1 at the ceil(0.29 N) tokens of largest H, else 0.5 at those of largest P, else 0."""
    entropies = [
        torch.rand(group.tokens.shape, generator=seeded(i)) for i, group in enumerate(groups)
    ]
    gains = [torch.zeros_like(each) for each in entropies]
    for i, group in enumerate(groups):
        group.old_log_probs = torch.full(group.tokens.shape, -1.0)
        if group.has_image:
            gains[i] = torch.randn(group.tokens.shape, generator=seeded("gain", i))
            group.view_log_probs["mask"] = gains[i] - 1.0
    policy = SimpleNamespace(entropies=None, per_group=lambda groups, _: entropies)
    weights = replace(preset("tor"), token_share=0.29).weigh(groups, policy)
    expected = torch.zeros(len(flat(groups, gains)))
    n = math.ceil(0.29 * len(expected))  # 24 of 80
    expected[flat(groups, gains).abs().topk(n).indices] = 0.5
    expected[flat(groups, entropies).topk(n).indices] = 1.0
    close(flat(groups, weights), expected)


def test_tor_takes_exactly_its_share_of_equal_values(groups):
    """Where P = 0 everywhere the tokens that see are drawn by lot, which depends on the prompts."""
    zeros = [torch.zeros(group.tokens.shape) for group in groups]

    def chosen(share=0.3):
        return flat(groups, tor.top_of_batch(groups, zeros, share))

    first = chosen()
    assert first.sum() == math.ceil(0.3 * len(first)) and torch.equal(first, chosen())
    assert not chosen(0.0).any()
    for group in groups:
        group.prompt.index += 7
    assert not torch.equal(first, chosen())


def test_the_noises_schedules_and_diffusion():
    """NoisyRollout's; and DVRP's, by the deviations that the source has at start, half and end."""
    algo = preset("noisy_rollout")
    noise = [algo.at_step(step, 60).noise_steps for step in (0, 37, 39, 59)]
    assert noise == [499, int(500 / (1 + math.exp(-1))), 250, 0]
    assert algo.at_step(0, 1).noise_steps == 500  # a run of one step: exp would overflow
    steps = [preset("dvrp").at_step(step, 100).noise_steps for step in (0, 50, 100)]
    std = [float((1 - noisy_rollout.share_kept(k)).sqrt()) for k in steps]
    assert std == pytest.approx([0.498, 0.147, 0.009], abs=2e-3)


def test_noise_is_added_to_pixels_between_0_and_1(encoder, prompts):
    """The same noise in both copies over time."""
    images = encoder.image_processor
    mean, std = (torch.tensor(x)[:, None, None] for x in (images.image_mean, images.image_std))
    clean = prompts[0].pixel_values
    noised = noisy_rollout.add_noise(clean, 400, images, seeded(1))
    pixels, noised_pixels = (x.view(len(x), 3, 2, 196) * std + mean for x in (clean, noised))
    kept = noisy_rollout.share_kept(400)
    noise = torch.randn(len(clean), 3, 1, 196, generator=seeded(1))
    expected = (kept.sqrt() * pixels + (1 - kept).sqrt() * noise).clamp(0, 1)
    close(noised_pixels, expected, atol=1e-5)
    assert (noised_pixels - pixels).std() > 0.1


def test_dyco_roles_and_score():
    """Positions: text, image, image, text, then the response. The last two tokens have a role.

    Token 1: the image part moves by pi, from its first to its second token, and the text part not
    at all: visual, with the image's share 0.6 / 0.8. Token 2: the image part stays, and the text
    part moves by pi / 2, from (1/2, 1/2) to (0, 1): textual, with its share 0.4 / 0.5.
    """
    attention = torch.tensor(
        [
            [0.1, 0.5, 0.0, 0.4, 0.0, 0.0, 0.0],
            [0.2, 0.0, 0.6, 0.1, 0.1, 0.0, 0.0],
            [0.5, 0.0, 0.1, 0.0, 0.4, 0.0, 0.0],
        ]
    )
    visible = torch.ones(3, 7, dtype=torch.bool).tril(3)
    close(dyco_rl.shifts(attention[:, 1:3], visible[:, 1:3]), [math.pi, 0], atol=1e-3)
    close(dyco_rl.shifts(attention[:, 3:], visible[:, 3:]), [0, math.pi / 2], atol=1e-3)
    alignment = dyco_rl.response_alignment(attention, visible, 1, 2, margin=0.05)
    close(alignment, 1 / (1 + math.exp(-(0.6 / 0.8 + 0.4 / 0.5) / 2)))


def test_dyco_without_roles_and_with_a_neutral_margin():
    """Nothing moves; the text part moves by less than the margin, and by more; the image part,
    which has no margin, does."""
    visible = torch.ones(2, 5, dtype=torch.bool).tril(3)
    still, text_moves = [0.2, 0.2, 0.2, 0.4, 0], [0.2, 0.4, 0.206, 0.194, 0]
    with_role = 1 / (1 + math.exp(-0.4 / 0.8))
    for before, after, last, margin, expected in (
        (still, still, 1, 0.05, 0.5),
        ([0.2, 0.4, 0.2, 0.2, 0], text_moves, 1, 0.05, 0.5),
        ([0.2, 0.4, 0.2, 0.2, 0], text_moves, 1, 0.02, with_role),
        (still, [0.2, 0.206, 0.194, 0.4, 0], 2, 0.05, with_role),
    ):
        attention = torch.tensor([before, after])
        close(dyco_rl.response_alignment(attention, visible, 1, last, margin), expected)


# ------------------------------------------------------------------------------- in a mini-batch


def prepared(name, policy, groups, n_batches=1, **changes):
    algo = replace(preset(name), kl_ref_coef=0.0, **changes)
    batches = mini_batches(groups, math.ceil(len(groups) / n_batches))
    prepare(policy, None, batches, algo, key=(0, 0))
    return algo


def test_pgpos_loss_is_that_of_weighted_advantages(varied_policy, groups):
    """In value and gradient: the weights have none."""
    algo = prepared("pgpo", varied_policy, groups)
    dependency = vppo.visual_dependency(groups[0])
    weights = pgpo.token_weights(dependency, groups[0].response_mask, 0.4, 2.0)
    assert torch.equal(groups[0].weights, weights)
    assert not groups[2].has_image and groups[2].weights[groups[2].response_mask].eq(1).all()
    assert (groups[0].view_pixel_values["mask"] == varied_policy.encoder.black_patch).all()
    loss, _ = pack_loss(varied_policy, groups, algo)
    log_probs = varied_policy.log_probs(groups)
    mask = pad_and_cat(groups, "response_mask").bool()
    advantages = torch.cat([group.advantages for group in groups])[:, None]
    weighted = advantages * pad_and_cat(groups, "weights")
    clips = (algo.clip_low, algo.clip_high)
    expected, _ = policy_loss(log_probs, log_probs.detach(), weighted, mask, *clips)
    assert loss.item() == pytest.approx(expected.item(), abs=1e-6) != 0
    gradients = (gradient_of(varied_policy, each) for each in (loss, expected))
    close(*gradients)


def test_dyco_uses_the_attention_of_transformers_eager_forward(folder, varied_policy, groups):
    eager = AutoModelForImageTextToText.from_pretrained(folder, attn_implementation="eager")
    eager.load_state_dict(varied_policy.model.state_dict())
    with_image = [group for group in groups if group.has_image]
    with torch.no_grad():
        alignments = torch.cat(dyco_rl.attention_alignments(varied_policy, with_image, 0.05))
        expected = []
        for group in with_image:
            prompt = group.prompt
            first, *_, last = prompt.is_image_token.nonzero()[:, 0].tolist()
            for tokens, mask in zip(group.tokens, group.response_mask, strict=True):
                ids = torch.cat([prompt.input_ids, tokens[mask][:-1]])[None]
                out = eager(
                    input_ids=ids,
                    mm_token_type_ids=(ids == eager.config.image_token_id).int(),
                    pixel_values=prompt.pixel_values,
                    image_grid_thw=prompt.image_grid_thw,
                    output_attentions=True,
                )
                attention = out.attentions[-1][0].mean(0)[len(prompt) - 1 :]
                visible = torch.ones_like(attention, dtype=torch.bool).tril(len(prompt) - 1)
                image = (attention, visible, first, last)
                expected.append(dyco_rl.response_alignment(*image, margin=0.05))
    close(alignments, torch.stack(expected), atol=1e-4)
    assert alignments.std() > 0.01


def test_vppo_scales_over_each_mini_batch(varied_policy, groups):
    """Not within each group, nor over both mini-batches."""
    prepared("vppo", varied_policy, groups, n_batches=2)
    of_batch = torch.cat([vppo.response_dependency(group) for group in groups[:2]])
    for group in groups[:2]:
        chosen = vppo.top_tokens(vppo.visual_dependency(group), group.response_mask, 0.4)
        scales = vppo.response_weights(vppo.response_dependency(group), of_batch, 0.9)
        close(group.weights, scales[:, None] * chosen, atol=1e-5)
    assert not groups[2].has_image and groups[2].weights.eq(1).all()


def test_dyco_scales_over_the_mini_batch(varied_policy, groups):
    """But for short responses, which get its lowest weight, and those without an image."""
    prepared("dyco_rl", varied_policy, groups, shortest_response=5)
    alignments = dyco_rl.attention_alignments(varied_policy, groups, margin=0.05)
    of_batch = torch.cat([alignments[i] for i in (0, 1, 3)])
    for group, own in zip(groups, alignments, strict=True):
        scores = torch.tanh((own - of_batch.mean()) / of_batch.std())
        scores[group.response_mask.sum(1) < 5] = -1.0
        expected = 1 + 0.2 * scores if group.has_image else torch.ones(3)
        close(group.weights[:, 0], expected.float(), atol=1e-5)
    assert dyco_rl.standardised(of_batch[:1], of_batch[:1]) == 0


def test_dvrp_adds_the_noised_views_kl_to_papos(varied_policy, groups):
    """In value and gradient; prompts without an image have neither view."""
    algo = prepared("dvrp", varied_policy, groups, n_batches=2, noised_coef=0.3)
    images, pixels = varied_policy.encoder.image_processor, groups[0].prompt.pixel_values
    expected = noisy_rollout.add_noise(pixels, 500, images, seeded("noised", 0, 0, 0))
    assert torch.equal(groups[0].view_pixel_values["noised"], expected)
    masked = mask_prompt(groups[0].prompt, algo, varied_policy.encoder, seeded("mask", 0, 0, 0))
    assert torch.equal(groups[0].view_pixel_values["mask"], masked)
    loss, metrics = pack_loss(varied_policy, groups, algo)
    loss_without, _ = pack_loss(varied_policy, groups, replace(algo, noised_coef=0.0))
    log_probs, mask = varied_policy.log_probs(groups), pad_and_cat(groups, "response_mask")
    per_token = kl_k3(log_probs, cat_view(groups, "noised"))
    kl = response_mean(per_token * responses_with_image(groups)[:, None], mask)
    assert metrics["kl_noised"].item() == pytest.approx(kl.item(), abs=1e-6) and kl > 1e-4
    added = loss - loss_without
    close(added, 0.3 * kl)
    close(gradient_of(varied_policy, added), gradient_of(varied_policy, 0.3 * kl))


def test_entropies_are_those_of_the_full_softmax(varied_policy, groups):
    """The first token's, from the log-probs of all tokens that might stand there."""
    varied_policy.temperature = 0.7
    group = groups[0]
    [found] = varied_policy.per_group([group], varied_policy.entropies)
    tokens = torch.arange(len(varied_policy.encoder.tokenizer))[:, None]
    first = replace(group, tokens=tokens, response_mask=torch.ones_like(tokens, dtype=torch.bool))
    with torch.no_grad():
        log_probs = varied_policy.log_probs([first])
    close(log_probs.exp().sum(), 1.0, atol=1e-4)
    close(found[:, 0], (-(log_probs.exp() * log_probs).sum()).expand(3), atol=1e-4)
    assert (found[~group.response_mask] == 0).all()


# ---------------------------------------------------------------- sampled and trained under images


@pytest.fixture()
def triplets(encoder):
    """Prompts with a positive and a negative image of other sizes; the third has no image."""
    prompts = []
    for index, example in enumerate(examples()):
        images = [image.rotate(180) for image in example.images]
        others = [image.resize((70, 70)) for image in images]
        more = {"images_pos": others, "images_neg": images} if images else {}
        prompts.append(encoder.encode(replace(example, more_images=more), index))
    return prompts


def sample(policy, prompts, algo, group_size=3):
    def sample_groups(each):
        return generate(policy, each, group_size, max_new_tokens=8, key=(0, 7))

    return algo.sample(prompts, policy, sample_groups, (0, 7))


def check_log_probs_are_the_samplers(policy, groups):
    with torch.no_grad():
        recomputed = policy.log_probs(groups)
    close(recomputed, pad_and_cat(groups, "sample_log_probs"), atol=1e-4)


def test_tapo_trains_each_half_under_the_image_it_was_sampled_under(varied_policy, triplets):
    """And compares both with the same negative."""
    algo = preset("tapo")
    groups = sample(varied_policy, triplets, algo)
    assert [group.prompt.index for group in groups] == [0, 0, 1, 1, 2, 2, 3, 3]
    check_log_probs_are_the_samplers(varied_policy, groups)
    prepare(varied_policy, None, [groups], algo, key=(0, 0))
    for anchor, positive in zip(groups[::2], groups[1::2], strict=True):
        assert not torch.equal(anchor.tokens, positive.tokens)  # nor without an image: other draws
        if not anchor.has_image:
            continue
        pixels = anchor.prompt.more_pixel_values["images_pos"]
        assert torch.equal(positive.prompt.pixel_values, pixels)
        assert not torch.equal(pixels, anchor.prompt.pixel_values)
        for group in (anchor, positive):
            negative = group.prompt.more_pixel_values["images_neg"]
            assert torch.equal(group.view_pixel_values["mask"], negative)
            swapped = replace(group, prompt=replace(group.prompt, pixel_values=negative))
            with torch.no_grad():
                close(group.masked_log_probs, varied_policy.log_probs([swapped]), atol=1e-5)


def test_noisy_rollout_trains_the_noised_half_under_the_clean_image(varied_policy, prompts):
    algo = preset("noisy_rollout")
    groups = sample(varied_policy, prompts, algo)
    check_log_probs_are_the_samplers(varied_policy, groups[::2])
    for prompt, clean, noised in zip(prompts, groups[::2], groups[1::2], strict=True):
        assert noised.prompt is prompt
        assert not torch.equal(clean.tokens, noised.tokens)
        image = algo._noised(prompt, varied_policy, (0, 7))
        check_log_probs_are_the_samplers(varied_policy, [replace(noised, prompt=image)])
        if prompt.pixel_values is not None:
            with torch.no_grad():
                differ = varied_policy.log_probs([noised]) - noised.sample_log_probs
            assert differ.abs().max() > 1e-3


# ------------------------------------------------------------------------- --algo finds a file

HEADER = """
from dataclasses import dataclass, replace
from papo import Algo, flag
import torch
"""
CLASS = "@dataclass(frozen=True)\nclass A(Algo):\n  "


@pytest.fixture()
def write_variant(tmp_path):
    """write_variant(text) -> the path of a new file with it; a file is loaded once."""

    def write(text):
        file = tmp_path / f"mine_{len(list(tmp_path.iterdir()))}.py"
        file.write_text(HEADER + text)
        return str(file)

    return write


def test_a_wrong_file_is_one_line(write_variant):
    """What Python would let pass, and what would train something else silently."""
    undecorated = "class A(Algo):\n  kl_prcp_coef: float = 0.5"
    for text, message in [
        ("x = 1", "must define one subclass of Algo, has none"),
        (undecorated, r"decorate A with @dataclass\(frozen=True\)"),
        (CLASS + "kl_prcp_coef = 0.5", "write the type, kl_prcp_coef"),
        (CLASS + "kl_prcp_coeff: float = 0.5", "kl_prcp_coeff is no step .*weigh.* no setting"),
        (CLASS + "def wiegh(self, groups, policy): pass", "wiegh is no step"),
    ]:
        with pytest.raises(ValueError, match=message):
            papo.algo_class(write_variant(text))


def test_a_wrong_result_of_a_step_is_one_line(policy, groups, write_variant):
    """One of another shape, or one that is not finite."""
    weigh = "def weigh(self, groups, _): return "
    view = "def view(self, name, prompt, *_): return prompt.pixel_values[:9]"
    for step, message in [
        (weigh + "[torch.ones(3)] * 4", r"float32\[3, 1\] or .* not float32\[3\]"),
        (weigh + "[torch.full((3, 1), torch.nan)] * 4", r"not float32\[3, 1\] with NaN"),
        (weigh + "[torch.ones(3, 1)]", "a list of 4 or a list of 0, not a list of 1"),
        (view, r"float32\[36, 1176\], not float32\[9, 1176\]"),
        (view.removesuffix("[:9]"), "must return a copy"),
    ]:
        algo = replace(preset(write_variant(CLASS + step)), kl_ref_coef=0.0)
        with pytest.raises(StepError, match=message):
            prepare(policy, None, [groups], algo, key=(0, 0))
    # Weights may read the masked view that the update computes again.
    reads = write_variant(CLASS + weigh + "[0 * g.masked_log_probs + 2 for g in groups]")
    algo = replace(preset(reads), kl_ref_coef=0.0, masked_grad=True)
    prepare(policy, None, [groups[:1]], algo, key=(0, 0))
    assert groups[0].weights.eq(2).all()


def test_noise_falls_while_training_and_one_response_per_image_is_enough(run, record_calls):
    calls = record_calls(noisy_rollout.NoisyRollout, "sample")
    flags = "--steps 2 --noise_middle 1.5 --eval_every 0"
    run("noisy", f"--algo noisy_rollout --group_size 1 {flags}")
    assert {algo.noise_steps for (algo, *_), _ in calls} == {0, 499}


def test_a_variant_of_a_variant_and_a_neighbouring_file(tmp_path, write_variant):
    """Also a default of a float that is written as an int."""
    (tmp_path / "my_shares.py").write_text("LESS = 0.2\n")
    file = write_variant(
        "from variants.vppo import VPPO\nfrom my_shares import LESS\n"
        "@dataclass(frozen=True)\nclass Narrow(VPPO):\n"
        "  token_share: float = LESS\n  kl_prcp_coef: float = 0\n  own: float = flag(1, 'mine')\n"
    )
    algo = preset(file)
    assert (algo.token_share, algo.least_weight, algo.entropy_coef) == (0.2, 0.9, 0.06)
    given = "--token_share 0.5 --kl_prcp_coef 0.5 --own 2".split()
    [parsed] = parse_flags("Train.", type(algo), defaults={}, argv=given)
    assert (parsed.token_share, parsed.kl_prcp_coef, parsed.own) == (0.5, 0.5, 2.0)


def test_presets_and_variants_have_the_originals_settings():
    table = {  # beta, gamma, eta1, eta2, clips, dynamic sampling, mask ratio, average, dual clip
        "grpo": (0.01, 0, 0, 0, 0.2, 0.3, False, 0.6, "token", 3),
        "dapo": (0, 0, 0, 0, 0.2, 0.28, True, 0.6, "token", 3),
        "papo_g": (0.01, 0.02, 0, 0, 0.2, 0.3, False, 0.6, "token", 3),
        "papo_g 7b": (0.01, 0.02, 0.05, 0.05, 0.2, 0.3, False, 0.6, "token", 3),
        "papo_d": (0, 0.01, 0.03, 0.03, 0.2, 0.28, True, 0.6, "token", 3),
        "papo_d 7b": (0, 0.01, 0.03, 0.03, 0.2, 0.28, True, 0.6, "token", 3),
        "grpo_no_kl_ref": (0, 0, 0, 0, 0.2, 0.3, False, 0.6, "token", 3),
        "papo_g_no_kl_ref": (0, 0.01, 0.03, 0.03, 0.2, 0.3, False, 0.6, "token", 3),
        "vppo": (0, 0, 0.06, 0, 0.2, 0.28, True, 0.5, "token", 3),
        "pgpo": (0, 0, 0, 0, 0.2, 0.28, True, 1.0, "token", 3),
        "tor": (0.01, 0, 0, 0, 0.2, 0.2, False, 1.0, "token", 3),
        "dvrp": (0, 0.01, 0, 0.05, 0.2, 0.3, False, 0.6, "token", 3),
        "tapo": (0, 0.01, 0.03, 0.03, 0.2, 0.28, True, 0.6, "token", 3),
        "noisy_rollout": (0, 0, 0, 0, 0.2, 0.2, False, 0.6, "token", math.inf),
        "dyco_rl": (0.04, 0, 0, 0, 0.2, 0.2, False, 0.6, "seq", 3),
    }
    assert {name.split()[0] for name in table} == {*papo.PRESETS, *variant_names()}
    fields = "kl_ref_coef kl_prcp_coef entropy_coef masked_entropy_coef clip_low clip_high"
    fields = [*fields.split(), "dynamic_sampling", "mask_ratio", "average", "clip_dual"]
    for name, expected in table.items():
        algo = preset(*name.split())
        assert tuple(getattr(algo, field) for field in fields) == expected, name
        assert algo.mask_strategy == "random"
    with pytest.raises(ValueError, match="size='72b': choose '3b' or '7b'"):
        preset("grpo", "72b")


def test_the_example_in_the_readme_runs_and_resumes(run, tmp_path, capsys):
    """As it stands there. The run keeps a copy, and a changed file is named."""
    block = readme_example("(Algo)")
    file = tmp_path / "my_idea.py"
    file.write_text(block)
    out = run("mine", f"--algo {file} --sharpness 0.5 --steps 1 --eval_every 0 --save_every 1")
    file.write_text(block + "# changed\n")
    train.main(["--resume", str(out), "--steps", "2"])
    kept = out / "my_idea.py"
    assert f"{file} differs from the run's copy of it, {kept}" in capsys.readouterr().err
    assert kept.read_text() == block
    assert json.loads((out / "config.json").read_text())["sharpness"] == 0.5
    assert [line["step"] for line in metric_lines(out)] == [1, 2]
