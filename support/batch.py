"""What a batch is made of: an Example (data), its Prompt (tensors) and the Group of its responses.

A group, one prompt and its G responses, is the unit everywhere: of masking, advantages, dynamic
sampling and packing. Groups never travel between ranks.

Shapes: P = prompt tokens, G = responses per prompt, T = response positions (right-padded),
N_patch = patches of all images of a prompt, D_patch = values per patch.
"""

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
    images: list[Image.Image]  # RGB, one per marker, in order
    images_aug: list[Image.Image] | None = None  # pre-masked images, used instead of random masks
    id: str = ""


@dataclass
class Prompt:
    """An example as the model reads it."""

    example: Example
    input_ids: Tensor  # [P], image placeholders expanded to one token per merged patch
    position_ids: Tensor  # [3, P]: time, height, width (M-RoPE)
    is_image_token: Tensor  # [P] bool, where image features replace embeddings
    pixel_values: Tensor | None = None  # [N_patch, D_patch]
    image_grid_thw: Tensor | None = None  # [n_images, 3], patches per axis
    aug_pixel_values: Tensor | None = None  # [N_patch, D_patch], from Example.images_aug
    index: int = 0  # position among the step's prompts, the same on any number of ranks

    def __len__(self) -> int:
        return len(self.input_ids)


@dataclass
class Group:
    """One prompt and its G responses. rollout.py fills the first block, train.py and papo.py the
    rest."""

    prompt: Prompt
    tokens: Tensor  # [G, T]
    response_mask: Tensor  # [G, T] bool, True up to and including the first end token
    truncated: Tensor  # [G] bool, cut at max_new_tokens
    sample_log_probs: Tensor  # [G, T], the sampler's; for checks only, training recomputes them
    responses: list[str] = field(default_factory=list)  # G decoded texts

    rewards: Tensor | None = None  # [G]
    advantages: Tensor | None = None  # [G]
    masked_pixel_values: Tensor | None = None  # [N_patch, D_patch], one mask for the whole group
    patch_mask: Tensor | None = None  # [N_patch] bool, the patches that the mask changed
    old_log_probs: Tensor | None = None  # [G, T]; None where a step makes a single update
    ref_log_probs: Tensor | None = None  # [G, T]
    masked_log_probs: Tensor | None = None  # [G, T]

    @property
    def has_image(self) -> bool:
        return self.prompt.pixel_values is not None

    @property
    def n_tokens(self) -> int:
        """Tokens of the group's packed row: the prompt once, each response but its last token."""
        fed = (self.response_mask.sum(1) - 1).clamp(min=0)
        return len(self.prompt) + int(fed.sum())


def empty_group(prompt: Prompt | None = None) -> Group:
    """A group with an empty response: a prompt alone in its row.

    Without a prompt, two tokens stand in. Under FSDP every forward is a collective, so a rank that
    has fewer rows than the others must feed something.
    """
    nothing = torch.zeros(1, 0)
    if prompt is None:
        prompt = Prompt(
            example=Example("", "", []),
            input_ids=torch.zeros(2, dtype=torch.long),
            position_ids=torch.arange(2).expand(3, -1),
            is_image_token=torch.zeros(2, dtype=torch.bool),
        )
    return Group(
        prompt=prompt,
        tokens=nothing.long(),
        response_mask=nothing.bool(),
        truncated=torch.zeros(1, dtype=torch.bool),
        sample_log_probs=nothing,
        responses=[""],
        advantages=torch.zeros(1),
        old_log_probs=nothing,
        ref_log_probs=nothing,
        masked_log_probs=nothing,
    )


def pad_and_cat(groups: list[Group], name: str, device="cpu") -> Tensor:
    """A field [G, T] of every group as one tensor [B, T], right-padded with zeros."""
    tensors = [getattr(group, name) for group in groups]
    width = max(tensor.shape[1] for tensor in tensors)
    padded = [F.pad(tensor, (0, width - tensor.shape[1])) for tensor in tensors]
    return torch.cat(padded).to(device)


def seeded(*key) -> torch.Generator:
    """A CPU generator that depends on `key` alone: the same numbers on any rank, in any order and
    after any resume."""
    digest = hashlib.blake2b(repr(key).encode(), digest_size=8).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest, "little") >> 1)
