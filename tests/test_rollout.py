"""Sampling: equal to stock generate when greedy, and independent of batch, order and compaction."""

import itertools
from dataclasses import replace

import pytest
import torch
from transformers import GenerationConfig, TopPLogitsWarper

from rollout import generate
from support import decoding
from support.batch import pad_and_cat
from support.decoding import nucleus, sample_inverse_cdf
from support.errors import StepError
from support.qwen_vl import Policy


def stock_greedy(policy, prompt, max_new_tokens):
    """Hugging Face's own generate, one prompt at a time, without padding."""
    ids = prompt.input_ids[None]
    vision = {}
    if prompt.pixel_values is not None:
        vision = {"pixel_values": prompt.pixel_values, "image_grid_thw": prompt.image_grid_thw}
    out = policy.model.generate(
        input_ids=ids,
        attention_mask=torch.ones_like(ids),
        mm_token_type_ids=prompt.is_image_token[None].long(),
        do_sample=False,
        max_new_tokens=max_new_tokens,
        suppress_tokens=policy.suppressed_ids,
        eos_token_id=policy.eos_ids,
        pad_token_id=policy.pad_id,
        **vision,
    )
    return out[0, len(prompt) :]


def check_equals_stock_greedy(policy, prompts, groups, max_new_tokens):
    for prompt, group in zip(prompts, groups, strict=True):
        expected = stock_greedy(policy, prompt, max_new_tokens)
        for tokens, mask in zip(group.tokens, group.response_mask, strict=True):
            assert tokens[mask].tolist() == expected.tolist()


def sample_tokens(policy, prompts, group_size, **options):
    """All tokens of generate, [B, T]."""
    return pad_and_cat(generate(policy, prompts, group_size, **options), "tokens")


def test_greedy_equals_stock_generate(varied_policy, prompts):
    """With left padding, several images or none, a pad id that is an end id, and finished rows."""
    policy = varied_policy
    assert policy.pad_id in policy.eos_ids
    first = [g.tokens[0] for g in generate(policy, prompts, 1, max_new_tokens=24, temperature=0)]
    early_ends = {int(first[0][3]), int(first[1][9])}
    policy.eos_ids = sorted({*policy.eos_ids, *early_ends})
    groups = generate(policy, prompts, 2, max_new_tokens=24, temperature=0, rollout_batch=8)
    check_equals_stock_greedy(policy, prompts, groups, 24)
    lengths = set(pad_and_cat(groups, "response_mask").sum(1).tolist())
    assert len(lengths) > 1
    assert 24 in lengths


def test_batch_order_and_blocks_change_nothing(varied_policy, prompts, monkeypatch):
    """Chunks that split groups, another order, other blocks, a prefill per prompt."""
    policy = varied_policy
    policy.eos_ids = list(range(0, 400, 8))  # unequal lengths, so rows are often dropped
    options = {"max_new_tokens": 20, "key": (7, 3), "top_p": 0.95}
    one_batch = generate(policy, prompts, 4, rollout_batch=64, **options)
    lengths = torch.cat([group.response_mask.sum(1) for group in one_batch])
    assert len(set(lengths.tolist())) > 3
    split_groups = generate(policy, prompts, 4, rollout_batch=3, **options)
    reordered = generate(policy, prompts[::-1], 4, rollout_batch=6, **options)[::-1]
    others = [split_groups, reordered]
    for block in (1, 7, 20):
        monkeypatch.setitem(decoding.BLOCK, "cpu", block)
        others.append(generate(policy, prompts, 4, rollout_batch=64, **options))
    monkeypatch.setitem(decoding.CANDIDATES, "cpu", 2)  # never enough: blocks are run again
    others.append(generate(policy, prompts, 4, rollout_batch=64, **options))
    monkeypatch.setattr(decoding, "PREFILL_TOKENS", 2 * max(map(len, prompts)))
    others.append(generate(policy, prompts, 4, rollout_batch=64, **options))
    for other in others:
        for a, b in zip(one_batch, other, strict=True):
            assert torch.equal(a.tokens, b.tokens)
            assert torch.equal(a.response_mask, b.response_mask)
            torch.testing.assert_close(a.sample_log_probs, b.sample_log_probs, atol=1e-4, rtol=0)


