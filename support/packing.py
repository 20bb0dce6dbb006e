"""Log-probs of groups, fast: one copy of the prompt per group, logits in chunks.

The straightforward forward gives each of a group's G responses its own copy of prompt and image.
Here all of them share one row:

    position   0 1 2 3 4 5 6 7 8 9
    token      P P P P a a a b b c      prompt P, fed tokens of responses a, b and c
    attends    prompt, causally
                       prompt and a, causally
                             prompt and b
                                 prompt and c

A second group follows in the same row and sees nothing of the first. Position ids restart after
the prompt for every response, so each token sees exactly what it would see alone, and log-probs
and gradients equal those of padded rows (tests/test_papo.py). The last token of a response
predicts nothing and is not fed. The image is encoded once per group.

The method can be read without this file. It is where training touches young interfaces of
transformers (registered attention, image features) and where attention kernels are chosen: on CUDA
in half precision flash-attn's varlen kernel if installed, else torch's own, else SDPA.
"""

from __future__ import annotations

import inspect
import warnings
from collections.abc import Callable
from functools import lru_cache, partial
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.checkpoint import checkpoint
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask
from transformers.utils import is_flash_attn_2_available

from support.batch import Group, empty_group
from support.distributed import max_over_ranks

# Response tokens whose logits exist at a time: 256 x 151,936 in fp32 take 148 MiB.
CHUNK = 256


# --------------------------------------------------------------------------------- groups into rows


def pack_rows(groups: list[Group], max_tokens: int) -> list[list[Group]]:
    """Rows of at most `max_tokens` tokens, as many on every rank as on the rank with the most.

    Each forward is a collective, so a rank with fewer rows feeds empty ones.
    """
    rows = split_rows(groups, max_tokens)
    missing = int(max_over_ranks(len(rows))) - len(rows)
    return rows + [[empty_group()] for _ in range(missing)]


def split_rows(groups: list[Group], max_tokens: int) -> list[list[Group]]:
    """Split groups, in order, into rows of at most `max_tokens`; a larger group gets its own."""
    rows: list[list[Group]] = []
    room = 0
    for group in groups:
        if not rows or group.n_tokens > room:
            rows.append([])
            room = max_tokens
        rows[-1].append(group)
        room -= group.n_tokens
    return rows


class GroupSpan(NamedTuple):
    """Where a group lies in its row: the prompt at [start, start + length), then its responses."""

    start: int
    length: int  # P
    index: Tensor  # [G, T - 1], row positions of the fed response tokens, 0 elsewhere
    fed: Tensor  # [G, T - 1] bool, the fed tokens: all of a response but its last


class RowLayout(NamedTuple):
    """Who attends to whom in a row: `spans` for SDPA, the rest for varlen kernels.

    A varlen kernel sees N sequences: the prompt and each response of the first group, then of the
    next. A prompt's keys are itself; a response's keys are its prompt and itself.
    """

    spans: list[GroupSpan]
    keys: Tensor  # [K], row positions of every sequence's keys, one after the other
    q_ends: Tensor  # [N + 1] int32, boundaries of the sequences' queries in the row
    k_ends: Tensor  # [N + 1] int32, boundaries of their keys in `keys`
    longest_q: int
    longest_k: int


class Row(NamedTuple):
    """Several groups as one sequence of S tokens."""

    input_ids: Tensor  # [1, S]
    position_ids: Tensor  # [3, 1, S]
    is_image_token: Tensor  # [1, S] bool
    pixel_values: Tensor  # [N_patch, D_patch]
    image_grid_thw: Tensor  # [n_images, 3]
    layout: RowLayout
    predicts: Tensor  # [n], row positions whose outputs predict the n response tokens
    targets: Tensor  # [n], those tokens, in the order of the [B, T] response mask


