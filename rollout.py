"""Sample G responses per prompt with Hugging Face `generate`.

1. Sort the (prompt, sample) jobs by prompt length and cut them into chunks of `rollout_batch`.
2. Prefill each prompt of a chunk once, and copy its KV cache to its responses.
3. Decode: generate() builds the logits processors (top-k, suppressed tokens) and calls our loop
   (`custom_generate`, support/decoding.py), which applies top-p and draws tokens one at a time.
4. Collect each prompt's responses in a Group (support/batch.py).

Differences from the released code, which samples with vLLM:
1. A response depends only on (seed, step, prompt, sample). The batch it is sampled in and the
   number of ranks change it by rounding at most.
2. Sampling ignores the model's generation_config except for its end-of-sequence tokens (Policy
   replaces it). Qwen ships a repetition penalty of 1.05 and a near-zero temperature there; either
   would silently bias the policy gradient.
3. The sampler's log-probs are those of the full softmax at the sampling temperature, before top-p,
   top-k and suppression, so they match the training forward. They serve checks alone: training
   recomputes the old log-probs.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch.nn.utils.rnn import pad_sequence
from tqdm import tqdm

from support.batch import Group, Prompt, seeded
from support.decoding import DecodingBatch, PreallocatedLayer, decode, left_pad, prefill
from support.distributed import full_weights
from support.qwen_vl import Policy

Response = tuple[torch.Tensor, torch.Tensor]  # tokens and log-probs


@dataclass(frozen=True)
class Sampling:
    """Settings of sampling."""

    max_new_tokens: int
    temperature: float | None = None  # None: the policy's; 0: greedy
    top_p: float = 1.0
    top_k: int = 0  # 0: off
    rollout_batch: int = 64  # responses sampled at a time


@torch.no_grad()
def generate(
    policy: Policy,
    prompts: list[Prompt],
    group_size: int,
    *,
    key: tuple = (0, 0),
    progress: bool = False,
    stop: Callable[[], bool] = lambda: False,
    **sampling,
) -> list[Group]:
    """Sample `group_size` responses per prompt. Returns one group per prompt, in their order.

    sampling: the fields of Sampling. key: such as (seed, step); together with Prompt.index and the
    sample's number it seeds each response. Once `stop()` is True, every unfinished response ends at
    its next token. Entering is a collective, so all ranks must call this; after that they run
    independently.
    """
    settings = Sampling(**sampling)
    by_length = sorted(range(len(prompts)), key=lambda i: len(prompts[i]))  # so padding is small
    jobs = [(i, sample) for i in by_length for sample in range(group_size)]
    responses: dict[tuple[int, int], Response] = {}
    policy.model.eval()
    with full_weights(policy.model):
        bar = tqdm(total=len(jobs), desc="rollout", leave=False, disable=not progress)
        for start in range(0, len(jobs), settings.rollout_batch):
            chunk = jobs[start : start + settings.rollout_batch]
            sampled = _sample_chunk(policy, prompts, chunk, settings, key, stop)
            responses.update(zip(chunk, sampled, strict=True))
            bar.update(len(chunk))
        bar.close()
    groups = []
    for i, prompt in enumerate(prompts):
        of_prompt = [responses[i, sample] for sample in range(group_size)]
        groups.append(_make_group(policy, prompt, of_prompt, settings.max_new_tokens))
    return groups


def _sample_chunk(policy: Policy, prompts, chunk, settings: Sampling, key, stop) -> list[Response]:
    """Sample a chunk of jobs (prompt number, sample number); returns one response each."""
    device = policy.device
    numbers = list(dict.fromkeys(i for i, _ in chunk))  # each prompt once
    padded = left_pad([prompts[i] for i in numbers], policy.pad_id, device)
    row_of = {i: row for row, i in enumerate(numbers)}
    rows = torch.tensor([row_of[i] for i, _ in chunk], device=device)

    cache = prefill(policy.model, padded)
    for layer, content in enumerate(cache.layers):  # one at a time: the original is freed
        cache.layers[layer] = PreallocatedLayer(content, rows)

    uniforms = []
    for i, sample in chunk:
        generator = seeded(*key, prompts[i].index, sample)
        uniforms.append(torch.rand(settings.max_new_tokens, generator=generator))
    temperature = policy.temperature if settings.temperature is None else settings.temperature
    greedy = temperature == 0
    batch = DecodingBatch(
        cache=cache,
        prompt_mask=padded.mask[rows],
        position=padded.positions[0, rows, -1],  # of text: the same on all three axes
        uniforms=torch.stack(uniforms).to(device),
        temperature=1.0 if greedy else temperature,
        top_p=1.0 if greedy else settings.top_p,
        eos_ids=torch.tensor(policy.eos_ids, device=device),
        stop=stop,
    )
    how = {"do_sample": False}
    if not greedy:
        how = {"do_sample": True, "temperature": temperature, "top_k": settings.top_k}
    return policy.model.generate(
        input_ids=padded.ids[rows],
        attention_mask=padded.mask[rows],
        position_ids=padded.positions[:, rows],
        custom_generate=decode,
        batch=batch,
        max_new_tokens=settings.max_new_tokens,
        eos_token_id=policy.eos_ids,
        pad_token_id=policy.pad_id,
        suppress_tokens=policy.suppressed_ids,
        **how,
    )


def _make_group(
    policy: Policy, prompt: Prompt, responses: list[Response], max_new_tokens: int
) -> Group:
    token_lists = [tokens for tokens, _ in responses]
    lengths = torch.tensor([len(tokens) for tokens in token_lists])
    tokens = pad_sequence(token_lists, batch_first=True, padding_value=policy.pad_id)
    last = tokens.gather(1, lengths[:, None] - 1)[:, 0]
    ended = torch.isin(last, torch.tensor(policy.eos_ids))
    to_text = policy.encoder.tokenizer.decode
    return Group(
        prompt=prompt,
        tokens=tokens,
        response_mask=torch.arange(tokens.shape[1]) < lengths[:, None],
        truncated=(lengths == max_new_tokens) & ~ended,
        sample_log_probs=pad_sequence([log_probs for _, log_probs in responses], batch_first=True),
        responses=[to_text(each, skip_special_tokens=True) for each in token_lists],
    )
