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

from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.distributed.fsdp import FSDPModule
from tqdm import tqdm
from transformers.cache_utils import DynamicLayer

from papo import Group, Policy, Prompt, seeded

PREFILL_TOKENS = 32_768  # encoded at a time: what one layer holds while it runs grows with it
ROOM = 64  # tokens a cache grows by at a time
COMPACT_AT = 0.75  # drop finished rows once no more than this share is alive: a drop copies the cache


@contextmanager
def gathered(model) -> Iterator[None]:
    """Whole weights on every rank, so that ranks can generate on their own: one gather here, no collective inside."""
    modules = [m for m in model.modules() if isinstance(m, FSDPModule)]
    for module in modules:
        module.unshard()
        module.set_reshard_after_forward(False, recurse=False)
    try:
        yield
    finally:
        for module in modules:
            module.set_reshard_after_forward(module is not model, recurse=False)
            module.reshard()
        if torch.cuda.is_available():  # the cache's large blocks, or updates would not find room in one piece
            torch.cuda.empty_cache()


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
        with gathered(policy.model):  # the other ranks gather too
            return []
    temperature = policy.temperature if temperature is None else temperature
    settings = dict(max_new_tokens=max_new_tokens, suppress_tokens=policy.suppressed_ids, repetition_penalty=1.0)
    settings |= dict(stop=stop)
    if temperature > 0:
        settings |= dict(do_sample=True, temperature=temperature, top_k=top_k, nucleus=top_p)
    else:
        settings |= dict(do_sample=False, nucleus=1.0)
    order = sorted(range(len(prompts)), key=lambda i: len(prompts[i]))  # neighbours of like length: little padding
    jobs = [(i, sample) for i in order for sample in range(group_size)]
    drawn: dict[tuple[int, int], tuple[Tensor, Tensor]] = {}
    policy.model.eval()
    with gathered(policy.model), tqdm(total=len(jobs), desc="rollout", leave=False, disable=not progress) as bar:
        for start in range(0, len(jobs), rollout_batch):
            chunk = jobs[start : start + rollout_batch]
            stop_at = None if lengths is None else torch.stack([lengths[job] for job in chunk]).to(policy.device)
            sampled = _sample(policy, prompts, chunk, settings | {"stop_at": stop_at}, temperature, key)
            drawn.update(zip(chunk, sampled, strict=True))
            bar.update(len(chunk))
    return [
        _group(policy, prompt, [drawn[i, sample] for sample in range(group_size)], max_new_tokens)
        for i, prompt in enumerate(prompts)
    ]


def _sample(policy: Policy, prompts, chunk, settings, temperature, key) -> list[tuple[Tensor, Tensor]]:
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
    for number, layer in enumerate(cache.layers):  # in place, so that each is freed once it is fanned out
        cache.layers[number] = RoomyLayer(layer, fan_out)
    uniforms = torch.stack(
        [torch.rand(settings["max_new_tokens"], generator=seeded(*key, prompts[i].index, s)) for i, s in chunk]
    ).to(device)
    return model.generate(
        input_ids=ids[fan_out], attention_mask=mask[fan_out], position_ids=positions[:, fan_out],
        custom_generate=decode, prefilled=cache, prompt_mask=mask[fan_out],
        next_position=positions[0, fan_out, -1], uniforms=uniforms,
        score_temperature=temperature or 1.0, eos_ids=torch.tensor(policy.eos_ids, device=device),
        pad_token_id=policy.pad_id, eos_token_id=policy.eos_ids, **settings,
    )  # fmt: skip


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
        layer.keys, layer.values = torch.cat([x.keys for x in layers]), torch.cat([x.values for x in layers])
        for cache in others:
            cache.layers[number] = None  # a layer at a time is there twice, not the cache
    return whole


class RoomyLayer(DynamicLayer):
    """A cache layer that is written in place: the stock one copies all it holds for every token it appends."""

    def __init__(self, layer: DynamicLayer, rows: Tensor):
        """The `rows` of a filled layer [n, H, t, D], in that order, which may repeat."""
        super().__init__()
        self.lazy_initialization(layer.keys, layer.values)
        self.length = layer.keys.shape[2]
        self._hold([self._more(layer.keys)[rows], self._more(layer.values)[rows]])

    @staticmethod
    def _more(x: Tensor) -> Tensor:
        return F.pad(x, (0, 0, 0, ROOM))

    def _hold(self, room: list[Tensor]) -> None:
        self.room = room
        self.keys, self.values = (x[:, :, : self.length] for x in room)

    def update(self, key_states: Tensor, value_states: Tensor, *args, **kwargs) -> tuple[Tensor, Tensor]:
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
        scores = keep_nucleus(logits_processor(tokens[rows, :t], logits), nucleus)
        token = draw(scores, uniforms[rows, t]) if generation_config.do_sample else scores.argmax(-1)
        tokens[rows, t] = token
        log_probs[rows, t] = (logits / score_temperature).log_softmax(-1).gather(1, token[:, None])[:, 0]
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
    return [(tokens[i, :length], log_probs[i, :length]) for i, length in enumerate(lengths.tolist())]


def keep_nucleus(scores: Tensor, top_p: float, candidates: int = 1024) -> Tensor:
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
        return keep_nucleus(scores, top_p, scores.shape[-1])
    return torch.full_like(scores, -torch.inf).scatter(1, index, top.masked_fill(before >= top_p, -torch.inf))


def draw(scores: Tensor, uniforms: Tensor) -> Tensor:
    """Inverse CDF: scores[n, V], uniforms[n] in [0, 1) -> tokens[n]. A token of probability 0 is never drawn."""
    cdf = scores.double().softmax(-1).cumsum(-1)  # float64: in float32 the tail of a large vocabulary is rounding
    targets = uniforms.double()[:, None] * cdf[:, -1:]
    return torch.searchsorted(cdf, targets, right=True)[:, 0].clamp(max=scores.shape[-1] - 1)


def _group(policy: Policy, prompt: Prompt, drawn: list[tuple[Tensor, Tensor]], max_new_tokens: int) -> Group:
    lengths = torch.tensor([len(tokens) for tokens, _ in drawn])
    padded = dict(batch_first=True, padding_value=policy.pad_id)
    tokens = torch.nn.utils.rnn.pad_sequence([t for t, _ in drawn], **padded)
    log_probs = torch.nn.utils.rnn.pad_sequence([p for _, p in drawn], batch_first=True)
    mask = torch.arange(tokens.shape[1])[None] < lengths[:, None]
    last = tokens.gather(1, lengths[:, None] - 1)[:, 0]
    truncated = (lengths == max_new_tokens) & ~torch.isin(last, torch.tensor(policy.eos_ids))
    texts = [policy.encoder.tokenizer.decode(t, skip_special_tokens=True) for t, _ in drawn]
    return Group(prompt, tokens, mask, truncated, log_probs, texts)
