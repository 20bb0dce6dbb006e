"""HTML pages, each one self-contained file: a response's image attribution, and a run's samples.

evaluate.py --explain writes the first, train.py the second at the end of a run.
"""

from __future__ import annotations

import base64
import html
import io
import json
import math
from collections.abc import Callable
from pathlib import Path
from string import Template
from typing import NamedTuple

import numpy as np
from matplotlib import colors
from PIL import Image

from support.attribution_figures import Attribution, visible
from support.batch import Example

LONGEST_SIDE = 448  # pixels of an image on a page
LEAST_SCALE = 0.1  # nats: a token with smaller drops than this owes the image nothing

PAGE = Template("""<!doctype html><html lang="en"><meta charset="utf-8">
<meta name="viewport" content="width=device-width">
<title>$title</title>
<style>
body {font: 15px/1.5 sans-serif; max-width: 75em; margin: 1em auto; padding: 0 1em;
      background: #fff; color: #111}
figure {display: inline-block; margin: 0 1em .5em 0; vertical-align: top}
img {display: block; height: auto}
$style
</style>
$body
</html>
""")


def write(out, title: str, style: str, body: str) -> Path:
    page = PAGE.substitute(title=html.escape(title), style=style, body=body)
    Path(out).write_text(page, encoding="utf-8", errors="xmlcharrefreplace")
    return Path(out)


def image_tag(image: Image.Image, name: str) -> str:
    """An <img> that carries its picture, reduced to LONGEST_SIDE and drawn at most 16 em wide and
    high."""
    small = image.convert("RGB")
    small.thumbnail((LONGEST_SIDE, LONGEST_SIDE))
    buffer = io.BytesIO()
    small.save(buffer, format="PNG")
    data = base64.b64encode(buffer.getvalue()).decode()
    width = 16 * min(1, image.width / image.height)
    style = f'alt="{html.escape(name)}" style="width: {width:.2f}em"'
    return f'<img {style} src="data:image/png;base64,{data}">'


def figure_tag(content: str, caption: str) -> str:
    return f"<figure>{content}<figcaption>{html.escape(caption)}</figcaption></figure>"


# ---------------------------------------------------------------------------------- one explanation


class CellDrops(NamedTuple):
    """How much the log-prob of each token drops when one cell of an image alone is black.

    drops[rows, columns, T] in nats; heights[rows] and widths[columns] of the cells in image tokens.
    """

    drops: np.ndarray
    heights: list[int]
    widths: list[int]

    def of_response(self) -> np.ndarray:
        """[rows, columns] of image tokens: the drop of the whole response's log-prob."""
        rows = self.drops.sum(-1).repeat(self.heights, axis=0)
        return rows.repeat(self.widths, axis=1)


EXPLANATION_STYLE = """
#views {position: sticky; top: 0; max-height: 55vh; overflow-y: auto; background: #fff;
        padding-top: .5em; border-bottom: 1px solid #ccc}
.frame {position: relative; width: fit-content}
.cells {position: absolute; inset: 0; display: grid}
#about {white-space: pre-wrap; height: 7.5em; overflow-y: auto; margin: 0}
#heading {white-space: pre-wrap}
#response {font: 15px/1.9 monospace; white-space: pre-wrap; overflow-wrap: anywhere;
           border: 1px solid #ccc; padding: .6em}
#response span {border-right: 1px solid #fff; padding: .15em 0; cursor: pointer;
                scroll-margin-top: 57vh}
#response span.shown {outline: 2px solid #111}
"""

EXPLANATION = Template("""<p id="heading">$heading</p>
<div id="views"><p id="about"></p>$images</div>
<p>Response. Hover over a token to see what it owes to each part of the image. Click to hold it; the
left and right arrow keys move on.</p>
<div id="response">$tokens</div>
<p>$legend</p>
<p>The image shows another measure: the drop of the token's log-prob when a cell alone is black. The
scale is the largest change of either sign, at least $least_scale. A cell is clear where the
log-prob drops by that much (framed from half of it), white where nothing changes, red where the
token becomes likelier. Without a token, the sum over the response is shown. Move over a cell for
its number.</p>
$masked
<script>
const drops = $drops;  // [image][cell][token]
$script
</script>""")

SCRIPT = """
const tokens = [...document.querySelectorAll("#response span")];
const grids = [...document.querySelectorAll(".cells")];
const about = document.querySelector("#about");
const sum = values => values.reduce((total, value) => total + value, 0);

function veil(share) {  // a drop as a share of the scale, -1 to 1
  const red = Math.max(0, -share);
  return `rgba(255, ${255 - 150 * red}, ${255 - 150 * red}, ${0.88 * (1 - Math.max(0, share))})`;
}

function show(token) {  // null: the whole response
  const values = drops.map(cells => cells.map(cell => token === null ? sum(cell) : cell[token]));
  const largest = Math.max(...values.flat());
  const scale = Math.max(LEAST_SCALE, ...values.flat().map(Math.abs));
  grids.forEach((grid, image) => [...grid.children].forEach((cell, k) => {
    const share = values[image][k] / scale;
    cell.style.background = veil(share);
    cell.style.boxShadow = share > 0.5 ? "inset 0 0 0 1px #111" : "none";
    cell.title = values[image][k].toFixed(3);
  }));
  tokens.forEach((span, k) => span.classList.toggle("shown", k === token));
  const subject = token === null ? "the whole response" : tokens[token].title;
  about.textContent = `${subject}\\nlargest drop without one cell: ${largest.toFixed(3)}`;
}

function held() {  // the token that the address names; null: none
  const found = location.hash.match(/^#token-(\\d+)$/);
  return found && found[1] < tokens.length ? Number(found[1]) : null;
}

function hold(token) {
  location.hash = token === null ? "" : "token-" + token;
  show(held());
}

tokens.forEach((span, k) => {
  span.onmouseenter = () => show(k);
  span.onmouseleave = () => show(held());
  span.onclick = () => hold(held() === k ? null : k);
});
document.onkeydown = event => {
  const step = {ArrowLeft: -1, ArrowRight: 1}[event.key];
  const next = held() === null ? 0 : held() + step;
  if (step && tokens[next]) hold(next);
};
window.onhashchange = () => show(held());
show(held());
tokens[held()]?.scrollIntoView({block: "nearest"});
""".replace("LEAST_SCALE", str(LEAST_SCALE))

