"""Figures of --explain: the tokens of a response, and the parts of the image they depend on.

Not in the paper. The perception gain, log pi - log pi_mask, is the simplest estimate of KL_prcp,
token by token. support/pages.py draws the same as a page.
"""

from __future__ import annotations

import functools
import textwrap
from pathlib import Path
from string import Template
from typing import NamedTuple

import numpy as np
from matplotlib import cm, colormaps, colors, font_manager, patches
from matplotlib.figure import Figure
from PIL import Image

LINE_WIDTH = 86  # characters per line of the PNG
CELL_WIDTH, CELL_HEIGHT = 0.0836, 0.21  # inches per character of 10-pt DejaVu Sans Mono

# The ends are pale, so that black text stays legible.
GAIN_COLOURS = colors.ListedColormap(colormaps["RdBu"](np.linspace(0.2, 0.8, 255)))

LEGEND = Template(
    "Perception gain: a token's log-prob with the image minus its log-prob with the image masked. "
    "Blue: the image makes it likelier (0.7: twice as likely). White: no difference. Red: likelier "
    "without the image. All tokens: log-prob $clean with the image, $masked with it masked, gain "
    "$gain. The mean, $mean per token, is the simplest estimate of KL_prcp, which PAPO raises."
)


class Attribution:
    """How much each token of a response depends on the image.

    log_probs, masked_log_probs [T]: log pi(o_t) in nats given the clean and the masked view (the
    mean over several masks). gains[T] is their difference. The colour scale ends at `limit`, the
    95th percentile of the gains' size, at least 0.5. ValueError for unequal lengths or a value that
    is not finite.
    """

    def __init__(
        self,
        images: list[Image.Image],
        masked_images: list[Image.Image],
        tokens: list[str],
        log_probs,
        masked_log_probs,
        question: str = "",
        answer: str = "",
    ):
        if not 0 < len(tokens) == len(log_probs) == len(masked_log_probs):
            lengths = f"{len(log_probs)} and {len(masked_log_probs)}"
            raise ValueError(f"{len(tokens)} tokens but {lengths} log-probs")
        self.images = [image.convert("RGB") for image in images]
        self.masked_images = [image.convert("RGB") for image in masked_images]
        self.tokens = tokens
        self.clean = np.asarray(log_probs, dtype=float)
        self.masked = np.asarray(masked_log_probs, dtype=float)
        self.gains = self.clean - self.masked
        finite = np.isfinite(self.gains)
        if not finite.all():
            raise ValueError(f"token {np.argmin(finite)} has a log-prob that is not finite")
        self.heading = f"Question: {question}"
        if answer:
            self.heading += f" True answer: {answer}"
        self.limit = max(0.5, float(np.percentile(np.abs(self.gains), 95)))
        self.colours = GAIN_COLOURS(0.5 + 0.5 * np.clip(self.gains / self.limit, -1, 1))
        self.legend = LEGEND.substitute(
            clean=f"{self.clean.sum():.2f}",
            masked=f"{self.masked.sum():.2f}",
            gain=f"{self.gains.sum():.2f}",
            mean=f"{self.gains.mean():.3f}",
        )


def perception_gain(attribution: Attribution, out_png) -> Path:
    """Draw the images on the left; on the right the tokens on their colours, scale and legend."""
    cells = _cells(attribution)
    n_lines = cells[-1].line + 1
    text_width, text_height = CELL_WIDTH * LINE_WIDTH, CELL_HEIGHT * n_lines
    width = text_width + 3.4
    views = [("image", image) for image in attribution.images]
    views += [("masked", image) for image in attribution.masked_images]
    height = max(text_height + 1.6, 3 * len(views)) + 0.2
    figure = Figure(figsize=(width, height))

    def add_axes(left, top, w, h):  # in inches from the top left corner
        return figure.add_axes((left / width, 1 - (top + h) / height, w / width, h / height))

    for number, (name, view) in enumerate(views):
        ax = add_axes(0.1, 3 * number + 0.3, 2.9, 2.6)
        ax.imshow(view)
        ax.set(title=name, xticks=[], yticks=[])
    ax = add_axes(3.2, 0.1, text_width, text_height)
    ax.set(xlim=(0, LINE_WIDTH), ylim=(n_lines, 0))
    ax.axis("off")
    for cell in cells:
        corner = (cell.column, cell.line)
        ax.add_patch(
            patches.Rectangle(corner, len(cell.text), 1, facecolor=cell.colour, edgecolor="white")
        )
        style = {"fontsize": 10, "family": "DejaVu Sans Mono", "parse_math": False}
        ax.text(cell.column, cell.line + 0.72, _in_font(cell.text), **style)
    scale = cm.ScalarMappable(colors.Normalize(-attribution.limit, attribution.limit), GAIN_COLOURS)
    bar_axes = add_axes(3.3, text_height + 0.3, 4, 0.2)
    figure.colorbar(scale, cax=bar_axes, orientation="horizontal")
    legend = textwrap.fill(attribution.legend, 100, break_on_hyphens=False)
    bar_axes.text(0, -1.6, legend, transform=bar_axes.transAxes, va="top", fontsize=9)
    figure.savefig(out_png, dpi=110)
    return Path(out_png)