def build_row(groups: list[Group], view: str, black: Tensor, merge: int, device) -> Row:
    """Groups -> Row. view: under which view of the images. black[D_patch], merge: the encoder's."""
    ids, positions, image_tokens, spans, predicts, targets = [], [], [], [], [], []
    start = 0
    for group in groups:
        prompt = group.prompt
        mask = group.response_mask.bool()  # [G, T]
        span = _place(group, start)
        spans.append(span)
        n_fed = int(span.fed.sum())
        ids += [prompt.input_ids, group.tokens[:, :-1][span.fed]]
        positions += [prompt.position_ids, _response_positions(group, span)]
        image_tokens += [prompt.is_image_token, torch.zeros(n_fed, dtype=torch.bool)]
        # The prompt's last position predicts every first token.
        prompt_end = torch.full((len(mask), 1), start + len(prompt) - 1)
        predicts.append(torch.cat([prompt_end, span.index], 1)[:, : mask.shape[1]][mask])
        targets.append(group.tokens[mask])
        start += len(prompt) + n_fed
    pixel_values, grid = _images(groups, view, black, merge)
    return Row(
        input_ids=torch.cat(ids)[None].to(device),
        position_ids=torch.cat(positions, 1)[:, None].to(device),
        is_image_token=torch.cat(image_tokens)[None].to(device),
        pixel_values=pixel_values.to(device),
        image_grid_thw=grid.to(device),
        layout=build_layout(spans, device),
        predicts=torch.cat(predicts).to(device),
        targets=torch.cat(targets).to(device),
    )


def _place(group: Group, start: int) -> GroupSpan:
    """Lay a group out from row position `start`."""
    length = len(group.prompt)
    mask = group.response_mask
    steps = torch.arange(max(mask.shape[1] - 1, 0))  # [T - 1]
    fed = steps < mask.sum(1, keepdim=True) - 1  # [G, T - 1]
    counted = fed.flatten().cumsum(0).view_as(fed)  # responses follow one another without gaps
    index = (start + length - 1 + counted).masked_fill(~fed, 0)
    return GroupSpan(start, length, index, fed)


def _response_positions(group: Group, span: GroupSpan) -> Tensor:
    """Position ids [3, n_fed]: every response goes on where its prompt ends, on all three axes."""
    steps = torch.arange(span.fed.shape[1])
    after_prompt = group.prompt.position_ids.max() + 1 + steps  # [T - 1]
    return after_prompt.expand_as(span.fed)[span.fed].expand(3, -1)


def _images(groups: list[Group], view: str, black: Tensor, merge: int) -> tuple[Tensor, Tensor]:
    """Patches and grids of the groups' images, or of a view of them."""
    with_image = [group for group in groups if group.has_image]
    if not with_image:
        # Under FSDP no rank may skip the vision tower: one black token whose features go nowhere.
        return black.expand(merge**2, -1), torch.tensor([[1, merge, merge]])
    if view:
        pixel_values = [group.view_pixel_values[view] for group in with_image]
    else:
        pixel_values = [group.prompt.pixel_values for group in with_image]
    grids = [group.prompt.image_grid_thw for group in with_image]
    return torch.cat(pixel_values), torch.cat(grids)


def build_layout(spans: list[GroupSpan], device) -> RowLayout:
    """The attention pattern of a row from its spans."""
    query_lengths, keys = [], []
    for start, length, index, fed in spans:
        prompt = torch.arange(start, start + length)
        query_lengths.append(length)
        keys.append(prompt)
        for positions, is_fed in zip(index, fed, strict=True):
            response = positions[is_fed]
            if len(response):
                query_lengths.append(len(response))
                keys.append(torch.cat([prompt, response]))
    key_lengths = [len(sequence) for sequence in keys]
    on_device = [
        GroupSpan(start, length, index.to(device), fed.to(device))
        for start, length, index, fed in spans
    ]
    return RowLayout(
        spans=on_device,
        keys=torch.cat(keys).to(device),
        q_ends=_boundaries(query_lengths).to(device),
        k_ends=_boundaries(key_lengths).to(device),
        longest_q=max(query_lengths),
        longest_k=max(key_lengths),
    )


def _boundaries(lengths: list[int]) -> Tensor:
    return torch.tensor([0, *lengths]).cumsum(0, dtype=torch.int32)


# ---------------------------------------------------------------------------------------- attention


