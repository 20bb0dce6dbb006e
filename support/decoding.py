"""The key-value cache and the decoding loop that `rollout.generate` hands to Hugging Face generate.

A chunk's prompts are encoded once (`prefill`), as packed rows without padding. Their keys and
values are kept once per prompt, and every response of the group reads that copy. `decode` samples
all responses of the chunk together, in blocks of steps. Within a block no operation depends on a
tensor's value and no tensor moves, so one step is recorded and replayed (support/graph.py). Between
two blocks the host reads which responses have ended, and drops them.

Tokens are drawn by inverse CDF from uniforms that depend on (seed, step, prompt, sample) alone. The
chunk, the order of its rows and the number of ranks change a response only through rounding.
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
# Steps per block. Responses that have ended cost time until the block ends, and each block costs a
# recording.
BLOCK = {"cpu": 16, "cuda": 128}
# How many of the likeliest tokens top-p considers at first; sorting is slow on a CPU.
CANDIDATES = {"cpu": 64, "cuda": 1024}
WIDEN = 8  # factor by which the candidates grow where they do not reach top-p
EXPECTED_SHARE = 0.25  # expected length of responses as a share of --max_new_tokens
# Per response and vocabulary entry: logits, scores and log-probs in fp32, a cumulative sum in fp64.
SCORE_BYTES = 40
CPU_ROOM = 4 * 2**30  # bytes for a chunk's cache on a CPU
CUDA_SHARE = 0.8  # of the free CUDA memory for a chunk's cache; the rest is for activations


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

Job = tuple[int, int]  # (prompt number, sample number)


def count_fitting(
    model, prompts: list[Prompt], jobs: list[Job], max_new_tokens: int, room: int
) -> int:
    """How many of the first jobs, ordered by prompt length, fit into `room` bytes; at least one.

    Prompts are padded to the longest of the chunk. A response is counted at EXPECTED_SHARE of
    max_new_tokens; should responses grow longer, `decode` gives up the last ones.
    """
    config, weight = model.config.get_text_config(), model.lm_head.weight
    per_token = cache_bytes_per_token(config, weight.element_size())
    first_block = min(BLOCK[weight.device.type], max_new_tokens)
    expected = max(EXPECTED_SHARE * max_new_tokens, first_block)
    per_response = expected * per_token + SCORE_BYTES * config.vocab_size
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
        return CPU_ROOM
    free, _ = torch.cuda.mem_get_info(device)
    unused = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
    return int(CUDA_SHARE * (free + unused))


# -------------------------------------------------------------------------------------------- cache


class GroupedCache:
    """Keys and values of p prompts, and of the generated tokens of n responses to them.

    Per layer: prompts [p, H_kv, P, D], padded on the right, and generated tokens [n, H_kv, T, D]. A
    prompt's last token is not in the cache: it is what the first decoding step feeds.
    """

    def __init__(self, config, prompts: list[Prompt], prompt_of: Tensor, weight: Tensor):
        """config: of the language model. prompt_of[n], on the host: the prompt that each response
        answers, in ascending order. weight: one of the model's, for its device and dtype."""
        self.device = weight.device
        self.bytes_per_token = cache_bytes_per_token(config, weight.element_size())
        self.heads, self.kv_heads = config.num_attention_heads, config.num_key_value_heads
        self.encoded = 0  # prompts whose keys and values are here
        self.prompts: list[tuple[Tensor, Tensor]] = []  # keys and values of each layer
        self.generated: list[tuple[Tensor, Tensor]] = []
        self._set_lengths([len(prompt) - 1 for prompt in prompts])
        self._arrange(prompt_of)

    def _set_lengths(self, lengths: list[int]) -> None:
        """Of the prompts; and the bias that hides their padding, [p * H_kv, 1, P]."""
        self.lengths = lengths
        positions = torch.arange(max(lengths))
        is_padding = positions >= torch.tensor(lengths)[:, None]  # [p, P]
        bias = torch.zeros(is_padding.shape).masked_fill(is_padding, -torch.inf)
        self.prompt_bias = bias.repeat_interleave(self.kv_heads, 0)[:, None].to(self.device)

    def _arrange(self, prompt_of: Tensor) -> None:
        """Index maps from the rows' order [n, H] to that of groups [p, H_kv, g, H / H_kv] and back.

        Groups of fewer than g responses are padded with row 0; the way back never reads those.
        """
        self.prompt_of = prompt_of
        counts = prompt_of.bincount()
        first = counts.cumsum(0) - counts
        slot = torch.arange(len(prompt_of)) - first[prompt_of]
        row_of = torch.zeros(len(counts), int(counts.max()), dtype=torch.long)  # [p, g]
        row_of[prompt_of, slot] = torch.arange(len(prompt_of))
        heads = torch.arange(self.heads).view(self.kv_heads, -1)  # [H_kv, H / H_kv]
        to_groups = row_of[:, None, :, None] * self.heads + heads[:, None]
        in_groups = torch.arange(to_groups.numel()).view(to_groups.shape)
        to_rows = in_groups.transpose(1, 2)[prompt_of, slot]  # [n, H_kv, H / H_kv]
        self.to_groups = to_groups.flatten().to(self.device)
        self.to_rows = to_rows.flatten().to(self.device)

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
        """Make room for `steps` more tokens per response."""
        if not self.generated:
            keys, _ = self.prompts[0]
            empty = keys.new_zeros(len(self.prompt_of), self.kv_heads, 0, keys.shape[3])
            self.generated = [(empty, empty)] * len(self.prompts)
        for layer, tensors in enumerate(self.generated):  # one at a time: both copies exist
            self.generated[layer] = tuple(F.pad(tensor, (0, 0, 0, steps)) for tensor in tensors)
        self.steps = torch.arange(self.generated[0][0].shape[2], device=self.device)

    def keep(self, rows: Tensor) -> None:
        """Drop all responses but `rows`, and prompts without a response."""
        on_device = rows.to(self.device)
        for layer, tensors in enumerate(self.generated):
            self.generated[layer] = tuple(tensor[on_device] for tensor in tensors)
        prompts, prompt_of = self.prompt_of[rows].unique(return_inverse=True)
        if len(prompts) < len(self.lengths):
            self._set_lengths([self.lengths[i] for i in prompts.tolist()])
            longest, prompts = max(self.lengths), prompts.to(self.device)
            for layer, tensors in enumerate(self.prompts):
                self.prompts[layer] = tuple(tensor[prompts, :, :longest] for tensor in tensors)
        self._arrange(prompt_of)

    def set_step(self, step: Tensor) -> None:
        """Set the step [1] that `attend` writes; a tensor, because a recorded step is replayed."""
        self.step = step
        bias = torch.zeros(len(self.steps), device=self.device)
        self.future_bias = bias.masked_fill_(self.steps > step, -torch.inf)  # [T]

    def attend(self, layer: int, query: Tensor, key: Tensor, value: Tensor, scale: float) -> Tensor:
        """Store one token per response, and attend to its prompt and its own tokens.

        query[n, H, 1, D], key and value[n, H_kv, 1, D] -> [n, 1, H, D]. Attention over the prompt
        and over the generated tokens is computed apart, and combined by their shares of the
        softmax.
        """
        n, heads, _, dim = query.shape
        keys, values = self.generated[layer]
        keys.index_copy_(2, self.step, key)
        values.index_copy_(2, self.step, value)
        queries = query.flatten(0, 2)  # [n * H, D]
        own, own_total = _attend(queries, keys, values, self.future_bias, scale)

        # All queries of a group in one product, so that the prompt is read once per group.
        grouped = queries.index_select(0, self.to_groups)
        out, total = _attend(grouped, *self.prompts[layer], self.prompt_bias, scale)
        out, total = out.index_select(0, self.to_rows), total.index_select(0, self.to_rows)
        own_share = (own_total - total).sigmoid().to(out.dtype)
        return torch.lerp(out, own, own_share).view(n, 1, heads, dim)


