"""Prompts -> G sampled responses each, with Hugging Face `generate`.

1. Order the responses by prompt length and cut them into chunks of `rollout_batch`.
2. Encode each chunk's prompts once and copy their cache to the responses (support/decoding.py).
3. Sample: generate() prepares the processors for top-k and suppressed tokens, and our loop, passed
   as `custom_generate`, draws token after token.
4. Collect each prompt's responses in a Group.

Differences from the released code, which samples with vLLM:
1. A response depends on (seed, step, prompt, sample) alone: neither the batch it is sampled in nor
   the number of ranks changes it, up to rounding.
2. Sampling ignores the model's generation_config except for its end-of-sequence tokens. Qwen ships
   a repetition penalty of 1.05 and a near-zero temperature there; either would silently bias the
   policy gradient.
3. Log-probs are those of the full softmax at the sampling temperature, before top-p, top-k and
   suppression: what the training forward computes.
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

Sample = tuple[torch.Tensor, torch.Tensor]  # tokens and log-probs of one response


@dataclass(frozen=True)
class Sampling:
    """How responses are sampled."""

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
    """Sample `group_size` responses to each prompt; one group per prompt, in their order.

    sampling: the fields of Sampling. key: (seed, step), which with Prompt.index and the sample's
    number seeds each response. Once `stop()` is True, responses end with their next token. All
    ranks call this together, but nothing inside waits for another rank.
    """
    sampling = Sampling(**sampling)
    by_length = sorted(range(len(prompts)), key=lambda i: len(prompts[i]))  # little padding
    jobs = [(i, sample) for i in by_length for sample in range(group_size)]
    samples: dict[tuple[int, int], Sample] = {}
    policy.model.eval()
    with full_weights(policy.model):
        bar = tqdm(total=len(jobs), desc="rollout", leave=False, disable=not progress)
        for start in range(0, len(jobs), sampling.rollout_batch):
            chunk = jobs[start : start + sampling.rollout_batch]
            responses = _sample_chunk(policy, prompts, chunk, sampling, key, stop)
            samples.update(zip(chunk, responses, strict=True))
            bar.update(len(chunk))
        bar.close()
    groups = []
    for i, prompt in enumerate(prompts):
        responses = [samples[i, sample] for sample in range(group_size)]
        groups.append(_make_group(policy, prompt, responses, sampling.max_new_tokens))
    return groups


def _sample_chunk(policy: Policy, prompts, chunk, sampling: Sampling, key, stop) -> list[Sample]:
    """Tokens and log-probs of each (prompt number, sample number) of the chunk."""
    numbers = list(dict.fromkeys(i for i, _ in chunk))  # each prompt once
    device = policy.device
    padded = left_pad([prompts[i] for i in numbers], policy.pad_id, device)
    rows = torch.tensor([numbers.index(i) for i, _ in chunk], device=device)

    cache = prefill(policy.model, padded)
    for number, layer in enumerate(cache.layers):  # one by one, so that each is freed when copied
        cache.layers[number] = PreallocatedLayer(layer, rows)

    uniforms = []
    for i, sample in chunk:
        generator = seeded(*key, prompts[i].index, sample)
        uniforms.append(torch.rand(sampling.max_new_tokens, generator=generator))
    temperature = policy.temperature if sampling.temperature is None else sampling.temperature
    batch = DecodingBatch(
        cache=cache,
        prompt_mask=padded.mask[rows],
        position=padded.positions[0, rows, -1],
        uniforms=torch.stack(uniforms).to(device),
        temperature=temperature or 1.0,  # greedy: log-probs at temperature 1
        top_p=sampling.top_p if temperature else 1.0,
        eos_ids=torch.tensor(policy.eos_ids, device=device),
        stop=stop,
    )
    how = {"do_sample": True, "temperature": temperature, "top_k": sampling.top_k}
    return policy.model.generate(
        input_ids=padded.ids[rows],
        attention_mask=padded.mask[rows],
        position_ids=padded.positions[:, rows],
        custom_generate=decode,
        batch=batch,
        max_new_tokens=sampling.max_new_tokens,
        eos_token_id=policy.eos_ids,
        pad_token_id=policy.pad_id,
        suppress_tokens=policy.suppressed_ids,
        repetition_penalty=1.0,
        **(how if temperature else {"do_sample": False}),
    )


def _make_group(
    policy: Policy, prompt: Prompt, samples: list[Sample], max_new_tokens: int
) -> Group:
    lengths = torch.tensor([len(tokens) for tokens, _ in samples])
    tokens = pad_sequence(
        [tokens for tokens, _ in samples], batch_first=True, padding_value=policy.pad_id
    )
    log_probs = pad_sequence([log_probs for _, log_probs in samples], batch_first=True)
    mask = torch.arange(tokens.shape[1]) < lengths[:, None]
    last = tokens.gather(1, lengths[:, None] - 1)[:, 0]
    ended = torch.isin(last, torch.tensor(policy.eos_ids))
    decode_text = policy.encoder.tokenizer.decode
    return Group(
        prompt=prompt,
        tokens=tokens,
        response_mask=mask,
        truncated=(lengths == max_new_tokens) & ~ended,
        sample_log_probs=log_probs,
        responses=[decode_text(tokens, skip_special_tokens=True) for tokens, _ in samples],
    )
