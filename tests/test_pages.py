"""The figures and page of --explain, and a run's page of samples. Synthetic numbers, seconds."""

import html
import json
import math
import re
import shutil
import subprocess

import numpy as np
import pytest
from drawings import assert_drawn, assert_legible
from matplotlib import colors
from PIL import Image, ImageDraw

from support import pages
from support.attribution_figures import Attribution, heat_map, perception_gain, visible
from support.batch import Example
from support.pages import CellDrops

TOKENS = [
    "<think>",
    " a1",
    " green",
    "\n",
    " ",
    "$x_1$",
    "",
    "\t\n\n",
    " </think>",
    '<script>alert("1")</script>',
    "一",
    " \\boxed{",
    "3",
    "}",
    "\x07",
    "<|im_end|>",
]


def red_dot():
    image = Image.new("RGB", (84, 84), "white")
    ImageDraw.Draw(image).ellipse((14, 14, 70, 70), fill="red")
    return image


@pytest.fixture
def attribution():
    """A response with every awkward token, long enough to wrap. " green" comes from the image."""
    rng = np.random.default_rng(0)
    tokens = TOKENS * 3 + ["x" * 200]
    clean = -rng.exponential(0.3, len(tokens))
    masked = clean - rng.normal(size=len(tokens))
    masked[2] = clean[2] - 3
    return Attribution(
        [red_dot()],
        [Image.new("RGB", (84, 84))],
        tokens,
        list(clean),
        list(masked),
        question="<b>How many</b> $\\frac$ dots & more?",
        answer="<3>",
    )


def some_drops(n_tokens, rows=2, columns=3, seed=0):
    drops = np.random.default_rng(seed).normal(size=(rows, columns, n_tokens)).astype(np.float32)
    return CellDrops(drops, heights=[1] * rows, widths=[1] * columns)


def token_spans(page):
    """(colour, tooltip, text) of a page's tokens, unescaped. A raw < or " would break the match."""
    pattern = r'<span style="background:(#\w{6})" title="([^"<>]*)">([^<>]*)</span>'
    return [
        tuple(map(html.unescape, span)) for span in re.findall(pattern, page.read_text("utf-8"))
    ]


def test_the_page_is_escaped_and_carries_the_numbers(attribution, tmp_path):
    cells = some_drops(len(attribution.tokens))
    page = pages.explanation(attribution, [cells], tmp_path / "page.html")
    text, spans = page.read_text("utf-8"), token_spans(page)
    assert text.count("<script") == 1 and "<b>" not in text  # nothing injected
    assert "http" not in text  # nothing fetched
    assert html.escape("<b>How many</b> $\\frac$ dots & more?") in text
    assert len(re.findall(r'<img [^>]*src="data:image/png;base64,[\w+/=]+">', text)) == 2
    gains = attribution.clean - attribution.masked
    assert f"gain {gains.sum():.2f}" in text and f"{gains.mean():.3f} per token" in text
    assert len(spans) == len(attribution.tokens)
    columns = (spans, attribution.tokens, attribution.clean, attribution.masked)
    for (_, tooltip, word), token, a, b in zip(*columns, strict=True):
        for part in (repr(token), f"{a:+.3f}", f"{b:+.3f}", f"gain {a - b:+.3f}"):
            assert part in tooltip
        assert word.strip() and word.isprintable()  # nothing invisible is left
    words = [word for _, _, word in spans]
    assert [words[i] for i in (2, 3, 4, 6, 7, 14)] == [" green", "↵", "␣", "∅", "⇥↵↵", "\\x07"]
    assert '<script>alert("1")</script>' in words
    [numbers] = json.loads(re.search(r"const drops = (.*);  //", text)[1])
    assert numbers == cells.drops.reshape(6, -1).astype(float).round(3).tolist()
    assert all(len(str(number)) < 8 for cell in numbers for number in cell)


