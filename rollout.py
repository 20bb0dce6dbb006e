"""Sample G responses per prompt with Hugging Face `generate`.

1. Sort the prompts by length and cut them into chunks of at most `rollout_batch` responses.
2. generate() builds the logits processors (suppressed tokens, temperature, top-k) and calls our
   loop (`custom_generate`, support/decoding.py). It encodes each prompt of a chunk once, and
   samples the chunk's responses together, token by token.
3. Collect each prompt's responses in a Group (support/batch.py).

Differences from the released code, which samples with vLLM:
1. A response depends only on (seed, step, prompt, sample). The batch it is sampled in and the
   number of ranks change it by rounding at most.
2. Sampling ignores the model's generation_config except for its end-of-sequence tokens (Policy
   replaces it). Qwen ships a repetition penalty of 1.05 and a near-zero temperature there; either
   would silently bias the policy gradient.
3. The sampler's log-probs are those of the full softmax at the sampling temperature, before top-p,
   top-k and suppression, so they match the training forward. They are used only for the metric
   sampler_gap: training recomputes the old log-probs.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor
from tqdm import tqdm

from support import StepError
from support.batch import Group, Prompt, seeded
from support.decoding import Chunk, decode
from support.distributed import full_weights
from support.qwen_vl import Policy


@dataclass(frozen=True)
class Sampling:
    """Sampling settings."""

    max_new_tokens: int
    temperature: float | None = None  # None: the policy's; 0: greedy
    top_p: float = 1.0
    top_k: int = 0  # 0: off
    rollout_batch: int = 320  # most responses at a time; halved where memory runs out


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
    after `stop()` becomes True. StepError if a log-prob is not finite. All ranks must call this,
    because gathering the weights is a collective; then they run independently.
    """
    settings = Sampling(**sampling)
    waiting = sorted(range(len(prompts)), key=lambda i: len(prompts[i]))  # so padding is small
    groups: dict[int, Group] = {}
    policy.model.eval()
    bar = tqdm(total=len(prompts), desc="rollout", leave=False, disable=not progress)
    with full_weights(policy.model), bar:
        while waiting and not stop():
            at_once = min(settings.rollout_batch, policy.most_responses)
            chunk = waiting[: max(1, at_once // group_size)]
            of_chunk = [prompts[i] for i in chunk]
            try:
                sampled = _sample_chunk(policy, of_chunk, group_size, settings, key, stop)
            except torch.OutOfMemoryError:
                if len(chunk) == 1:
                    raise
                policy.most_responses = len(chunk) // 2 * group_size  # in later steps, too
                continue
            groups |= zip(chunk, sampled, strict=True)
            waiting = waiting[len(chunk) :]
            bar.update(len(chunk))
    return [] if stop() else [groups[i] for i in range(len(prompts))]


def _sample_chunk(
    policy: Policy, prompts: list[Prompt], group_size: int, settings: Sampling, key, stop
) -> list[Group]:
    device = policy.device
    uniforms = torch.empty(len(prompts), group_size, settings.max_new_tokens)
    for prompt, of_prompt in zip(prompts, uniforms, strict=True):
        for sample, of_response in enumerate(of_prompt, start=prompt.first_sample):
            of_response.uniform_(generator=seeded(*key, prompt.index, sample))
    temperature = policy.temperature if settings.temperature is None else settings.temperature
    chunk = Chunk(
        encoder=policy.encoder,
        prompts=prompts,
        uniforms=uniforms.to(device),
        temperature=temperature or 1.0,
        top_p=settings.top_p,
        eos_ids=torch.tensor(policy.eos_ids, device=device),
        stop=stop,
    )
    options = {"do_sample": False}  # temperature 0: greedy
    if temperature:
        options = {"do_sample": True, "temperature": temperature, "top_k": settings.top_k}
    last_tokens = torch.stack([prompt.input_ids[-1:] for prompt in prompts]).to(device)
    last_tokens = last_tokens.repeat_interleave(group_size, 0)
    tokens, log_probs = policy.model.generate(
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
    responses = zip(prompts, tokens, log_probs, strict=True)
    return [_make_group(policy, *each, settings.max_new_tokens) for each in responses]


def _make_group(
    policy: Policy, prompt: Prompt, tokens: Tensor, log_probs: Tensor, max_new_tokens: int
) -> Group:
    """A group from what was decoded, [G, steps], without what follows the first end tokens."""
    is_end = torch.isin(tokens, torch.tensor(policy.eos_ids))
    ends_before = is_end.cumsum(1) - is_end.int()
    mask = ends_before == 0  # [G, steps], up to and including the first end token
    longest = int(mask.sum(1).max())
    tokens, log_probs, mask = (each[:, :longest] for each in (tokens, log_probs, mask))
    if not log_probs[mask].isfinite().all():
        raise StepError(
            f"log-probs of a response to prompt {prompt.example.id or prompt.index} are not finite "
            f"({prompt.example.question[:80]!r}): either the weights have diverged (lower --lr and "
            "--resume from a checkpoint), or attention is wrong on this device"
        )
    to_text = policy.encoder.tokenizer.decode
    responses = zip(tokens, mask, strict=True)
    return Group(
        prompt=prompt,
        tokens=tokens.masked_fill(~mask, policy.pad_id),
        response_mask=mask,
        truncated=(mask.sum(1) == max_new_tokens) & ~is_end.any(1),
        sample_log_probs=log_probs.masked_fill(~mask, 0.0),
        responses=[to_text(each[own], skip_special_tokens=True) for each, own in responses],
    )
