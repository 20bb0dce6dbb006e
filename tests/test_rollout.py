"""Sampling: equal to stock generate where that is defined, and indifferent to batch, order and compaction."""

import pytest
import torch
from transformers import GenerationConfig, TopPLogitsWarper

from rollout import generate
from support import decoding
from support.batch import pad_and_cat
from support.decoding import sample_inverse_cdf, top_p_filter
from support.qwen_vl import Policy


def stock_greedy(policy, prompt, max_new_tokens):
    """Hugging Face's own generate, one prompt at a time, without padding."""
    ids = prompt.input_ids[None]
    vision = {}
    if prompt.pixel_values is not None:
        vision = dict(pixel_values=prompt.pixel_values, image_grid_thw=prompt.image_grid_thw)
    out = policy.model.generate(
        input_ids=ids, attention_mask=torch.ones_like(ids), mm_token_type_ids=prompt.is_image_token[None].long(),
        do_sample=False, max_new_tokens=max_new_tokens, suppress_tokens=policy.suppressed_ids,
        eos_token_id=policy.eos_ids, pad_token_id=policy.pad_id, **vision,
    )  # fmt: skip
    return out[0, len(prompt) :]


def lively(policy):
    """Random weights repeat themselves; larger heads give varied tokens, and ends at spread lengths."""
    torch.manual_seed(3)
    with torch.no_grad():
        policy.model.lm_head.weight.add_(0.3 * torch.randn_like(policy.model.lm_head.weight))
    return policy


def test_greedy_equals_stock_generate(policy, prompts):
    """Left padding of all lengths, several images, none, a pad id that is an end id, finished rows dropped."""
    lively(policy)
    assert policy.pad_id in policy.eos_ids
    first = [g.tokens[0] for g in generate(policy, prompts, 1, max_new_tokens=24, temperature=0)]
    policy.eos_ids = sorted(
        {*policy.eos_ids, int(first[0][3]), int(first[1][9])}
    )  # let two of them stop early
    groups = generate(policy, prompts, 2, max_new_tokens=24, temperature=0, rollout_batch=8)
    lengths = set()
    for prompt, group in zip(prompts, groups, strict=True):
        expected = stock_greedy(policy, prompt, 24)
        for tokens, mask in zip(group.tokens, group.response_mask, strict=True):
            assert tokens[mask].tolist() == expected.tolist()
            lengths.add(int(mask.sum()))
    assert len(lengths) > 1 and 24 in lengths


def test_batches_order_and_compaction_change_nothing(policy, prompts, monkeypatch):
    lively(policy)
    policy.eos_ids = list(range(0, 400, 8))  # many ends: lengths spread, rows are dropped often
    kwargs = dict(max_new_tokens=20, key=(7, 3), top_p=0.95)
    whole = generate(policy, prompts, 4, rollout_batch=64, **kwargs)
    lengths = torch.cat([g.response_mask.sum(1) for g in whole])
    assert len(set(lengths.tolist())) > 3
    small = generate(policy, prompts, 4, rollout_batch=3, **kwargs)  # a group split over chunks
    turned = generate(policy, prompts[::-1], 4, rollout_batch=6, **kwargs)[::-1]
    monkeypatch.setattr(decoding, "COMPACT_AT", 0.0)
    uncompacted = generate(policy, prompts, 4, rollout_batch=64, **kwargs)
    monkeypatch.setattr(decoding, "PREFILL_TOKENS", 2 * max(map(len, prompts)))
    in_parts = generate(policy, prompts, 4, rollout_batch=64, **kwargs)
    for other in (small, turned, uncompacted, in_parts):
        for a, b in zip(whole, other, strict=True):
            assert torch.equal(a.tokens, b.tokens) and torch.equal(a.response_mask, b.response_mask)
            torch.testing.assert_close(a.sample_log_probs, b.sample_log_probs, atol=1e-4, rtol=0)


@pytest.mark.parametrize("scale", [0.01, 1.0, 4.0], ids=["flat", "usual", "peaked"])
@pytest.mark.parametrize("top_p", [0.05, 0.9, 0.99, 1.0])
def test_the_nucleus_is_transformers_without_the_sort(scale, top_p):
    """The same tokens stay, with the same scores, where the candidates reach top_p and where they do not."""
    torch.manual_seed(0)
    scores = scale * torch.randn(8, 3000, dtype=torch.float64)
    scores[:, :50] = -torch.inf  # suppressed ones
    plain = TopPLogitsWarper(top_p)(None, scores)
    for candidates in (64, 1024, 3000):
        assert torch.equal(top_p_filter(scores, top_p, candidates), plain), candidates