def test_the_figure_shows_each_token_on_its_colour(attribution, tmp_path, figures):
    assert_drawn(perception_gain(attribution, tmp_path / "gain.png"), (1000, 600))
    [figure] = figures
    assert_legible(figure)
    image, masked_image, sheet, scale = figure.axes
    assert [image.get_title(), masked_image.get_title()] == ["image", "masked"]
    shown = "".join(text.get_text() for text in sheet.texts)
    assert "".join(map(visible, attribution.tokens)).replace("一", "□") in shown
    for text, cell in zip(sheet.texts, sheet.patches, strict=True):  # within 2 or 3 pixels
        words, background = text.get_window_extent(), cell.get_window_extent()
        assert words.x0 >= background.x0 - 2 and words.x1 <= background.x1 + 2
        assert words.y0 >= background.y0 - 3 and words.y1 <= background.y1 + 3
        assert background.x1 <= figure.bbox.x1 + 1
    cells = sorted((cell.get_y(), cell.get_x(), cell.get_width()) for cell in sheet.patches)
    for (line, column, width), (next_line, next_column, _) in zip(cells, cells[1:], strict=False):
        assert next_line > line or next_column >= column + width  # no cell covers another
    legend = scale.texts[0].get_window_extent()
    assert legend.y0 >= 0 and legend.x1 <= figure.bbox.x1


def test_gain_colours_are_centred_and_robust(tmp_path, figures):
    """Gains 0, 1 and -1, and a single one of 500, which must not bleach the others."""
    gains = np.array([0.0] + [1.0, -1.0] * 50 + [500.0])
    masked = np.full(len(gains), -600.0)
    tokens = ["t"] * len(gains)
    attribution = Attribution([red_dot()], [], tokens, gains + masked, masked)
    perception_gain(attribution, tmp_path / "gain.png")
    page = pages.explanation(attribution, [some_drops(len(gains))], tmp_path / "page.html")
    hex_colours = [colour for colour, _, _ in token_spans(page)]
    colours = [np.array(colors.to_rgb(colour)) for colour in hex_colours]
    neutral, positive, negative = colours[:3]
    assert neutral.min() > 0.94  # white
    assert positive[2] > positive[0] and negative[0] > negative[2]  # blue, red
    assert hex_colours[-1] == hex_colours[1]
    for colour in (neutral, positive, negative):
        assert colour**2.2 @ [0.2126, 0.7152, 0.0722] > 0.18  # luminance: black text is legible
    assert figures[0].axes[-1].get_xlim() == pytest.approx((-1, 1))


@pytest.mark.parametrize(
    "tokens, clean, masked, message",
    [
        (["a", "b"], [-1.0], [-1.0, -2.0], "2 tokens but 1 and 2"),
        ([], [], [], "0 tokens"),
        (["a", "b"], [-1.0, -1.0], [-1.0, -math.inf], "token 1 "),
    ],
)
def test_gain_of_bad_input(tokens, clean, masked, message):
    with pytest.raises(ValueError, match=message):
        Attribution([red_dot()], [], tokens, clean, masked)


@pytest.mark.parametrize("size", [(84, 84), (280, 56), (56, 280)])
def test_heat_map(tmp_path, figures, size):
    image = red_dot().resize(size)
    heat = np.linspace(0, 1, 24).reshape(4, 6)
    assert_drawn(heat_map(image, heat, tmp_path / "a.png", "cost of $\\frac$ per patch"))
    heat_map(image, heat - 0.2, tmp_path / "b.png")
    for figure in figures:
        assert_legible(figure)
    positive, signed = (figure.axes[1].images[-1] for figure in figures)
    assert (positive.norm.vmin, positive.norm.vmax) == (0, 1)
    assert signed.norm.vmin == -signed.norm.vmax == pytest.approx(-0.8)
    whole_image = [-0.5, size[0] - 0.5, size[1] - 0.5, -0.5]
    assert positive.get_extent() == whole_image
    with pytest.raises(ValueError, match=r"\(24,\)"):
        heat_map(image, heat.ravel(), tmp_path / "c.png")


