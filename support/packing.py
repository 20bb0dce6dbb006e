"""Log-probs of groups, fast: one copy of the prompt per group, logits in chunks.

The straightforward forward gives each of a group's G responses its own copy of prompt and image.
Here a group is one sequence:

    position   0 1 2 3 4 5 6 7 8 9
    token      P P P P a a a b b c      prompt P, fed tokens of responses a, b and c
    owner      0 0 0 0 1 1 1 2 2 3      a token sees the prompt and its own response, up to itself

Position ids restart after the prompt for every response, so each token sees exactly what it would
see alone: log-probs and gradients equal those of padded rows (tests/test_papo.py). The last token
of a response predicts nothing and is not fed. The image is encoded once per group. Several groups,
one after the other, make a pack; none sees another.

On CUDA in half precision the rule becomes calls of a varlen attention kernel (flash-attn where it
imports, else torch's own). Elsewhere it is a mask for SDPA.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cache, cached_property
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention.varlen import varlen_attn
from torch.utils.checkpoint import checkpoint
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

from support.batch import Group, dummy_group
from support.distributed import max_over_ranks

# Response tokens whose logits exist at a time: 256 x 151,936 in fp32 take 148 MiB.
CHUNK = 256


# -------------------------------------------------------------------------------- groups into packs


def make_packs(groups: list[Group], max_tokens: int) -> list[list[Group]]:
    """Packs of at most `max_tokens` tokens, as many on every rank as on the rank with the most.

    Each forward is a collective, so a rank with fewer packs feeds dummies.
    """
    packs = split_into_packs(groups, max_tokens)
    missing = int(max_over_ranks(len(packs))) - len(packs)
    return packs + [[dummy_group()] for _ in range(missing)]


def split_into_packs(groups: list[Group], max_tokens: int) -> list[list[Group]]:
    """Split groups, in order, into packs of at most `max_tokens`; a larger group gets its own."""
    packs: list[list[Group]] = []
    room = 0
    for group in groups:
        if not packs or group.n_tokens > room:
            packs.append([])
            room = max_tokens
        packs[-1].append(group)
        room -= group.n_tokens
    return packs


class Pack(NamedTuple):
    """Several groups, one after the other: S tokens."""

    input_ids: Tensor  # [1, S]
    position_ids: Tensor  # [3, 1, S]
    is_image_token: Tensor  # [1, S] bool
    images: tuple[Tensor, Tensor] | None  # patches [N_patch, D_patch], grids [n_images, 3]
    attend: PackAttention  # who sees whom
    predicts: Tensor  # [n], pack positions whose outputs predict the n response tokens
    targets: Tensor  # [n], those tokens, in the order of the [B, T] response mask


def build_pack(groups: list[Group], view: str, device) -> Pack:
    """Groups -> Pack. view: of the images, if not they themselves."""
    ids, positions, image_tokens, predicts, targets = [], [], [], [], []
    start = 0
    for group in groups:
        prompt, mask = group.prompt, group.response_mask.bool()  # [G, T]
        fed = mask[:, 1:]  # where a token is fed to predict the next one
        n_fed = int(fed.sum())
        after_prompt = prompt.position_ids.max() + 1 + torch.arange(fed.shape[1])
        ids += [prompt.input_ids, group.tokens[:, :-1][fed]]
        positions += [prompt.position_ids, after_prompt.expand_as(fed)[fed].expand(3, -1)]
        image_tokens.append(F.pad(prompt.is_image_token, (0, n_fed)))
        # The prompt's last position predicts every first token.
        predictor = torch.full(mask.shape, len(prompt) - 1)
        predictor[:, 1:][fed] = len(prompt) + torch.arange(n_fed)
        predicts.append(start + predictor[mask])
        targets.append(group.tokens[mask])
        start += len(prompt) + n_fed
    return Pack(
        input_ids=torch.cat(ids)[None].to(device),
        position_ids=torch.cat(positions, 1)[:, None].to(device),
        is_image_token=torch.cat(image_tokens)[None].to(device),
        images=_images([group for group in groups if group.has_image], view, device),
        attend=PackAttention([group.owner for group in groups], device),
        predicts=torch.cat(predicts).to(device),
        targets=torch.cat(targets).to(device),
    )


def _images(groups: list[Group], view: str, device) -> tuple[Tensor, Tensor] | None:
    """Patches and grids of the groups' images, or of a view of them."""
    if not groups:
        return None
    patches = [
        group.view_pixel_values[view] if view else group.prompt.pixel_values for group in groups
    ]
    grids = [group.prompt.image_grid_thw for group in groups]
    # Joined on the device: on the host, joining the patches takes longer than the forward.
    return torch.cat([each.to(device) for each in patches]), torch.cat(grids).to(device)


# ---------------------------------------------------------------------------------------- attention


