"""The key-value cache and the decoding loop that `rollout.generate` hands to Hugging Face generate.

A chunk's prompts are encoded once (`prefill`), as packed rows without padding. Their keys and
values are kept once per prompt, and every response of the group reads that copy. `decode` samples
all responses of the chunk together, in blocks of steps. Within a block nothing depends on a value:
every tensor keeps its shape and its address, so that on CUDA a graph of one step is captured and
replayed. Between two blocks the host looks once, and drops the responses that have ended.

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

from support.batch import Prompt, empty_group
from support.errors import StepError
from support.graph import repeat
from support.packing import build_row, split_rows

PREFILL_TOKENS = 32_768  # prompt tokens encoded at a time; a layer's activations grow with it
# Steps per block. On a CPU, responses that have ended cost until the block does; on CUDA every
# block costs a capture.
BLOCK = {"cpu": 16, "cuda": 128}
# Likeliest tokens among which top-p looks first. Ordering more costs time on a CPU.
CANDIDATES = {"cpu": 64, "cuda": 1024}
WIDEN = 8  # factor by which the candidates grow where they do not reach top-p
EXPECTED_SHARE = 0.25  # of --max_new_tokens that a response is expected to take
SCORE_BYTES = 40  # per response and vocabulary entry: logits, scores and log-probs in fp32
CPU_CACHE = 4 * 2**30  # bytes for the cache of a chunk; on CUDA, most of what is free
CUDA_SHARE = 0.8  # of it; the rest is for activations


class NonFiniteError(StepError):
    """A response has log-probs that are NaN or infinite."""

    def __init__(self, prompt: Prompt):
        example = prompt.example
        super().__init__(
            f"sampling: log-probs of a response to prompt {example.id or prompt.index} are not "
            f"finite ({example.question[:80]!r}): either the weights have diverged (lower --lr, "
            "and --resume from a checkpoint), or attention is wrong on this device"
        )


# ------------------------------------------------------------------------------------------- chunks

Job = tuple[int, int]  # the numbers of a prompt and of a sample


def fitting(model, prompts: list[Prompt], jobs: list[Job], max_new_tokens: int, room: int) -> int:
    """How many of the first jobs, ordered by prompt length, fit into `room` bytes; at least one.

    A prompt takes the room of the longest, and a response that of EXPECTED_SHARE of the longest
    possible. Should the responses grow longer than that, `decode` gives up the last ones.
    """
    config, weight = model.config.get_text_config(), model.lm_head.weight
    per_token = cache_bytes_per_token(config, weight.element_size())
    per_response = EXPECTED_SHARE * max_new_tokens * per_token + SCORE_BYTES * config.vocab_size
    numbers: set[int] = set()
    for count, (number, _) in enumerate(jobs):
        numbers.add(number)
        prompt_tokens = len(numbers) * len(prompts[number])
        if count and prompt_tokens * per_token + (count + 1) * per_response > room:
            return count
    return len(jobs)


def cache_bytes_per_token(config, element_size: int) -> int:
    """Keys and values of one token in all layers."""
    head_dim = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    return 2 * config.num_hidden_layers * config.num_key_value_heads * head_dim * element_size


def cache_room(device: torch.device) -> int:
    """Bytes for a chunk's cache: most of what is free on CUDA, a constant on a CPU."""
    if device.type != "cuda":
        return CPU_CACHE
    free, _ = torch.cuda.mem_get_info(device)
    unused = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
    return int(CUDA_SHARE * (free + unused))


# -------------------------------------------------------------------------------------------- cache