def test_cells_at_the_edge_are_smaller():
    """7 x 5 image tokens in cells of 3 x 3: the last row has one token's height."""
    drops = np.arange(6.0).reshape(3, 2, 1).repeat(2, axis=2)  # two tokens of equal drops
    heat = CellDrops(drops, heights=[3, 3, 1], widths=[3, 2]).of_response()
    assert heat.shape == (7, 5)
    assert heat[:, 0].tolist() == [0, 0, 0, 4, 4, 4, 8]
    assert heat[6].tolist() == [8, 8, 8, 10, 10]


# ------------------------------------------------------------------------------------ in a browser

CHROMIUM = shutil.which("chromium") or shutil.which("google-chrome")
HEADLESS = "--headless --no-sandbox --disable-gpu --no-first-run --disable-background-networking"
REPORT = """<pre id="report"></pre><script>
const log = [];
function look(event, k) {
  tokens[k].dispatchEvent(new Event(event));
  log.push(grids.map(grid => [...grid.children].map(cell => cell.style.background)));
}
function reachable() {  // tokens that no other element covers at some scroll position
  const seen = new Set();
  for (let y = 0; y <= document.body.scrollHeight; y += 100) {
    scrollTo(0, y);
    tokens.forEach((span, k) => {
      const box = [...span.getClientRects()].at(-1);  // a token may wrap after its space
      if (document.elementFromPoint(box.x + box.width / 2, box.y + box.height / 2) === span) {
        seen.add(k);
      }
    });
  }
  scrollTo(0, 0);
  return seen.size;
}
%s
document.querySelector("#report").textContent = JSON.stringify({
  log, about: about.textContent, hash: location.hash,
  shown: tokens.findIndex(span => span.classList.contains("shown")),
  reachable: reachable(),
  frame: document.querySelector(".cells").getBoundingClientRect(),
  image: document.querySelector(".frame img").getBoundingClientRect(),
  cells: [...document.querySelectorAll(".cells")].map(
    grid => [...grid.children].map(cell => cell.getBoundingClientRect())),
});
</script>"""


def in_browser(page, actions, fragment=""):
    """What a page looks like after some lines of JavaScript."""
    acted = page.with_name("acted.html")
    acted.write_text(page.read_text("utf-8") + REPORT % actions, encoding="utf-8")
    command = [CHROMIUM, *HEADLESS.split(), "--dump-dom", f"file://{acted}{fragment}"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, check=True)
    return json.loads(html.unescape(re.search(r'<pre id="report">(.*?)</pre>', done.stdout)[1]))


def opacity(colour):
    """The alpha of "rgb(...)" or "rgba(..., alpha)"."""
    numbers = re.findall(r"[\d.]+", colour)
    return float(numbers[3]) if len(numbers) == 4 else 1.0


