"""Groups -> log-probs, fast: a prompt's responses in one row behind one copy of the prompt, and logits in chunks.

The plain way gives each of G responses its own copy of prompt and picture. Here a row is
[prompt | response 1 | ... | response G | next prompt | ...]: a response attends to its prompt and itself, the picture
is encoded once, nothing is padded, and the log-probs and gradients are those of the plain way (tests/test_papo.py).

A file of its own because it is the one place where training touches young interfaces of transformers (registered
attention, image features, positions handed in), and where kernels are chosen: flash-attn's varlen kernel on CUDA in
half precision where it is installed, else torch's own, else SDPA. The method can be read without it. Groups are
papo.Group; this file imports no module of ours.
"""

from __future__ import annotations

import inspect
import warnings
from functools import lru_cache, partial
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.checkpoint import checkpoint
from transformers import (
    AttentionInterface,
    AttentionMaskInterface,
)
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask
from transformers.utils import is_flash_attn_2_available

CHUNK = 256  # response tokens whose logits exist at one time: 256 x 151,936 in fp32 is 148 MiB


class Span(NamedTuple):
    """Where a group lies in its row: the prompt at [start, start + length), the fed response tokens behind it."""

    start: int
    length: int  # P
    index: Tensor  # [G, R], row positions of the response tokens fed (all but the last), 0 where there are none
    fed: Tensor  # [G, R] bool


class Layout(NamedTuple):
    """What attention needs to know of a Row, for SDPA (spans) and for varlen kernels, whose N sequences are the prompt
    and each response of the first group, then of the next."""

    spans: list[Span]
    keys: Tensor  # [K], row positions of what each sequence may see: a prompt itself, a response its prompt and itself
    q_ends: Tensor  # [N + 1] int32, where the sequences' queries begin and end in the row
    k_ends: Tensor  # [N + 1] int32, where their keys do in `keys`
    longest_q: int
    longest_k: int


class Row(NamedTuple):
    """Several groups as one sequence [prompt | response 1 | ... | response G | prompt | ...] of S tokens."""

    input_ids: Tensor  # [1, S]
    position_ids: Tensor  # [3, 1, S]
    is_image_token: Tensor  # [1, S] bool
    pixel_values: Tensor  # [N_patch, D_patch]
    image_grid_thw: Tensor  # [n_images, 3]
    layout: Layout
    predicts: Tensor  # [n], the row position whose output predicts each response token
    targets: Tensor  # [n], those tokens, in the order of the [B, T] response mask


def build_row(groups: list, masked: bool, black: Tensor, merge: int, device) -> Row:
    """Groups -> Row, with the pictures as they are or as the masked view; black[D_patch], merge: see papo.Encoder."""
    ids, positions, images, spans, predicts, targets = [], [], [], [], [], []
    start = 0
    for group in groups:
        prompt, mask, length = group.prompt, group.response_mask.bool(), len(group.prompt)
        steps = torch.arange(max(mask.shape[1] - 1, 0))  # [T - 1]
        fed = steps < mask.sum(1, keepdim=True) - 1  # [G, T - 1]
        index = (start + length - 1 + fed.flatten().cumsum(0).view_as(fed)).masked_fill(~fed, 0)
        spans.append(Span(start, length, index, fed))
        ids += [prompt.input_ids, group.tokens[:, :-1][fed]]
        after = (
            prompt.position_ids.max() + 1 + steps
        )  # a response goes on where its prompt ends, on all three axes
        positions += [prompt.position_ids, after.expand_as(fed)[fed].expand(3, -1)]
        images += [prompt.is_image_token, torch.zeros(int(fed.sum()), dtype=torch.bool)]
        last = torch.full(
            (len(mask), 1), start + length - 1
        )  # the prompt's end predicts every first token
        predicts.append(torch.cat([last, index], 1)[:, : mask.shape[1]][mask])
        targets.append(group.tokens[mask])
        start += length + int(fed.sum())
    seen = [g for g in groups if g.has_image]
    if seen:
        pixel_values = torch.cat(
            [g.masked_pixel_values if masked else g.prompt.pixel_values for g in seen]
        )
        grid = torch.cat([g.prompt.image_grid_thw for g in seen])
    else:  # one black token that goes nowhere: under FSDP no rank may leave out the vision tower
        pixel_values, grid = black.expand(merge**2, -1), torch.tensor([[1, merge, merge]])
    parts = (
        torch.cat(ids)[None],
        torch.cat(positions, 1)[:, None],
        torch.cat(images)[None],
        pixel_values,
        grid,
    )
    parts += (build_layout(spans, device), torch.cat(predicts), torch.cat(targets))
    return Row(*(x.to(device) if isinstance(x, Tensor) else x for x in parts))


