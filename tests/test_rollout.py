"""Sampling: equal to stock generate when greedy, and independent of chunks, order and blocks."""

import itertools
from dataclasses import replace
from functools import partial

import pytest
import torch
from conftest import generate
from transformers import GenerationConfig, TopPLogitsWarper

import rollout
from support import StepError, decoding, qwen_vl
from support.batch import pad_and_cat
from support.decoding import sample, top_p_filter
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
    """With prompts of unequal length, several images or none, a pad id that is an end id, and
    groups that end early; top-k of 1 is greedy, too."""
    policy = varied_policy
    assert policy.pad_id in policy.eos_ids
    first = [g.tokens[0] for g in generate(policy, prompts, 1, max_new_tokens=24, temperature=0)]
    policy.eos_ids = sorted({*policy.eos_ids, int(first[0][3]), int(first[1][9])})
    for group_size, options in ((1, {"top_k": 1}), (3, {"temperature": 0})):
        groups = generate(policy, prompts, group_size, max_new_tokens=24, **options)
        check_equals_stock_greedy(policy, prompts, groups, 24)
    lengths = set(pad_and_cat(groups, "response_mask").sum(1).tolist())
    assert len(lengths) > 1 and 24 in lengths


def test_chunks_order_and_blocks_change_nothing(varied_policy, prompts, monkeypatch, record_calls):
    """Nor how many prompts are encoded at a time."""
    policy = varied_policy
    policy.eos_ids = list(range(0, 400, 4))  # unequal lengths, so groups are dropped
    options = {"max_new_tokens": 20, "key": (7, 3), "top_p": 0.95}
    one_chunk = generate(policy, prompts, 4, **options)
    lengths = pad_and_cat(one_chunk, "response_mask").sum(1)
    assert len(set(lengths.tolist())) > 3
    others = [
        generate(policy, prompts, 4, rollout_batch=3, **options),  # less than a group
        generate(policy, prompts[::-1], 4, rollout_batch=8, **options)[::-1],
    ]
    calls = record_calls(decoding, "sample")
    for block in (7, 20, 1):
        calls.clear()
        monkeypatch.setitem(decoding.BLOCK, "cpu", block)
        others.append(generate(policy, prompts, 4, **options))
    longest = lengths.view(-1, 4).amax(1)
    n_sampled = sum(len(scores) for (scores, *_), _ in calls)
    assert n_sampled == 4 * longest.sum()  # groups are dropped
    monkeypatch.setattr(decoding, "PREFILL_TOKENS", 2 * max(map(len, prompts)))
    others.append(generate(policy, prompts, 4, **options))
    for other in others:
        for a, b in zip(one_chunk, other, strict=True):
            assert torch.equal(a.tokens, b.tokens)
            assert torch.equal(a.response_mask, b.response_mask)
            torch.testing.assert_close(a.sample_log_probs, b.sample_log_probs, atol=1e-4, rtol=0)


@pytest.mark.parametrize("scale", [0.01, 1.0, 4.0], ids=["flat", "usual", "peaked"])
@pytest.mark.parametrize("top_p", [0.05, 0.9, 0.99])
def test_top_p_is_that_of_transformers(monkeypatch, scale, top_p):
    """Unless it takes more than CANDIDATES tokens: then the CANDIDATES likeliest remain."""
    torch.manual_seed(0)
    scores = scale * torch.randn(8, 3000, dtype=torch.float64)
    scores[:, :50] = -torch.inf  # suppressed tokens
    expected = TopPLogitsWarper(top_p)(None, scores)
    assert torch.equal(top_p_filter(scores, top_p), expected)
    monkeypatch.setattr(decoding, "CANDIDATES", 64)
    likeliest = scores.masked_fill(scores < scores.topk(64).values[:, -1:], -torch.inf)
    fits = expected.isfinite().sum(-1, keepdim=True) <= 64
    assert torch.equal(top_p_filter(scores, top_p), torch.where(fits, expected, likeliest))


def test_sampling_is_inverse_cdf():
    def draw(scores, uniforms, top_p=1.0):
        return sample(scores.expand(len(uniforms), -1), top_p, uniforms[:, None])[:, 0]

    scores = torch.tensor([0.25, 0.5, 0.25]).log()
    uniforms = torch.tensor([0.0, 0.24, 0.26, 0.74, 0.76, 1 - 2**-24])
    assert draw(scores, uniforms).tolist() == [0, 0, 1, 1, 2, 2]
    assert draw(scores, uniforms, top_p=0.5).tolist() == [1] * 6  # others have probability 0