class Cell(NamedTuple):
    """A piece of text on the PNG's grid of characters."""

    line: int
    column: int
    text: str
    colour: object


def _cells(attribution: Attribution) -> list[Cell]:
    """The heading, an empty line, then the tokens, wrapped at LINE_WIDTH and after newlines."""
    heading = textwrap.wrap(attribution.heading, LINE_WIDTH)
    cells = [Cell(line, 0, text, "white") for line, text in enumerate(heading)]
    line, column = len(heading) + 1, 0
    for token, colour in zip(attribution.tokens, attribution.colours, strict=True):
        for piece in textwrap.wrap(visible(token), LINE_WIDTH, drop_whitespace=False):
            if column + len(piece) > LINE_WIDTH:
                line, column = line + 1, 0
            cells.append(Cell(line, column, piece, colour))
            column += len(piece)
        if "\n" in token:
            line, column = line + 1, 0
    return cells


def visible(token: str) -> str:
    """A token with its invisible characters replaced; a space beside letters needs no sign."""
    text = token.replace("\n", "↵").replace("\t", "⇥") or "∅"
    if not text.strip(" ↵⇥"):
        text = text.replace(" ", "␣")
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in text)


@functools.cache
def _glyphs() -> dict:
    return font_manager.get_font(font_manager.findfont("DejaVu Sans Mono")).get_charmap()


def _in_font(text: str) -> str:
    """Characters that the PNG's font lacks (Chinese, for one) become boxes."""
    return "".join(c if ord(c) in _glyphs() else "□" for c in text)


def black_out_patches(image: Image.Image, patch_mask) -> Image.Image:
    """The image at 14 pixels per patch, the patches of patch_mask[h, w] in black."""
    mask = Image.fromarray(255 * np.asarray(patch_mask, dtype=np.uint8))
    masked = image.resize((14 * mask.width, 14 * mask.height))
    masked.paste((0, 0, 0), None, mask.resize(masked.size, Image.Resampling.NEAREST))
    return masked


def heat_map(image: Image.Image, heat, out_png, title: str = "") -> Path:
    """Draw the image beside itself under heat[rows, columns], one value per patch.

    Where values of both signs occur, the colours are centred on 0.
    """
    heat = np.asarray(heat, dtype=float)
    if heat.ndim != 2:
        raise ValueError(f"heat must be [rows, columns] of patches, got shape {heat.shape}")
    if heat.min() < 0 < heat.max():
        scale = {"cmap": "RdBu", "norm": colors.CenteredNorm()}
    else:
        scale = {"cmap": "inferno"}
    figure = Figure(figsize=(9, min(9, 4 * image.height / image.width + 0.6)), layout="constrained")
    figure.suptitle(title, fontsize=11, parse_math=False)
    left, right = figure.subplots(1, 2)
    left.imshow(image.convert("RGB"))
    right.imshow(image.convert("L").convert("RGB"), alpha=0.4)  # grey and pale, under the heat
    whole_image = (-0.5, image.width - 0.5, image.height - 0.5, -0.5)
    drawn = right.imshow(heat, extent=whole_image, alpha=0.7, **scale)
    for ax in (left, right):
        ax.axis("off")
    figure.colorbar(drawn, ax=right)
    figure.savefig(out_png, dpi=110)
    return Path(out_png)