def build_layout(spans: list[Span], device) -> Layout:
    """The sequences of a row, from its spans."""
    queries, keys = [], []
    for start, length, index, fed in spans:
        prompt = torch.arange(start, start + length)
        responses = [own for own in (i[f] for i, f in zip(index, fed, strict=True)) if len(own)]
        queries += [length, *map(len, responses)]
        keys += [prompt, *(torch.cat([prompt, own]) for own in responses)]
    n_keys = [len(k) for k in keys]
    ends = [
        torch.tensor([0, *n]).cumsum(0, dtype=torch.int32).to(device) for n in (queries, n_keys)
    ]
    spans = [
        Span(start, length, index.to(device), fed.to(device)) for start, length, index, fed in spans
    ]
    return Layout(spans, torch.cat(keys).to(device), *ends, max(queries), max(n_keys))


@lru_cache
def varlen_kernel(device: str, dtype: torch.dtype):
    """kernel(q[Tq, H, D], k, v[Tk, H_kv, D], q_ends, k_ends, longest_q, longest_k, scale, causal), or None: use SDPA.

    A causal query sees the keys up to the last one from the end it has itself: aligned at the bottom right. flash-attn
    promises that from 2.1 on; torch's kernel does not say, so it is used only where it agrees with SDPA.
    """
    if device != "cuda" or dtype not in (torch.bfloat16, torch.float16):
        return None
    if is_flash_attn_2_available():
        from flash_attn import flash_attn_varlen_func

        return lambda *x, scale, causal: flash_attn_varlen_func(
            *x, softmax_scale=scale, causal=causal
        )
    from torch.nn.attention.varlen import varlen_attn

    shared_heads = "enable_gqa" in inspect.signature(varlen_attn).parameters  # from torch 2.12 on

    def kernel(q, k, v, *lengths, scale, causal):
        extra = {"enable_gqa": True} if shared_heads else {}
        if not shared_heads:
            k, v = (x.repeat_interleave(q.shape[1] // x.shape[1], 1) for x in (k, v))
        return varlen_attn(
            q, k, v, *lengths, scale=scale, window_size=(-1, 0 if causal else -1), **extra
        )

    try:
        good = aligned(kernel, device, dtype)
    except RuntimeError:  # a card or a build without it
        good = False
    if not good:
        warnings.warn(
            "torch's varlen attention is missing or differs from SDPA, which is used: slower",
            stacklevel=2,
        )
    return kernel if good else None


@torch.enable_grad()
def aligned(kernel, device: str, dtype: torch.dtype) -> bool:
    """Whether a varlen kernel and its gradient agree with SDPA on fewer queries than keys: 3 of 7, 4 heads on 2."""
    random, shapes = torch.Generator().manual_seed(0), ((3, 4), (7, 2), (7, 2), (3, 4))
    q, k, v, weight = (
        torch.randn(n, h, 64, generator=random).to(device, dtype).requires_grad_()
        for n, h in shapes
    )
    q_ends, k_ends = (torch.tensor([0, n], dtype=torch.int32, device=device) for n in (3, 7))
    mask = torch.ones(3, 7, dtype=torch.bool, device=device).tril(4)
    heads_first = (x.repeat_interleave(4 // x.shape[1], 1).transpose(0, 1) for x in (q, k, v))
    with torch.autograd.graph.saved_tensors_hooks(
        lambda x: x, lambda x: x
    ):  # not those of a checkpoint around this
        ours = kernel(q, k, v, q_ends, k_ends, 3, 7, scale=0.125, causal=True)
        plain = F.scaled_dot_product_attention(*heads_first, attn_mask=mask, scale=0.125).transpose(
            0, 1
        )
        both = [
            [out, *torch.autograd.grad((out * weight).sum(), (q, k, v))] for out in (ours, plain)
        ]
    # rounding of halves is 0.01, another alignment 1
    return all(bool((a - b).abs().max() < 0.05) for a, b in zip(*both, strict=True))


def shared_prompt_attention(
    module, query, key, value, attention_mask, scaling=None, layout=None, **kwargs
):
    """Attention over a Row without a mask of S x S: query[1, H, S, D], key, value[1, H_kv, S, D] -> [1, S, H, D].

    Without `layout` (prefill, decoding, plain batches) it is transformers' own SDPA attention.
    """
    if layout is None:
        return sdpa_attention_forward(
            module, query, key, value, attention_mask, scaling=scaling, **kwargs
        )
    if kernel := varlen_kernel(query.device.type, query.dtype):
        q, k, v = (x[0].transpose(0, 1) for x in (query, key, value))  # [S, heads, D]
        k, v = k.index_select(0, layout.keys), v.index_select(0, layout.keys)
        return kernel(q, k, v, *layout[2:], scale=scaling, causal=True)[None], None
    if (
        query.is_cuda
    ):  # with fewer heads of keys and a mask CUDA's SDPA would fall back to its slow formula
        key, value = (x.repeat_interleave(query.shape[1] // x.shape[1], 1) for x in (key, value))
    attend = partial(
        F.scaled_dot_product_attention, scale=scaling, enable_gqa=query.shape[1] != key.shape[1]
    )
    parts = []
    for start, length, index, fed in layout.spans:
        q, k, v = (x[:, :, start : start + length] for x in (query, key, value))  # the prompt
        parts.append(attend(q, k, v, is_causal=True)[0].transpose(0, 1))
        if index.numel():
            groups, longest = index.shape
            q_own, k_own, v_own = (
                x[0][:, index].transpose(0, 1) for x in (query, key, value)
            )  # [G, heads, R, D]
            k = torch.cat([k.expand(groups, -1, -1, -1), k_own], 2)
            v = torch.cat([v.expand(groups, -1, -1, -1), v_own], 2)
            causal = torch.ones(longest, length + longest, dtype=torch.bool, device=q.device).tril(
                length
            )
            parts.append(attend(q_own, k, v, attn_mask=causal).transpose(1, 2)[fed])
    return torch.cat(parts)[None], None


def window_attention(
    module, query, key, value, attention_mask, scaling=None, cu_seq_lens_q=None, **kwargs
):
    """The vision tower's: patches attend within their window or image. query, key, value[1, H, S, D] -> [1, S, H, D].

    cu_seq_lens_q[W + 1]: where the windows begin and end. Those of one length make one call of SDPA.
    """
    q, k, v = (x[0].transpose(0, 1) for x in (query, key, value))  # [S, H, D]
    lengths = cu_seq_lens_q.diff()
    if kernel := varlen_kernel(query.device.type, query.dtype):
        ends, longest = cu_seq_lens_q.to(torch.int32), kwargs["max_length_q"]
        return kernel(q, k, v, ends, ends, longest, longest, scale=scaling, causal=False)[
            None
        ], None
    parts, order = [], []
    for n in lengths.unique().tolist():
        index = cu_seq_lens_q[:-1][lengths == n, None] + torch.arange(
            n, device=q.device
        )  # [windows, n]
        part = F.scaled_dot_product_attention(
            *(x[index].transpose(1, 2) for x in (q, k, v)), scale=scaling
        )
        parts.append(part.transpose(1, 2).flatten(0, 1))
        order.append(index.flatten())
    return torch.cat(parts)[torch.cat(order).argsort()][None], None


AttentionInterface.register("shared_prompt", shared_prompt_attention)


# Without its mask function a registered attention gets no mask at all, and left padding is attended, silently.
AttentionMaskInterface.register("shared_prompt", sdpa_mask)


# Only an attention with "flash" in its name is handed all windows at once; any other is called for each in a loop.
AttentionInterface.register("flash_or_sdpa_windows", window_attention)


ATTENTION = {
    "text_config": "shared_prompt",
    "vision_config": "flash_or_sdpa_windows",
}  # for set_attn_implementation


def chunk_log_probs(hidden: Tensor, weight: Tensor, targets: Tensor, temperature: float) -> Tensor:
    logits = (hidden @ weight.t()).float()
    logits /= temperature  # in place: the logits are the peak of memory
    return -F.cross_entropy(logits, targets, reduction="none")


def row_log_probs(self, row: Row, temperature: float) -> Tensor:
    """Log-probs [n] of a row's response tokens. Bound to the model as a method, so that FSDP can wrap it."""
    embeds = self.get_input_embeddings()(row.input_ids)  # [1, S, hidden]
    image = self.model.get_image_features(row.pixel_values, row.image_grid_thw, return_dict=True)
    features = torch.cat(image.pooler_output).to(embeds.dtype)  # [n image tokens, hidden]
    embeds = embeds.masked_scatter(row.is_image_token[..., None].expand_as(embeds), features)
    extra = {}
    if hasattr(
        image, "deepstack_features"
    ):  # Qwen3-VL: more image features, added to the first layers
        levels = [
            x if isinstance(x, Tensor) else torch.cat(x) for x in image.deepstack_features
        ]  # a tensor up to 5.17
        extra = dict(visual_pos_masks=row.is_image_token, deepstack_visual_embeds=levels)
    hidden = self.model.language_model(
        inputs_embeds=embeds,
        position_ids=row.position_ids,
        use_cache=False,
        layout=row.layout,
        **extra,
    ).last_hidden_state[0]
    weight = self.lm_head.weight
    chunks = zip(hidden[row.predicts].split(CHUNK), row.targets.split(CHUNK), strict=True)
    return torch.cat(
        [
            checkpoint(chunk_log_probs, h, weight, t, temperature, use_reentrant=False)
            for h, t in chunks
        ]
    )