class PackAttention:
    """Attention over a pack of groups by the rule above. owners: those of each group's tokens."""

    def __init__(self, owners: list[Tensor], device):
        self.owners = owners
        self.lengths = [len(owner) for owner in owners]
        self.device = device
        self.masks: list[Tensor] = []

    def __call__(self, layer: int, query: Tensor, key: Tensor, value: Tensor, scale: float):
        """query[1, H, S, D], key and value[1, H_kv, S, D] -> [1, S, H, D]."""
        if kernel := varlen_kernel(query):
            keys, *boundaries = self.sequences
            q, k, v = (x[0].transpose(0, 1) for x in (query, key, value))  # [S, heads, D]
            k, v = k.index_select(0, keys), v.index_select(0, keys)
            return kernel(q, k, v, *boundaries, scale=scale, causal=True)[None]
        self.masks = self.masks or [self._mask(owner, query.dtype) for owner in self.owners]
        # The query heads that share a key head become a batch with one view of it, which no kernel
        # has to copy: [H_kv, H / H_kv, S, D] and [H_kv, 1, S, D].
        query = query[0].unflatten(0, (key.shape[1], -1))
        key, value = key[0][:, None], value[0][:, None]
        # split, because the backward of a slice fills a tensor of the whole pack.
        groups = zip(
            *(x.split(self.lengths, 2) for x in (query, key, value)), self.masks, strict=True
        )
        attended = [
            F.scaled_dot_product_attention(
                q, k.expand_as(q), v.expand_as(q), attn_mask=mask, scale=scale
            )
            for q, k, v, mask in groups
        ]
        return torch.cat(attended, 2).flatten(0, 1).transpose(0, 1)[None]

    def _mask(self, owner: Tensor, dtype: torch.dtype) -> Tensor:
        """[S, S] of one group: 0 where the query (down) sees the key (across), else -inf."""
        owner = owner.to(self.device)
        sees = ((owner == 0) | (owner == owner[:, None])).tril()
        mask = torch.zeros(sees.shape, dtype=dtype, device=self.device)
        return mask.masked_fill(~sees, -torch.inf)  # not bool: SDPA would convert it in every layer

    @cached_property
    def sequences(self) -> tuple[Tensor, Tensor, Tensor, int, int]:
        """The pack as a varlen kernel takes it: each prompt and each response is a sequence.

        Its queries lie in the pack as they are. A response's keys are its prompt and itself; causal
        means aligned at the end, where the last query sees the last key. Returns pack positions of
        the keys, and boundaries of queries and keys and the longest of each.
        """
        query_lengths, keys = [], []
        start = 0
        for owner in self.owners:
            lengths = owner.unique_consecutive(return_counts=True)[1].tolist()
            positions = torch.arange(start, start + len(owner))
            prompt, *responses = positions.split(lengths)
            keys += [prompt] + [torch.cat([prompt, response]) for response in responses]
            query_lengths += lengths
            start += len(owner)
        key_lengths = [len(sequence) for sequence in keys]
        ends = [
            torch.tensor([0, *lengths]).cumsum(0, dtype=torch.int32).to(self.device)
            for lengths in (query_lengths, key_lengths)
        ]
        return torch.cat(keys).to(self.device), *ends, max(query_lengths), max(key_lengths)


def varlen_kernel(query: Tensor) -> Callable | None:
    """The attention kernel for sequences of unequal length, or None where SDPA must do.

    kernel(q[Tq, H, D], k, v[Tk, H_kv, D], q_ends, k_ends, longest_q, longest_k, scale, causal).
    """
    is_half = query.dtype in (torch.bfloat16, torch.float16)
    if not query.is_cuda or not is_half or not _has_flash_attention():
        return None
    return _import_flash_attn() or _torch_varlen_attention


@cache
def _has_flash_attention() -> bool:
    """FlashAttention-2 needs an Ampere GPU or newer (no T4, no V100) and a CUDA build of torch."""
    return bool(torch.version.cuda) and torch.cuda.get_device_capability() >= (8, 0)


@cache
def _import_flash_attn() -> Callable | None:
    try:
        from flash_attn import flash_attn_varlen_func
    except ImportError:  # not installed, or built for another torch
        return None

    def attend(*tensors_and_lengths, scale, causal):
        return flash_attn_varlen_func(*tensors_and_lengths, softmax_scale=scale, causal=causal)

    return attend


def _torch_varlen_attention(*tensors_and_lengths, scale: float, causal: bool) -> Tensor:
    window = (-1, 0 if causal else -1)
    return varlen_attn(*tensors_and_lengths, scale=scale, window_size=window, enable_gqa=True)