class GroupedCache:
    """Keys and values of p prompts, and of the own tokens of n responses to them.

    Per layer: prompts [p, H_kv, P, D], padded on the right, and own tokens [n, H_kv, T, D]. A
    prompt's last token is not in the cache: it is what the first decoding step feeds.
    """

    def __init__(self, config, prompts: list[Prompt], prompt_of: Tensor, like: Tensor):
        """config: of the language model. prompt_of[n], on the host: the prompt that each response
        answers, in ascending order. like: a tensor on the device and in the dtype of the model."""
        self.device = like.device
        self.bytes_per_token = cache_bytes_per_token(config, like.element_size())
        self.heads, self.kv_heads = config.num_attention_heads, config.num_key_value_heads
        self.lengths = [len(prompt) - 1 for prompt in prompts]
        steps = torch.arange(max(self.lengths))
        is_padding = steps >= torch.tensor(self.lengths)[:, None]  # [p, P]
        bias = torch.zeros(is_padding.shape).masked_fill(is_padding, -torch.inf)
        bias = bias.repeat_interleave(self.kv_heads, 0)[:, None]
        self.prompt_bias = bias.to(self.device)  # [p * H_kv, 1, P]
        self.encoded = 0  # prompts whose keys and values are here
        self.prompts: list[tuple[Tensor, Tensor]] = []  # keys and values of each layer
        self.own: list[tuple[Tensor, Tensor]] = []
        self._arrange(prompt_of)

    def _arrange(self, prompt_of: Tensor) -> None:
        """Work out where the queries of a prompt's responses stand together, and back."""
        self.prompt_of = prompt_of
        counts = prompt_of.bincount()
        first = counts.cumsum(0) - counts
        slot = torch.arange(len(prompt_of)) - first[prompt_of]
        # The first row stands in where a prompt has fewer responses than another.
        row_of = torch.zeros(len(counts), int(counts.max()), dtype=torch.long)  # [p, g]
        row_of[prompt_of, slot] = torch.arange(len(prompt_of))
        heads = torch.arange(self.heads).view(self.kv_heads, -1)  # [H_kv, H / H_kv]
        of_group = row_of[:, None, :, None] * self.heads + heads[:, None]  # [p, H_kv, g, H / H_kv]
        place = (torch.arange(of_group.numel()).view(of_group.shape)).transpose(1, 2)
        of_row = place[prompt_of, slot]  # [n, H_kv, H / H_kv]
        self.of_group = of_group.flatten().to(self.device)
        self.of_row = of_row.flatten().to(self.device)

    def add_prompts(self, layer: int, keys: Tensor, values: Tensor, spans: list) -> None:
        """Store a packed row's keys and values[1, H_kv, S, D] in one layer."""
        if layer == len(self.prompts):
            shape = (len(self.lengths), keys.shape[1], max(self.lengths), keys.shape[3])
            self.prompts.append((keys.new_zeros(shape), values.new_zeros(shape)))
        for tensor, stored in zip((keys, values), self.prompts[layer], strict=True):
            for row, span in enumerate(spans, start=self.encoded):
                length = self.lengths[row]
                stored[row, :, :length] = tensor[0, :, span.start : span.start + length]

    def bytes_of_prompts(self) -> int:
        return len(self.lengths) * max(self.lengths) * self.bytes_per_token

    def grow(self, steps: int) -> None:
        """Make room for so many more tokens per response."""
        if not self.own:
            n = len(self.prompt_of)
            self.own = [(self._empty(n, keys), self._empty(n, keys)) for keys, _ in self.prompts]
        for layer, tensors in enumerate(self.own):  # one at a time: both copies exist meanwhile
            self.own[layer] = tuple(F.pad(tensor, (0, 0, 0, steps)) for tensor in tensors)
        room = self.own[0][0].shape[2]
        self.steps = torch.arange(room, dtype=torch.float32, device=self.device)

    @staticmethod
    def _empty(n: int, like: Tensor) -> Tensor:
        return like.new_zeros(n, like.shape[1], 0, like.shape[3])

    def keep(self, rows: Tensor) -> None:
        """Drop all responses but `rows`, and prompts that no response is left of."""
        on_device = rows.to(self.device)
        for layer, tensors in enumerate(self.own):
            self.own[layer] = tuple(tensor[on_device] for tensor in tensors)
        prompts, prompt_of = self.prompt_of[rows].unique(return_inverse=True)
        if len(prompts) < len(self.lengths):
            self.lengths = [self.lengths[i] for i in prompts.tolist()]
            prompts = prompts.to(self.device)
            bias = self.prompt_bias.unflatten(0, (-1, self.kv_heads))[prompts]
            self.prompt_bias = bias.flatten(0, 1)
            for layer, tensors in enumerate(self.prompts):
                self.prompts[layer] = tuple(tensor[prompts] for tensor in tensors)
        self._arrange(prompt_of)

    def at(self, step: Tensor) -> None:
        """Set the step [1] that `attend` writes; a tensor, because a recorded step is replayed."""
        self.step = step
        self.own_bias = torch.zeros_like(self.steps).masked_fill_(self.steps > step, -torch.inf)

    def attend(self, layer: int, query: Tensor, key: Tensor, value: Tensor, scale: float) -> Tensor:
        """Store one token per response, and attend to its prompt and its own tokens.

        query[n, H, 1, D], key and value[n, H_kv, 1, D] -> [n, 1, H, D]. Prompt and own tokens are
        attended to apart, and joined by their shares of the softmax.
        """
        own_keys, own_values = self.own[layer]
        own_keys.index_copy_(2, self.step, key)
        own_values.index_copy_(2, self.step, value)
        queries = query.flatten(0, 2)  # [n * H, D]
        own, own_total = _attend(queries, own_keys, own_values, self.own_bias, scale)

        # All queries of a group in one product, so that the prompt is read once per group.
        grouped = queries.index_select(0, self.of_group)
        out, total = _attend(grouped, *self.prompts[layer], self.prompt_bias, scale)
        out, total = out.index_select(0, self.of_row), total.index_select(0, self.of_row)
        own_share = (own_total - total).sigmoid().to(out.dtype)
        return torch.lerp(out, own, own_share).view(len(query), 1, *query.shape[1::2])