@pytest.mark.parametrize("scale", [0.01, 1.0, 4.0], ids=["flat", "usual", "peaked"])
@pytest.mark.parametrize("top_p", [0.05, 0.9, 0.99])
def test_the_nucleus_is_that_of_transformers(scale, top_p):
    """Unless the candidates missed top_p, which is said."""
    torch.manual_seed(0)
    scores = scale * torch.randn(8, 3000, dtype=torch.float64)
    scores[:, :50] = -torch.inf  # suppressed tokens
    expected = TopPLogitsWarper(top_p)(None, scores)
    sizes = expected.isfinite().sum(-1)
    for candidates in (64, 1024, 3000):
        kept, ids, missed = nucleus(scores, top_p, candidates)
        assert torch.equal(ids, ids.sort(-1).values)
        assert torch.equal(missed, sizes > candidates) or candidates < sizes.max()
        whole = torch.full_like(scores, -torch.inf).scatter(1, ids, kept)
        assert torch.equal(whole[~missed], expected[~missed])
        assert (sizes[missed] >= candidates).all()


def test_the_key_seeds_the_samples(varied_policy, prompts):
    first, other, again = (
        sample_tokens(varied_policy, prompts, 4, max_new_tokens=12, key=key)
        for key in ((0, 0), (0, 1), (0, 0))
    )
    assert not torch.equal(first, other)
    assert torch.equal(first, again)
    different = {tuple(row.tolist()) for row in first}
    assert len(different) > len(first) // 2  # a prompt's samples differ, too


def test_a_response_ends_with_its_first_end_token(varied_policy, prompts):
    policy = varied_policy
    policy.eos_ids = sorted({*policy.eos_ids, *range(30)})
    groups = generate(policy, prompts, 6, max_new_tokens=10, key=(1, 1))
    end_ids = torch.tensor(policy.eos_ids)
    n_ended = 0
    for group in groups:
        responses = zip(group.tokens, group.response_mask, group.truncated, strict=True)
        for tokens, mask, truncated in responses:
            n = int(mask.sum())
            assert mask[:n].all()
            assert (tokens[n:] == policy.pad_id).all()
            is_end = torch.isin(tokens[:n], end_ids)
            assert not is_end[:-1].any()
            assert bool(is_end[-1]) != bool(truncated)
            assert not truncated or n == 10
            n_ended += int(is_end[-1])
    assert 0 < n_ended < 6 * len(prompts)


def test_vision_tokens_are_never_sampled(policy, prompts):
    """Even if the model prefers them."""
    suppressed = policy.suppressed_ids
    assert {policy.model.config.image_token_id, policy.model.config.video_token_id} <= {*suppressed}
    with torch.no_grad():
        weight = policy.model.lm_head.weight
        weight[suppressed] = 50.0 * weight.abs().max()
    tokens = sample_tokens(policy, prompts, 4, max_new_tokens=8)
    assert not torch.isin(tokens, torch.tensor(suppressed)).any()


def test_generation_config_is_ignored_except_for_its_end_tokens(folder, encoder, prompts):
    """Qwen's chat defaults (repetition_penalty 1.05, temperature 1e-6) must not reach a rollout."""
    assert GenerationConfig.from_pretrained(folder).repetition_penalty == 1.05
    chat, blank = Policy.load(folder, encoder), Policy.load(folder, encoder)
    blank.model.generation_config = GenerationConfig()
    tokens = sample_tokens(chat, prompts, 3, max_new_tokens=12)
    assert torch.equal(tokens, sample_tokens(blank, prompts, 3, max_new_tokens=12))
    at_temperature_1 = sample_tokens(chat, prompts, 3, max_new_tokens=12, temperature=1.0)
    assert torch.equal(tokens, at_temperature_1)
    assert len(chat.eos_ids) == 2


def test_sampling_is_inverse_cdf():
    scores = torch.tensor([0.5, 0.25, 0.25]).log().expand(4, 3).clone()
    uniforms = torch.tensor([0.0, 0.49, 0.51, 0.99])
    assert sample_inverse_cdf(scores, uniforms).tolist() == [0, 0, 1, 2]
    scores[:, [0, 2]] = -torch.inf
    uniforms = torch.tensor([0.0, 0.5, 0.999999, 1 - 2**-24])
    assert sample_inverse_cdf(scores, uniforms).tolist() == [1, 1, 1, 1]
    scores = torch.randn(1, 30, generator=torch.Generator().manual_seed(0)).expand(20_000, -1)
    uniforms = torch.rand(20_000, generator=torch.Generator().manual_seed(1))
    tokens = sample_inverse_cdf(scores, uniforms)
    frequencies = torch.bincount(tokens, minlength=30) / 20_000
    torch.testing.assert_close(frequencies, scores[0].softmax(-1), atol=0.012, rtol=0)


