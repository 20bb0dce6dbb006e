"""The variants' rules by hand-computed values, their gradients, and how --algo finds a file."""

import copy
import json
import math
import re
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from conftest import (
    check_same_metrics,
    check_same_weights,
    examples,
    process_restored,
    run_flags,
)
from transformers import AutoModelForImageTextToText

import papo
import train
from losses import group_advantages, kl_k3, masked_mean, policy_loss
from papo import mini_batches, prepare, preset, row_loss
from rollout import generate
from support import toy
from support.batch import pad_and_cat, seeded
from support.cli import parse_flags
from support.errors import StepError
from support.qwen_vl import Policy
from support.run_folder import free_name
from support.stats import RolloutStats
from support.variants import FOLDER, sampling_pairs, variant_names
from variants import dyco_rl, noisy_rollout, pgpo, vppo

ROOT = Path(__file__).parent.parent


def close(found, expected, atol=1e-6):
    torch.testing.assert_close(
        found, torch.as_tensor(expected, dtype=found.dtype), atol=atol, rtol=0
    )


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
    long = torch.ones(1, 15, dtype=torch.bool)
    assert vppo.top_tokens(torch.rand(1, 15), long, share=0.2).sum() == 3  # not 4, by rounding


def test_dependency_is_k3_of_the_masked_view_up_to_ten(groups):
    group = groups[0]
    group.old_log_probs = torch.full(group.tokens.shape, -1.0)
    masked = torch.full(group.tokens.shape, -1.0 + math.log(2))
    masked[0, 0] = 9.0
    group.view_log_probs["mask"] = masked
    found = vppo.visual_dependency(group)
    assert found[0, 0] == 10
    close(found[0, 1], 2 - math.log(2) - 1)


def test_pgpo_token_weights():
    """I = 0, 1/4, 1/2, 1, and w = 0, 0.25/0.4, 1 + 2 (0.1/0.6), 3, then scaled to sum 4."""
    dependency = torch.tensor([[0.0, 1.0, 2.0, 4.0, 0.0]]).expm1()
    dependency[0, 4] = 99.0  # padding
    mask = torch.tensor([[True] * 4 + [False]])
    raw = torch.tensor([0.0, 0.625, 1 + 2 / 6, 3.0, 0.0])
    close(pgpo.token_weights(dependency, mask, 0.4, 2.0)[0], raw * 4 / raw.sum())
    equal = pgpo.token_weights(torch.full((1, 5), 0.3), mask, 0.4, 2.0)
    close(equal, [[1, 1, 1, 1, 0]])


def test_noisy_rollout_schedule_and_diffusion():
    algo = preset("noisy_rollout")
    noise = [algo.annealed(step, 60).noise_steps for step in (0, 37, 39, 59)]
    assert noise == [499, int(500 / (1 + math.exp(-1))), 250, 0]
    assert algo.annealed(0, 1).noise_steps == 500  # a run of one step: exp would overflow
    betas = [(5e-3 - 1e-5) / (1 + math.exp(6 - 12 * i / 999)) + 1e-5 for i in range(301)]
    expected = math.prod(1 - beta for beta in betas)
    assert float(noisy_rollout.share_kept(300)) == pytest.approx(expected, rel=1e-5)
    assert 0.5 < expected < 0.99


def test_noise_is_added_to_pixels_between_0_and_1(encoder, prompts):
    images = encoder.images
    mean, std = (torch.tensor(x)[:, None, None] for x in (images.image_mean, images.image_std))
    clean = prompts[0].pixel_values
    noised = noisy_rollout.add_noise(clean, 400, images, seeded(1))
    assert noised.shape == clean.shape
    pixels, noised_pixels = (x.view(len(x), 3, 2, 196) * std + mean for x in (clean, noised))
    close(noised_pixels[:, :, 0], noised_pixels[:, :, 1])  # copies over time
    kept = noisy_rollout.share_kept(400)
    noise = torch.randn(len(clean), 3, 1, 196, generator=seeded(1))
    expected = (kept.sqrt() * pixels + (1 - kept).sqrt() * noise).clamp(0, 1)
    close(noised_pixels, expected, atol=1e-5)
    assert (noised_pixels - pixels).std() > 0.1