def _attend(queries: Tensor, keys: Tensor, values: Tensor, bias: Tensor, scale: float):
    """Attention [N, D], and the logarithm of the softmax's denominator [N, 1].

    queries[N, D], as many in turn for each of keys and values[b, H_kv, t, D]; bias[b or 1, 1, t].
    """
    keys, values = keys.flatten(0, 1), values.flatten(0, 1)  # [b * H_kv, t, D]
    scores = _products(queries.view(len(keys), -1, queries.shape[1]), keys.transpose(1, 2))
    scores = torch.add(bias, scores, alpha=scale)  # [b * H_kv, q, t]
    weights = scores.softmax(-1)
    # The largest weight is exp(largest score - log denominator), and never 0.
    log_denominator = scores.amax(-1) - weights.amax(-1).log_()
    out = torch.bmm(weights.to(values.dtype), values)
    return out.view_as(queries), log_denominator.view(-1, 1)


def _products(queries: Tensor, keys: Tensor) -> Tensor:
    """Their products in fp32. Rounded to bf16, a score of 30 would be off by 0.1."""
    if queries.is_cuda and queries.dtype != torch.float32:
        return torch.bmm(queries, keys, out_dtype=torch.float32)
    return torch.bmm(queries, keys).float()


def prefill(model, prompts: list[Prompt], cache: GroupedCache, encoder) -> None:
    """Encode every prompt token but the last into the cache, PREFILL_TOKENS at a time."""
    groups = [empty_group(prompt) for prompt in prompts]
    merge, black = encoder.images.merge_size, encoder.black_patch
    for row_groups in split_rows(groups, PREFILL_TOKENS):
        row = build_row(row_groups, False, black, merge, cache.device)
        model.row_hidden_states(row, grouped_cache=cache)
        cache.encoded += len(row_groups)


# --------------------------------------------------------------------------------------------- loop


@dataclass
class Chunk:
    """What `decode` samples: n responses to p prompts."""

    encoder: object  # support.qwen_vl.Encoder
    prompts: list[Prompt]
    prompt_of: Tensor  # [n], the prompt of each response, in ascending order; on the host
    uniforms: Tensor  # [n, max_new_tokens] in [0, 1), on the device
    room: int  # bytes for the cache
    temperature: float  # that of the returned log-probs
    top_p: float
    eos_ids: Tensor  # on the device
    stop: Callable[[], bool]  # once True, responses end with the current block
    report: Callable[[int], object]  # told after each block how many responses have ended


