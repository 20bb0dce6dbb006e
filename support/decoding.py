"""The decoding loop that `rollout.generate` hands to Hugging Face generate.

The batch is the prompts and a sequence is a group: one forward decodes a token for each of a
prompt's g responses, as g queries over one row of keys. So a prompt is encoded, stored and read
once per group, and only a mask tells the responses of a group apart:

    slot      0 1 2 3 4 5 6 7 8 9
    key       P P P - a b a b a b      prompt P, padding, step by step the tokens of responses a, b
    a sees    x x x   x   x   x

Steps run in blocks of fixed shape, in which no operation depends on a tensor's value: on CUDA a
step is recorded once and replayed. Between two blocks the host reads which responses have ended,
and drops the prompts whose responses all have.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
import torch.nn.functional as F
from torch import Tensor

from support.batch import Prompt, dummy_group
from support.packing import build_pack, split_into_packs

PREFILL_TOKENS = 32_768  # prompt tokens encoded at a time; a layer's activations grow with it
# Steps per block: a response that has ended costs time until its end, and each costs a recording.
BLOCK = {"cpu": 16, "cuda": 128}
# Top-p looks at this many of the likeliest tokens, since sorting a vocabulary takes too long. Where
# they do not reach top_p, the others cannot be drawn.
CANDIDATES = 4096
ALIGNMENT = 16  # slots; CUDA's attention copies a mask whose rows are not aligned


@dataclass
class Chunk:
    """What `decode` samples: g responses to each of p prompts."""

    prompts: list[Prompt]
    uniforms: Tensor  # [p, g, max_new_tokens] in [0, 1), on the device
    temperature: float  # that of the returned log-probs
    top_p: float
    eos_ids: Tensor  # on the device
    stop: Callable[[], bool]  # once True, sampling ends with the current block


def decode(
    model, input_ids, logits_processor, generation_config, chunk: Chunk, **unused
) -> tuple[Tensor, Tensor]:
    """Sample the chunk. Called by generate(custom_generate=decode); input_ids are not used.

    Returns tokens and log-probs [p, g, steps] on the CPU; what follows a response's first end token
    is arbitrary.
    """
    config = model.config.get_text_config()
    shared = config.num_attention_heads // config.num_key_value_heads
    cache = GroupCache(chunk.prompts, chunk.uniforms.shape[1], shared, chunk.uniforms.device)
    prefill(model, chunk, cache)
    return DecodingLoop(model, cache, chunk, logits_processor, generation_config.do_sample).run()


class GroupCache:
    """Keys and values of p groups, [p, H_kv, slots, D] per layer; see the header for the slots.

    A prompt's last token is not among those of the prompt: the first decoding step feeds it.
    """

    def __init__(self, prompts: list[Prompt], group_size: int, shared: int, device):
        """shared: how many query heads share a key head."""
        self.group_size, self.shared = group_size, shared
        self.lengths = torch.tensor([len(prompt) - 1 for prompt in prompts], device=device)
        longest = max(len(prompt) for prompt in prompts)
        self.width = -(-longest // ALIGNMENT) * ALIGNMENT  # slots of a prompt
        self.layers: list[list[Tensor]] = []  # keys and values

    def add_prompts(self, layer: int, keys: list[Tensor], values: list[Tensor], first: int) -> None:
        """Store prompts, from number `first` on, in one layer; keys and values [1, H_kv, P, D]."""
        if layer == len(self.layers):
            _, kv_heads, _, dim = keys[0].shape
            shape = (len(self.lengths), kv_heads, self.width, dim)
            self.layers.append([keys[0].new_zeros(shape), values[0].new_zeros(shape)])
        for stored, prompts in zip(self.layers[layer], (keys, values), strict=True):
            for number, prompt in enumerate(prompts, start=first):
                stored[number, :, : prompt.shape[2]] = prompt[0]

    def grow(self, steps: int) -> None:
        """Add slots for `steps` more tokens per response."""
        self._replace(lambda tensor: F.pad(tensor, (0, 0, 0, steps * self.group_size)))

    def keep(self, groups: Tensor) -> None:
        """Drop all groups but these."""
        self.lengths = self.lengths[groups]
        self._replace(lambda tensor: tensor[groups])

    def _replace(self, change: Callable[[Tensor], Tensor]) -> None:
        for layer in self.layers:  # one tensor at a time: both copies exist
            for i, tensor in enumerate(layer):
                layer[i] = change(tensor)
        keys = self.layers[0][0]
        self.slots = torch.arange(keys.shape[2], device=keys.device)
        responses = torch.arange(self.group_size, device=keys.device)[:, None]
        is_prompt = self.slots < self.lengths[:, None, None]
        generated = self.slots - self.width
        is_own = (generated >= 0) & (generated % self.group_size == responses)
        sees = (is_prompt | is_own).repeat(1, self.shared, 1)[:, None]  # [p, 1, shared * g, slots]
        # Not bool: SDPA would convert it in every layer.
        self.mask = keys.new_zeros(sees.shape).masked_fill_(~sees, -torch.inf)

    def set_step(self, step: Tensor) -> None:
        """Set the step [1] that `attend` writes; a tensor, because a recorded step is replayed."""
        start = self.width + step * self.group_size
        end = start + self.group_size
        self.written = start + torch.arange(self.group_size, device=step.device)
        self.step_mask = self.mask.masked_fill(self.slots >= end, -torch.inf)

    def attend(self, layer: int, query: Tensor, key: Tensor, value: Tensor, scale: float) -> Tensor:
        """Store one token per response, and attend to its prompt and its own tokens.

        query[p, H, g, D], key and value[p, H_kv, g, D] -> [p, g, H, D]. The query heads of a key
        head become queries of that head, so that no key is copied.
        """
        keys, values = self.layers[layer]
        keys.index_copy_(2, self.written, key)
        values.index_copy_(2, self.written, value)
        queries = query.unflatten(1, (-1, self.shared)).flatten(2, 3)  # [p, H_kv, shared * g, D]
        out = F.scaled_dot_product_attention(
            queries, keys, values, attn_mask=self.step_mask, scale=scale
        )
        return out.reshape(query.shape).transpose(1, 2)  # CUDA's result is not contiguous


def prefill(model, chunk: Chunk, cache: GroupCache) -> None:
    """Encode the chunk's prompts, PREFILL_TOKENS at a time, with the forward of training."""
    first = 0
    groups = [replace(dummy_group(), prompt=prompt) for prompt in chunk.prompts]
    for of_pack in split_into_packs(groups, PREFILL_TOKENS):
        pack = build_pack(of_pack, "", cache.lengths.device)

        def store(layer, query, key, value, scale, lengths=pack.attend.lengths, first=first):
            cache.add_prompts(layer, key.split(lengths, 2), value.split(lengths, 2), first)

        model.pack_hidden_states(pack, store)
        first += len(of_pack)