def test_dyco_roles_and_score():
    """Positions: text, image, image, text, then the response. The last two tokens have a role.

    Token 1: the image part moves from its first to its second token, pi; the text part, on the one
    position that both see, not at all: visual, with the image's share 0.6 / 0.8. Token 2: the image
    part stays; the text part moves from (1/2, 1/2) to (0, 1), pi / 2: textual, with its share
    0.4 / 0.5.
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
    half_turn = torch.tensor([[0.5, 0.5], [1.0, 0.0]])
    close(dyco_rl.shifts(half_turn, torch.ones(2, 2, dtype=torch.bool)), [math.pi / 2])


def test_dyco_without_roles_and_with_a_neutral_margin():
    still = torch.tensor([[0.2, 0.4, 0.4, 0.0], [0.2, 0.4, 0.4, 0.0]])
    visible = torch.ones(2, 4, dtype=torch.bool).tril(2)
    close(dyco_rl.response_alignment(still, visible, 1, 1, margin=0.05), 0.5)
    close(
        dyco_rl.response_alignment(still[:1], visible[:1], 1, 1, margin=0.05), 0.5
    )  # a single token
    text_moves_by_0_03 = torch.tensor([[0.2, 0.4, 0.2, 0.2, 0], [0.2, 0.4, 0.206, 0.194, 0]])
    visible = torch.ones(2, 5, dtype=torch.bool).tril(3)
    close(dyco_rl.response_alignment(text_moves_by_0_03, visible, 1, 1, margin=0.05), 0.5)
    image_moves = torch.tensor([[0.2, 0.2, 0.2, 0.4, 0], [0.2, 0.206, 0.194, 0.4, 0]])
    visual = dyco_rl.response_alignment(image_moves, visible, 1, 2, margin=0.05)  # without a margin
    close(visual, 1 / (1 + math.exp(-0.4 / 0.8)))
    textual = dyco_rl.response_alignment(text_moves_by_0_03, visible, 1, 1, margin=0.02)
    close(textual, 1 / (1 + math.exp(-0.4 / 0.8)))


def test_dyco_standardises_over_the_mini_batch():
    """Scores 1, 2, 3 have mean 2 and standard deviation 1."""
    of_all = torch.tensor([1.0, 2.0, 3.0])
    close(dyco_rl.standardised(torch.tensor([3.0, 2.0]), of_all), [math.tanh(1), 0.0])
    close(dyco_rl.standardised(of_all[:1], of_all[:1]), [0.0])


# ------------------------------------------------------------------------------- in a mini-batch


def prepared(name, policy, groups, n_batches=1, **changes):
    algo = replace(preset(name), kl_ref_coef=0.0, **changes)
    batches = mini_batches(groups, math.ceil(len(groups) / n_batches))
    metrics = prepare(policy, None, batches, algo, key=(0, 0))
    return algo, metrics


WEIGHING = {"vppo": {}, "pgpo": {}, "dyco_rl": {"shortest_response": 0}}  # and changed settings


@pytest.mark.parametrize("name", WEIGHING)
def test_weights_do_not_depend_on_padding(varied_policy, groups, name):
    padded = copy.deepcopy(groups)
    for group in padded:
        for field in ("tokens", "response_mask", "sample_log_probs"):
            tensor = getattr(group, field)
            setattr(group, field, torch.nn.functional.pad(tensor, (0, 3)))
    for these in (groups, padded):
        prepared(name, varied_policy, these, **WEIGHING[name])
    for group, with_padding in zip(groups, padded, strict=True):
        width = group.tokens.shape[1]
        found = with_padding.weights[:, :width] * group.response_mask
        close(found, group.weights * group.response_mask, atol=1e-5)
        if group.has_image:
            assert (group.weights - 1).abs().max() > 0.01
            mask = group.response_mask
            if name == "vppo":
                expected = vppo.top_tokens(vppo.visual_dependency(group), mask, 0.4)
                assert torch.equal((group.weights * mask) > 0, expected > 0)
            if name == "pgpo":
                dependency = vppo.visual_dependency(group)
                assert torch.equal(group.weights, pgpo.token_weights(dependency, mask, 0.4, 2.0))
                assert (group.view_pixel_values["mask"] == varied_policy.encoder.black_patch).all()
        else:
            assert (group.weights[group.response_mask] == 1).all()


@pytest.mark.parametrize("name", WEIGHING)
def test_the_loss_is_that_of_weighted_advantages(varied_policy, groups, name):
    """In value and gradient: the weights have none."""
    algo, _ = prepared(name, varied_policy, groups, n_batches=2, **WEIGHING[name])
    loss, _ = row_loss(varied_policy, groups, algo)
    loss.backward()
    found = [p.grad.clone() for p in varied_policy.model.parameters() if p.grad is not None]
    varied_policy.model.zero_grad()

    log_probs = varied_policy.log_probs(groups)
    mask = pad_and_cat(groups, "response_mask").bool()
    advantages = torch.cat([group.advantages for group in groups])[:, None]
    weights = pad_and_cat(groups, "weights")
    assert not weights.requires_grad
    expected, _ = policy_loss(
        log_probs,
        pad_and_cat(groups, "old_log_probs"),
        advantages * weights,
        mask,
        clip_low=algo.clip_low,
        clip_high=algo.clip_high,
    )
    expected = expected + algo.entropy_coef * masked_mean(-log_probs, mask)
    expected.backward()
    assert loss.item() == pytest.approx(expected.item(), abs=1e-6)
    parameters = [p for p in varied_policy.model.parameters() if p.grad is not None]
    assert len(found) == len(parameters)
    for gradient, parameter in zip(found, parameters, strict=True):
        close(gradient, parameter.grad)


def test_vppo_scales_over_the_mini_batch_not_over_a_group(varied_policy, groups):
    algo, _ = prepared("vppo", varied_policy, groups)
    with_image = [group for group in groups if group.has_image]
    means = torch.cat([vppo.response_dependency(group) for group in with_image])
    expected = vppo.response_weights(means, means, 0.9)
    found = torch.cat([group.weights.amax(1) for group in with_image])
    close(found, expected, atol=1e-5)
    assert found.mean() == pytest.approx(1.0, abs=1e-5)
    assert found.max() - found.min() > 0.05


def test_dyco_uses_the_attention_of_transformers_eager_forward(folder, varied_policy, groups):
    eager = AutoModelForImageTextToText.from_pretrained(folder, attn_implementation="eager")
    eager.load_state_dict(varied_policy.model.state_dict())
    last_layer = eager.config.get_text_config().num_hidden_layers - 1
    with_image = [group for group in groups if group.has_image]
    found = []

    def probe(layer, query, key, scaling, layout):
        if layer == last_layer:
            for group, span in zip(with_image, layout.spans, strict=True):
                for index, n in zip(span.index, group.response_mask.sum(1), strict=True):
                    fed = index[: n - 1]
                    attention = (query[0], key[0], scaling, span, fed)
                    found.append(dyco_rl.response_attention(*attention)[0])

    with torch.no_grad():
        varied_policy.probe_attention(with_image, probe)
        alignments = torch.cat(dyco_rl.attention_alignments(varied_policy, with_image, 0.05))
        expected, expected_alignments = [], []
        for group in with_image:
            prompt = group.prompt
            for tokens, mask in zip(group.tokens, group.response_mask, strict=True):
                ids = torch.cat([prompt.input_ids, tokens[mask][:-1]])[None]
                out = eager(
                    input_ids=ids,
                    mm_token_type_ids=(ids == eager.config.image_token_id).int(),
                    pixel_values=prompt.pixel_values,
                    image_grid_thw=prompt.image_grid_thw,
                    output_attentions=True,
                )
                expected.append(out.attentions[-1][0].mean(0)[len(prompt) - 1 :])
                visible = torch.ones_like(expected[-1], dtype=torch.bool).tril(len(prompt) - 1)
                first, *_, last = prompt.is_image_token.nonzero()[:, 0].tolist()
                image = (expected[-1], visible, first, last)
                expected_alignments.append(dyco_rl.response_alignment(*image, margin=0.05))
    close(alignments, torch.stack(expected_alignments), atol=1e-4)
    assert alignments.std() > 0.01
    assert len(found) == len(expected) == 9
    for ours, theirs in zip(found, expected, strict=True):
        close(ours, theirs, atol=1e-5)


@pytest.mark.parametrize("name", ["vppo", "dyco_rl"])
def test_each_mini_batch_is_scaled_by_itself(varied_policy, groups, name):
    prepared(name, varied_policy, groups, n_batches=2, **WEIGHING[name])
    alone = copy.deepcopy(groups)
    for half in (alone[:2], alone[2:]):
        prepared(name, varied_policy, half, **WEIGHING[name])
    for group, other in zip(groups, alone, strict=True):
        close(group.weights, other.weights, atol=1e-5)


def test_dyco_weighs_short_responses_least_and_stays_within_its_limits(varied_policy, groups):
    prepared("dyco_rl", varied_policy, groups, shortest_response=5)
    for group in groups:
        short = group.response_mask.sum(1) < 5
        if group.has_image:
            assert (group.weights[short] == pytest.approx(0.8)) and group.weights.max() <= 1.2
            assert short.any()


def test_dvrp_adds_the_noised_views_kl_to_papos(varied_policy, groups):
    """In value and gradient; prompts without an image have neither view."""
    algo, metrics = prepared("dvrp", varied_policy, groups, n_batches=2, noised_coef=0.3)
    assert 0.3 < metrics["mask_ratio"] < 0.9
    assert metrics["noised_ratio"] == 1
    images, pixels = varied_policy.encoder.images, groups[0].prompt.pixel_values
    expected = noisy_rollout.add_noise(pixels, 500, images, seeded("noised", 0, 0, 0))
    assert torch.equal(groups[0].view_pixel_values["noised"], expected)
    without = replace(algo, noised_coef=0.0)
    mask = pad_and_cat(groups, "response_mask").bool()
    noised = torch.zeros(mask.shape)
    for group, rows in zip(groups, noised.split(3), strict=True):
        if group.has_image:
            rows[:, : group.tokens.shape[1]] = group.view_log_probs["noised"]
            assert not torch.equal(group.view_log_probs["noised"], group.masked_log_probs)
    (loss, metrics), (loss_without, _) = (
        row_loss(varied_policy, groups, each) for each in (algo, without)
    )
    log_probs = varied_policy.log_probs(groups)
    has_image = torch.tensor([group.has_image for group in groups for _ in range(3)])[:, None]
    kl = masked_mean(kl_k3(log_probs, noised) * has_image, mask)
    assert metrics["kl_noised"].item() == pytest.approx(kl.item(), abs=1e-6)
    assert kl > 1e-4
    assert (loss - loss_without).item() == pytest.approx(0.3 * kl.item(), abs=1e-6)
    head = varied_policy.model.lm_head.weight
    [found] = torch.autograd.grad(loss - loss_without, head)
    [expected] = torch.autograd.grad(0.3 * kl, head)
    close(found, expected)


def test_entropies_are_those_of_the_full_softmax(varied_policy, groups):
    varied_policy.temperature = 0.7
    for group, found in varied_policy.per_group(groups, varied_policy.entropies):
        alone = [replace(group, tokens=group.tokens.clone()) for _ in range(2)]
        vocabulary = torch.arange(0, len(varied_policy.encoder.tokenizer))
        first = torch.empty(len(vocabulary))
        with torch.no_grad():  # the first token's distribution, token by token
            for chunk in vocabulary.split(64):
                copies = []
                for token in chunk:
                    one = copy.copy(alone[0])
                    one.tokens = token.view(1, 1)
                    one.response_mask = torch.ones(1, 1, dtype=torch.bool)
                    copies.append(one)
                first[chunk] = varied_policy.log_probs(copies)[:, 0]
        close(first.exp().sum(), 1.0, atol=1e-4)
        close(found[:, 0], (-(first.exp() * first).sum()).expand(3), atol=1e-4)
        assert (found[~group.response_mask] == 0).all()
        break  # one group says enough


def test_nothing_is_computed_that_no_variant_asks_for(policy, groups, record_calls):
    calls = [record_calls(Policy, name) for name in ("entropies", "probe_attention")]
    for name in ("grpo", "papo_d", "vppo", "tapo"):
        these = copy.deepcopy(groups)
        for group in these:
            group.prompt.more_pixel_values["images_neg"] = group.prompt.pixel_values
        prepare(policy, policy, [these], preset(name), key=(0, 0))
    assert calls == [[], []]
    passes = record_calls(Policy, "log_probs")
    for name, expected in {
        "vppo": 2,
        "pgpo": 2,
        "dyco_rl": 1,
        "dvrp": 2,
        "noisy_rollout": 0,
    }.items():
        passes.clear()
        prepare(policy, policy, [copy.deepcopy(groups)], preset(name), key=(0, 0))
        assert len(passes) == expected, name


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
    config = SimpleNamespace(
        group_size=group_size, max_new_tokens=8, top_p=1.0, top_k=0, rollout_batch=64
    )
    run = SimpleNamespace(
        config=config, policy=policy, sampling=nullcontext, rank=1, stop_requested=False
    )
    run.raise_if_stopped = lambda: None
    return train.sample(run, algo, prompts, key=(0, 7)), run


def check_log_probs_are_the_samplers(policy, groups):
    with torch.no_grad():
        recomputed = policy.log_probs(groups)
    close(recomputed, pad_and_cat(groups, "sample_log_probs"), atol=1e-4)


def test_tapo_trains_each_half_under_the_image_it_was_sampled_under(varied_policy, triplets):
    algo = preset("tapo")
    groups, _ = sample(varied_policy, triplets, algo)
    assert [group.prompt.index for group in groups] == [0, 0, 1, 1, 2, 2, 3, 3]
    check_log_probs_are_the_samplers(varied_policy, groups)
    for anchor, positive in zip(groups[::2], groups[1::2], strict=True):
        assert not torch.equal(anchor.tokens, positive.tokens)  # nor without an image: other draws
        if anchor.has_image:
            pixels = anchor.prompt.more_pixel_values["images_pos"]
            assert torch.equal(positive.prompt.pixel_values, pixels)
            assert pixels.shape == anchor.prompt.pixel_values.shape
            assert not torch.equal(pixels, anchor.prompt.pixel_values)

    for group in groups:
        group.advantages = torch.zeros(3)
    metrics = prepare(varied_policy, None, [groups], algo, key=(0, 0))
    assert 0.5 < metrics["mask_ratio"] <= 1
    for group in groups:
        if group.has_image:  # one negative for both halves
            negative = group.prompt.more_pixel_values["images_neg"]
            assert torch.equal(group.view_pixel_values["mask"], negative)
            swapped = replace(group, prompt=replace(group.prompt, pixel_values=negative))
            with torch.no_grad():
                close(group.masked_log_probs, varied_policy.log_probs([swapped]), atol=1e-5)


def test_noisy_rollout_trains_the_noised_half_under_the_clean_image(varied_policy, prompts):
    algo = preset("noisy_rollout")
    groups, _ = sample(varied_policy, prompts, algo)
    clean_half, noised_half = groups[::2], groups[1::2]
    check_log_probs_are_the_samplers(varied_policy, clean_half)
    for prompt, group in zip(prompts, noised_half, strict=True):
        assert group.prompt is prompt
        [_, (noised, _)] = algo.images(prompt, varied_policy, seeded("images", 0, 7, prompt.index))
        check_log_probs_are_the_samplers(varied_policy, [replace(group, prompt=noised)])
        if prompt.pixel_values is not None:
            with torch.no_grad():
                differ = varied_policy.log_probs([group]) - group.sample_log_probs
            assert differ.abs().max() > 1e-3
    for clean, noised in zip(clean_half, noised_half, strict=True):
        assert not torch.equal(clean.tokens, noised.tokens)


@pytest.mark.parametrize("name", ["tapo", "noisy_rollout"])
def test_both_halves_form_one_group(varied_policy, triplets, name):
    """Advantages, dynamic sampling and mini-batches take all 2n responses of a prompt together."""
    algo = replace(preset(name), dynamic_sampling=True)
    groups, run = sample(varied_policy, triplets, algo, group_size=2)
    right = [1, 0, 0, 0, 1, 1, 1, 1, 0, 0, 0, 0, 0, 0, 1, 1]  # of 4 prompts' 4 responses each
    scores = [{"overall": 0.9 * r + 0.1, "accuracy": float(r), "format": 1.0} for r in right]

    def grader(responses, answers):
        return scores

    grader.timeouts = grader.errors = grader.unscored = 0
    run.grader, stats = grader, RolloutStats()
    kept = train.grade(run, algo, groups, stats)
    assert [group.prompt.index for group in kept] == [0, 0, 3, 3]
    assert stats.zero_advantage_groups == 2
    rewards = torch.tensor([score["overall"] for score in scores], dtype=torch.float64)
    expected = group_advantages(rewards, 4).float()
    close(torch.cat([group.advantages for group in groups]), expected)
    assert kept[2].advantages.max() < 0 < kept[3].advantages.min()
    batches = mini_batches(groups, 3)
    indices = [[group.prompt.index for group in batch] for batch in batches]
    assert indices == [[0, 0, 1, 1, 2, 2], [3, 3]]


def test_without_a_variant_nothing_about_sampling_changes(varied_policy, prompts):
    groups, _ = sample(varied_policy, prompts, preset("papo_g"))
    settings = {"max_new_tokens": 8, "key": (0, 7)}
    expected = generate(varied_policy, prompts, 3, **settings)
    for group, other in zip(groups, expected, strict=True):
        assert torch.equal(group.tokens, other.tokens)
        assert torch.equal(group.sample_log_probs, other.sample_log_probs)


# ------------------------------------------------------------------------- --algo finds a file

HEADER = """
from dataclasses import dataclass, replace
from papo import Algo, flag
import torch
"""
CLASS = "@dataclass(frozen=True)\nclass A(Algo):\n  "
WRONG_FILES = {  # a file's text -> what its one line says
    "x = 1": "must define one subclass of Algo, has none",
    "class A(Algo): pass": r"decorate A with @dataclass\(frozen=True\)",
    2 * "@dataclass(frozen=True)\nclass A(Algo): pass\nB = A\n" + "class C(A): pass": "A, C",
    CLASS + "def wiegh(self, groups, policy): pass": (
        "wiegh is no step, did you mean weigh\\? choose one of columns, needs, annealed, images"
    ),
    CLASS + "def view(self, name, prompt): pass": (
        r"write def view\(self, name, prompt, policy, generator\)"
    ),
    CLASS + "weigh = None": r"write def weigh\(self, groups, policy\)",
    CLASS + "kl_prcp_coef = 0.5": "write the type, kl_prcp_coef",
    CLASS + "kl_prcp_coeff: float = 0.5": (
        "kl_prcp_coeff is no setting, did you mean kl_prcp_coef"
    ),
    "@dataclass(frozen=True)\nclass A(Algo)\n": "cannot be imported: SyntaxError",
    "import no_such_package": "cannot be imported: ModuleNotFoundError",
    CLASS + "mask_ratio: float = 3.0": "mask_ratio=3.0",
    "@dataclass\nclass A(Algo): pass": r"write @dataclass\(frozen=True\)",
    CLASS + "needs = ('entropy',)": "of old_log_probs, entropies",
    CLASS + "needs = ('entropies')": "needs='entropies': a tuple",
    CLASS + "seed: int = flag(1, 'x')": ("A.seed: there is a flag of this name already"),
}


@pytest.mark.parametrize("text, message", WRONG_FILES.items())
def test_a_wrong_file_is_one_line(tmp_path, capsys, text, message):
    file = tmp_path / "mine.py"
    file.write_text(HEADER + text)
    with pytest.raises(SystemExit):
        train.main(["--algo", str(file), "--out", str(tmp_path / "run")])
    error = capsys.readouterr().err
    assert re.search(message, error) and error.count("\n") == 1


def test_an_unknown_name_is_one_line_with_the_choices(tmp_path, capsys):
    with pytest.raises(SystemExit):
        train.main(["--algo", "papo_x"])
    error = capsys.readouterr().err
    assert "algo='papo_x': choose one of grpo, dapo, papo_g" in error
    assert "dyco_rl, noisy_rollout" in error and error.count("\n") == 1
    with pytest.raises(SystemExit):
        train.main(["--algo", str(tmp_path / "none.py")])
    error = capsys.readouterr().err
    assert "No such file" in error and "none.py" in error and error.count("\n") == 1


WRONG_STEPS = {  # a step -> what its one line says
    "weigh(self, groups, _): return None": "a list of 4 tensors, .* not NoneType",
    "weigh(self, groups, _): return torch.ones(4)": r"4 tensors, .* not float32\[4\]",
    "weigh(self, groups, _): return [torch.ones(3, 1)] * 3": "a list of 4 tensors, .* not 3",
    "weigh(self, groups, _): return [torch.ones(3)] * 4": r"float32\[3, 1\] or .*\[3\]",
    "weigh(self, groups, _): return [torch.full((3, 1), torch.nan)] * 4": "finite weights",
    "view(self, name, prompt, *_): return prompt.pixel_values": "and the changed",
    "view(self, name, prompt, *_): return prompt.pixel_values, torch.ones(36)": (
        r"float32\[36, 1176\] and bool\[36\], not float32\[36, 1176\] and float32\[36\]"
    ),
    "images(self, prompt, *_, **__): return prompt": "a list of pairs of prompts, not Prompt",
    "images(self, prompt, *_, **__): return []": "pairs of prompts, not an empty list",
    "images(self, prompt, *_, **__): return [prompt]": "pairs of prompts, not of Prompt",
    "images(self, prompt, *_, **__): return [(prompt, replace(prompt, index=7))]": (
        "made by dataclasses.replace"
    ),
    "views(self): return {'mask': -5.0}": r"views\(\)\['mask'\]=-5.0 has no effect: set kl_",
}


@pytest.mark.parametrize(
    "flags, message",
    [
        ("--algo noisy_rollout --noise_steps 1000", "noise_steps=1000: must be between 0 and 999"),
        ("--algo dvrp --noise_steps -1", "noise_steps=-1: must be"),
        ("--algo vppo --token_share 1.5", "token_share=1.5: must be between 0 and 1"),
        ("--algo vppo --least_weight -1", "least_weight=-1.0"),
        ("--algo pgpo --threshold 1", "threshold=1.0"),
        ("--algo dyco_rl --strength 3", "strength=3.0"),
    ],
)
def test_settings_out_of_range_are_one_line(folder, tmp_path, capsys, flags, message):
    with process_restored(), pytest.raises(SystemExit):
        train.main(run_flags(folder, tmp_path / "run", flags))
    assert message in capsys.readouterr().err.splitlines()[-1]


def test_the_noise_falls_while_training(run, monkeypatch):
    seen, images = [], noisy_rollout.NoisyRollout.images

    def recorded(self, *args, **kwargs):
        seen.append(self.noise_steps)
        return images(self, *args, **kwargs)

    monkeypatch.setattr(noisy_rollout.NoisyRollout, "images", recorded)
    run("noisy", "--algo noisy_rollout --steps 2 --noise_middle 1.5 --eval_every 0")
    assert sorted(set(seen)) == [0, 499]


@pytest.mark.parametrize("step, message", WRONG_STEPS.items())
def test_a_wrong_result_of_a_step_is_one_line(policy, groups, tmp_path, step, message):
    file = tmp_path / "wrong.py"
    file.write_text(f"{HEADER}{CLASS}def {step}\n")
    algo = replace(preset(str(file)), kl_ref_coef=0.0)
    with pytest.raises(StepError, match=message) as caught:
        sampling_pairs(algo, [groups[0].prompt], policy, 4, key=(0, 0))
        prepare(policy, None, [groups], algo, key=(0, 0))
    assert str(caught.value).startswith(f"algo={file}: ") and "\n" not in str(caught.value)


def test_weights_may_read_the_masked_view_that_the_update_computes_again(policy, groups, tmp_path):
    file = tmp_path / "reads.py"
    step = "weigh(self, groups, _): return [0 * g.masked_log_probs + 2 for g in groups]"
    file.write_text(f"{HEADER}{CLASS}def {step}\n")
    algo = replace(preset(str(file)), kl_ref_coef=0.0, masked_grad=True)
    with_image = [group for group in groups if group.has_image]
    prepare(policy, None, [with_image], algo, key=(0, 0))
    assert all((group.weights == 2).all() for group in with_image)


def test_a_variant_of_a_variant_and_a_neighbouring_file(tmp_path):
    (tmp_path / "my_shares.py").write_text("LESS = 0.2\n")
    file = tmp_path / "narrow.py"
    file.write_text(
        "from dataclasses import dataclass\nfrom variants.vppo import VPPO\n"
        "from my_shares import LESS\n"
        "@dataclass(frozen=True)\nclass Narrow(VPPO):\n  token_share: float = LESS\n"
    )
    algo = preset(str(file))
    assert (algo.token_share, algo.least_weight, algo.entropy_coef) == (0.2, 0.9, 0.06)
    assert papo.algo_class(str(file)) is type(algo)
    flags = parse_flags("Train.", type(algo), argv=["--token_share", "0.5", "--kl_ref_coef", "1"])
    assert flags == {"token_share": 0.5, "kl_ref_coef": 1.0}


def test_a_float_may_have_the_default_0_without_postponed_annotations(tmp_path):
    file = tmp_path / "zero.py"
    file.write_text(HEADER + CLASS + "kl_prcp_coef: float = 0\n  own: float = flag(1, 'mine')\n")
    given = parse_flags(
        "Train.", papo.algo_class(str(file)), argv=["--kl_prcp_coef=0.5", "--own=2"]
    )
    assert given == {"kl_prcp_coef": 0.5, "own": 2.0}


def test_a_run_without_out_is_named_after_the_file():
    config = SimpleNamespace(algo="../some/where/my_idea.py", model="toy", seed=3)
    assert free_name(config) == "runs/my_idea-toy-s3"


def test_a_variants_settings_are_in_help(capsys):
    with pytest.raises(SystemExit):
        train.main(["--algo", "vppo", "--help"])
    text = " ".join(capsys.readouterr().out.split())
    assert "--token_share float share of a response's tokens that are trained [0.4]" in text
    assert (
        "--mask_ratio float share of patches to mask; random and noise: a probability [0.5]" in text
    )
    for name in variant_names():
        assert name in text


def test_every_variant_has_the_originals_defaults():
    assert variant_names() == ["dvrp", "dyco_rl", "noisy_rollout", "pgpo", "tapo", "vppo"]
    table = {  # beta, gamma, eta1, eta2, clip_high, dynamic sampling, mask ratio
        "vppo": (0, 0, 0.06, 0, 0.28, True, 0.5),
        "pgpo": (0, 0, 0, 0, 0.28, True, 0.6),
        "dvrp": (0, 0.01, 0, 0.05, 0.3, False, 0.6),
        "tapo": (0, 0.01, 0.03, 0.03, 0.28, True, 0.6),
        "noisy_rollout": (0, 0, -0.001, 0, 0.2, False, 0.6),
        "dyco_rl": (0.04, 0, 0, 0, 0.2, False, 0.6),
    }
    for name, expected in table.items():
        algo = preset(name)
        found = (algo.kl_ref_coef, algo.kl_prcp_coef, algo.entropy_coef, algo.masked_entropy_coef)
        found += (algo.clip_high, algo.dynamic_sampling, algo.mask_ratio)
        assert found == expected, name
        assert algo.clip_low == 0.2 and algo.name == name


def lines_of_code(path):
    """Without blank lines, comments and docstrings."""
    text = re.sub(r'""".*?"""', "", path.read_text(), flags=re.S)
    return len([line for line in text.splitlines() if line.strip() and line.strip()[0] != "#"])


def test_a_variant_is_a_short_file():
    """As short as the README's table says."""
    limits = dict.fromkeys(variant_names(), 60) | {"dyco_rl": 100}
    table = re.findall(r"^\| \[`(\w+)`\].*\| (\d+) \|", (ROOT / "README.md").read_text(), re.M)
    assert dict(table).keys() == limits.keys()
    for name, lines in table:
        assert lines_of_code(FOLDER / f"{name}.py") == int(lines) <= limits[name], name