def decode(
    model, input_ids, logits_processor, generation_config, chunk: Chunk, **unused
) -> list[tuple[Tensor, Tensor] | None]:
    """Sample the chunk's n responses. Called by generate(custom_generate=decode).

    input_ids[n, 1]: the last prompt token of each. Returns the tokens and log-probs of each
    response, on the CPU, up to and including its first end token. Log-probs are those of the full
    softmax at `chunk.temperature`, before top-p, top-k and suppression: what the training forward
    computes. None stands for a response that was given up because the cache outgrew its room.
    """
    text_config = model.config.get_text_config()
    cache = GroupedCache(text_config, chunk.prompts, chunk.prompt_of, model.lm_head.weight)
    prefill(model, chunk.prompts, cache, chunk.encoder)
    loop = DecodingLoop(model, cache, chunk, logits_processor, generation_config.do_sample)
    tokens, log_probs = loop.run(input_ids[:, 0])
    is_end = torch.isin(tokens, chunk.eos_ids.cpu())
    lengths = torch.where(is_end.any(1), is_end.int().argmax(1) + 1, tokens.shape[1])
    responses: list = []
    for row, length in enumerate(lengths.tolist()):
        if row in loop.given_up:
            responses.append(None)
            continue
        if not log_probs[row, :length].isfinite().all():
            raise NonFiniteError(chunk.prompts[chunk.prompt_of[row]])
        responses.append((tokens[row, :length], log_probs[row, :length]))
    return responses