TOOLTIP = Template(
    "token $token\nlog-prob with the image $clean (p = $p_clean)\n"
    "log-prob with it masked $masked (p = $p_masked)\ngain $gain"
)


def explanation(attribution: Attribution, cells: list[CellDrops], out) -> Path:
    """Write the page of --explain. cells: one per image."""
    images = masked = ""
    for number, (image, of_image) in enumerate(zip(attribution.images, cells, strict=True), 1):
        name = f"image {number}" if len(cells) > 1 else "image"
        frame = f'<div class="frame">{image_tag(image, name)}{_grid(of_image)}</div>'
        images += figure_tag(frame, name)
    for image in attribution.masked_images:
        masked += figure_tag(image_tag(image, "masked"), "one of the masked views")
    drops = [_rounded(each.drops) for each in cells]
    body = EXPLANATION.substitute(
        heading=html.escape(attribution.heading),
        images=images,
        masked=masked,
        least_scale=LEAST_SCALE,
        tokens=_token_spans(attribution),
        legend=html.escape(attribution.legend),
        drops=json.dumps(drops, allow_nan=False, separators=(",", ":")),
        script=SCRIPT,
    )
    return write(out, "Image attribution", EXPLANATION_STYLE, body)


def _rounded(drops: np.ndarray) -> list[list[float]]:
    """[cell][token], in doubles: a rounded float32 would be written with 17 digits."""
    return drops.reshape(-1, drops.shape[-1]).astype(float).round(3).tolist()


def _grid(cells: CellDrops) -> str:
    """A transparent grid of cells to lay over an image."""
    rows = " ".join(f"{height}fr" for height in cells.heights)
    columns = " ".join(f"{width}fr" for width in cells.widths)
    n_cells = len(cells.heights) * len(cells.widths)
    style = f"grid-template: {rows} / {columns}"
    return f'<div class="cells" style="{style}">{"<i></i>" * n_cells}</div>'


def _token_spans(attribution: Attribution) -> str:
    spans = ""
    columns = zip(
        attribution.tokens,
        attribution.colours,
        attribution.clean,
        attribution.masked,
        strict=True,
    )
    for token, colour, clean, masked in columns:
        tooltip = TOOLTIP.substitute(
            token=repr(token),
            clean=f"{clean:+.3f}",
            p_clean=f"{math.exp(clean):.2%}",
            masked=f"{masked:+.3f}",
            p_masked=f"{math.exp(masked):.2%}",
            gain=f"{clean - masked:+.3f}",
        )
        style, title = f"background:{colors.to_hex(colour)}", html.escape(tooltip)
        spans += f'<span style="{style}" title="{title}">{html.escape(visible(token))}</span>'
        if "\n" in token:
            spans += "\n"
    return spans


# -------------------------------------------------------------------------------- a run's responses

SAMPLES_STYLE = """
section {border-top: 1px solid #ccc; padding: 1em 0; display: flex; flex-wrap: wrap; gap: 1em}
h2 {font-size: 1em; margin: 0}
.images {flex: none}
.text {flex: 1 1 20em; min-width: 0}
.question {white-space: pre-wrap}
.responses {display: grid; grid-template-columns: repeat(auto-fit, minmax(14em, 1fr)); gap: 1em}
.response {border-left: 4px solid #c33; padding-left: .6em}
.response.right {border-color: #393}
pre {white-space: pre-wrap; overflow-wrap: anywhere; margin: 0; font-size: 13px;
     max-height: 24em; overflow-y: auto}
"""


def samples(
    lines: list[dict], find_example: Callable[[dict], Example | None], title: str, out
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
    sections = ""
    for of_row in by_row.values():
        example = find_example(of_row[-1])
        if example:  # and of its row's lines, those that are about the same question
            newest = (of_row[-1]["id"], of_row[-1]["label"])
            same = [line for line in of_row if (line["id"], line["label"]) == newest]
            sections += _question(example, same)
    if not sections:
        return None
    legend = "<p>Green: accuracy 1. Red: less.</p>"
    return write(out, title, SAMPLES_STYLE, f"<h1>{html.escape(title)}</h1>{legend}{sections}")


def _question(example: Example, lines: list[dict]) -> str:
    images = "".join(image_tag(image, "image") for image in example.images)
    question = html.escape(example.question.replace("<image>", ""))
    heading = f"{lines[-1]['set']}, row {lines[-1]['row']}"
    return (
        f'<section><div class="images">{images}</div><div class="text">'
        f"<h2>{html.escape(heading)}</h2>"
        f'<p class="question">{question}<br>Answer: {html.escape(example.answer)}</p>'
        f'<div class="responses">{"".join(map(_response, lines))}</div></div></section>'
    )


def _response(line: dict) -> str:
    accuracy = line["accuracy"]
    kind = "response right" if accuracy == 1 else "response"
    mark = {0: "✗", 1: "✓"}.get(accuracy, f"accuracy {accuracy:.2f}")
    text = html.escape(line["predict"]) or "(empty)"
    return f'<div class="{kind}"><b>step {line["step"]} {mark}</b><pre>{text}</pre></div>'
