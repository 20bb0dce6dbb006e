"""What a batch is made of: an example, the prompt made of it, the group of its responses; and padding them into tensors."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass, field

import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor


@dataclass
class Example:
    """One row of data. `<image>` markers in the question say where the images go."""

    question: str
    answer: str
    images: list[Image.Image]  # RGB, one a marker, in order
    images_aug: list[Image.Image] | None = None  # pre-masked images, used instead of random masks
    id: str = ""


@dataclass
class Prompt:
    """An example as the model reads it: P tokens, N_patch patches of all its images."""

    example: Example
    input_ids: Tensor  # [P], each image placeholder expanded to its number of tokens
    position_ids: Tensor  # [3, P], time, height, width (mrope)
    is_image_token: Tensor  # [P] bool, where the image features go
    pixel_values: Tensor | None = None  # [N_patch, D_patch]
    image_grid_thw: Tensor | None = None  # [n_images, 3]
    aug_pixel_values: Tensor | None = None  # [N_patch, D_patch], from Example.images_aug
    index: int = 0  # place among the step's prompts, the same on any number of ranks

    def __len__(self) -> int:
        return len(self.input_ids)


@dataclass
class Group:
    """One prompt and its G responses of at most T tokens: the unit of masking, advantages, filtering and packing."""

    prompt: Prompt
    tokens: Tensor  # [G, T], right-padded
    response_mask: Tensor  # [G, T] bool, the first end token included
    truncated: Tensor  # [G] bool, ran into max_new_tokens
    sample_log_probs: (
        Tensor  # [G, T], the sampler's, of the full softmax; for checks, training recomputes them
    )
    responses: list[str] = field(default_factory=list)  # G decoded texts
    advantages: Tensor | None = None  # [G]
    masked_pixel_values: Tensor | None = None  # [N_patch, D_patch], one mask for the whole group
    patch_mask: Tensor | None = None  # [N_patch] bool, the patches the mask changed
    old_log_probs: Tensor | None = (
        None  # [G, T], as the next two; None: one update is all, so its own are the old ones
    )
    ref_log_probs: Tensor | None = None
    masked_log_probs: Tensor | None = None

    @property
    def has_image(self) -> bool:
        return self.prompt.pixel_values is not None

    @property
    def n_tokens(self) -> int:
        """Tokens of the packed row: the prompt once, each response but its last token."""
        return len(self.prompt) + int((self.response_mask.sum(1) - 1).clamp(min=0).sum())


def empty_group() -> Group:
    """Two prompt tokens and nothing else: what a rank without groups feeds so as to run as many rows as the others."""
    nothing, positions = torch.zeros(1, 0), torch.arange(2).expand(3, -1)
    prompt = Prompt(
        Example("", "", []),
        torch.zeros(2, dtype=torch.long),
        positions,
        torch.zeros(2, dtype=torch.bool),
    )
    return Group(
        prompt, nothing.long(), nothing.bool(), torch.zeros(1, dtype=torch.bool), nothing, [""], torch.zeros(1),
        old_log_probs=nothing, ref_log_probs=nothing, masked_log_probs=nothing,
    )  # fmt: skip


def pad_and_cat(groups: list[Group], name: str, device="cpu") -> Tensor:
    """A field [G, T] of every group, right-padded to one [B, T]."""
    tensors = [getattr(group, name) for group in groups]
    width = max(t.shape[1] for t in tensors)
    return torch.cat([F.pad(t, (0, width - t.shape[1])) for t in tensors]).to(device)


def seeded(*key) -> torch.Generator:
    """A CPU generator that depends on the key alone: the same draw on any rank, in any order, after any resume."""
    digest = hashlib.blake2b(repr(key).encode(), digest_size=8).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest, "little") >> 1)
