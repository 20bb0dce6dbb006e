"""The shared-prompt row against the plain padded batch, packing, presets, masks and the update."""

import copy
from dataclasses import replace

import pytest
import torch
from conftest import random_image

from losses import Counts, count
from papo import PRESETS, mini_batches, prepare, preset, row_loss, update
from support.batch import Example, pad_and_cat, seeded
from support.packing import pack_rows
from support.qwen_vl import Policy


def plain_log_probs(policy, group):
    """The slow way: every response in a row of its own with its own copy of the image, left-padded, full logits."""
    model, prompt = policy.model, group.prompt
    out = []
    for tokens, mask in zip(group.tokens, group.response_mask, strict=True):
        n, pad = int(mask.sum()), 3
        ids = torch.cat([torch.full((pad,), policy.pad_id), prompt.input_ids, tokens[:n]])[None]
        attention = torch.ones_like(ids)
        attention[:, :pad] = 0
        types = torch.zeros_like(ids)
        types[:, pad : pad + len(prompt)] = prompt.is_image_token
        vision = {}
        if group.has_image:
            vision = dict(pixel_values=prompt.pixel_values, image_grid_thw=prompt.image_grid_thw)
        logits = (
            model(input_ids=ids, attention_mask=attention, mm_token_type_ids=types, **vision)
            .logits[0]
            .float()
        )
        log_probs = (logits / policy.temperature).log_softmax(-1)[pad + len(prompt) - 1 : -1]
        row = log_probs.gather(1, tokens[:n, None])[:, 0]
        out.append(torch.nn.functional.pad(row, (0, group.tokens.shape[1] - n)))
    return torch.stack(out)


def gradients(model):
    return torch.cat(
        [(torch.zeros_like(p) if p.grad is None else p.grad).flatten() for p in model.parameters()]
    )


@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("chosen", [[0], [1], [2], [0, 1, 2, 3]])
def test_shared_prompt_row_equals_padded_batch(policy, groups, chosen, checkpointing):
    """Log-probs and gradients, one and several groups a row, two images, none, temperature not 1."""
    groups = [groups[i] for i in chosen]
    policy.temperature = 0.7
    if checkpointing:
        policy.model.gradient_checkpointing_enable({"use_reentrant": False})
    policy.model.train()
    row = policy.log_probs(groups)
    weights = torch.randn(row.shape, generator=seeded("weights"))
    (row * weights).sum().backward()
    fast = gradients(policy.model)
    policy.model.zero_grad()
    plain = torch.cat([plain_log_probs(policy, g) for g in groups])
    torch.testing.assert_close(row, plain, atol=1e-5, rtol=1e-5)
    (plain * weights).sum().backward()
    slow = gradients(policy.model)
    assert (fast - slow).norm() < 1e-5 * slow.norm()


def test_log_probs_equal_the_sampler(policy, prompts):
    """Recomputed by the training forward, log-probs are the sampler's own, before top-p and suppression."""
    from rollout import generate

    policy.temperature = 0.8
    groups = generate(policy, prompts, 3, max_new_tokens=16, key=(1, 2), top_p=0.9, rollout_batch=5)
    with torch.no_grad():
        again = policy.log_probs(groups)
    sampled = pad_and_cat(groups, "sample_log_probs")
    torch.testing.assert_close(again, sampled, atol=1e-4, rtol=0)
    assert (sampled != 0).sum() == pad_and_cat(groups, "response_mask").sum()