def test_another_key_is_another_draw(policy, prompts):
    lively(policy)
    a, b, c = (
        generate(policy, prompts, 4, max_new_tokens=12, key=key) for key in ((0, 0), (0, 1), (0, 0))
    )
    assert not torch.equal(pad_and_cat(a, "tokens"), pad_and_cat(b, "tokens"))
    assert torch.equal(pad_and_cat(a, "tokens"), pad_and_cat(c, "tokens"))
    rows = pad_and_cat(a, "tokens")
    assert len({tuple(row.tolist()) for row in rows}) > len(rows) // 2  # samples of a prompt differ


def test_response_mask_keeps_the_first_end_and_nothing_after(policy, prompts):
    lively(policy)
    policy.eos_ids = sorted({*policy.eos_ids, *range(30)})
    groups = generate(policy, prompts, 6, max_new_tokens=10, key=(1, 1))
    ends, stopped, cut = torch.tensor(policy.eos_ids), 0, 0
    for group in groups:
        for tokens, mask, truncated in zip(
            group.tokens, group.response_mask, group.truncated, strict=True
        ):
            n = int(mask.sum())
            assert mask[:n].all() and not mask[n:].any() and (tokens[n:] == policy.pad_id).all()
            is_end = torch.isin(tokens[:n], ends)
            assert not is_end[:-1].any() and bool(is_end[-1]) != bool(truncated)
            stopped, cut = stopped + int(is_end[-1]), cut + int(truncated)
            assert not truncated or n == 10
    assert stopped and cut


def test_vision_tokens_are_never_sampled(policy, prompts):
    """Even when the model wants nothing else."""
    with torch.no_grad():
        policy.model.lm_head.weight[policy.suppressed_ids] = (
            50.0 * policy.model.lm_head.weight.abs().max()
        )
    groups = generate(policy, prompts, 4, max_new_tokens=8, key=(0, 0))
    assert not torch.isin(pad_and_cat(groups, "tokens"), torch.tensor(policy.suppressed_ids)).any()
    assert {policy.model.config.image_token_id, policy.model.config.video_token_id} <= set(
        policy.suppressed_ids
    )


def test_nothing_is_inherited_from_generation_config(folder, encoder, prompts):
    """Qwen's chat defaults (repetition_penalty 1.05, temperature 1e-6) must not reach a rollout."""
    chat, plain = Policy.load(folder, encoder), Policy.load(folder, encoder)
    assert (
        GenerationConfig.from_pretrained(folder).repetition_penalty == 1.05
    )  # the folder has them
    plain.model.generation_config = GenerationConfig()
    a, b = (generate(p, prompts, 3, max_new_tokens=12, key=(0, 0)) for p in (chat, plain))
    assert torch.equal(pad_and_cat(a, "tokens"), pad_and_cat(b, "tokens"))
    assert len(chat.eos_ids) == 2  # both ends of the file are kept
    again = generate(chat, prompts, 3, max_new_tokens=12, key=(0, 0), temperature=1.0)
    assert torch.equal(pad_and_cat(a, "tokens"), pad_and_cat(again, "tokens"))


def test_draw_is_inverse_cdf():
    scores = torch.tensor([0.5, 0.25, 0.25]).log().expand(4, 3).clone()
    assert sample_inverse_cdf(scores, torch.tensor([0.0, 0.49, 0.51, 0.99])).tolist() == [
        0,
        0,
        1,
        2,
    ]
    scores[:, 2] = float("-inf")
    scores[:, 0] = float("-inf")
    assert sample_inverse_cdf(scores, torch.tensor([0.0, 0.5, 0.999999, 1 - 2**-24])).tolist() == [
        1,
        1,
        1,
        1,
    ]
    many = torch.randn(1, 30, generator=torch.Generator().manual_seed(0)).expand(20_000, -1)
    tokens = sample_inverse_cdf(
        many, torch.rand(20_000, generator=torch.Generator().manual_seed(1))
    )
    share = torch.bincount(tokens, minlength=30) / 20_000
    torch.testing.assert_close(share, many[0].softmax(-1), atol=0.012, rtol=0)


def test_a_tiny_model_runs_on_one_thread(folder, encoder, monkeypatch):
    before = torch.get_num_threads()
    try:
        for given, threads in (("2", 2), (None, 1)):
            torch.set_num_threads(2)
            if given:
                monkeypatch.setenv("OMP_NUM_THREADS", given)
            else:
                monkeypatch.delenv("OMP_NUM_THREADS")
            Policy.load(folder, encoder)
            assert torch.get_num_threads() == threads
    finally:
        torch.set_num_threads(before)


def test_no_prompts_no_groups(policy):
    assert generate(policy, [], 4, max_new_tokens=8) == []


@pytest.mark.parametrize("group_size", [1, 3])
def test_shapes(policy, prompts, group_size):
    for prompt, group in zip(
        prompts, generate(policy, prompts, group_size, max_new_tokens=5), strict=True
    ):
        assert group.prompt is prompt and len(group.responses) == group_size
        assert group.tokens.shape == group.response_mask.shape == group.sample_log_probs.shape
        assert group.tokens.shape[0] == group_size == len(group.truncated)