@lru_cache
def varlen_kernel(device: str, dtype: torch.dtype):
    """The attention kernel for sequences of unequal length, or None where SDPA must do.

    kernel(q[Tq, H, D], k, v[Tk, H_kv, D], q_ends, k_ends, longest_q, longest_k, scale, causal).
    Causal means aligned at the bottom right: a sequence's last query sees its last key. flash-attn
    promises this from 2.1 on. torch does not document its kernel's alignment, so that kernel is
    used only if it agrees with SDPA on a small case.
    """
    if device != "cuda" or dtype not in (torch.bfloat16, torch.float16):
        return None
    if kernel := flash_attention():
        return kernel
    try:
        if agrees_with_sdpa(_torch_varlen_attention, device, dtype):
            return _torch_varlen_attention
    except RuntimeError:  # a GPU or a build of torch without it
        pass
    warnings.warn("no usable varlen attention: falling back to SDPA, which is slower", stacklevel=2)
    return None


def flash_attention():
    """flash-attn's kernel, as varlen_kernel returns it; None where it cannot be imported."""
    if not is_flash_attn_2_available():  # which asks whether it is installed, not whether it works
        return None
    try:
        from flash_attn import flash_attn_varlen_func
    except ImportError as error:  # it was built for another torch
        warnings.warn(f"flash-attn is installed but not usable: {error}", stacklevel=2)
        return None

    def attend(*tensors, scale, causal):
        return flash_attn_varlen_func(*tensors, softmax_scale=scale, causal=causal)

    return attend