def test_a_response_with_an_image_token_is_text(policy, groups):
    group = groups[0]
    group.tokens[0, 2] = policy.model.config.image_token_id
    row = policy.log_probs([group])
    assert torch.isfinite(row).all()
    # The slow way would take it for a picture; feed the embeddings of a text token instead.
    ids = torch.cat([group.prompt.input_ids, group.tokens[0]])[None]
    embeds = policy.model.get_input_embeddings()(ids)
    image = policy.model.get_image_features(
        group.prompt.pixel_values, group.prompt.image_grid_thw, return_dict=True
    )
    embeds[0, : len(group.prompt)][group.prompt.is_image_token] = torch.cat(image.pooler_output)
    after = group.prompt.position_ids.max() + 1 + torch.arange(group.tokens.shape[1])
    positions = torch.cat([group.prompt.position_ids, after.expand(3, -1)], 1)[:, None]
    hidden = policy.model.model.language_model(
        inputs_embeds=embeds, position_ids=positions
    ).last_hidden_state
    logits = policy.model.lm_head(hidden)[0, len(group.prompt) - 1 : -1]
    plain = logits.log_softmax(-1).gather(1, group.tokens[0][:, None])[:, 0]
    torch.testing.assert_close(row[0], plain, atol=1e-5, rtol=0)


def test_packing_changes_nothing(policy, groups):
    """Rows of any budget give the same gradient: counts are the mini-batch's, not the row's."""
    algo = replace(preset("papo_g", "7b"), average="token")
    reference = copy.deepcopy(policy)
    prepare(policy, reference, mini_batches(groups, 2), algo, key=(0, 0))
    own = [count(g.response_mask, torch.full((len(g.tokens),), g.has_image)) for g in groups]
    counts = Counts(*(sum(c[i] for c in own) for i in range(3)))
    results = []
    for budget in (1, 100, 10_000):
        policy.model.zero_grad()
        rows = pack_rows(groups, budget)
        losses = []
        for row in rows:
            loss, _ = row_loss(policy, row, algo, counts)
            loss.backward()
            losses.append(loss.item())
        results.append((len(rows), sum(losses), gradients(policy.model)))
    assert [n for n, _, _ in results][0] == 4 and results[-1][0] == 1
    for _, loss, gradient in results[1:]:
        assert loss == pytest.approx(results[0][1], abs=1e-6)
        assert (gradient - results[0][2]).norm() < 1e-5 * gradient.norm()


def test_rows_keep_to_the_token_limit(groups):
    rows = pack_rows(groups, 70)
    assert [g.prompt.index for row in rows for g in row] == [0, 1, 2, 3]
    assert all(len(row) == 1 or sum(g.n_tokens for g in row) <= 70 for row in rows)


def test_presets_are_the_papers():
    table = {  # beta, gamma, eta1 = eta2, eps_low, eps_high, dynamic sampling
        ("grpo", "3b"): (0.01, 0, 0, 0.2, 0.3, False),
        ("dapo", "3b"): (0, 0, 0, 0.2, 0.28, True),
        ("papo_g", "3b"): (0.01, 0.02, 0, 0.2, 0.3, False),
        ("papo_g", "7b"): (0.01, 0.02, 0.05, 0.2, 0.3, False),
        ("papo_d", "3b"): (0, 0.01, 0.03, 0.2, 0.28, True),
        ("papo_d", "7b"): (0, 0.01, 0.03, 0.2, 0.28, True),
        ("grpo_no_kl_ref", "7b"): (0, 0, 0, 0.2, 0.3, False),
        ("papo_g_no_kl_ref", "7b"): (0, 0.01, 0.03, 0.2, 0.3, False),
    }
    assert {name for name, _ in table} == set(PRESETS)
    for (name, size), (beta, gamma, eta, low, high, dynamic) in table.items():
        a = preset(name, size)
        assert (a.kl_ref_coef, a.kl_prcp_coef, a.entropy_coef, a.masked_entropy_coef) == (
            beta,
            gamma,
            eta,
            eta,
        )
        assert (a.clip_low, a.clip_high, a.clip_dual, a.dynamic_sampling) == (
            low,
            high,
            3.0,
            dynamic,
        )
        assert (a.name, a.mask_ratio, a.mask_strategy, a.average) == (name, 0.6, "random", "token")