def _attend(queries: Tensor, keys: Tensor, values: Tensor, bias: Tensor, scale: float):
    """Attention [N, D], and the logarithm of the softmax's denominator [N, 1].

    queries[N, D]: N / (b * H_kv) in turn for each of keys and values[b, H_kv, t, D]. bias[t] or
    [b * H_kv, 1, t].
    """
    keys, values = keys.flatten(0, 1), values.flatten(0, 1)  # [b * H_kv, t, D]
    scores = _products(queries.view(len(keys), -1, queries.shape[1]), keys.transpose(1, 2))
    torch.add(bias, scores, alpha=scale, out=scores)  # [b * H_kv, q, t]
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
    """Encode the prompts, PREFILL_TOKENS at a time, and store all tokens but their last."""
    groups = [empty_group(prompt) for prompt in prompts]
    merge, black = encoder.images.merge_size, encoder.black_patch
    for row_groups in split_rows(groups, PREFILL_TOKENS):
        row = build_row(row_groups, "", black, merge, cache.device)
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
    room: int  # bytes for the cache and the scores
    temperature: float  # that of the returned log-probs
    top_p: float
    eos_ids: Tensor  # on the device
    stop: Callable[[], bool]  # once True, sampling ends with the current block
    report: Callable[[int], object]  # called after each block with how many have just ended


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
    how = {"process": logits_processor, "do_sample": generation_config.do_sample}
    loop = DecodingLoop(model, cache, chunk, input_ids[:, 0], **how)
    tokens, log_probs = loop.run()
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

    `step` reads and writes fixed tensors, its index within the block among them, so that it can be
    replayed.
    """

    def __init__(self, model, cache: GroupedCache, chunk: Chunk, last_tokens, process, do_sample):
        """last_tokens[n]: the last token of each row's prompt. process: the logits processors."""
        self.model, self.cache, self.chunk = model, cache, chunk
        self.process, self.do_sample = process, do_sample
        device = cache.device
        self.block = BLOCK[device.type]
        self.candidates = CANDIDATES[device.type]
        last = [int(prompt.position_ids[0, -1]) for prompt in chunk.prompts]
        # Of the rows that have not ended: their numbers, their last tokens and where prompts end.
        self.rows = torch.arange(len(chunk.prompt_of), device=device)
        self.last_tokens = last_tokens
        self.prompt_ends = torch.tensor(last, device=device)[chunk.prompt_of.to(device)]
        self.given_up: set[int] = set()

    def run(self) -> tuple[Tensor, Tensor]:
        """Decode until all rows have ended.

        Returns tokens and log-probs [n, steps taken] on the CPU. What follows an end token is
        arbitrary.
        """
        n, max_new_tokens = self.chunk.uniforms.shape
        tokens = self.last_tokens.new_zeros(n, max_new_tokens)
        log_probs = torch.zeros(n, max_new_tokens, device=tokens.device)
        done = 0
        while len(self.rows) and done < max_new_tokens:
            size = min(self.block, max_new_tokens - done)
            self._give_up_rows(done + size)
            self.cache.grow(size)
            ended = self._run_block(done, size)
            tokens[self.rows, done : done + size] = self.tokens
            log_probs[self.rows, done : done + size] = self.log_probs
            done += size
            self.last_tokens = self.token
            self._keep([row for row, is_ended in enumerate(ended) if not is_ended])
            self.chunk.report(sum(ended))
            if self.chunk.stop():
                break
        self.chunk.report(len(self.rows))  # those cut short
        return tokens[:, :done].cpu(), log_probs[:, :done].cpu()

    def _run_block(self, start: int, size: int) -> list[bool]:
        """Take `size` steps; returns which rows have ended.

        Where top-p needed more candidates, the block is run again with WIDEN times as many.
        """
        device, n = self.last_tokens.device, len(self.last_tokens)
        self.start = start
        self.uniforms = self.chunk.uniforms[self.rows, start : start + size]
        positions = self.prompt_ends[:, None] + torch.arange(start, start + size, device=device)
        text = self.model.model.language_model
        hidden = text.embed_tokens(self.last_tokens)  # only its dtype and device are used
        self.rope = text.rotary_emb(hidden, positions.expand(3, -1, -1))
        self.tokens = self.last_tokens.new_zeros(n, size)
        self.log_probs = torch.zeros(n, size, device=device)
        while True:
            self.token = self.last_tokens.clone()
            self.i = torch.zeros(1, dtype=torch.long, device=device)  # step within the block
            self.missed = torch.zeros(1, dtype=torch.bool, device=device)
            repeat(self.step, size, device)
            ended = torch.isin(self.tokens, self.chunk.eos_ids).any(1)
            flags = torch.cat([ended, self.missed]).tolist()  # the only time the host waits
            if not flags[-1]:
                return flags[:-1]
            self.candidates *= WIDEN

    def step(self) -> None:
        """Sample one token per row. No shape, address or branch depends on a value."""
        text = self.model.model.language_model
        self.cache.set_step(self.i + self.start)
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

    def _keep(self, alive: list[int]) -> None:
        """Drop all rows but these."""
        if len(alive) == len(self.rows):
            return
        keep = torch.tensor(alive, dtype=torch.long)
        on_device = keep.to(self.rows.device)
        self.rows = self.rows[on_device]
        self.last_tokens = self.last_tokens[on_device]
        self.prompt_ends = self.prompt_ends[on_device]
        if alive:
            self.cache.keep(keep)

    def _give_up_rows(self, steps: int) -> None:
        """Drop the last rows if `steps` tokens per row would exceed the room; never the first."""
        left = self.chunk.room - self.cache.bytes_of_prompts()
        scores = SCORE_BYTES * self.model.config.get_text_config().vocab_size
        n_fit = max(1, left // (steps * self.cache.bytes_per_token + scores))
        if n_fit < len(self.rows):
            self.given_up.update(self.rows[n_fit:].tolist())
            self._keep(list(range(n_fit)))


# ----------------------------------------------------------------------------------------- sampling


def nucleus(scores: Tensor, top_p: float, candidates: int) -> tuple[Tensor, Tensor, Tensor]:
    """The fewest likeliest tokens whose probabilities reach top_p; scores[n, V].

    Returns their scores (-inf elsewhere) and ids, both [n, candidates] and in the vocabulary's
    order, and whether the candidates missed top_p [n]. Where they did not miss it, the set is, up
    to ties, that of transformers' TopPLogitsWarper, which sorts the whole vocabulary.
    """
    vocabulary = scores.shape[-1]
    top, ids = scores.topk(min(candidates, vocabulary))  # descending
    probs = (top - scores.logsumexp(-1, keepdim=True)).exp()
    likelier = probs.cumsum(-1) - probs  # probability of all tokens before this one
    kept = top.masked_fill(likelier >= top_p, -torch.inf)
    missed = (likelier[:, -1] < top_p) & (candidates < vocabulary)
    ids, order = ids.sort(-1)
    return kept.gather(1, order), ids, missed


def sample_inverse_cdf(scores: Tensor, uniforms: Tensor) -> Tensor:
    """Draw indices [n] from scores[n, K] with uniforms[n] in [0, 1).

    An index of probability 0 is never drawn. The sum is in float64: in float32 rounding swamps the
    tail of a large vocabulary.
    """
    cdf = scores.softmax(-1).cumsum(-1, dtype=torch.float64)
    targets = uniforms.double()[:, None] * cdf[:, -1:]
    indices = torch.searchsorted(cdf, targets, right=True)[:, 0]
    return indices.clamp(max=scores.shape[-1] - 1)
