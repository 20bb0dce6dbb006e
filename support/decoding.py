"""The key-value cache and the decoding loop behind `generate`."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor
from transformers.cache_utils import DynamicLayer

from support.batch import Prompt

PREFILL_TOKENS = 32_768  # encoded at a time: what one layer holds while it runs grows with it


CACHE_GROWTH = 64  # tokens a cache grows by at a time


COMPACT_AT = (
    0.75  # drop finished rows once no more than this share is alive: a drop copies the cache
)


def prefill(model, batch: list[Prompt], ids: Tensor, mask: Tensor, positions: Tensor):
    """The cache of all tokens but the last of n left-padded prompts: the first decoding step feeds that one, for every
    response. ids, mask[n, P], positions[3, n, P]. As many prompts at a time as PREFILL_TOKENS allow, pictures included.
    """
    device, size = ids.device, max(1, PREFILL_TOKENS // ids.shape[1])
    caches = []
    for part in (slice(start, start + size) for start in range(0, len(batch), size)):
        vision = {}
        if seen := [p for p in batch[part] if p.pixel_values is not None]:
            vision["pixel_values"] = torch.cat([p.pixel_values for p in seen]).to(device)
            vision["image_grid_thw"] = torch.cat([p.image_grid_thw for p in seen]).to(device)
        out = model(
            input_ids=ids[part, :-1], attention_mask=mask[part, :-1], position_ids=positions[:, part, :-1],
            use_cache=True, logits_to_keep=1, **vision,
        )  # fmt: skip
        caches.append(out.past_key_values)
    whole, *others = caches
    for number, layer in enumerate(whole.layers if others else ()):
        layers = [layer, *(cache.layers[number] for cache in others)]
        layer.keys, layer.values = (
            torch.cat([x.keys for x in layers]),
            torch.cat([x.values for x in layers]),
        )
        for cache in others:
            cache.layers[number] = None  # a layer at a time is there twice, not the cache
    return whole


class PreallocatedLayer(DynamicLayer):
    """A cache layer that is written in place: the stock one copies all it holds for every token it appends."""

    def __init__(self, layer: DynamicLayer, rows: Tensor):
        """The `rows` of a filled layer [n, H, t, D], in that order, which may repeat."""
        super().__init__()
        self.lazy_initialization(layer.keys, layer.values)
        self.length = layer.keys.shape[2]
        self._hold([self._more(layer.keys)[rows], self._more(layer.values)[rows]])

    @staticmethod
    def _more(x: Tensor) -> Tensor:
        return F.pad(x, (0, 0, 0, CACHE_GROWTH))

    def _hold(self, room: list[Tensor]) -> None:
        self.room = room
        self.keys, self.values = (x[:, :, : self.length] for x in room)

    def update(
        self, key_states: Tensor, value_states: Tensor, *args, **kwargs
    ) -> tuple[Tensor, Tensor]:
        before, self.length = self.length, self.length + key_states.shape[2]
        while self.length > self.room[0].shape[2]:
            self.room = [self._more(x) for x in self.room]
        for room, new in zip(self.room, (key_states, value_states), strict=True):
            room[:, :, before : self.length] = new
        self._hold(self.room)
        return self.keys, self.values

    def batch_select_indices(self, indices: Tensor) -> None:
        self._hold([x[indices] for x in self.room])


def decode(
    model, input_ids, logits_processor, generation_config, prefilled, prompt_mask, next_position, uniforms,
    score_temperature, nucleus, eos_ids, stop, stop_at, **unused,
) -> list[tuple[Tensor, Tensor]]:  # fmt: skip
    """The decoding loop behind generate(): n rows, finished ones dropped; tokens and log-probs of each row, on the CPU.

    input_ids, prompt_mask[n, P], next_position[n] (of the last prompt token, the same on all three axes), uniforms
    [n, max_new_tokens], prefilled: the cache of all prompt tokens but the last. nucleus: top_p. stop_at[n]: `lengths`
    in generate.
    """
    n, steps = uniforms.shape
    tokens = torch.full((n, steps), generation_config.pad_token_id, device=input_ids.device)
    log_probs = torch.zeros(n, steps, device=input_ids.device)
    lengths = torch.full((n,), steps, device=input_ids.device)
    rows = torch.arange(n, device=input_ids.device)  # which response each row of the batch is
    token, position, mask = input_ids[:, -1], next_position, prompt_mask
    for t in range(steps):
        logits = model(
            input_ids=token[:, None], attention_mask=mask, position_ids=position.expand(3, -1)[..., None],
            past_key_values=prefilled, use_cache=True,
        ).logits[:, -1].float()  # fmt: skip
        scores = top_p_filter(logits_processor(tokens[rows, :t], logits), nucleus)
        token = (
            sample_inverse_cdf(scores, uniforms[rows, t])
            if generation_config.do_sample
            else scores.argmax(-1)
        )
        tokens[rows, t] = token
        log_probs[rows, t] = (
            (logits / score_temperature).log_softmax(-1).gather(1, token[:, None])[:, 0]
        )
        ended = torch.isin(token, eos_ids) if stop_at is None else stop_at[rows] == t + 1
        lengths[rows] = torch.where(ended, lengths[rows].clamp(max=t + 1), lengths[rows])
        alive = lengths[rows] > t + 1
        position = position + 1
        left = int(alive.sum())
        if left == 0 or stop():
            lengths[rows[alive]] = t + 1
            break
        mask = torch.cat([mask, mask.new_ones(len(mask), 1)], 1)
        if left <= COMPACT_AT * len(rows):
            keep = alive.nonzero().squeeze(1)
            prefilled.batch_select_indices(keep)
            rows, token, position, mask = rows[keep], token[keep], position[keep], mask[keep]
    tokens, log_probs = tokens.cpu(), log_probs.cpu()
    return [
        (tokens[i, :length], log_probs[i, :length]) for i, length in enumerate(lengths.tolist())
    ]


def top_p_filter(scores: Tensor, top_p: float, candidates: int = 1024) -> Tensor:
    """Top-p: scores[n, V] with -inf outside the fewest likeliest tokens whose probabilities reach top_p.

    As transformers' TopPLogitsWarper, which sorts the whole vocabulary for every token; here only the likeliest
    `candidates` are ordered, and all of them in the rare case that these do not reach top_p in some row.
    """
    if top_p >= 1:
        return scores
    top, index = scores.topk(min(candidates, scores.shape[-1]))  # [n, candidates], descending
    probs = (top - scores.logsumexp(-1, keepdim=True)).exp()
    before = probs.cumsum(-1) - probs  # of the likelier tokens
    if len(top[0]) < scores.shape[-1] and bool((before[:, -1] < top_p).any()):
        return top_p_filter(scores, top_p, scores.shape[-1])
    return torch.full_like(scores, -torch.inf).scatter(
        1, index, top.masked_fill(before >= top_p, -torch.inf)
    )


def sample_inverse_cdf(scores: Tensor, uniforms: Tensor) -> Tensor:
    """Inverse CDF: scores[n, V], uniforms[n] in [0, 1) -> tokens[n]. A token of probability 0 is never drawn."""
    cdf = (
        scores.double().softmax(-1).cumsum(-1)
    )  # float64: in float32 the tail of a large vocabulary is rounding
    targets = uniforms.double()[:, None] * cdf[:, -1:]
    return torch.searchsorted(cdf, targets, right=True)[:, 0].clamp(max=scores.shape[-1] - 1)
