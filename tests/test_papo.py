"""papo.py: presets, masked views and updates; and packed rows against a padded batch."""

import copy
from dataclasses import replace

import pytest
import torch
from conftest import generate, gradient_of, random_image
from torch.nn import functional as F

from losses import kl_k3, response_mean
from masking import mask_prompt
from papo import accumulate_gradients, pack_loss, prepare, preset, update
from support.batch import Example, mini_batches, pad_and_cat, responses_with_image, seeded
from support.packing import make_packs
from support.qwen_vl import Policy

# ------------------------------------------------------------------------------------- packed rows


def padded_log_probs(policy, group):
    """The straightforward forward: a row per response, padded on both sides, with its own image."""
    prompt, (n, length) = group.prompt, group.tokens.shape
    vision = {}
    if group.has_image:
        vision["pixel_values"] = prompt.pixel_values.repeat(n, 1)
        vision["image_grid_thw"] = prompt.image_grid_thw.repeat(n, 1)
    padding = torch.full((n, 3), policy.pad_id)
    is_token = F.pad(group.response_mask.long(), (len(prompt), 0), value=1)
    logits = policy.model(
        input_ids=torch.cat([padding, prompt.input_ids.expand(n, -1), group.tokens], 1),
        attention_mask=F.pad(is_token, (3, 0)),
        mm_token_type_ids=F.pad(prompt.is_image_token.long(), (3, length)).expand(n, -1),
        **vision,
    ).logits[:, 2 + len(prompt) : -1]
    log_probs = (logits.float() / policy.temperature).log_softmax(-1)
    return log_probs.gather(2, group.tokens[..., None])[..., 0] * group.response_mask


def weights_of(policy):
    return torch.cat([parameter.detach().flatten() for parameter in policy.model.parameters()])


def log_probs_and_gradients(policy, groups, forward):
    """forward(groups) and the gradients of a fixed random weighting of it."""
    log_probs = forward(groups)
    weights = torch.randn(log_probs.shape, generator=seeded("weights")).to(log_probs)
    return log_probs.detach(), gradient_of(policy, (log_probs * weights).sum())


def check_packed_equals_padded(policy, groups, tolerance):
    """A packed row's log-probs and gradients, with and without checkpointing; returns log-probs."""

    def padded(groups):
        return torch.cat([padded_log_probs(policy, group) for group in groups])

    policy.temperature = 0.7
    policy.model.train()
    expected, expected_gradients = log_probs_and_gradients(policy, groups, padded)
    for checkpointing in (False, True):
        if checkpointing:
            policy.model.gradient_checkpointing_enable({"use_reentrant": False})
        found, found_gradients = log_probs_and_gradients(policy, groups, policy.log_probs)
        torch.testing.assert_close(found, expected, atol=tolerance, rtol=tolerance)
        error = (found_gradients - expected_gradients).norm()
        assert error < 1e-5 * expected_gradients.norm()
    return expected


@pytest.mark.parametrize("chosen", [[0], [1], [2], [0, 1, 2, 3]], ids=str)
def test_packed_rows_equal_padded_rows(policy, groups, chosen):
    """For one image, two, none, and several groups per row."""
    check_packed_equals_padded(policy, [groups[i] for i in chosen], tolerance=1e-5)


@pytest.mark.parametrize("dtype, tolerance", [(torch.float32, 1e-4), (torch.bfloat16, 0.1)])
def test_log_probs_equal_the_samplers(folder, encoder, prompts, dtype, tolerance):
    """The training forward recomputes the sampler's log-probs: before top-p and suppression."""
    policy = Policy.load(folder, encoder, dtype, temperature=0.8)
    groups = generate(policy, prompts, 3, max_new_tokens=16, key=(1, 2), top_p=0.9, rollout_batch=5)
    with torch.no_grad():
        recomputed = policy.log_probs(groups)
    sampled = pad_and_cat(groups, "sample_log_probs")
    torch.testing.assert_close(recomputed, sampled, atol=tolerance, rtol=0)
    assert (sampled != 0).sum() == pad_and_cat(groups, "response_mask").sum()


