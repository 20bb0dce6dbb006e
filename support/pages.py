"""Pages to look at, each one self-contained file: --explain's, and the responses of a run.

Not in the paper. The gain of a token, log pi - log pi_mask, is the simplest estimate of KL_prcp at
that token.
"""

from __future__ import annotations

import base64
import html
import io
import itertools
import json
from collections.abc import Callable, Iterable
from dataclasses import replace
from pathlib import Path
from string import Template

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from tqdm import tqdm

from support.batch import Example, Group
from support.qwen_vl import Encoder, Policy

TEMPLATES = Path(__file__).with_name("pages")
LONGEST_SIDE = 448  # pixels of an image on a page


def write(out: Path, template: str, **values: str) -> Path:
    """Fill support/pages/TEMPLATE.html."""
    page = Template((TEMPLATES / f"{template}.html").read_text()).substitute(values)
    out.parent.mkdir(parents=True, exist_ok=True)
    out.write_text(page, encoding="utf-8", errors="xmlcharrefreplace")
    return out


def image_url(image: Image.Image) -> str:
    """The image, reduced to LONGEST_SIDE, as a data: URL."""
    small = image.convert("RGB")
    small.thumbnail((LONGEST_SIDE, LONGEST_SIDE))
    buffer = io.BytesIO()
    small.save(buffer, format="PNG")
    return "data:image/png;base64," + base64.b64encode(buffer.getvalue()).decode()


# ---------------------------------------------------------------------------------- one explanation


@torch.no_grad()
def explain(policy: Policy, group: Group, views: list, max_cells: int, out: Path) -> Path:
    """Write the page of one response: how much each token depends on the image and its parts.

    views: the pixels of some masked views. A token's gain is its log-prob under the image
    minus its mean under them. Its drop at a cell is how much of its log-prob is lost when that cell
    alone is black; a cell is an image token, or a square of several where the images have more
    than max_cells tokens.
    """
    encoder, example = policy.encoder, group.prompt.example
    merge = encoder.image_processor.merge_size
    grids = [(h // merge, w // merge) for _, h, w in group.prompt.image_grid_thw.tolist()]
    longest = max(map(max, grids))
    sides = (side for side in range(1, longest) if len(cells_of(grids, side)) <= max_cells)
    side = next(sides, longest)  # the smallest, or one cell per image
    [clean] = log_probs(policy, group, [group.prompt.pixel_values])  # [T]
    masked = log_probs(policy, group, tqdm(views, "masks", leave=False)).mean(0)
    cells = tqdm(cells_of(grids, side), "cells", leave=False)
    black = (black_out(encoder, group.prompt.pixel_values, tokens) for tokens in cells)
    drops = clean - log_probs(policy, group, black)  # [cells, T]

    gains = (clean - masked).numpy()
    pieces = [encoder.tokenizer.decode([token]) for token in group.tokens[0].tolist()]
    numbers = zip(pieces, clean.tolist(), masked.tolist(), strict=True)
    images = []
    per_image = drops.split([len(cells_of([grid], side)) for grid in grids])
    shown = images_of(encoder, views[0], grids)
    for image, under_mask, (h, w), own in zip(example.images, shown, grids, per_image, strict=True):
        images.append(
            {"image": image_url(image), "masked": image_url(under_mask), "rows": h, "columns": w}
            | {"side": side, "drops": own.double().numpy().round(3).tolist()}
        )
    data = {
        "question": example.question.replace("<image>", ""),
        "answer": example.answer,
        "tokens": [{"text": text, "clean": c, "masked": m} for text, c, m in numbers],
        # Of the colours; the largest gains would make all others pale.
        "limit": max(0.5, float(np.percentile(np.abs(gains), 95))),
        "images": images,
        "views": len(views),
    }
    # In a script, "</" would end it.
    text = json.dumps(data, allow_nan=False).replace("<", "\\u003c")
    return write(out, "explanation", data=text)


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


def cells_of(grids: list[tuple[int, int]], side: int) -> list[Tensor]:
    """The image tokens of each square cell, numbered over all images; row by row, image by image.

    grids: rows and columns of image tokens. side: of a cell, in image tokens.
    """
    sizes = [h * w for h, w in grids]
    cells = []
    for tokens, grid in zip(torch.arange(sum(sizes)).split(sizes), grids, strict=True):
        rows = tokens.view(grid).split(side)
        cells += [cell.flatten() for row in rows for cell in row.split(side, 1)]
    return cells


def black_out(encoder: Encoder, pixel_values: Tensor, tokens: Tensor) -> Tensor:
    """A copy of pixel_values[N_patch, D_patch] with the patches of some image tokens black."""
    view = pixel_values.clone()
    view.view(-1, encoder.patches_per_token, view.shape[1])[tokens] = encoder.black_patch
    return view


def images_of(encoder: Encoder, pixel_values: Tensor, grids: list) -> list[Image.Image]:
    """The images that pixel_values[N_patch, D_patch] show: the processor's steps undone."""
    settings = encoder.image_processor
    merge, size = settings.merge_size, settings.patch_size
    mean, std = torch.tensor(settings.image_mean), torch.tensor(settings.image_std)
    images = []
    per_image = pixel_values.split([h * w * merge**2 for h, w in grids])
    for patches, (h, w) in zip(per_image, grids, strict=True):
        # (row, column) of the block, then in it; channel, copy, y, x. One of the copies is enough.
        blocks = patches.view(h, w, merge, merge, 3, -1, size, size)[:, :, :, :, :, 0]
        rgb = blocks.permute(0, 2, 5, 1, 3, 6, 4).reshape(h * merge * size, w * merge * size, 3)
        values = (255 * (rgb * std + mean)).round().clamp(0, 255)
        images.append(Image.fromarray(values.byte().numpy()))
    return images


# -------------------------------------------------------------------------------- a run's responses


def samples(
    lines: list[dict], find_example: Callable[[dict], Example | None], title: str, out: Path
) -> Path | None:
    """Write a page with the responses of a run's first, middle and last evaluation, side by side.

    lines: of samples.jsonl. find_example: a line's question; where there is none, the question is
    left out. Returns None, and writes nothing, if no question is left.
    """
    steps = sorted({line["step"] for line in lines})
    by_row: dict[tuple[str, int], list[dict]] = {}
    for line in lines:
        if line["step"] in (steps[0], steps[len(steps) // 2], steps[-1]):
            by_row.setdefault((line["set"], line["row"]), []).append(line)
    sections = []
    for of_row in by_row.values():
        example = find_example(of_row[-1])
        if example:
            sections.append(_question(example, of_row))
    if not sections:
        return None
    return write(out, "samples", title=html.escape(title), sections="\n".join(sections))


def _question(example: Example, lines: list[dict]) -> str:
    images = "".join(f'<img src="{image_url(image)}" alt="image">' for image in example.images)
    question = html.escape(example.question.replace("<image>", ""))
    return (
        f"<section><div>{images}</div><div><h2>{html.escape(lines[-1]['set'])}, row "
        f"{lines[-1]['row']}</h2><p>{question}<br>Answer: {html.escape(example.answer)}</p>"
        f'<div class="responses">{"".join(map(_response, lines))}</div></div></section>'
    )


def _response(line: dict) -> str:
    accuracy = line["accuracy"]
    kind = "right" if accuracy == 1 else "wrong"
    mark = {0: "✗", 1: "✓"}.get(accuracy, f"accuracy {accuracy:.2f}")
    text = html.escape(line["predict"]) or "(empty)"
    return f'<div class="{kind}"><b>step {line["step"]} {mark}</b><pre>{text}</pre></div>'
