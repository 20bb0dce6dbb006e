"""Per-token and per-patch image attribution of one response, for evaluate.py --explain."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import torch
from torch import Tensor
from tqdm import tqdm

from support import plots
from support.batch import Group
from support.predictions import boxed
from support.qwen_vl import Encoder, Policy

HEAT_TITLE = "drop of the response's log-prob when a patch alone is black"


def log_probs(policy: Policy, group: Group, pixel_values: Tensor) -> Tensor:
    """Log-probs [T] of a group's only response with these pixels in place of its image."""
    return policy.log_probs([replace(group, masked_pixel_values=pixel_values)], masked=True)[
        0
    ].cpu()


def patch_drops(policy: Policy, group: Group, clean: Tensor) -> Tensor:
    """How much the response's log-prob drops with one image token's patches black; [image tokens].

    clean[T]: the log-probs under the whole image.
    """
    pixels, width = group.prompt.pixel_values, policy.encoder.patches_per_token
    drops = []
    for start in tqdm(range(0, len(pixels), width), desc="patches", leave=False):
        view = pixels.clone()
        view[start : start + width] = policy.encoder.black_patch
        drops.append((clean - log_probs(policy, group, view)).sum())
    return torch.stack(drops)


def draw(
    encoder: Encoder, group: Group, patch_mask: Tensor, clean: Tensor, masked: Tensor, drops, out
) -> None:
    """Write the figures to the folder `out` and print what they show.

    patch_mask[N_patch]: a mask to show. clean, masked[T]: log-probs. drops: see patch_drops.
    """
    out = Path(out)
    out.mkdir(parents=True, exist_ok=True)
    example = group.prompt.example
    merge = encoder.images.merge_size
    grids = [(h // merge, w // merge) for _, h, w in group.prompt.image_grid_thw.tolist()]
    masked_images = example.images_aug
    if not masked_images:
        masked_images = []
        per_image = patch_mask.split([h * w * merge**2 for h, w in grids])
        for image, changed, (h, w) in zip(example.images, per_image, grids, strict=True):
            blocks = changed.view(h, w, merge, merge).transpose(1, 2)  # undo the merger's order
            grid = blocks.reshape(h * merge, w * merge)
            masked_images.append(plots.black_out_patches(image, grid))
    tokens = [encoder.tokenizer.decode([token]) for token in group.tokens[0].tolist()]
    question = example.question.replace("<image>", "")
    gain_files = plots.perception_gain(
        example.images,
        masked_images,
        tokens,
        clean,
        masked,
        out,
        question=question,
        answer=example.answer,
    )
    files = list(gain_files)
    heats = drops.split([h * w for h, w in grids])
    for i, (image, heat, grid) in enumerate(zip(example.images, heats, grids, strict=True)):
        files.append(plots.heat_map(image, heat.view(grid), out / f"heat_map{i}.png", HEAT_TITLE))
    print(f"question: {question}")
    print(f"response: {group.responses[0]}")
    print(f"boxed: {boxed(group.responses[0])}")
    print(*files, sep="\n")