@pytest.mark.parametrize(
    "make, words",
    [
        (lambda: preset("ppo"), "grpo, dapo, papo_g"),
        (lambda: preset("grpo", "72b"), "'3b' or '7b'"),
        (lambda: replace(preset("grpo"), mask_strategy="blur"), "random, semantic, noise"),
        (lambda: replace(preset("grpo"), mask_ratio=1.2), "between 0 and 1"),
        (lambda: replace(preset("grpo"), average="mean"), "token, seq"),
    ],
)
def test_bad_presets_name_the_choices(make, words):
    with pytest.raises(ValueError, match=words):
        make()


def test_annealing_is_linear_and_takes_the_entropies_along():
    algo = replace(preset("papo_d"), kl_prcp_coef_end=0.0)
    half = algo.annealed(0.5)
    assert half.kl_prcp_coef == pytest.approx(0.005) and half.entropy_coef == pytest.approx(0.015)
    assert algo.annealed(0.0).kl_prcp_coef == 0.01 and algo.annealed(1.0).masked_entropy_coef == 0
    assert preset("papo_d").annealed(0.7) == preset("papo_d")


def test_one_mask_a_prompt_seeded_and_counted(policy, groups):
    algo = preset("papo_g")
    pixels = [
        None if g.prompt.pixel_values is None else g.prompt.pixel_values.clone() for g in groups
    ]
    reference = copy.deepcopy(policy)
    share = prepare(policy, reference, [groups], algo, key=(3, 4))["mask_ratio"]
    views = [g.masked_pixel_values for g in groups]
    hits = torch.cat([g.patch_mask for g in groups if g.has_image])
    assert share == pytest.approx(hits.float().mean().item()) and 0.35 < share < 0.85
    prepare(policy, reference, [groups[::-1]], algo, key=(3, 4))
    for group, view, before in zip(groups, views, pixels, strict=True):
        assert (view is None) == (before is None)
        if view is not None:  # the same mask whatever the order, the clean pixels untouched
            assert torch.equal(view, group.masked_pixel_values) and torch.equal(
                before, group.prompt.pixel_values
            )
            changed = (view != before).any(-1)
            assert torch.equal(changed, group.patch_mask)
    assert groups[2].masked_log_probs.abs().sum() == 0  # text only: nothing to read


def test_no_wasted_pass(policy, groups, monkeypatch):
    """GRPO without KL_ref and with one update makes no forward before the update."""
    calls = []
    original = Policy.log_probs
    monkeypatch.setattr(
        Policy, "log_probs", lambda self, *a, **k: calls.append(a) or original(self, *a, **k)
    )
    expected = {"grpo_no_kl_ref": 0, "grpo": 1, "papo_g": 2, "papo_g_no_kl_ref": 1}
    for name, passes in expected.items():
        calls.clear()
        prepare(policy, copy.deepcopy(policy), [groups], preset(name), key=(0, 0))
        assert len(calls) == passes, name
    calls.clear()
    prepare(policy, None, mini_batches(groups, 2), preset("papo_g_no_kl_ref"), key=(0, 0))
    assert len(calls) == 2


def test_masked_grad_gives_the_masked_branch_a_gradient(policy, groups):
    """With H_mask alone there is no gradient, unless the masked log-probs are recomputed."""
    for live in (False, True):
        algo = replace(preset("grpo"), kl_ref_coef=0.0, masked_entropy_coef=1.0, masked_grad=live)
        prepare(policy, None, mini_batches(groups, 2), algo, key=(0, 0))
        for g in groups:
            g.advantages = torch.zeros(3)
        policy.model.zero_grad()
        loss, metrics = row_loss(policy, groups, algo)
        loss.backward()
        assert metrics["masked_entropy"] > 0
        assert (gradients(policy.model).norm() > 0) == live