def test_the_key_and_the_number_seed_a_sample(varied_policy, prompts):
    """A prompt's samples differ, and its second group counts its samples on."""
    first, other, again = (
        sample_tokens(varied_policy, prompts, 4, max_new_tokens=12, key=key)
        for key in ((0, 0), (0, 1), (0, 0))
    )
    assert not torch.equal(first, other)
    assert torch.equal(first, again)
    assert len(first.unique(dim=0)) > len(first) // 2
    twice = sample_tokens(varied_policy, prompts + prompts, 2, max_new_tokens=12)
    two_halves = torch.stack(twice.view(2, -1, 2, 12).unbind(), 1)  # [prompts, groups, 2, T]
    assert torch.equal(two_halves.flatten(0, 2), first)


def test_a_response_ends_with_its_first_end_token(varied_policy, prompts):
    """And everything else about it ends there, too."""
    policy = varied_policy
    policy.eos_ids = sorted({*policy.eos_ids, *range(30)})
    groups = generate(policy, prompts, 6, max_new_tokens=10, key=(1, 1))
    truncated = torch.cat([group.truncated for group in groups])
    assert truncated.any() and not truncated.all()
    for group in groups:
        for number, mask in enumerate(group.response_mask):
            n, tokens = int(mask.sum()), group.tokens[number]
            assert mask[:n].all()
            assert (tokens[n:] == policy.pad_id).all()
            log_probs = group.sample_log_probs[number]
            assert (log_probs[:n] < 0).all() and (log_probs[n:] == 0).all()
            is_end = torch.isin(tokens[:n], torch.tensor(policy.eos_ids))
            assert not is_end[:-1].any()
            assert is_end[-1] != group.truncated[number]
            assert is_end[-1] or n == 10
            text = policy.encoder.tokenizer.decode(tokens[:n], skip_special_tokens=True)
            assert group.responses[number] == text


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
    assert len(chat.eos_ids) == 2
    blank.model.generation_config = GenerationConfig()
    tokens = [sample_tokens(each, prompts, 3, max_new_tokens=12) for each in (chat, blank)]
    assert torch.equal(*tokens)


def test_out_of_memory_halves_the_chunk(varied_policy, prompts, monkeypatch):
    """Later calls start with what was found to fit; a prompt alone that does not fit raises."""
    policy, sizes, limit = varied_policy, [], 2

    def decode(model, input_ids, chunk, **options):
        sizes.append(len(chunk.prompts))
        if len(chunk.prompts) > limit:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return decoding.decode(model, input_ids, chunk=chunk, **options)

    expected = sample_tokens(policy, prompts, 3, max_new_tokens=8)
    monkeypatch.setattr(rollout, "decode", decode)
    for _ in range(2):
        assert torch.equal(sample_tokens(policy, prompts, 3, max_new_tokens=8), expected)
    generate(policy, prompts, 6, max_new_tokens=8)  # as many responses at a time
    assert sizes == [4, 2, 2] + [2, 2] + [1, 1, 1, 1]
    limit, policy.most_responses = 0, 12
    with pytest.raises(torch.OutOfMemoryError):
        generate(policy, prompts, 3, max_new_tokens=8)
    assert sizes[-3:] == [4, 2, 1]


def test_a_log_prob_that_is_not_finite_names_the_prompt(varied_policy, prompts):
    """Of two prompts, the one whose image makes NaN is named; nothing else hides it."""
    second = replace(prompts[1], example=replace(prompts[1].example, id="broken-7"))
    second.pixel_values = torch.full_like(second.pixel_values, torch.nan)
    with pytest.raises(StepError, match="prompt broken-7 are not finite"):
        generate(varied_policy, [prompts[0], second], 2, max_new_tokens=4)


def test_no_prompts_or_a_stop_give_no_groups(policy, prompts):
    assert generate(policy, [], 4, max_new_tokens=8) == []
    for asked in range(3):  # stops before the chunk, before its first block, after it
        answers = itertools.chain([False] * asked, itertools.repeat(True))
        assert generate(policy, prompts, 2, max_new_tokens=40, stop=partial(next, answers)) == []


def test_a_tiny_model_takes_the_threads_that_are_idle(folder, encoder, monkeypatch):
    """Unless OMP_NUM_THREADS is set."""
    calls = []
    monkeypatch.setattr(torch, "set_num_threads", calls.append)
    Policy.load(folder, encoder)
    monkeypatch.delenv("OMP_NUM_THREADS")
    for idle in (1.9, 1.2):
        monkeypatch.setattr(qwen_vl, "idle_cores", lambda idle=idle: idle)
        Policy.load(folder, encoder)
    assert calls == [2, 1]