class DecodingLoop:
    """The rows still being sampled, and one step of them.

    Within a block `step` reads and writes the same tensors in place, and its index within the block
    is a tensor too.
    """

    def __init__(self, model, cache: GroupedCache, chunk: Chunk, process, do_sample: bool):
        self.model, self.cache, self.chunk = model, cache, chunk
        self.process, self.do_sample = process, do_sample
        device = cache.device
        self.block = BLOCK[device.type]
        self.candidates = CANDIDATES[device.type]
        last = [int(prompt.position_ids[0, -1]) for prompt in chunk.prompts]
        self.first_position = torch.tensor(last, device=device)[chunk.prompt_of.to(device)]
        self.rows = torch.arange(len(chunk.prompt_of), device=device)  # the responses not ended
        self.given_up: set[int] = set()

    def run(self, token: Tensor) -> tuple[Tensor, Tensor]:
        """Decode from the last prompt tokens [n] until all rows have ended.

        Returns tokens and log-probs [n, steps taken] on the CPU. What follows an end token is
        arbitrary.
        """
        n, max_new_tokens = self.chunk.uniforms.shape
        tokens = token.new_zeros(n, max_new_tokens)
        log_probs = torch.zeros(n, max_new_tokens, device=token.device)
        done = 0
        while len(self.rows) and done < max_new_tokens:
            size = min(self.block, max_new_tokens - done)
            token = self._give_up_rows(token, done + size)
            self.cache.grow(size)
            ended = self._run_block(token, done, size)
            tokens[self.rows, done : done + size] = self.tokens
            log_probs[self.rows, done : done + size] = self.log_probs
            done += size
            alive = [row for row, is_ended in enumerate(ended) if not is_ended]
            token = self._keep(alive, self.token)
            self.chunk.report(sum(ended))
            if self.chunk.stop():
                break
        self.chunk.report(len(self.rows))  # those cut short
        return tokens[:, :done].cpu(), log_probs[:, :done].cpu()

    def _run_block(self, token: Tensor, start: int, size: int) -> list[bool]:
        """Take `size` steps; returns which rows have ended.

        Where the candidates do not reach top-p, the block is run again with more.
        """
        device, n = token.device, len(token)
        self.start = start
        self.uniforms = self.chunk.uniforms[self.rows, start : start + size]
        positions = self.first_position[:, None] + torch.arange(start, start + size, device=device)
        text = self.model.model.language_model
        hidden = text.embed_tokens(token)  # only its dtype and device are used
        self.rope = text.rotary_emb(hidden, positions.expand(3, -1, -1))
        self.tokens = token.new_zeros(n, size)
        self.log_probs = torch.zeros(n, size, device=device)
        while True:
            self.token = token.clone()
            self.i = torch.zeros(1, dtype=torch.long, device=device)  # step within the block
            self.missed = torch.zeros(1, dtype=torch.bool, device=device)
            repeat(self.step, size, device)
            ended = torch.isin(self.tokens, self.chunk.eos_ids).any(1)
            *ended, missed = torch.cat([ended, self.missed]).tolist()  # the block's only sync
            if not missed:
                return ended
            self.candidates *= WIDEN

    def step(self) -> None:
        """Sample one token per row. No shape, address or branch depends on a value."""
        text = self.model.model.language_model
        self.cache.at(self.i + self.start)
        rope = tuple(table.index_select(-2, self.i) for table in self.rope)
        hidden = text.embed_tokens(self.token)[:, None]
        for layer in text.layers:
            # forward, not a call: FSDP's hooks cost time, and a CUDA graph cannot hold them.
            hidden = layer.forward(hidden, position_embeddings=rope, grouped_cache=self.cache)
        logits = self.model.lm_head(text.norm(hidden))[:, -1].float()
        token = self._choose(self.process(None, logits))
        log_probs = (logits / self.chunk.temperature).log_softmax(-1).gather(1, token[:, None])
        self.tokens.index_copy_(1, self.i, token[:, None])
        self.log_probs.index_copy_(1, self.i, log_probs)
        self.token.copy_(token)
        self.i += 1

    def _choose(self, scores: Tensor) -> Tensor:
        if not self.do_sample:
            return scores.argmax(-1)
        uniforms = self.uniforms.index_select(1, self.i)[:, 0]
        if self.chunk.top_p >= 1:
            return sample_inverse_cdf(scores, uniforms)
        kept, ids, missed = nucleus(scores, self.chunk.top_p, self.candidates)
        self.missed |= missed.any()
        return ids.gather(1, sample_inverse_cdf(kept, uniforms)[:, None])[:, 0]

    def _keep(self, alive: list[int], token: Tensor) -> Tensor:
        """Drop all rows but these; returns their last tokens."""
        if len(alive) == len(self.rows):
            return token
        keep = torch.tensor(alive, dtype=torch.long)
        on_device = keep.to(token.device)
        self.rows = self.rows[on_device]
        self.first_position = self.first_position[on_device]
        if alive:
            self.cache.keep(keep)
        return token[on_device]

    def _give_up_rows(self, token: Tensor, steps: int) -> Tensor:
        """Drop the last rows where `steps` tokens for each would not fit into the room."""
        left = self.chunk.room - self.cache.bytes_of_prompts()
        fitting = max(1, left // (steps * self.cache.bytes_per_token))
        self.given_up.update(self.rows[fitting:].tolist() if fitting < len(self.rows) else [])
        return self._keep(list(range(min(fitting, len(self.rows)))), token)


# ----------------------------------------------------------------------------------------- sampling


def nucleus(scores: Tensor, top_p: float, candidates: int) -> tuple[Tensor, Tensor, Tensor]:
    """The fewest likeliest tokens whose probabilities reach top_p; scores[n, V].

    Returns their scores (-inf elsewhere) and ids, both [n, candidates] and in the vocabulary's
    order, and whether the candidates missed top_p [n]. Where they did not miss it, the set is that
    of transformers' TopPLogitsWarper, which sorts the whole vocabulary.
    """
    vocabulary = scores.shape[-1]
    top, ids = scores.topk(min(candidates, vocabulary))  # descending
    probs = (top - scores.logsumexp(-1, keepdim=True)).exp()
    likelier = probs.cumsum(-1) - probs  # probability of all likelier tokens
    kept = top.masked_fill(likelier >= top_p, -torch.inf)
    missed = (likelier[:, -1] < top_p) & (candidates < vocabulary)
    ids, order = ids.sort(-1)
    return kept.gather(1, order), ids, missed


def sample_inverse_cdf(scores: Tensor, uniforms: Tensor) -> Tensor:
    """Draw indices [n] from scores[n, K] with uniforms[n] in [0, 1).

    An index of probability 0 is never drawn. The sum is in float64, because in float32 the tail of
    a large vocabulary is rounding.
    """
    cdf = scores.softmax(-1).cumsum(-1, dtype=torch.float64)
    targets = uniforms.double()[:, None] * cdf[:, -1:]
    indices = torch.searchsorted(cdf, targets, right=True)[:, 0]
    return indices.clamp(max=scores.shape[-1] - 1)