class DecodingLoop:
    """The groups still being sampled, and one step of them.

    `step` reads and writes fixed tensors, its own number among them, so that it can be replayed.
    """

    def __init__(self, model, cache: GroupCache, chunk: Chunk, process, do_sample: bool):
        """process: the logits processors."""
        self.model, self.cache, self.chunk = model, cache, chunk
        self.process, self.do_sample = process, do_sample
        p, g, _ = chunk.uniforms.shape
        device = chunk.uniforms.device
        last_tokens = torch.stack([prompt.input_ids[-1:] for prompt in chunk.prompts])
        ends = torch.stack([prompt.position_ids[0, -1:] for prompt in chunk.prompts])
        self.at = torch.zeros(1, dtype=torch.long, device=device)  # number of the next step
        self.tokens = torch.zeros_like(chunk.uniforms, dtype=torch.long)  # [p, g, steps], results
        self.log_probs = torch.zeros_like(chunk.uniforms)
        # Of the groups that have not ended:
        self.numbers = torch.arange(p, device=device)
        self.prompt_ends = ends.to(device)  # [p, 1], position ids
        self.token = last_tokens.to(device).repeat(1, g)  # [p, g], the next step's input

    def run(self) -> tuple[Tensor, Tensor]:
        """Decode until all groups have ended. Returns tokens and log-probs, see `decode`."""
        device, max_new_tokens, done = self.token.device, self.tokens.shape[-1], 0
        block = BLOCK[device.type]
        while len(self.numbers) and done < max_new_tokens and not self.chunk.stop():
            size = min(block, max_new_tokens - done)
            self.cache.grow(block)
            graph = repeat(self.step, size, device)
            done += size
            sampled = self.tokens.index_select(0, self.numbers)[..., :done]
            has_ended = torch.isin(sampled, self.chunk.eos_ids).any(-1).all(-1)
            self._keep((~has_ended).nonzero()[:, 0])  # the only time the host waits
            del graph  # not before: its replays were still queued
        return self.tokens[..., :done].cpu(), self.log_probs[..., :done].cpu()

    def step(self) -> None:
        """Sample one token per response. No shape, address or branch depends on a value."""
        text = self.model.model.language_model
        self.cache.set_step(self.at)
        hidden = text.embed_tokens(self.token)  # [p, g, hidden]
        rope = text.rotary_emb(hidden, (self.prompt_ends + self.at).expand(3, -1, -1))
        for layer in text.layers:
            # forward, not a call: FSDP's hooks cost time, and a CUDA graph cannot hold them.
            hidden = layer.forward(hidden, position_embeddings=rope, attend=self.cache.attend)
        logits = self.model.lm_head(text.norm(hidden)).float().flatten(0, 1)  # [p * g, V]
        scores = self.process(None, logits)
        if self.do_sample:
            uniforms = self.chunk.uniforms.index_select(2, self.at).index_select(0, self.numbers)
            token = sample(scores, self.chunk.top_p, uniforms.view(-1, 1))
        else:
            token = scores.argmax(-1, keepdim=True)
        log_probs = (logits / self.chunk.temperature).log_softmax(-1).gather(1, token)
        self.token.copy_(token.view_as(self.token))
        self.tokens[self.numbers, :, self.at] = self.token
        self.log_probs[self.numbers, :, self.at] = log_probs.view_as(self.token)
        self.at += 1

    def _keep(self, alive: Tensor) -> None:
        """Drop all groups but these."""
        if len(alive) == len(self.numbers):
            return
        self.numbers, self.prompt_ends = self.numbers[alive], self.prompt_ends[alive]
        self.token = self.token[alive]
        self.cache.keep(alive)