@pytest.mark.skipif(not CHROMIUM, reason="needs Chromium")
def test_hovering_a_token_clears_the_cells_it_depends_on(tmp_path):
    """200 tokens and two images: token k depends on cell k mod 6 of image k mod 2 alone."""
    n_tokens = 200
    drops = np.zeros((2, 2, 3, n_tokens))
    for k in range(n_tokens):
        drops[k % 2].reshape(6, n_tokens)[k % 6, k] = 2.5
    drops[0, 0, 0, 7] = -2.5  # without this cell token 7 is likelier
    drops[:, :, :, 9] = 0.001  # token 9 owes the image nothing
    cells = [CellDrops(each, heights=[2, 1], widths=[2, 2, 1]) for each in drops]
    log_probs = -np.ones(n_tokens)
    tokens = [f" word{k}" for k in range(n_tokens)]
    images = [red_dot(), red_dot().resize((30, 3000))]
    attribution = Attribution(images, [], tokens, log_probs, log_probs - 1)
    page = pages.explanation(attribution, cells, tmp_path / "page.html")

    actions = "".join(f'look("mouseenter", {k}); look("mouseleave", {k});' for k in (5, 7, 9))
    seen = in_browser(page, actions)
    hovered_5, after, hovered_7, _, hovered_9, _ = seen["log"]
    veils = [[opacity(cell) for cell in image] for image in hovered_5]
    assert veils[0] == pytest.approx([0.88] * 6)
    assert veils[1] == pytest.approx([0.88] * 5 + [0.0])  # cell 5 is clear
    reds = [cell for image in hovered_7 for cell in image if "255, 105, 105" in cell]
    assert reds == [hovered_7[0][0]]
    assert all(opacity(cell) > 0.8 for image in hovered_9 for cell in image)
    assert after != hovered_5 and seen["shown"] == -1  # back to the whole response
    assert seen["about"].startswith("the whole response")

    assert seen["reachable"] == n_tokens  # the images, which stay on top, do not hide them
    for side in ("left", "top", "right", "bottom"):  # the grid covers the image, no more
        assert seen["frame"][side] == pytest.approx(seen["image"][side], abs=1)
    first, *_, last = seen["cells"][0]
    assert first["width"] == pytest.approx(2 * last["width"], abs=1)
    assert first["height"] == pytest.approx(2 * last["height"], abs=1)

    held = in_browser(page, 'look("click", 5); look("mouseenter", 7); look("mouseleave", 7);')
    assert held["log"][0] == held["log"][2] == hovered_5
    assert held["shown"] == 5 and held["hash"] == "#token-5"
    assert "word5" in held["about"] and "largest drop without one cell: 2.500" in held["about"]
    linked = in_browser(page, "", fragment="#token-5")
    assert linked["shown"] == 5
    keys = "document.onkeydown({key: 'ArrowRight'}); document.onkeydown({key: 'ArrowRight'});"
    assert in_browser(page, keys, fragment="#token-5")["shown"] == 7
    assert in_browser(page, "", fragment="#token-200")["shown"] == -1  # no such token


# --------------------------------------------------------------------------------- a run's samples


def sample(step, row, accuracy, text, name="general"):
    question = {"set": name, "row": row, "id": str(row), "label": "3"}
    return {"step": step, "accuracy": accuracy, "predict": text} | question


def test_samples_show_the_first_middle_and_last_evaluation(tmp_path):
    lines = [
        sample(step, row, step / 40, f"{step}/{row}") for step in (0, 20, 40) for row in (0, 1)
    ]
    lines += [sample(10, 0, 1.0, "left out"), sample(30, 0, 1.0, "left out")]
    lines += [sample(40, 0, 1.0, "<script>x</script>", name="other"), sample(40, 5, 1.0, "lost")]
    examples = {
        ("general", 0): Example("<image>How many <b>?", "<3>", [red_dot()]),
        ("general", 1): Example("<image>Before <image>after?", "4 \ud800", [red_dot(), red_dot()]),
        ("other", 0): Example("No image?", "5", []),
    }

    def find_example(line):
        return examples.get((line["set"], line["row"]))

    out = tmp_path / "samples.html"
    text = pages.samples(lines, find_example, "a & b", out).read_text("utf-8")
    assert re.findall(r"<b>step (\d+) (.*?)</b><pre>(.*?)</pre>", text) == [
        ("0", "✗", "0/0"),
        ("20", "accuracy 0.50", "20/0"),
        ("40", "✓", "40/0"),
        ("0", "✗", "0/1"),
        ("20", "accuracy 0.50", "20/1"),
        ("40", "✓", "40/1"),
        ("40", "✓", "&lt;script&gt;x&lt;/script&gt;"),
    ]
    assert text.count('class="response right"') == 3
    assert text.count("<img ") == 3
    assert "How many &lt;b&gt;?<br>Answer: &lt;3&gt;" in text and "a &amp; b" in text
    assert "lost" not in text  # its question is not there
    assert "http" not in text and "<script" not in text
    assert pages.samples(lines, lambda line: None, "none", tmp_path / "none.html") is None
    assert pages.samples([], find_example, "none", tmp_path / "none.html") is None
    assert not (tmp_path / "none.html").exists()
