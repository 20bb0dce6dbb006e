"""Groups -> log-probs, fast: a prompt's responses in one row behind one copy of the prompt, and logits in chunks.

The plain way gives each of G responses its own copy of prompt and picture. Here a row is
[prompt | response 1 | ... | response G | next prompt | ...]: a response attends to its prompt and itself, the picture
is encoded once, nothing is padded, and the log-probs and gradients are those of the plain way (tests/test_papo.py).

A file of its own because it is the one place where training touches young interfaces of transformers (registered
attention, image features, positions handed in), and where kernels are chosen. The method can be read without it.
Groups are papo.Group; this file imports no module of ours.
"""

from __future__ import annotations

from functools import partial
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.checkpoint import checkpoint
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

CHUNK = 256  # response tokens whose logits exist at one time: 256 x 151,936 in fp32 is 148 MiB


class Span(NamedTuple):
    """Where a group lies in its row: the prompt at [start, start + length), the fed response tokens behind it."""

    start: int
    length: int  # P
    index: Tensor  # [G, R], row positions of the response tokens fed (all but the last), 0 where there are none
    fed: Tensor  # [G, R] bool


class Row(NamedTuple):
    """Several groups as one sequence [prompt | response 1 | ... | response G | prompt | ...] of S tokens."""

    input_ids: Tensor  # [1, S]
    position_ids: Tensor  # [3, 1, S]
    image_mask: Tensor  # [1, S] bool
    pixel_values: Tensor  # [N_patch, D_patch]
    image_grid_thw: Tensor  # [n_images, 3]
    spans: list[Span]
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
        spans.append(Span(start, length, index.to(device), fed.to(device)))
        ids += [prompt.input_ids, group.tokens[:, :-1][fed]]
        after = prompt.position_ids.max() + 1 + steps  # a response goes on where its prompt ends, on all three axes
        positions += [prompt.position_ids, after.expand_as(fed)[fed].expand(3, -1)]
        images += [prompt.image_mask, torch.zeros(int(fed.sum()), dtype=torch.bool)]
        last = torch.full((len(mask), 1), start + length - 1)  # the prompt's end predicts every first token
        predicts.append(torch.cat([last, index], 1)[:, : mask.shape[1]][mask])
        targets.append(group.tokens[mask])
        start += length + int(fed.sum())
    seen = [g for g in groups if g.has_image]
    if seen:
        pixel_values = torch.cat([g.masked_pixel_values if masked else g.prompt.pixel_values for g in seen])
        grid = torch.cat([g.prompt.image_grid_thw for g in seen])
    else:  # one black token that goes nowhere: under FSDP no rank may leave out the vision tower
        pixel_values, grid = black.expand(merge**2, -1), torch.tensor([[1, merge, merge]])
    parts = (torch.cat(ids)[None], torch.cat(positions, 1)[:, None], torch.cat(images)[None], pixel_values, grid)
    parts += (spans, torch.cat(predicts), torch.cat(targets))
    return Row(*(x.to(device) if isinstance(x, Tensor) else x for x in parts))


def shared_prompt_attention(module, query, key, value, attention_mask, scaling=None, spans=None, **kwargs):
    """Attention over a Row without a mask of S x S: query[1, H, S, D], key, value[1, H_kv, S, D] -> [1, S, H, D].

    Without `spans` (prefill, decoding, plain batches) it is transformers' own SDPA attention.
    """
    if spans is None:
        return sdpa_attention_forward(module, query, key, value, attention_mask, scaling=scaling, **kwargs)
    attend = partial(F.scaled_dot_product_attention, scale=scaling, enable_gqa=query.shape[1] != key.shape[1])
    parts = []
    for start, length, index, fed in spans:
        q, k, v = (x[:, :, start : start + length] for x in (query, key, value))  # the prompt
        parts.append(attend(q, k, v, is_causal=True)[0].transpose(0, 1))
        if index.numel():
            groups, longest = index.shape
            q_own, k_own, v_own = (x[0][:, index].transpose(0, 1) for x in (query, key, value))  # [G, heads, R, D]
            k = torch.cat([k.expand(groups, -1, -1, -1), k_own], 2)
            v = torch.cat([v.expand(groups, -1, -1, -1), v_own], 2)
            causal = torch.ones(longest, length + longest, dtype=torch.bool, device=q.device).tril(length)
            parts.append(attend(q_own, k, v, attn_mask=causal).transpose(1, 2)[fed])
    return torch.cat(parts)[None], None


AttentionInterface.register("shared_prompt", shared_prompt_attention)
# Without its mask function a registered attention gets no mask at all, and left padding is attended, silently.
AttentionMaskInterface.register("shared_prompt", sdpa_mask)


def chunk_log_probs(hidden: Tensor, weight: Tensor, targets: Tensor, temperature: float) -> Tensor:
    return -F.cross_entropy((hidden @ weight.t()).float() / temperature, targets, reduction="none")


def row_log_probs(self, row: Row, temperature: float) -> Tensor:
    """Log-probs [n] of a row's response tokens. Bound to the model as a method, so that FSDP can wrap it."""
    embeds = self.get_input_embeddings()(row.input_ids)  # [1, S, hidden]
    image = self.model.get_image_features(row.pixel_values, row.image_grid_thw, return_dict=True)
    features = torch.cat(image.pooler_output).to(embeds.dtype)  # [n image tokens, hidden]
    embeds = embeds.masked_scatter(row.image_mask[..., None].expand_as(embeds), features)
    extra = {}
    if hasattr(image, "deepstack_features"):  # Qwen3-VL: more image features, added to the first layers
        levels = [torch.cat(list(level)) for level in image.deepstack_features]
        extra = dict(visual_pos_masks=row.image_mask, deepstack_visual_embeds=levels)
    hidden = self.model.language_model(
        inputs_embeds=embeds, position_ids=row.position_ids, use_cache=False, spans=row.spans, **extra
    ).last_hidden_state[0]
    weight = self.lm_head.weight
    chunks = zip(hidden[row.predicts].split(CHUNK), row.targets.split(CHUNK), strict=True)
    return torch.cat([checkpoint(chunk_log_probs, h, weight, t, temperature, use_reentrant=False) for h, t in chunks])