def text_attention(module, query, key, value, attention_mask, scaling=None, attend=None, **kwargs):
    """The language model's attention, as `attend` says; without it, transformers' own.

    attend(layer, query[B, H, S, D], key, value[B, H_kv, S, D], scale) -> [B, S, H, D].
    """
    if attend is None:
        return sdpa_attention_forward(
            module, query, key, value, attention_mask, scaling=scaling, **kwargs
        )
    return attend(module.layer_idx, query, key, value, scaling), None


def window_attention(
    module, query, key, value, attention_mask, scaling=None, cu_seq_lens_q=None, **kwargs
):
    """The vision tower's attention: patches attend within their window, or within their image.

    query, key, value[1, H, S, D] -> [1, S, H, D]. cu_seq_lens_q[W + 1]: the windows' boundaries.
    Without a varlen kernel there is a call of SDPA per window.
    """
    q, k, v = (x[0].transpose(0, 1) for x in (query, key, value))  # [S, H, D]
    if kernel := varlen_kernel(query):
        ends, longest = cu_seq_lens_q.to(torch.int32), kwargs["max_length_q"]
        out = kernel(q, k, v, ends, ends, longest, longest, scale=scaling, causal=False)
        return out[None], None
    lengths = cu_seq_lens_q.diff().tolist()
    windows = zip(*(x.split(lengths, 2) for x in (query, key, value)), strict=True)
    attended = [F.scaled_dot_product_attention(*window, scale=scaling) for window in windows]
    return torch.cat(attended, 2).transpose(1, 2), None


AttentionInterface.register("group", text_attention)
# transformers passes no mask to a custom attention unless its mask function is registered too;
# without one, left padding would be attended silently.
AttentionMaskInterface.register("group", sdpa_mask)
# Only an attention with "flash" in its name gets all windows in one call; any other is called once
# per window.
AttentionInterface.register("flash_or_sdpa_windows", window_attention)
# For model.set_attn_implementation.
ATTENTION = {"text_config": "group", "vision_config": "flash_or_sdpa_windows"}


# ---------------------------------------------------------------------------------------- log-probs


def pack_log_probs(self, pack: Pack, temperature: float, entropies: bool = False) -> Tensor:
    """Log-probs [n] of a pack's response tokens, or the entropies of their distributions.

    `self` is the transformers model. Logits exist for CHUNK tokens at a time, in the forward and
    again in the backward.
    """
    hidden = pack_hidden_states(self, pack)
    values = []
    chunks = zip(hidden[pack.predicts].split(CHUNK), pack.targets.split(CHUNK), strict=True)
    for states, targets in chunks:
        inputs = (states, self.lm_head.weight, targets, temperature, entropies)
        values.append(checkpoint(_chunk_values, *inputs, use_reentrant=False))
    return torch.cat(values)


def pack_hidden_states(self, pack: Pack, watch: Callable | None = None) -> Tensor:
    """The last layer's outputs [S, hidden]. `self` is the transformers model.

    watch: called by each layer with the arguments of pack.attend, before it.
    """

    def attend(*inputs):
        if watch:
            watch(*inputs)
        return pack.attend(*inputs)

    embeds = self.get_input_embeddings()(pack.input_ids)  # [1, S, hidden]
    # Under FSDP no rank may skip the vision tower. Nothing reads the features of a blank image.
    images = pack.images or blank_image(self.model.visual, embeds.device)
    image = self.model.get_image_features(*images, return_dict=True)
    features = torch.cat(image.pooler_output).to(embeds.dtype)  # [image tokens, hidden]
    where = pack.is_image_token[..., None].expand_as(embeds)
    more = {}
    if hasattr(image, "deepstack_features"):  # Qwen3-VL adds these in its first layers
        levels = [torch.cat(level) for level in image.deepstack_features]
        more = {"visual_pos_masks": pack.is_image_token, "deepstack_visual_embeds": levels}
    return self.model.language_model(
        inputs_embeds=embeds.masked_scatter(where, features),
        position_ids=pack.position_ids,
        use_cache=False,
        attend=attend,
        **more,
    ).last_hidden_state[0]


def blank_image(visual, device) -> tuple[Tensor, Tensor]:
    """Patches and grid of one image token."""
    embed, merge = visual.patch_embed, visual.spatial_merge_size
    patch = torch.zeros(embed.in_channels * embed.temporal_patch_size * embed.patch_size**2)
    return patch.expand(merge**2, -1).to(device), torch.tensor([[1, merge, merge]]).to(device)


def _chunk_values(
    hidden: Tensor, weight: Tensor, targets: Tensor, temperature: float, entropies: bool
) -> Tensor:
    logits = (hidden @ weight.t()).float()
    logits /= temperature  # in place: the logits are the peak of memory
    if not entropies:
        return -F.cross_entropy(logits, targets, reduction="none")
    log_probs = logits.log_softmax(-1)
    return -(log_probs.exp() * log_probs).sum(-1)