@pytest.mark.parametrize("omp_num_threads, expected", [("2", 2), (None, 1)])
def test_a_tiny_model_runs_on_one_thread(folder, encoder, monkeypatch, omp_num_threads, expected):
    """Unless OMP_NUM_THREADS is set."""
    before = torch.get_num_threads()
    if omp_num_threads:
        monkeypatch.setenv("OMP_NUM_THREADS", omp_num_threads)
    else:
        monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    try:
        torch.set_num_threads(2)
        Policy.load(folder, encoder)
        assert torch.get_num_threads() == expected
    finally:
        torch.set_num_threads(before)


def test_no_prompts_give_no_groups(policy):
    assert generate(policy, [], 4, max_new_tokens=8) == []


@pytest.mark.parametrize("group_size", [1, 3])
def test_group_shapes(policy, prompts, group_size):
    groups = generate(policy, prompts, group_size, max_new_tokens=5)
    for prompt, group in zip(prompts, groups, strict=True):
        assert group.prompt is prompt
        assert group.tokens.shape == group.response_mask.shape == group.sample_log_probs.shape
        assert group.tokens.shape[0] == group_size
        assert len(group.responses) == len(group.truncated) == group_size


def test_a_log_prob_that_is_not_finite_names_the_prompt(varied_policy, prompts):
    """Of two prompts, the one whose image makes NaN is named; nothing else hides it."""
    policy, second = varied_policy, replace(prompts[1])
    second.pixel_values = torch.full_like(second.pixel_values, torch.nan)
    second.example = replace(second.example, id="broken-7")
    with pytest.raises(StepError, match="prompt broken-7 are not finite .*how many green dots"):
        generate(policy, [prompts[0], second], 2, max_new_tokens=4)


def test_chunks_fit_into_the_room_for_keys_and_values(policy, prompts):
    """A long prompt shares its chunk with fewer responses; every chunk has at least one."""
    config = policy.model.config.get_text_config()
    per_token = decoding.cache_bytes_per_token(config, 4)
    assert per_token == 2 * 4 * 2 * 32 * 4  # keys and values, layers, heads, head size, fp32
    scores = decoding.SCORE_BYTES * config.vocab_size
    short, long = sorted(range(4), key=lambda i: len(prompts[i]))[::3]
    jobs = [(short, 0), (short, 1), (long, 0), (long, 1)]

    # A response is expected to take a quarter of the limit, and takes a block at least.
    for limit, expected in [(80, 20), (32, 16), (5, 5)]:
        for count, number, n_prompts in [(2, short, 1), (3, long, 2), (4, long, 2)]:
            tokens = n_prompts * len(prompts[number]) + count * expected
            room = tokens * per_token + count * scores
            assert decoding.count_fitting(policy.model, prompts, jobs, limit, room) == count
            assert decoding.count_fitting(policy.model, prompts, jobs, limit, room - 1) == count - 1
    assert decoding.count_fitting(policy.model, prompts, jobs, 80, room=0) == 1


def test_responses_that_outgrow_the_room_are_sampled_again(varied_policy, prompts, monkeypatch):
    """And the cache never takes more than its room, unless for a single response."""
    options = {"max_new_tokens": 40, "key": (7, 3)}
    expected = generate(varied_policy, prompts, 4, **options)
    per_token = decoding.cache_bytes_per_token(varied_policy.model.config.get_text_config(), 4)
    prompt_room = 4 * max(map(len, prompts)) * per_token
    grow, rows = decoding.GroupedCache.grow, []

    def checked_grow(cache, steps):
        grow(cache, steps)
        keys, _ = cache.generated[0]
        tensors = [*itertools.chain.from_iterable(cache.prompts + cache.generated)]
        used = sum(tensor.nbytes for tensor in tensors)
        assert len(keys) == 1 or used <= decoding.CPU_ROOM
        rows.append(len(keys))

    monkeypatch.setattr(decoding.GroupedCache, "grow", checked_grow)
    monkeypatch.setattr(decoding, "SCORE_BYTES", 0)
    for tokens in (16 * 10, 16 * 16, 16 * 33):  # for some, all in the first block, most
        monkeypatch.setattr(decoding, "CPU_ROOM", prompt_room + tokens * per_token)
        rows.clear()
        groups = generate(varied_policy, prompts, 4, **options)
        assert sum(rows) > 3 * 16  # more than the three blocks of a single chunk: some were lost
        for group, other in zip(groups, expected, strict=True):
            assert torch.equal(group.tokens, other.tokens)
    monkeypatch.setattr(decoding, "CPU_ROOM", 0)  # one at a time
    alone = generate(varied_policy, prompts[:1], 2, **options)
    assert torch.equal(alone[0].tokens, expected[0].tokens[:2])