def test_an_image_token_in_a_response_is_text(policy, groups):
    """It gets the embedding of its token, not image features, and moves no position."""
    image_token, word = policy.model.config.image_token_id, 30
    embeddings = policy.model.get_input_embeddings().weight
    results = []
    with torch.no_grad():
        embeddings[image_token] = embeddings[word]
        for token in (image_token, word):
            groups[0].tokens[0, 2] = token
            results.append(policy.log_probs(groups[:1])[0, 3:])
    assert torch.equal(*results)


@pytest.mark.parametrize("average", ["token", "seq"])
def test_packing_does_not_change_the_update(policy, groups, average):
    """Packs of any size give the same gradient: means are over the mini-batch, not the pack."""
    for pack in make_packs(groups, 70):
        assert len(pack) == 1 or sum(group.n_tokens for group in pack) <= 70
    algo = replace(preset("papo_g", "7b"), average=average)
    prepare(policy, copy.deepcopy(policy), mini_batches(groups, 2), algo, key=(0, 0))
    results = []
    for policy.tokens_per_forward in (1, 100, 10_000):
        policy.model.zero_grad()
        metrics = accumulate_gradients(policy, groups, algo)
        gradient = torch.cat([parameter.grad.flatten() for parameter in policy.model.parameters()])
        results.append((metrics, gradient))
    (expected, expected_gradient), *others = results
    for metrics, gradient in others:
        assert metrics == pytest.approx(expected, abs=1e-6)
        assert (gradient - expected_gradient).norm() < 1e-5 * gradient.norm()


# ----------------------------------------------------------------------------------------- prepare


def test_prepare_masks_each_prompt(policy, groups):
    algo = replace(preset("papo_g"), kl_ref_coef=0.0)
    with_image = [group for group in groups if group.has_image]
    assert [group.prompt.index for group in with_image] == [0, 1, 3]
    clean = [group.prompt.pixel_values.clone() for group in with_image]
    prepare(policy, None, [groups], algo, key=(3, 4))
    views = [group.view_pixel_values["mask"] for group in with_image]
    changed = torch.cat([(view != x).any(-1) for view, x in zip(views, clean, strict=True)])
    assert 0.35 < changed.float().mean() < 0.85
    assert not groups[2].view_pixel_values and not groups[2].view_log_probs  # text only

    prepare(policy, None, [groups[::-1]], algo, key=(3, 4))
    for group, view, pixel_values in zip(with_image, views, clean, strict=True):
        assert torch.equal(group.view_pixel_values["mask"], view)  # in any order
        assert torch.equal(group.prompt.pixel_values, pixel_values)
        masked = replace(group, prompt=replace(group.prompt, pixel_values=view))
        with torch.no_grad():
            log_probs = policy.log_probs([masked])
            torch.testing.assert_close(group.masked_log_probs, log_probs, atol=1e-5, rtol=0)
            assert not torch.allclose(log_probs, policy.log_probs([group]), atol=1e-4)


def test_each_term_gets_its_own_log_probs(policy, groups):
    """Of the reference, of the masked view, of the old policy."""
    mask = pad_and_cat(groups, "response_mask")
    for group in groups:
        group.advantages = torch.zeros(3)
        group.ref_log_probs = -1.0 * group.response_mask
        group.old_log_probs = -2.0 * group.response_mask
        group.view_log_probs["mask"] = -3.0 * group.response_mask
    _, metrics = pack_loss(policy, groups, preset("papo_g"))
    pi = policy.log_probs(groups).detach()
    for name, values in {
        "kl_ref": kl_k3(pi, -1.0 * mask),
        "kl_prcp": kl_k3(pi, -3.0 * mask) * responses_with_image(groups)[:, None],
        "ppo_kl": -2.0 * mask - pi,
    }.items():
        assert metrics[name].item() == pytest.approx(response_mean(values, mask).item(), abs=1e-5)


