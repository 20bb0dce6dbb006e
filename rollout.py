"""Prompts -> G sampled responses each, with Hugging Face `generate`.

A chunk of prompts is encoded and prefilled once; its key-value cache is fanned out to the G responses of each prompt;
and `decode`, handed to generate() as `custom_generate`, drops rows as they finish, so that no step is spent on a
response that has ended.

Differences from the released code (which samples with vLLM):
1. Tokens are drawn by inverse CDF from uniforms that depend on (seed, step, prompt, sample) alone. The batch a response
   is sampled in, its compaction and the number of ranks change nothing but rounding.
2. Nothing is inherited from the model's generation_config but its end tokens (papo.Policy sees to it): Qwen's carries
   a repetition penalty and a near-zero temperature, which would bias every rollout silently.
3. All vision tokens are suppressed, not only the image placeholder. Log-probs are those of the plain softmax at the
   sampling temperature, before top-p, top-k and suppression: what the training forward computes.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor
from tqdm import tqdm

from support.batch import Group, Prompt, seeded
from support.decoding import PreallocatedLayer, decode, prefill
from support.distributed import full_weights
from support.qwen_vl import Policy


@torch.no_grad()
def generate(
    policy: Policy,
    prompts: list[Prompt],
    group_size: int,
    *,
    max_new_tokens: int,
    key: tuple = (0, 0),
    top_p: float = 1.0,
    top_k: int = 0,
    temperature: float | None = None,
    rollout_batch: int = 64,
    progress: bool = False,
    stop: Callable[[], bool] = lambda: False,
    lengths: Tensor | None = None,
) -> list[Group]:
    """`group_size` responses to each prompt, in the order of the prompts, `rollout_batch` rows at a time.

    Sampled at the policy's temperature unless another is given; 0 is greedy. `key`: (seed, step); with Prompt.index
    and the number of the sample it seeds a response. Nothing here waits for another rank. Once `stop()`, responses end
    with their next token. `lengths` [prompts, G], for measurements: responses end after so many tokens, whatever they
    are (random weights do not stop by themselves).
    """
    if not prompts:
        with full_weights(policy.model):  # the other ranks gather too
            return []
    temperature = policy.temperature if temperature is None else temperature
    settings = dict(
        max_new_tokens=max_new_tokens, suppress_tokens=policy.suppressed_ids, repetition_penalty=1.0
    )
    settings |= dict(stop=stop)
    if temperature > 0:
        settings |= dict(do_sample=True, temperature=temperature, top_k=top_k, nucleus=top_p)
    else:
        settings |= dict(do_sample=False, nucleus=1.0)
    order = sorted(
        range(len(prompts)), key=lambda i: len(prompts[i])
    )  # neighbours of like length: little padding
    jobs = [(i, sample) for i in order for sample in range(group_size)]
    drawn: dict[tuple[int, int], tuple[Tensor, Tensor]] = {}
    policy.model.eval()
    with (
        full_weights(policy.model),
        tqdm(total=len(jobs), desc="rollout", leave=False, disable=not progress) as bar,
    ):
        for start in range(0, len(jobs), rollout_batch):
            chunk = jobs[start : start + rollout_batch]
            stop_at = (
                None
                if lengths is None
                else torch.stack([lengths[job] for job in chunk]).to(policy.device)
            )
            sampled = _sample(
                policy, prompts, chunk, settings | {"stop_at": stop_at}, temperature, key
            )
            drawn.update(zip(chunk, sampled, strict=True))
            bar.update(len(chunk))
    return [
        _group(policy, prompt, [drawn[i, sample] for sample in range(group_size)], max_new_tokens)
        for i, prompt in enumerate(prompts)
    ]


def _sample(
    policy: Policy, prompts, chunk, settings, temperature, key
) -> list[tuple[Tensor, Tensor]]:
    """Tokens and log-probs of each (prompt number, sample) of the chunk, cut behind the first end token."""
    device, model = policy.device, policy.model
    numbers = list(dict.fromkeys(i for i, _ in chunk))
    batch = [prompts[i] for i in numbers]
    width = max(map(len, batch))
    ids = torch.full((len(batch), width), policy.pad_id)  # left-padded
    mask = torch.zeros(len(batch), width, dtype=torch.long)
    positions = torch.zeros(3, len(batch), width, dtype=torch.long)
    for row, prompt in enumerate(batch):
        ids[row, -len(prompt) :], mask[row, -len(prompt) :] = prompt.input_ids, 1
        positions[:, row, -len(prompt) :] = prompt.position_ids
    ids, mask, positions = ids.to(device), mask.to(device), positions.to(device)
    fan_out = torch.tensor([numbers.index(i) for i, _ in chunk], device=device)
    cache = prefill(model, batch, ids, mask, positions)
    for number, layer in enumerate(
        cache.layers
    ):  # in place, so that each is freed once it is fanned out
        cache.layers[number] = PreallocatedLayer(layer, fan_out)
    uniforms = torch.stack(
        [
            torch.rand(settings["max_new_tokens"], generator=seeded(*key, prompts[i].index, s))
            for i, s in chunk
        ]
    ).to(device)
    return model.generate(
        input_ids=ids[fan_out], attention_mask=mask[fan_out], position_ids=positions[:, fan_out],
        custom_generate=decode, prefilled=cache, prompt_mask=mask[fan_out],
        next_position=positions[0, fan_out, -1], uniforms=uniforms,
        score_temperature=temperature or 1.0, eos_ids=torch.tensor(policy.eos_ids, device=device),
        pad_token_id=policy.pad_id, eos_token_id=policy.eos_ids, **settings,
    )  # fmt: skip


def _group(
    policy: Policy, prompt: Prompt, drawn: list[tuple[Tensor, Tensor]], max_new_tokens: int
) -> Group:
    lengths = torch.tensor([len(tokens) for tokens, _ in drawn])
    padded = dict(batch_first=True, padding_value=policy.pad_id)
    tokens = torch.nn.utils.rnn.pad_sequence([t for t, _ in drawn], **padded)
    log_probs = torch.nn.utils.rnn.pad_sequence([p for _, p in drawn], batch_first=True)
    mask = torch.arange(tokens.shape[1])[None] < lengths[:, None]
    last = tokens.gather(1, lengths[:, None] - 1)[:, 0]
    truncated = (lengths == max_new_tokens) & ~torch.isin(last, torch.tensor(policy.eos_ids))
    texts = [policy.encoder.tokenizer.decode(t, skip_special_tokens=True) for t, _ in drawn]
    return Group(prompt, tokens, mask, truncated, log_probs, texts)