EVERYTHING = (
    HEADER
    + """
from variants.tapo import TAPO
from variants.vppo import VPPO
from variants.dvrp import DVRP

@dataclass(frozen=True)
class Everything(DVRP):
    dynamic_sampling: bool = False
    strength: float = flag(1.0, "an exponent", "everything")
    columns = TAPO.columns
    needs = ("old_log_probs", "entropies")

    def images(self, prompt, policy, generator):
        return TAPO.images(self, prompt, policy, generator)

    def weigh(self, groups, policy):
        return [group.entropies**self.strength for group in groups]
"""
)


def test_a_file_of_ones_own_runs_and_resumes_exactly(run, tmp_path, capsys):
    file = tmp_path / "everything.py"
    file.write_text(EVERYTHING)
    flags = f"--algo {file} --strength 0.5 --eval_every 0 --save_every 1"
    whole = run("whole", f"{flags} --steps 2")
    half = run("half", f"{flags} --steps 1")
    config = json.loads((half / "config.json").read_text())
    assert (config["algo"], config["strength"], config["noised_coef"]) == (str(file), 0.5, 0.01)
    assert (half / "everything.py").read_text() == EVERYTHING
    with pytest.raises(SystemExit):
        train.main(["--resume", str(half), "--strength", "2.0"])
    assert "--strength 2.0 contradicts the run's 0.5" in capsys.readouterr().err
    with process_restored():
        assert train.build_run(["--resume", str(half)]).algo.name == str(file)
    file.write_text(EVERYTHING + "# changed\n")
    train.main(["--resume", str(half), "--steps", "2", "--offload_optimizer"])
    assert (
        f"{file} differs from the run's copy of it, {half / 'everything.py'}"
        in capsys.readouterr().err
    )
    assert (half / "everything.py").read_text() == EVERYTHING
    check_same_metrics(whole, half)
    check_same_weights(whole, half)
    steps = [json.loads(line) for line in (whole / "metrics.jsonl").read_text().splitlines()]
    trained = [step for step in steps if "reward" in step]
    assert all({"kl_prcp", "kl_noised", "noised_ratio"} <= step.keys() for step in trained)