def test_mini_batches_cover_every_group_once(groups):
    for size, expected in ((1, 4), (3, 2), (4, 1), (128, 1)):
        batches = mini_batches(groups[::-1], size)
        assert len(batches) == expected
        assert sorted(g.prompt.index for b in batches for g in b) == [0, 1, 2, 3]
        assert sorted(g.prompt.index for g in batches[0]) == list(range(min(size, 4)))


@pytest.mark.parametrize("name", PRESETS)
def test_update_moves_the_policy_and_skips_what_is_not_finite(policy, groups, name):
    algo = preset(name)
    optimizer = torch.optim.SGD(policy.model.parameters(), lr=0.1)
    before = [p.clone() for p in policy.model.parameters()]
    policy.tokens_per_forward = 200
    batches = mini_batches(groups, 2)
    prepare(policy, copy.deepcopy(policy), batches, algo, key=(0, 0))
    metrics = update(policy, optimizer, batches, algo)
    assert metrics["skipped_updates"] == 0 and metrics["grad_norm"] > 0
    assert ("kl_prcp" in metrics) == algo.needs_masked_view and ("kl_ref" in metrics) == bool(
        algo.kl_ref_coef
    )
    assert any(
        not torch.equal(a, b) for a, b in zip(before, policy.model.parameters(), strict=True)
    )
    before = [p.clone() for p in policy.model.parameters()]
    groups[0].advantages = torch.full((3,), float("nan"))
    metrics = update(policy, optimizer, [groups], algo)
    assert metrics["skipped_updates"] == 1 and "grad_norm" not in metrics
    assert all(torch.equal(a, b) for a, b in zip(before, policy.model.parameters(), strict=True))


def test_a_skipped_update_does_not_lower_the_mean_gradient_norm(policy, groups):
    optimizer = torch.optim.SGD(policy.model.parameters(), lr=0.0)
    algo = preset("grpo_no_kl_ref")
    whole = update(policy, optimizer, [groups[1:2]], algo)
    groups[0].advantages = torch.full((3,), float("nan"))
    half_skipped = update(policy, optimizer, mini_batches(groups[:2], 1), algo)
    assert half_skipped["skipped_updates"] == 1
    assert half_skipped["grad_norm"] == pytest.approx(whole["grad_norm"], rel=1e-5)


def test_a_step_without_groups_is_no_error(policy):
    assert update(policy, None, [], preset("papo_d")) == {"skipped_updates": 0}
    assert prepare(policy, None, [], preset("papo_d"), key=(0, 0)) == {"mask_ratio": 0.0}


def test_prompt_length_needs_no_pixels(encoder, prompts):
    for prompt in prompts:
        sizes = [image.size for image in prompt.example.images]
        assert encoder.prompt_length(prompt.example.question, sizes) == len(prompt)


def test_encode_errors_name_the_question(encoder):
    with pytest.raises(ValueError, match="1 <image> markers for 0 images"):
        encoder.encode(Example("<image>what?", "1", []))
    with pytest.raises(ValueError, match="spells out an image token"):
        encoder.encode(Example("what is <|image_pad|>?", "1", []))
    with pytest.raises(ValueError, match="(?i)aspect ratio"):
        encoder.encode(Example("<image>what?", "1", [random_image(1, 5000)]))


def test_the_suffix_is_added_once(encoder):
    with_it = encoder.encode(Example("How many?\n\nBox it.", "1", []))
    without = encoder.encode(Example("How many?", "1", []))
    assert torch.equal(with_it.input_ids, without.input_ids)


def test_pre_masked_images_are_the_masked_view(encoder, policy):
    image = random_image(84, 84)
    black = image.copy()
    black.paste((0, 0, 0), (0, 0, 14, 14))
    prompt = encoder.encode(
        Example("<image>?", "1", [image], images_aug=[black.resize((168, 168))])
    )
    from masking import mask_prompt

    view, hit = mask_prompt(prompt, preset("papo_g"), encoder, seeded(0))
    assert view.shape == prompt.pixel_values.shape and hit[0]