def test_the_first_update_needs_no_old_log_probs(policy, groups):
    """Metrics and weights are the same as with all recorded."""
    algo, batches = preset("papo_g_no_kl_ref"), mini_batches(groups, 2)
    prepare(policy, None, batches, algo, key=(0, 0))
    assert [group.old_log_probs is None for group in groups] == [True, True, False, False]
    all_recorded = copy.deepcopy(batches)
    old = policy.per_group(all_recorded[0], policy.log_probs)
    for group, log_probs in zip(all_recorded[0], old, strict=True):
        group.old_log_probs = log_probs
    results = []
    for each in (batches, all_recorded):
        trained = copy.deepcopy(policy)
        optimizer = torch.optim.SGD(trained.model.parameters(), lr=1.0)
        results.append((update(trained, optimizer, each, algo), weights_of(trained)))
    (metrics, weights), (expected, expected_weights) = results
    assert metrics == pytest.approx(expected, abs=1e-6)
    torch.testing.assert_close(weights, expected_weights, atol=1e-6, rtol=0)


def test_masked_grad_gives_the_masked_entropy_a_gradient(policy, groups):
    """H_mask alone has no gradient unless the masked log-probs are recomputed."""
    for group in groups:
        group.advantages = torch.zeros(3)
    only_masked_entropy = replace(preset("grpo_no_kl_ref"), masked_entropy_coef=1.0)
    for masked_grad in (False, True):
        algo = replace(only_masked_entropy, masked_grad=masked_grad)
        prepare(policy, None, mini_batches(groups, 2), algo, key=(0, 0))
        loss, metrics = pack_loss(policy, groups, algo)
        assert metrics["masked_entropy"] > 0
        assert (gradient_of(policy, loss).norm() > 0) == masked_grad


def test_images_aug_is_the_masked_view(encoder):
    image = random_image(84, 84)
    masked_image = image.copy()
    masked_image.paste((0, 0, 0), (0, 0, 14, 14))
    more_images = {"images_aug": [masked_image.resize((168, 168))]}  # its own size does not matter
    prompt = encoder.encode(Example("<image>?", "1", [image], more_images=more_images))
    view = mask_prompt(prompt, preset("papo_g"), encoder, seeded(0))
    assert (view != prompt.pixel_values)[0].any()  # and their shapes are the same


def test_mini_batches_contain_every_group_once(groups):
    """And two groups of a prompt are in the same one."""
    groups = [*groups[::-1], groups[0]]
    for size, expected in (
        (1, [[0, 0], [1], [2], [3]]),
        (3, [[2, 1, 0, 0], [3]]),
        (9, [[3, 2, 1, 0, 0]]),
    ):
        batches = mini_batches(groups, size)
        assert [[group.prompt.index for group in batch] for batch in batches] == expected


def test_a_gradient_that_is_not_finite_skips_its_update(policy, groups):
    """Which counts in no mean. A step without groups is not an error."""
    optimizer = torch.optim.SGD(policy.model.parameters(), lr=0.0)
    algo, before = preset("grpo_no_kl_ref"), weights_of(policy)
    finite = update(policy, optimizer, [groups[1:2]], algo)
    groups[0].advantages = torch.full((3,), float("nan"))
    half_skipped = update(policy, optimizer, mini_batches(groups[:2], 1), algo)
    assert half_skipped["skipped_updates"] == 1
    assert half_skipped["grad_norm"] == pytest.approx(finite["grad_norm"], rel=1e-5)
    assert torch.equal(before, weights_of(policy))  # 0 times NaN would show
    assert update(policy, None, [], preset("papo_d")) == {"skipped_updates": 0}
    prepare(policy, None, [], preset("papo_d"), key=(0, 0))


def test_encode(encoder, prompts):
    """A prompt's length needs no pixels; the suffix is added once; what cannot be encoded."""
    for prompt in prompts:
        sizes = [image.size for image in prompt.example.images]
        assert encoder.prompt_length(prompt.example.question, sizes) == len(prompt)
    with_suffix = encoder.encode(Example("How many?\n\nBox it.", "1", []))
    without = encoder.encode(Example("How many?", "1", []))
    assert torch.equal(with_suffix.input_ids, without.input_ids)
    for question, images, message in [
        ("<image>what?", [], "1 <image> markers for 0 images"),
        ("what is <|image_pad|>?", [], r"spells out <\|image_pad\|>"),
        ("what<|im_end|>", [], r"spells out <\|im_end\|>"),
        ("<image>what?", [random_image(1, 5000)], "(?i)aspect ratio"),
    ]:
        with pytest.raises(ValueError, match=message):
            encoder.encode(Example(question, "1", images))
