"""The key-value cache and the decoding loop that `rollout.generate` hands to Hugging Face generate.

A chunk of prompts is encoded once (`prefill`), the cache is fanned out to the responses of each
prompt, and `decode` samples them together, dropping rows as they finish.

Tokens are drawn by inverse CDF from uniforms that depend on (seed, step, prompt, sample) alone.
Neither the chunk that a response is sampled in, nor the order of its rows, nor the number of ranks
changes more than rounding.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor
from transformers.cache_utils import DynamicLayer

from support.batch import Prompt

PREFILL_TOKENS = 32_768  # prompt tokens encoded at a time; a layer's activations grow with it
CACHE_GROWTH = 64  # tokens by which a full cache grows
COMPACT_AT = 0.75  # drop finished rows once at most this share is alive; dropping copies the cache


# ------------------------------------------------------------------------------------- prompt cache


@dataclass
class PaddedPrompts:
    """n left-padded prompts of at most P tokens, on the device."""

    prompts: list[Prompt]
    ids: Tensor  # [n, P]
    mask: Tensor  # [n, P], 0 at padding
    positions: Tensor  # [3, n, P]


def left_pad(prompts: list[Prompt], pad_id: int, device) -> PaddedPrompts:
    """Pad on the left, so that all prompts end in the same column."""
    width = max(len(prompt) for prompt in prompts)
    ids = torch.full((len(prompts), width), pad_id)
    mask = torch.zeros(len(prompts), width, dtype=torch.long)
    positions = torch.zeros(3, len(prompts), width, dtype=torch.long)
    for row, prompt in enumerate(prompts):
        ids[row, -len(prompt) :] = prompt.input_ids
        mask[row, -len(prompt) :] = 1
        positions[:, row, -len(prompt) :] = prompt.position_ids
    return PaddedPrompts(prompts, ids.to(device), mask.to(device), positions.to(device))


def prefill(model, padded: PaddedPrompts):
    """The cache of every prompt token but the last, which the first decoding step feeds.

    Prompts are encoded as many at a time as PREFILL_TOKENS allow.
    """
    at_a_time = max(1, PREFILL_TOKENS // padded.ids.shape[1])
    caches = []
    for start in range(0, len(padded.prompts), at_a_time):
        part = slice(start, start + at_a_time)
        out = model(
            input_ids=padded.ids[part, :-1],
            attention_mask=padded.mask[part, :-1],
            position_ids=padded.positions[:, part, :-1],
            use_cache=True,
            logits_to_keep=1,
            **_image_inputs(padded.prompts[part], padded.ids.device),
        )
        caches.append(out.past_key_values)
    return _join_caches(caches)


def _image_inputs(prompts: list[Prompt], device) -> dict[str, Tensor]:
    with_image = [prompt for prompt in prompts if prompt.pixel_values is not None]
    if not with_image:
        return {}
    return {
        "pixel_values": torch.cat([prompt.pixel_values for prompt in with_image]).to(device),
        "image_grid_thw": torch.cat([prompt.image_grid_thw for prompt in with_image]).to(device),
    }


def _join_caches(caches: list):
    """Concatenate caches of different prompts, layer by layer: one layer at a time exists twice."""
    first, *others = caches
    if not others:
        return first
    for number, layer in enumerate(first.layers):
        parts = [layer, *(cache.layers[number] for cache in others)]
        layer.keys = torch.cat([part.keys for part in parts])
        layer.values = torch.cat([part.values for part in parts])
        for cache in others:
            cache.layers[number] = None
    return first


class PreallocatedLayer(DynamicLayer):
    """A cache layer that is written in place. The stock one copies itself for every new token."""

    def __init__(self, layer: DynamicLayer, rows: Tensor):
        """Take `rows` (which may repeat) of a filled layer [n, H, t, D], in that order."""
        super().__init__()
        self.lazy_initialization(layer.keys, layer.values)
        self.length = layer.keys.shape[2]
        self._set_buffers(_grow(layer.keys)[rows], _grow(layer.values)[rows])

    def _set_buffers(self, keys: Tensor, values: Tensor) -> None:
        self.key_buffer, self.value_buffer = keys, values
        self.keys = keys[:, :, : self.length]
        self.values = values[:, :, : self.length]

    def update(self, key_states: Tensor, value_states: Tensor, *args, **kwargs):
        start, end = self.length, self.length + key_states.shape[2]
        keys, values = self.key_buffer, self.value_buffer
        while end > keys.shape[2]:
            keys, values = _grow(keys), _grow(values)
        keys[:, :, start:end] = key_states
        values[:, :, start:end] = value_states
        self.length = end
        self._set_buffers(keys, values)
        return self.keys, self.values

    def batch_select_indices(self, indices: Tensor) -> None:
        self._set_buffers(self.key_buffer[indices], self.value_buffer[indices])


def _grow(buffer: Tensor) -> Tensor:
    return F.pad(buffer, (0, 0, 0, CACHE_GROWTH))


# --------------------------------------------------------------------------------------------- loop


@dataclass
class DecodingBatch:
    """What `decode` needs for its n rows beside the prompts' token ids."""

    cache: object  # of all prompt tokens but the last, [n, ...] in every layer
    prompt_mask: Tensor  # [n, P]
    position: Tensor  # [n], of the last prompt token; the same on all three axes
    uniforms: Tensor  # [n, max_new_tokens] in [0, 1)
    temperature: float  # that of the returned log-probs
    top_p: float
    eos_ids: Tensor
    stop: Callable[[], bool]  # once True, responses end with their next token


