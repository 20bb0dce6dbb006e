"""Sample G responses per prompt with Hugging Face `generate`.

1. Sort the (prompt, sample) jobs by prompt length and cut them into chunks that fit into memory.
2. generate() builds the logits processors (suppressed tokens, temperature, top-k) and calls our
   loop (`custom_generate`, support/decoding.py). It encodes each prompt of a chunk once,
   and samples the chunk's responses together, token by token.
3. Collect each prompt's responses in a Group (support/batch.py).

Differences from the released code, which samples with vLLM:
1. A response depends only on (seed, step, prompt, sample). The batch it is sampled in and the
   number of ranks change it by rounding at most.
2. Sampling ignores the model's generation_config except for its end-of-sequence tokens (Policy
   replaces it). Qwen ships a repetition penalty of 1.05 and a near-zero temperature there; either
   would silently bias the policy gradient.
3. The sampler's log-probs are those of the full softmax at the sampling temperature, before top-p,
   top-k and suppression, so they match the training forward. They are used only for checks:
   training recomputes the old log-probs.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch.nn.utils.rnn import pad_sequence
from tqdm import tqdm

from support.batch import Group, Prompt, seeded
from support.decoding import Chunk, Job, cache_room, count_fitting, decode
from support.distributed import full_weights
from support.qwen_vl import Policy

Response = tuple[torch.Tensor, torch.Tensor]  # tokens and log-probs


@dataclass(frozen=True)
class Sampling:
    """Sampling settings."""

    max_new_tokens: int
    temperature: float | None = None  # None: the policy's; 0: greedy
    top_p: float = 1.0
    top_k: int = 0  # 0: off
    rollout_batch: int = 320  # maximum at a time; memory may allow fewer


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

    sampling: the fields of Sampling. key: such as (seed, step); each response is seeded with it,
    with Prompt.index and with its number, which counts from Prompt.first_sample. Returns [] soon
    after `stop()` becomes True. Raises NonFiniteError if a log-prob is not finite. All ranks must
    call this, because gathering the weights is a collective; then they run independently.
    """
    settings = Sampling(**sampling)
    by_length = sorted(range(len(prompts)), key=lambda i: len(prompts[i]))  # so padding is small
    jobs = [(i, sample) for i in by_length for sample in range(group_size)]
    responses: dict[Job, Response] = {}
    policy.model.eval()
    bar = tqdm(total=len(jobs), desc="rollout", leave=False, disable=not progress)
    with full_weights(policy.model), bar:
        while jobs and not stop():
            room = cache_room(policy.device)
            n_fit = count_fitting(policy.model, prompts, jobs, settings.max_new_tokens, room)
            chunk = jobs[: min(n_fit, settings.rollout_batch)]
            control = {"room": room, "stop": stop, "report": bar.update}
            sampled = _sample_chunk(policy, prompts, chunk, settings, key, **control)
            for job, response in zip(chunk, sampled, strict=True):
                if response is not None:  # None: no memory was left for it; it stays in jobs
                    responses[job] = response
            jobs = [job for job in jobs if job not in responses]
    if stop():
        return []
    groups = []
    for i, prompt in enumerate(prompts):
        of_prompt = [responses[i, sample] for sample in range(group_size)]
        groups.append(_make_group(policy, prompt, of_prompt, settings.max_new_tokens))
    return groups


def _sample_chunk(
    policy: Policy, prompts, jobs: list[Job], settings: Sampling, key, **control
) -> list[Response | None]:
    """Sample one response per job. control: the fields room, stop and report of Chunk."""
    device = policy.device
    numbers = list(dict.fromkeys(i for i, _ in jobs))  # each prompt once
    uniforms = []
    for i, sample in jobs:
        generator = seeded(*key, prompts[i].index, prompts[i].first_sample + sample)
        uniforms.append(torch.rand(settings.max_new_tokens, generator=generator))
    temperature = policy.temperature if settings.temperature is None else settings.temperature
    chunk = Chunk(
        encoder=policy.encoder,
        prompts=[prompts[i] for i in numbers],
        prompt_of=torch.tensor([numbers.index(i) for i, _ in jobs]),
        uniforms=torch.stack(uniforms).to(device),
        temperature=temperature or 1.0,
        top_p=settings.top_p,
        eos_ids=torch.tensor(policy.eos_ids, device=device),
        **control,
    )
    options = {"do_sample": False}  # temperature 0: greedy
    if temperature:
        options = {"do_sample": True, "temperature": temperature, "top_k": settings.top_k}
    last_tokens = torch.stack([prompts[i].input_ids[-1:] for i, _ in jobs]).to(device)
    return policy.model.generate(
        input_ids=last_tokens,
        attention_mask=torch.ones_like(last_tokens),
        custom_generate=decode,
        chunk=chunk,
        max_new_tokens=settings.max_new_tokens,
        eos_token_id=policy.eos_ids,
        pad_token_id=policy.pad_id,
        suppress_tokens=policy.suppressed_ids,
        **options,
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