# ----------------------------------------------------------------------------------------- data


def test_the_toys_positive_and_negative_images():
    setting = toy.DEFAULT
    for row in range(40):
        scene = toy.make_scene("train", row)
        answer = scene.cells.count(scene.asked)
        positive = toy.make_relative("images_pos", "train", row)
        negative = toy.make_relative("images_neg", "train", row)
        assert positive.cells.count(scene.asked) == answer != negative.cells.count(scene.asked)
        assert scene.asked == positive.asked == negative.asked
        example = toy.example("train", row, 0, setting, ("images_pos", "images_neg"))
        assert example.more_images["images_pos"][0].tobytes() == positive.image.tobytes()
        assert replace(example, more_images={}) == toy.example("train", row)
    assert {n for n in range(40) if positive.cells != scene.cells}


def test_the_example_in_the_readme_runs(run, tmp_path, capsys):
    """As it stands there."""
    text = (ROOT / "README.md").read_text()
    blocks = re.findall(r"```python\n(.*?)```", text, re.S)
    [block] = [block for block in blocks if "(Algo)" in block]
    assert len([line for line in block.splitlines() if line.strip()]) <= 22
    file = tmp_path / "my_idea.py"
    file.write_text(block)
    out = run("mine", f"--algo {file} --steps 1")
    config = json.loads((out / "config.json").read_text())
    assert config["sharpness"] == 1.0
    assert papo.algo_class(str(file)).needs == ("entropies",)