def decode(
    model, input_ids, logits_processor, generation_config, batch: DecodingBatch, **unused
) -> list[tuple[Tensor, Tensor]]:
    """Sample a response for each of the n rows. Called by generate(custom_generate=decode).

    input_ids[n, P]: the left-padded prompts. Returns the tokens and log-probs of each row, on the
    CPU, up to and including its first end token. Log-probs are those of the full softmax at
    `batch.temperature`, before top-p, top-k and suppression: what the training forward computes.
    """
    n, max_new_tokens = batch.uniforms.shape
    device = input_ids.device
    tokens = torch.full((n, max_new_tokens), generation_config.pad_token_id, device=device)
    log_probs = torch.zeros(n, max_new_tokens, device=device)
    lengths = torch.full((n,), max_new_tokens, device=device)
    rows = torch.arange(n, device=device)  # the responses still being decoded
    token, position, mask = input_ids[:, -1], batch.position, batch.prompt_mask
    for t in range(max_new_tokens):
        logits = _next_logits(model, batch.cache, token, position, mask)
        scores = logits_processor(tokens[rows, :t], logits)
        scores = top_p_filter(scores, batch.top_p)
        if generation_config.do_sample:
            token = sample_inverse_cdf(scores, batch.uniforms[rows, t])
        else:
            token = scores.argmax(-1)
        tokens[rows, t] = token
        all_log_probs = (logits / batch.temperature).log_softmax(-1)
        log_probs[rows, t] = all_log_probs.gather(1, token[:, None])[:, 0]
        ended = torch.isin(token, batch.eos_ids)
        # A row that ended stays in the batch until it is dropped: its first end token counts.
        lengths[rows[ended]] = lengths[rows[ended]].clamp(max=t + 1)
        alive = lengths[rows] > t + 1
        n_alive = int(alive.sum())
        if n_alive == 0 or batch.stop():
            lengths[rows[alive]] = t + 1
            break
        position = position + 1
        mask = torch.cat([mask, mask.new_ones(len(mask), 1)], 1)
        if n_alive <= COMPACT_AT * len(rows):
            keep = alive.nonzero().squeeze(1)
            batch.cache.batch_select_indices(keep)
            rows, token, position, mask = rows[keep], token[keep], position[keep], mask[keep]
    tokens, log_probs = tokens.cpu(), log_probs.cpu()
    ends = enumerate(lengths.tolist())
    return [(tokens[i, :length], log_probs[i, :length]) for i, length in ends]


def _next_logits(model, cache, token: Tensor, position: Tensor, mask: Tensor) -> Tensor:
    """Feed one token per row; logits of the next one, [n, V] in fp32."""
    out = model(
        input_ids=token[:, None],
        attention_mask=mask,
        position_ids=position.expand(3, -1)[..., None],
        past_key_values=cache,
        use_cache=True,
    )
    return out.logits[:, -1].float()


def top_p_filter(scores: Tensor, top_p: float, candidates: int = 1024) -> Tensor:
    """-inf outside the fewest likeliest tokens whose probabilities reach top_p; scores[n, V].

    The same set as transformers' TopPLogitsWarper, which sorts the whole vocabulary for every
    token. Here only the likeliest `candidates` are sorted, and all only where these do not reach
    top_p in some row.
    """
    if top_p >= 1:
        return scores
    vocabulary = scores.shape[-1]
    top, index = scores.topk(min(candidates, vocabulary))  # [n, candidates], descending
    probs = (top - scores.logsumexp(-1, keepdim=True)).exp()
    likelier = probs.cumsum(-1) - probs  # probability of all likelier tokens
    if candidates < vocabulary and bool((likelier[:, -1] < top_p).any()):
        return top_p_filter(scores, top_p, vocabulary)
    kept = top.masked_fill(likelier >= top_p, -torch.inf)
    return torch.full_like(scores, -torch.inf).scatter(1, index, kept)


def sample_inverse_cdf(scores: Tensor, uniforms: Tensor) -> Tensor:
    """Draw tokens [n] from scores[n, V] with uniforms[n] in [0, 1).

    A token of probability 0 is never drawn. In float64, because in float32 the tail of a large
    vocabulary is rounding.
    """
    cdf = scores.double().softmax(-1).cumsum(-1)
    targets = uniforms.double()[:, None] * cdf[:, -1:]
    tokens = torch.searchsorted(cdf, targets, right=True)[:, 0]
    return tokens.clamp(max=scores.shape[-1] - 1)
