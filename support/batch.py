"""What a batch is made of: an Example (data), its Prompt (tensors) and the Group of its responses.

A group, one prompt and its G responses, is the unit everywhere: of sampling, masking, filtering and
packing. Groups never travel between ranks. To compute log-probs, whole groups are put into a pack,
one long sequence: the prompt once, then its responses, hidden from one another.

Shapes: P = prompt tokens, G = responses per prompt, B = responses of several groups, T = response
positions (right-padded), N_patch = patches of all images of a prompt, D_patch = values per patch.
"""

from __future__ import annotations

import hashlib
import math
from dataclasses import dataclass, field

import torch
from PIL import Image
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from support.distributed import concat_over_ranks


@dataclass
class Example:
    """One row of data. `<image>` markers in the question say where the images go."""

    question: str
    answer: str
    images: list[Image.Image]  # RGB, one per marker, in order
    id: str = ""
    # Further image columns, each as long as `images`: images_aug, if the data has images masked
    # beforehand (see masking.mask_prompt), and those of Algo.image_columns.
    more_images: dict[str, list[Image.Image]] = field(default_factory=dict)
    columns: dict = field(default_factory=dict)  # the row's further columns

    def as_row(self) -> dict:
        """What a reward with a parameter `row` is given."""
        names = ("question", "answer", "images", "id")
        return self.columns | {name: getattr(self, name) for name in names}


@dataclass
class Prompt:
    """An example as the model reads it."""

    example: Example
    input_ids: Tensor  # [P], image placeholders expanded to one token per merged patch
    position_ids: Tensor  # [3, P]: time, height, width (M-RoPE)
    is_image_token: Tensor  # [P] bool, where image features replace embeddings
    pixel_values: Tensor | None = None  # [N_patch, D_patch]
    image_grid_thw: Tensor | None = None  # [n_images, 3], patches per axis
    # Position among the prompts of all rounds of a step, the same on any number of ranks; in an
    # evaluation the number of the data row.
    index: int = 0
    # Example.more_images on the same grid, [N_patch, D_patch] each.
    more_pixel_values: dict[str, Tensor] = field(default_factory=dict)

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
    old_log_probs: Tensor | None = None  # [G, T]; None where not recorded: pi_old = pi
    ref_log_probs: Tensor | None = None  # [G, T]
    weights: Tensor | None = None  # [G, T], factors of the advantages: see Algo.weigh
    # By name of a view of the image ("mask" is PAPO's), the same for the whole group:
    view_pixel_values: dict[str, Tensor] = field(default_factory=dict)  # [N_patch, D_patch]
    view_log_probs: dict[str, Tensor] = field(default_factory=dict)  # [G, T]

    @property
    def masked_log_probs(self) -> Tensor | None:
        """Under PAPO's masked view, [G, T], for a variant's `weigh`. None without an image, or if
        Algo.views() has no "mask"."""
        return self.view_log_probs.get("mask")

    @property
    def has_image(self) -> bool:
        return self.prompt.pixel_values is not None

    @property
    def owner(self) -> Tensor:
        """For each token that the model is fed: 0 if it is the prompt's, i if the i-th response's.

        It tells which tokens may see each other. The last token of a response is not fed, because
        nothing is predicted from it."""
        fed = (self.response_mask.sum(1) - 1).clamp(min=0)
        lengths = torch.cat([torch.tensor([len(self.prompt)]), fed])
        return torch.arange(len(lengths)).repeat_interleave(lengths)

    @property
    def n_tokens(self) -> int:
        """How many tokens the model is fed."""
        return len(self.owner)


def dummy_group() -> Group:
    """A pack for a rank that has no group left while others have: two tokens of text, and one
    response that is all padding, so it counts for nothing. It has the fields that packs need."""
    zero = torch.zeros(1, 1)
    two = torch.arange(2)
    return Group(
        prompt=Prompt(Example("", "", []), two, two.expand(3, -1), torch.zeros(2).bool()),
        tokens=zero.long(),
        response_mask=zero.bool(),
        truncated=torch.zeros(1, dtype=torch.bool),
        sample_log_probs=zero,
        responses=[""],
        advantages=torch.zeros(1),
        ref_log_probs=zero,
    )


def mini_batches(groups: list[Group], size: int) -> list[list[Group]]:
    """This rank's share of each mini-batch of `size` prompts.

    The indices of all ranks' prompts, sorted, are cut into mini-batches. So the assignment does not
    depend on the number of ranks, and no group has to move.
    """
    indices = set(concat_over_ranks([group.prompt.index for group in groups]))
    batch_of = {index: i // size for i, index in enumerate(sorted(indices))}
    batches = [[] for _ in range(math.ceil(len(indices) / size))]
    for group in groups:
        batches[batch_of[group.prompt.index]].append(group)
    return batches


def responses_with_image(groups: list[Group]) -> Tensor:
    """Whether each response's prompt has an image, [B] bool."""
    return torch.tensor([group.has_image for group in groups for _ in group.tokens])


def pad_and_cat(groups: list[Group], name: str, device="cpu") -> Tensor:
    """A field [G, T] of every group as one tensor [B, T], right-padded with zeros."""
    return stack_padded([getattr(group, name) for group in groups], device)


def cat_view(groups: list[Group], view: str, device="cpu") -> Tensor:
    """The log-probs recorded under a view, [B, T]. Groups without an image have none, and get 0."""
    tensors = [
        group.view_log_probs[view] if group.has_image else torch.zeros(group.tokens.shape)
        for group in groups
    ]
    return stack_padded(tensors, device)


def stack_padded(tensors: list[Tensor], device="cpu") -> Tensor:
    """Tensors [G, T] as one tensor [B, T], right-padded with zeros."""
    rows = [row for tensor in tensors for row in tensor]
    return pad_sequence(rows, batch_first=True).to(device)


def seeded(*key) -> torch.Generator:
    """A CPU generator that depends on `key` alone: the same numbers on any rank, in any order and
    after any resume."""
    digest = hashlib.blake2b(repr(key).encode(), digest_size=8).digest()
    seed_of_63_bits = int.from_bytes(digest, "little") >> 1
    return torch.Generator().manual_seed(seed_of_63_bits)
