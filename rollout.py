"""Sample G responses per prompt with Hugging Face `generate`.

The prompts are sorted by length and cut into chunks of at most `rollout_batch` responses, or one
prompt's. For each, model.generate() builds the logits processors (which forbid vision tokens,
divide by the temperature, apply top-k) and leaves the sampling to a loop of ours
(`custom_generate`, support/decoding.py). The loop encodes each prompt once, then draws the
responses token by token, within top-p.

Differences from the released code, which samples with vLLM:
1. Up to rounding, a response depends only on the weights and (seed, step, prompt, sample), not on
   its chunk or on the number of ranks.
2. Sampling ignores the model's generation_config (Policy replaces it) except for its end tokens.
   Otherwise it would apply Qwen's repetition penalty of 1.05, and samples would come from another
   policy than the one trained. Three such differences remain: top-p (0.99, as in the paper),
   top-k (off by default) and the suppression of vision tokens.
3. The sampler's log-probs are those of the full softmax at the sampling temperature, before top-p,
   top-k and suppression: what the training forward computes. They are used only for the metric
   sampler_gap; training recomputes the old log-probs.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, fields

import torch
from torch import Tensor

from support import StepError
from support.batch import Group, Prompt, seeded
from support.decoding import Chunk, decode
from support.distributed import full_weights
from support.qwen_vl import Policy


@dataclass(frozen=True)
class Sampling:
    max_new_tokens: int
    temperature: float = 1.0  # 0: greedy
    top_p: float = 1.0
    top_k: int = 0  # 0: off
    rollout_batch: int = 1024  # most responses at a time; halved where memory runs out

    @classmethod
    def of(cls, config) -> Sampling:
        """The settings that a command's flags hold."""
        return cls(*(getattr(config, field.name) for field in fields(cls)))


@torch.no_grad()
def generate(
    policy: Policy,
    prompts: list[Prompt],
    group_size: int,
    sampling: Sampling,
    *,
    key: tuple,
    stop: Callable[[], bool] = lambda: False,
) -> list[Group]:
    """Sample `group_size` responses per prompt. Returns one group per prompt, in their order.

    key: such as (seed, step); each response is seeded with it, Prompt.index and its own number.
    Returns [] soon after `stop()` becomes True. StepError if a log-prob is not finite. All ranks
    must call this, because gathering the weights is a collective; then they run independently.
    """
    # One random number per token, so that a response does not depend on its chunk.
    uniforms = _draw_uniforms(prompts, group_size, sampling.max_new_tokens, key)
    waiting = sorted(range(len(prompts)), key=lambda i: len(prompts[i]))  # so padding is small
    groups: dict[int, Group] = {}
    policy.model.eval()
    with full_weights(policy.model):
        while waiting and not stop():
            # most_responses is infinite until memory has run out once.
            responses_at_once = min(sampling.rollout_batch, policy.most_responses)
            numbers = waiting[: max(1, responses_at_once // group_size)]
            chosen = [prompts[i] for i in numbers]
            try:
                sampled = _sample_chunk(policy, chosen, uniforms[numbers], sampling, stop)
            except torch.OutOfMemoryError:
                if len(chosen) == 1:
                    raise
                policy.most_responses = len(chosen) // 2 * group_size  # in later steps, too
                continue
            groups.update(zip(numbers, sampled, strict=True))
            waiting = waiting[len(chosen) :]
    # A stopped chunk is cut short.
    return [] if stop() else [groups[i] for i in range(len(prompts))]


def _draw_uniforms(prompts: list[Prompt], group_size: int, length: int, key: tuple) -> Tensor:
    """A random number in [0, 1) for every token, [prompts, G, length]: the decoding loop draws a
    token by inverting the CDF at its number.

    A prompt may come twice (see Algo.sample): its second G responses are samples G to 2 G - 1.
    """
    uniforms = torch.empty(len(prompts), group_size, length)
    n_seen: Counter = Counter()
    for prompt, of_prompt in zip(prompts, uniforms, strict=True):
        for of_response in of_prompt:
            generator = seeded(*key, prompt.index, n_seen[prompt.index])
            of_response.uniform_(generator=generator)
            n_seen[prompt.index] += 1
    return uniforms


def _sample_chunk(
    policy: Policy, prompts: list[Prompt], uniforms: Tensor, sampling: Sampling, stop
) -> list[Group]:
    device = policy.device
    chunk = Chunk(
        prompts=prompts,
        uniforms=uniforms.to(device),
        temperature=sampling.temperature or 1.0,  # of the returned log-probs alone
        top_p=sampling.top_p,  # applied by `decode`: generate() would sort the vocabulary
        eos_ids=torch.tensor(policy.eos_ids, device=device),
        stop=stop,
    )
    if sampling.temperature:
        options = {"do_sample": True, "temperature": sampling.temperature, "top_k": sampling.top_k}
    else:
        options = {"do_sample": False}  # `decode` takes the likeliest token
    # generate() builds the logits processors and hands them to `decode`, which samples the chunk.
    # Its own inputs play no part.
    unused = torch.ones(1, 1, dtype=torch.long, device=device)
    tokens, log_probs = policy.model.generate(  # [prompts, G, steps] each, on the CPU
        input_ids=unused,
        attention_mask=unused,
        custom_generate=decode,
        chunk=chunk,
        max_new_tokens=sampling.max_new_tokens,
        suppress_tokens=policy.suppressed_ids,  # vision tokens
        **options,
    )
    of_prompts = zip(prompts, tokens, log_probs, strict=True)
    return [_make_group(policy, *each, sampling.max_new_tokens) for each in of_prompts]


def _make_group(
    policy: Policy, prompt: Prompt, tokens: Tensor, log_probs: Tensor, max_new_tokens: int
) -> Group:
    """A group from what was decoded, [G, steps], without what follows the first end tokens."""
    is_end = torch.isin(tokens, torch.tensor(policy.eos_ids))
    ends_before = is_end.cumsum(1) - is_end.int()  # end tokens before this one
    response_mask = ends_before == 0  # [G, steps]
    lengths = response_mask.sum(1)
    longest = int(lengths.max())
    tokens, log_probs, response_mask = (x[:, :longest] for x in (tokens, log_probs, response_mask))
    if not log_probs[response_mask].isfinite().all():
        raise StepError(
            f"log-probs of a response to prompt {prompt.example.id or prompt.index} are not "
            "finite: the weights have diverged (lower --lr and --resume from a checkpoint), or a "
            "kernel is wrong on this device"
        )
    ids = [of_response[mask] for of_response, mask in zip(tokens, response_mask, strict=True)]
    texts = policy.encoder.tokenizer.batch_decode(ids, skip_special_tokens=True)
    return Group(
        prompt=prompt,
        tokens=tokens.masked_fill(~response_mask, policy.pad_id),
        response_mask=response_mask,
        truncated=(lengths == max_new_tokens) & ~is_end.any(1),
        sample_log_probs=log_probs.masked_fill(~response_mask, 0.0),
        # opening: the <think> that a chat template may have written for the model.
        responses=[policy.encoder.opening + text for text in texts],
    )
