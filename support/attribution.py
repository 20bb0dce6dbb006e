"""Per-token and per-patch image attribution of one response, for evaluate.py --explain."""

from __future__ import annotations

import itertools
import json
import math
from collections.abc import Iterable
from dataclasses import replace
from pathlib import Path

import torch
from torch import Tensor
from tqdm import tqdm

from support import attribution_figures, pages
from support.attribution_figures import Attribution
from support.batch import Group
from support.pages import CellDrops
from support.qwen_vl import Encoder, Policy
from support.reward import boxed

MASK_SETTINGS = ("mask_ratio", "mask_strategy", "mask_sigma")
HEAT_TITLE = "drop of the response's log-prob when a cell alone is black"


def mask_settings(model: str) -> dict:
    """The mask_* settings a model was trained with; {} if unknown.

    They are in the config.json of the run that an exported model/ folder lies in.
    """
    path = Path(model).parent / "config.json"
    config = json.loads(path.read_text()) if path.is_file() else {}
    return {name: config[name] for name in MASK_SETTINGS if name in config}


@torch.no_grad()
def explain(policy: Policy, group: Group, views: list, heat_patches: int, out: str) -> None:
    """Draw each token's log-prob under the image minus its mean under masked views; and, for each
    cell of the image, the drop in the tokens' log-probs when only that cell is black.

    group: one response. views: (pixels, patch_mask) of each mask.
    """
    [clean] = log_probs(policy, group, [group.prompt.pixel_values])  # [T]
    progress = tqdm([pixels for pixels, _ in views], desc="masks", leave=False)
    masked = log_probs(policy, group, progress).mean(0)
    drops = cell_drops(policy, group, clean, heat_patches)
    draw(policy.encoder, group, views[0][1], clean, masked, drops, out)
    print(f"perception gain: {(clean - masked).mean():.3f} per token, over {len(views)} masks")


def log_probs(policy: Policy, group: Group, views: Iterable[Tensor]) -> Tensor:
    """Log-probs [n_views, T] of a group's only response, each view in place of its image.

    views: pixel_values[N_patch, D_patch] each. They are drawn as they are needed: a forward holds
    as many as policy.tokens_per_forward allows.
    """
    per_forward = max(1, policy.tokens_per_forward // group.n_tokens)
    remaining = iter(views)
    parts = []
    while chunk := list(itertools.islice(remaining, per_forward)):
        copies = [replace(group, view_pixel_values={"mask": view}) for view in chunk]
        parts.append(policy.log_probs(copies, "mask").cpu())
    return torch.cat(parts)


def cell_drops(policy: Policy, group: Group, clean: Tensor, max_cells: int) -> list[CellDrops]:
    """How much the log-prob of each token drops when one cell of an image alone is black.

    A cell is one image token, or a square of several where the images have more than `max_cells`
    tokens; cells at the right and lower edge may be smaller. clean[T]: the log-probs under the
    whole image. Returns the drops of each image.
    """
    encoder, pixel_values = policy.encoder, group.prompt.pixel_values
    grids = token_grids(encoder, group)
    side = cell_side(grids, max_cells)
    cells = cells_of(grids, side)
    print(f"heat map: {len(cells)} views, each without one cell of {side} x {side} image tokens")
    progress = tqdm(cells, desc="heat map", leave=False)
    views = (black_out(encoder, pixel_values, cell) for cell in progress)
    drops = clean - log_probs(policy, group, views)
    sizes = [(lengths(h, side), lengths(w, side)) for h, w in grids]
    per_image = drops.split([len(heights) * len(widths) for heights, widths in sizes])
    found = []
    for of_image, (heights, widths) in zip(per_image, sizes, strict=True):
        grid = of_image.view(len(heights), len(widths), -1)
        found.append(CellDrops(grid.numpy(), heights, widths))
    return found


def cells_of(grids: list[tuple[int, int]], side: int) -> list[Tensor]:
    """The image tokens of each cell, numbered over all images; row by row, image by image."""
    cells = []
    first_token = 0
    for h, w in grids:
        tokens = torch.arange(first_token, first_token + h * w).view(h, w)
        for row in tokens.split(side):
            cells += [cell.flatten() for cell in row.split(side, dim=1)]
        first_token += h * w
    return cells


def lengths(n: int, side: int) -> list[int]:
    """The lengths of the pieces when n is cut every `side`; the last may be shorter."""
    return [min(side, n - start) for start in range(0, n, side)]


def token_grids(encoder: Encoder, group: Group) -> list[tuple[int, int]]:
    """(rows, columns) of image tokens, for each image of a group's prompt."""
    merge = encoder.images.merge_size
    return [(h // merge, w // merge) for _, h, w in group.prompt.image_grid_thw.tolist()]


def cell_side(grids: list[tuple[int, int]], max_cells: int) -> int:
    """The smallest side, in image tokens, of square cells that are at most `max_cells`."""
    side = 1
    while sum(math.ceil(h / side) * math.ceil(w / side) for h, w in grids) > max_cells:
        if all(side >= max(grid) for grid in grids):
            break  # a single cell per image
        side += 1
    return side


def black_out(encoder: Encoder, pixel_values: Tensor, tokens: Tensor) -> Tensor:
    """A copy of pixel_values[N_patch, D_patch] with the patches of some image tokens black."""
    per_token = encoder.patches_per_token
    view = pixel_values.clone()
    view.view(-1, per_token, view.shape[1])[tokens] = encoder.black_patch
    return view


def draw(
    encoder: Encoder, group: Group, patch_mask: Tensor, clean: Tensor, masked: Tensor, drops, out
) -> None:
    """Write the figures to the folder `out` and print what they show.

    patch_mask[N_patch]: a mask to show. clean, masked[T]: log-probs. drops: see cell_drops.
    """
    out = Path(out)
    out.mkdir(parents=True, exist_ok=True)
    example = group.prompt.example
    merge = encoder.images.merge_size
    grids = token_grids(encoder, group)
    masked_images = example.more_images.get("images_aug")
    if not masked_images:
        masked_images = []
        per_image = patch_mask.split([h * w * merge**2 for h, w in grids])
        for image, changed, (h, w) in zip(example.images, per_image, grids, strict=True):
            blocks = changed.view(h, w, merge, merge).transpose(1, 2)  # undo the merger's order
            grid = blocks.reshape(h * merge, w * merge)
            masked_images.append(attribution_figures.black_out_patches(image, grid))
    question = example.question.replace("<image>", "")
    attribution = Attribution(
        example.images,
        masked_images,
        tokens=[encoder.tokenizer.decode([token]) for token in group.tokens[0].tolist()],
        log_probs=clean,
        masked_log_probs=masked,
        question=question,
        answer=example.answer,
    )
    files = [
        attribution_figures.perception_gain(attribution, out / "perception_gain.png"),
        pages.explanation(attribution, drops, out / "explanation.html"),
    ]
    for i, (image, cells) in enumerate(zip(example.images, drops, strict=True)):
        heat, file = cells.of_response(), out / f"heat_map{i}.png"
        files.append(attribution_figures.heat_map(image, heat, file, HEAT_TITLE))
    print(f"question: {question}")
    print(f"response: {group.responses[0]}")
    print(f"boxed: {boxed(group.responses[0])}")
    print(*files, sep="\n")