def repeat(step: Callable[[], None], times: int, device: torch.device):
    """Take a step so many times, on CUDA as replays of a recording, which is returned.

    The caller keeps it until it has read the results, since its queued replays still use it.
    """
    step()
    if device.type != "cuda":
        for _ in range(times - 1):
            step()
        return None
    graph = torch.cuda.CUDAGraph()
    # Only this thread records: others (NCCL's watchdog) may use CUDA meanwhile.
    with torch.cuda.graph(graph, capture_error_mode="thread_local"):
        step()  # recorded, not run
    for _ in range(times - 1):
        graph.replay()
    return graph


def sample(scores: Tensor, top_p: float, uniforms: Tensor) -> Tensor:
    """Draw tokens [n, 1] from scores[n, V] by inverse CDF, with uniforms[n, 1] in [0, 1).

    A token of probability 0 is never drawn. The sum is in float64: in float32 rounding swamps the
    tail of a large vocabulary.
    """
    if top_p < 1:
        scores = top_p_filter(scores, top_p)
    cdf = scores.softmax(-1).cumsum(-1, dtype=torch.float64)
    tokens = torch.searchsorted(cdf, uniforms.double() * cdf[:, -1:], right=True)
    return tokens.clamp(max=scores.shape[-1] - 1)


def top_p_filter(scores: Tensor, top_p: float) -> Tensor:
    """scores[n, V] of the fewest likeliest tokens whose probabilities reach top_p, elsewhere -inf.

    Up to ties, the set is that of transformers' TopPLogitsWarper, which sorts the vocabulary.
    """
    top, ids = scores.topk(min(CANDIDATES, scores.shape[-1]))  # descending
    probs = (top - scores.logsumexp(-1, keepdim=True)).exp()
    likelier = probs.cumsum(-1) - probs  # probability of all tokens before this one
    kept = top.masked_fill(likelier >= top_p, -torch.inf)
    return torch.full_like(scores, -torch.inf).scatter_(1, ids, kept)