def _torch_varlen_attention(q, k, v, *lengths, scale, causal):
    from torch.nn.attention.varlen import varlen_attn

    window = (-1, 0 if causal else -1)
    if "enable_gqa" in inspect.signature(varlen_attn).parameters:  # from torch 2.12 on
        return varlen_attn(q, k, v, *lengths, scale=scale, window_size=window, enable_gqa=True)
    k = k.repeat_interleave(q.shape[1] // k.shape[1], 1)
    v = v.repeat_interleave(q.shape[1] // v.shape[1], 1)
    return varlen_attn(q, k, v, *lengths, scale=scale, window_size=window)


@torch.enable_grad()
def agrees_with_sdpa(kernel, device: str, dtype: torch.dtype) -> bool:
    """Whether a varlen kernel and its gradient agree with SDPA: 3 queries, 7 keys, 4 heads on 2."""
    generator = torch.Generator().manual_seed(0)

    def random(length: int, heads: int) -> Tensor:
        values = torch.randn(length, heads, 64, generator=generator)
        return values.to(device, dtype).requires_grad_()

    def with_gradients(out: Tensor) -> list[Tensor]:
        return [out, *torch.autograd.grad((out * weight).sum(), (q, k, v))]

    q, k, v, weight = random(3, 4), random(7, 2), random(7, 2), random(3, 4)
    q_ends = torch.tensor([0, 3], dtype=torch.int32, device=device)
    k_ends = torch.tensor([0, 7], dtype=torch.int32, device=device)
    mask = torch.ones(3, 7, dtype=torch.bool, device=device).tril(4)
    # Identity hooks: a checkpoint around this call must not record these tensors as its own.
    with torch.autograd.graph.saved_tensors_hooks(lambda x: x, lambda x: x):
        ours = kernel(q, k, v, q_ends, k_ends, 3, 7, scale=0.125, causal=True)
        heads_first = [q.transpose(0, 1)]
        heads_first += [x.repeat_interleave(2, 1).transpose(0, 1) for x in (k, v)]
        sdpa = F.scaled_dot_product_attention(*heads_first, attn_mask=mask, scale=0.125)
        pairs = zip(with_gradients(ours), with_gradients(sdpa.transpose(0, 1)), strict=True)
        worst = max(float((a - b).detach().abs().max()) for a, b in pairs)
    return worst < 0.05  # half precision differs by 0.01, another alignment by 1


def shared_prompt_attention(  # noqa: PLR0913  (transformers' arguments and ours)
    module,
    query,
    key,
    value,
    attention_mask,
    scaling=None,
    layout=None,
    grouped_cache=None,
    probe=None,
    **kwargs,
):
    """Attention over a Row without an S x S mask.

    query[1, H, S, D], key and value[1, H_kv, S, D] -> [1, S, H, D].
    layout alone: a row of groups. layout and grouped_cache: a row of prompts, whose keys and values
    are stored too. grouped_cache alone (support/decoding.py): one token per response is decoded.
    Neither: transformers' own SDPA attention. `probe(layer, query, key, scaling, layout)` is called
    first, for variants that look at attention weights.
    """
    if probe:
        probe(module.layer_idx, query, key, scaling, layout)
    if grouped_cache and layout is None:
        return grouped_cache.attend(module.layer_idx, query, key, value, scaling), None
    if grouped_cache:
        grouped_cache.add_prompts(module.layer_idx, key, value, layout.spans)
    if layout is None:
        return sdpa_attention_forward(
            module, query, key, value, attention_mask, scaling=scaling, **kwargs
        )
    kernel = varlen_kernel(query.device.type, query.dtype)
    if kernel:
        q, k, v = (x[0].transpose(0, 1) for x in (query, key, value))  # [S, heads, D]
        k, v = k.index_select(0, layout.keys), v.index_select(0, layout.keys)
        return kernel(q, k, v, *layout[2:], scale=scaling, causal=True)[None], None
    return _span_attention(query, key, value, scaling, layout.spans)[None], None


def _span_attention(query, key, value, scaling, spans: list[GroupSpan]) -> Tensor:
    """SDPA over one prompt, then over its responses, for each group in turn: [S, H, D]."""
    if query.is_cuda:
        # With a mask and fewer key heads CUDA's SDPA would fall back to its slow formula.
        key = key.repeat_interleave(query.shape[1] // key.shape[1], 1)
        value = value.repeat_interleave(query.shape[1] // value.shape[1], 1)
    shared_heads = query.shape[1] != key.shape[1]
    attend = partial(F.scaled_dot_product_attention, scale=scaling, enable_gqa=shared_heads)
    parts = []
    for start, length, index, fed in spans:
        q, k, v = (x[:, :, start : start + length] for x in (query, key, value))  # the prompt
        parts.append(attend(q, k, v, is_causal=True)[0].transpose(0, 1))
        if index.numel() == 0:
            continue
        responses, longest = index.shape
        own_q, own_k, own_v = (_gather(x[0], index) for x in (query, key, value))
        k = torch.cat([k.expand(responses, -1, -1, -1), own_k], 2)
        v = torch.cat([v.expand(responses, -1, -1, -1), own_v], 2)
        causal = torch.ones(longest, length + longest, dtype=torch.bool, device=q.device)
        out = attend(own_q, k, v, attn_mask=causal.tril(length))
        parts.append(out.transpose(1, 2)[fed])
    return torch.cat(parts)


def _gather(heads: Tensor, index: Tensor) -> Tensor:
    """Positions index[G, T] of heads[H, S, D]: [G, H, T, D].

    index_select: the gradient of heads[:, index] is several times as slow.
    """
    tokens = heads.transpose(0, 1).index_select(0, index.flatten())  # [G * T, H, D]
    return tokens.unflatten(0, index.shape).transpose(1, 2)


def window_attention(
    module, query, key, value, attention_mask, scaling=None, cu_seq_lens_q=None, **kwargs
):
    """The vision tower's attention: patches attend within their window, or within their image.

    query, key, value[1, H, S, D] -> [1, S, H, D]. cu_seq_lens_q[W + 1]: the windows' boundaries.
    Without a varlen kernel all windows of one length make one SDPA call.
    """
    q, k, v = (x[0].transpose(0, 1) for x in (query, key, value))  # [S, H, D]
    kernel = varlen_kernel(query.device.type, query.dtype)
    if kernel:
        ends, longest = cu_seq_lens_q.to(torch.int32), kwargs["max_length_q"]
        out = kernel(q, k, v, ends, ends, longest, longest, scale=scaling, causal=False)
        return out[None], None
    starts, lengths = cu_seq_lens_q[:-1], cu_seq_lens_q.diff()
    parts, order = [], []
    for length in lengths.unique().tolist():
        offsets = torch.arange(length, device=q.device)
        index = starts[lengths == length, None] + offsets  # [windows, length]
        windows = [x[index].transpose(1, 2) for x in (q, k, v)]
        out = F.scaled_dot_product_attention(*windows, scale=scaling)
        parts.append(out.transpose(1, 2).flatten(0, 1))
        order.append(index.flatten())
    return torch.cat(parts)[torch.cat(order).argsort()][None], None


AttentionInterface.register("shared_prompt", shared_prompt_attention)
# transformers passes no mask to a custom attention unless its mask function is registered too;
# without one, left padding would be attended silently.
AttentionMaskInterface.register("shared_prompt", sdpa_mask)
# Only an attention with "flash" in its name gets all windows in one call; any other is called once
# per window.
AttentionInterface.register("flash_or_sdpa_windows", window_attention)
# For model.set_attn_implementation.
ATTENTION = {"text_config": "shared_prompt", "vision_config": "flash_or_sdpa_windows"}


# ---------------------------------------------------------------------------------------- log-probs


def row_log_probs(self, row: Row, temperature: float, entropies: bool = False) -> Tensor:
    """Log-probs [n] of a row's response tokens, or the entropies of their distributions.

    `self` is the transformers model. Logits exist for CHUNK tokens at a time, in the forward and
    again in the backward.
    """
    hidden = row_hidden_states(self, row)
    of_chunk = _chunk_entropies if entropies else _chunk_log_probs
    values = []
    chunks = zip(hidden[row.predicts].split(CHUNK), row.targets.split(CHUNK), strict=True)
    for states, targets in chunks:
        inputs = (states, self.lm_head.weight, targets, temperature)
        values.append(checkpoint(of_chunk, *inputs, use_reentrant=False))
    return torch.cat(values)


def row_hidden_states(self, row: Row, grouped_cache=None, probe: Callable | None = None) -> Tensor:
    """The last layer's outputs [S, hidden]. `self` is the transformers model.

    grouped_cache: a decoding.GroupedCache that is to take the keys and values of a row of prompts.
    probe: see shared_prompt_attention.
    """
    embeds = self.get_input_embeddings()(row.input_ids)  # [1, S, hidden]
    image = self.model.get_image_features(row.pixel_values, row.image_grid_thw, return_dict=True)
    features = torch.cat(image.pooler_output).to(embeds.dtype)  # [image tokens, hidden]
    where = row.is_image_token[..., None].expand_as(embeds)
    return self.model.language_model(
        inputs_embeds=embeds.masked_scatter(where, features),
        position_ids=row.position_ids,
        use_cache=False,
        layout=row.layout,
        grouped_cache=grouped_cache,
        probe=probe,
        **_deepstack_inputs(image, row),
    ).last_hidden_state[0]


def _deepstack_inputs(image, row: Row) -> dict:
    """Qwen3-VL adds further image features to its first layers; Qwen2.5-VL has none."""
    if not hasattr(image, "deepstack_features"):
        return {}
    levels = []
    for level in image.deepstack_features:
        is_tensor = isinstance(level, Tensor)  # up to transformers 5.17; a tuple later
        levels.append(level if is_tensor else torch.cat(level))
    return {"visual_pos_masks": row.is_image_token, "deepstack_visual_embeds": levels}


def _chunk_log_probs(hidden: Tensor, weight: Tensor, targets: Tensor, temperature: float) -> Tensor:
    logits = _chunk_logits(hidden, weight, temperature)
    return -F.cross_entropy(logits, targets, reduction="none")


def _chunk_entropies(hidden: Tensor, weight: Tensor, targets: Tensor, temperature: float) -> Tensor:
    log_probs = _chunk_logits(hidden, weight, temperature).log_softmax(-1)
    return -(log_probs.exp() * log_probs).sum(-1)


def _chunk_logits(hidden: Tensor, weight: Tensor, temperature: float) -> Tensor:
    logits = (hidden @ weight.t()).float()
    logits /= temperature  # in place: the logits are the peak of memory
    return logits
