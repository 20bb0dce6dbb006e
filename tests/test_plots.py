"""plots.py: what is read, what is drawn, and when the collapse warning speaks. CPU, synthetic runs, a few seconds."""

import html
import json
import math
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image, ImageDraw

from support import metrics, plots


def write_run(
    folder,
    steps=30,
    seed=0,
    algo="papo_g",
    model="Qwen/Qwen2.5-VL-3B-Instruct",
    leave_out=(),
    **config,
):
    """A run folder with plausible metrics: one line a step, an evaluation of two splits every 10 steps."""
    rng = np.random.default_rng(seed)
    folder.mkdir(parents=True)
    (folder / "config.json").write_text(
        json.dumps({"algo": algo, "seed": seed, "model": model, **config})
    )
    lines = []
    for step in range(1, steps + 1):
        x = step / steps
        line = {
            "step": step,
            "reward": 0.5 + 0.4 * x + 0.03 * rng.normal(),
            "accuracy": 0.4 + 0.4 * x,
            "format": 0.98,
            "kl_prcp": 0.1 + 0.2 * x + 0.02 * rng.normal(),
            "kl_ref": 0.02 * x,
            "entropy": 0.4 - 0.3 * x,
            "masked_entropy": 0.9 - 0.2 * x,
            "clip_frac": 0.01 + 0.002 * rng.random(),
            "clip_frac_dual": 1e-4,
            "grad_norm": 1 + rng.random(),
            "response_length": 60 - 10 * x,
            "truncated": 0.02 * (1 - x),
        }
        lines.append({k: v for k, v in line.items() if k not in leave_out})
        if step % 10 == 0:
            lines.append(
                {
                    "step": step,
                    "eval/general": 0.6 + 0.3 * x,
                    "eval/vision_dependent": 0.4 + 0.5 * x,
                }
            )
    (folder / "metrics.jsonl").write_text("".join(json.dumps(x) + "\n" for x in lines))
    return folder


@pytest.fixture
def figures(monkeypatch):
    """The figures that plots makes, kept so that a test can look inside them."""
    made = []

    class Kept(plots.Figure):
        def __init__(self, *args, **kwargs):
            super().__init__(*args, **kwargs)
            made.append(self)

    monkeypatch.setattr(plots, "Figure", Kept)
    return made


def assert_picture(path, least=(300, 150)):
    image = Image.open(path)
    assert image.format == "PNG" and image.width >= least[0] and image.height >= least[1], (
        image.size
    )
    assert np.asarray(image.convert("L"), dtype=float).std() > 10  # not a blank sheet


def tick_labels(axis):
    """The labels that are drawn: matplotlib also keeps one beyond either end."""
    low, high = sorted(axis.get_view_interval())
    return [
        tick.label1 if tick.label1.get_visible() else tick.label2
        for tick in axis.get_major_ticks()
        if low <= tick.get_loc() <= high
    ]


def assert_legible(figure):
    """No title, axis label or tick label lies over another one, or leaves the figure."""
    figure.draw_without_rendering()
    boxes = []
    for ax in figure.axes:
        labels = [ax.title] + (
            [ax.xaxis.label, *tick_labels(ax.xaxis), *tick_labels(ax.yaxis)] if ax.axison else []
        )
        boxes += [
            (x.get_text(), x.get_window_extent())
            for x in labels
            if x.get_text() and x.get_visible()
        ]
    for i, (text, box) in enumerate(boxes):
        assert (
            box.x0 >= -1
            and box.y0 >= -1
            and box.x1 <= figure.bbox.x1 + 1
            and box.y1 <= figure.bbox.y1 + 1
        ), text
        for other, second in boxes[:i]:
            assert not box.padded(-1).overlaps(second.padded(-1)), (text, other)


def test_read_metrics(tmp_path):
    lines = [
        '{"step": 0, "eval/general": 0.5, "eval/vision_dependent": 0.3}',
        '{"step": 1, "reward": 0.1}',
        "",
        '{"step": 2, "reward": 0.2}',
        '{"step": 2, "eval/general": 0.61}',
        '{"step": 2, "eval/other": 0.4}',
        '{"step": 1, "reward": 0.15}',
        '{"step": 0, "eval/general": 0.55}',
        '{"step": 3, "rew',
    ]
    (tmp_path / "metrics.jsonl").write_text("\n".join(lines))
    for path in (tmp_path, tmp_path / "metrics.jsonl", str(tmp_path)):
        steps, evals = metrics.read_metrics(path)
        assert steps == [{"step": 1, "reward": 0.15}, {"step": 2, "reward": 0.2}]
        assert evals == [
            {"step": 0, "eval/general": 0.55, "eval/vision_dependent": 0.3},
            {"step": 2, "eval/general": 0.61, "eval/other": 0.4},
        ]


def test_read_metrics_names_what_is_wrong(tmp_path):
    with pytest.raises(FileNotFoundError, match="nowhere"):
        metrics.read_metrics(tmp_path / "nowhere")
    (tmp_path / "metrics.jsonl").write_text('{"reward": 0.125}\n')
    with pytest.raises(ValueError, match="0.125"):
        metrics.read_metrics(tmp_path)


def test_curves_draws_every_panel(tmp_path, figures):
    out = plots.curves(write_run(tmp_path / "run"))
    assert out == tmp_path / "run" / "curves.png"
    assert_picture(out, (1000, 700))
    assert [ax.get_title() for ax in figures[0].axes] == list(plots.PANELS)
    assert figures[0].get_suptitle() == "papo_g, Qwen2.5-VL-3B-Instruct, seed 0"
    labels = {text.get_text() for ax in figures[0].axes for text in ax.get_legend().get_texts()}
    assert {
        "reward",
        "accuracy",
        "format",
        "general",
        "vision_dependent",
        "clean image",
        "masked image",
    } <= labels
    assert_legible(figures[0])
    steps, _ = metrics.read_metrics(tmp_path / "run")
    assert figures[0].axes[0].lines[0].get_xydata().tolist() == [
        [x["step"], x["reward"]] for x in steps
    ]


def test_curves_leaves_absent_panels_out(tmp_path, figures):
    algo = {"name": "papo_d", "kl_prcp_coef": 0.01}
    run = write_run(
        tmp_path / "run", algo=algo, model="$\\frac$", leave_out={"kl_ref", "truncated"}
    )
    assert_picture(plots.curves(run, tmp_path / "other.png"))
    titles = [ax.get_title() for ax in figures[0].axes]
    assert len(titles) == len(plots.PANELS) - 2 and "KL_ref" not in str(titles)
    assert (
        figures[0].get_suptitle() == "papo_d, $\\frac$, seed 0"
    )  # no formula, which would not parse
    assert not (run / "curves.png").exists()


def test_curves_of_one_step_with_gaps_and_no_config(tmp_path, figures):
    (tmp_path / "metrics.jsonl").write_text(
        '{"step": 7, "reward": 0.5, "kl_ref": null, "grad_norm": NaN}\n'
    )
    assert_picture(plots.curves(tmp_path))
    assert [ax.get_title() for ax in figures[0].axes] == ["reward on training prompts"]
    assert figures[0].axes[0].lines[0].get_marker() == "."  # one point makes no line
    assert [t.get_text() for t in tick_labels(figures[0].axes[0].xaxis)] == ["7"]


def test_nothing_to_draw(tmp_path):
    (tmp_path / "metrics.jsonl").write_text('{"step": 1, "reward": NaN}\n')
    for draw in (
        lambda: plots.curves(tmp_path),
        lambda: plots.compare([], tmp_path / "compare.png"),
    ):
        with pytest.raises(ValueError, match="nothing to draw"):
            draw()


def test_the_backend_is_left_alone():
    code = "import sys; from support import plots; assert 'matplotlib.pyplot' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True, cwd=plots.Path(plots.__file__).parent)


@pytest.mark.parametrize(
    "n, t", [(2, 12.706), (3, 4.303), (10, 2.262), (11, 2.228), (31, 2.042), (121, 1.980)]
)
def test_interval_is_students_t(n, t):
    values = np.random.default_rng(n).normal(size=n)
    mean, half = metrics.mean_interval(values)
    assert mean == pytest.approx(values.mean())
    assert math.isnan(metrics.mean_interval(values[:1])[1])  # one seed has none
    assert half == pytest.approx(t * values.std(ddof=1) / math.sqrt(n), rel=2e-3)


def test_compare_table_equals_the_hand_calculation(tmp_path, figures):
    folders = []
    for seed, last in enumerate([0.5, 0.6, 0.7]):
        folder = tmp_path / f"s{seed}"
        folder.mkdir()
        (folder / "config.json").write_text(json.dumps({"algo": "papo_g", "seed": seed}))
        lines = [
            {"step": 0, "eval/general": 0.4},
            {"step": 1, "reward": last - 0.1},
            {"step": 2, "reward": last},
            {"step": 2, "eval/general": last},
        ]
        lines += [{"step": 3, "reward": 0.7 + 0.1 * seed}] if seed else []  # two longer runs
        (folder / "metrics.jsonl").write_text("\n".join(map(json.dumps, lines)))
        folders.append(folder)
    _, table = plots.compare(folders, tmp_path / "compare.png")
    rows = [line.split() for line in table.splitlines()]
    # sd 0.1, t(2) = 4.303: half width 4.303 * 0.1 / sqrt(3) = 0.248; rewards 0.5, 0.8, 0.9: sd 0.2082, half 0.517
    assert rows[1] == "papo_g eval/general 3 0.400 +- 0.000 0 0.600 +- 0.248 2".split()
    assert rows[2] == "papo_g reward 3 0.500 +- 0.248 1 0.733 +- 0.517 2-3".split()
    reward = figures[0].axes[1]
    assert reward.lines[0].get_xydata() == pytest.approx(np.array([[1, 0.5], [2, 0.6], [3, 0.85]]))
    band = reward.collections[0].get_paths()[0].vertices
    assert band[:, 0].max() == 2  # past the shortest run the mean goes on, its interval does not
    assert band[:, 1].max() == pytest.approx(0.6 + 0.2484, abs=1e-4)


def test_a_run_keeps_its_colour_where_another_has_no_such_metric(tmp_path, figures):
    series = [{1: 0.1, 2: 0.2}]
    panels = {"reward": {"grpo": series, "papo_g": series}, "kl_prcp": {"papo_g": series}}
    plots.draw(panels, "two runs", tmp_path / "two.png", shared_legend=True)
    colours = {
        (ax.get_title(), line.get_label()): line.get_color()
        for ax in figures[0].axes
        for line in ax.lines
    }
    assert colours["kl_prcp", "papo_g"] == colours["reward", "papo_g"] != colours["reward", "grpo"]
    [legend] = figures[0].legends
    shown = zip(legend.get_texts(), legend.get_lines(), strict=True)
    assert {text.get_text(): line.get_color() for text, line in shown} == {
        name: colours["reward", name] for name in ("grpo", "papo_g")
    }


def test_compare_groups_by_algorithm_and_keeps_settings_apart(tmp_path, figures):
    algos = [
        "grpo",
        "grpo",
        *({"name": "papo_g", "kl_prcp_coef": x} for x in (0.02, 0.04)),
        {"name": "papo_d"},
    ]
    folders = [
        write_run(tmp_path / f"{i}", seed=i % 2, algo=algo, steps=10 + i, out=f"runs/{i}")
        for i, algo in enumerate(algos)
    ]
    path, table = plots.compare(folders, tmp_path / "compare.png")
    assert_picture(path)
    seeds = {
        line.rsplit(" reward ", 1)[0].strip(): line.split(" reward ", 1)[1].split()[0]
        for line in table.splitlines()
        if " reward " in line
    }
    assert seeds == {
        "grpo": "2",
        "papo_g kl_prcp_coef=0.02": "1",
        "papo_g kl_prcp_coef=0.04": "1",
        "papo_d": "1",
    }
    assert [text.get_text() for text in figures[0].legends[0].get_texts()] == list(seeds)
    for ax in figures[0].axes:  # one colour a group in every panel
        assert [line.get_color() for line in ax.lines] == [
            line.get_color() for line in figures[0].axes[0].lines
        ]
    assert_legible(figures[0])


def collapsing(n=20, seed=0, flat=(), leave_out=()):
    """n healthy lines, then 10 in which every sign grows but those in flat."""
    rng, lines = np.random.default_rng(seed), []
    for step in range(1, n + 11):
        grow = max(0, step - n)
        base = {
            "kl_prcp": (0.3, 0.2),
            "clip_frac": (0.01, 0.002),
            "entropy": (0.3, 0.05),
            "masked_entropy": (0.8, 0.1),
        }
        line = {
            k: (a + b * grow * (k not in flat)) * (1 + 0.02 * rng.normal())
            for k, (a, b) in base.items()
        }
        lines.append({"step": step} | {k: v for k, v in line.items() if k not in leave_out})
    return lines


def test_collapse_is_named_with_its_numbers():
    warning = metrics.collapse_warning(collapsing())
    assert warning.startswith("step 30:") and "\n" not in warning
    assert all(key in warning for key in metrics.SIGNS) and warning.count("->") == 4
    before, after = (
        np.median([x["kl_prcp"] for x in part])
        for part in (collapsing()[-14:-7], collapsing()[-7:])
    )
    assert f"kl_prcp {before:.3g} -> {after:.3g}" in warning


@pytest.mark.parametrize("flat", metrics.SIGNS)
def test_one_calm_sign_is_enough_for_silence(flat):
    assert metrics.collapse_warning(collapsing(flat={flat})) is None


def test_kl_prcp_rising_alone_is_no_collapse():
    assert (
        metrics.collapse_warning(collapsing(flat={"clip_frac", "entropy", "masked_entropy"}))
        is None
    )
    falling = [
        {
            "step": i,
            "kl_prcp": 0.02 * i,
            "clip_frac": 0.001 * i,
            "entropy": 1 / i,
            "masked_entropy": 1 / i,
        }
        for i in range(1, 101)
    ]
    assert not any(metrics.collapse_warning(falling[:i]) for i in range(101))


def test_short_runs_and_noise_are_silent():
    assert metrics.collapse_warning([]) is None
    assert metrics.collapse_warning(collapsing()[-13:]) is None
    assert metrics.collapse_warning(collapsing()[-14:]) is not None
    rng = np.random.default_rng(0)
    for spread, together in (
        (0.7, False),
        (0.25, True),
    ):  # heavy tails; the four signs moving as one
        for _ in range(300):
            noise = np.exp(spread * rng.normal(size=(20, 1 if together else 4))) * np.ones(4)
            lines = [
                {"step": i, **dict(zip(metrics.SIGNS, x, strict=True))}
                for i, x in enumerate(noise.tolist())
            ]
            assert metrics.collapse_warning(lines) is None


def test_small_or_doubtful_growth_is_silent():
    steady = [
        {"step": i, **{key: 1 + 0.03 * i for key in metrics.SIGNS}} for i in range(20)
    ]  # by far too slowly
    assert metrics.collapse_warning(steady) is None
    tiny = [
        {**line, "clip_frac": line["clip_frac"] / 100} for line in collapsing()
    ]  # doubles, from next to nothing
    assert metrics.collapse_warning(tiny) is None
    lines = collapsing()
    lines[-10]["entropy"] = 1.0  # as high before as now
    assert metrics.collapse_warning(lines) is None


def test_the_runs_of_the_experiments():
    """Real runs: the warning comes in the midst of a collapse, and in no run that did not fall far from its best."""
    fired = {}
    for file in (Path(__file__).parent.parent / "experiments" / "results").glob("*.json"):
        result = json.loads(file.read_text())
        metrics = {k: v for k, v in result.get("metrics", {}).items() if k in metrics.SIGNS}
        rows = enumerate(zip(*metrics.values(), strict=True), 1)
        lines = [{"step": i, **dict(zip(metrics, values, strict=True))} for i, values in rows]
        steps = [i for i in range(len(lines) + 1) if metrics.collapse_warning(lines[:i])]
        ended = np.mean([split["accuracy"] for split in result["final"].values()])
        best = max(
            (np.mean([*line.values()]) for line in result.get("curve", {}).values()), default=0
        )
        assert not steps or ended < best - 0.2, file.name
        fired[file.stem] = steps
    assert fired["large-s10"][0] == 37 and len(fired) > 40


def test_signs_that_are_not_measured():
    assert metrics.collapse_warning(collapsing(leave_out={"masked_entropy"})) is not None
    on_policy = [{**line, "clip_frac": 0.0} for line in collapsing()]
    assert "clip_frac" not in metrics.collapse_warning(on_policy)
    assert (
        metrics.collapse_warning(
            [{k: v for k, v in x.items() if k != "masked_entropy"} for x in on_policy]
        )
        is None
    )
    assert (
        metrics.collapse_warning(collapsing(leave_out={"kl_prcp"})) is None
    )  # grpo has no masked view
    gaps = [
        x
        for line in collapsing()
        for x in (line, {"step": line["step"], "kl_prcp": None, "entropy": math.nan})
    ]
    assert metrics.collapse_warning(gaps) == metrics.collapse_warning(collapsing())


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


def picture():
    image = Image.new("RGB", (84, 84), "white")
    ImageDraw.Draw(image).ellipse((14, 14, 70, 70), fill="red")
    return image


@pytest.fixture
def gained(tmp_path, figures):
    """(tokens, clean, masked, png, page) of a drawn response with every awkward token in it, long enough to wrap."""
    rng = np.random.default_rng(0)
    tokens = TOKENS * 3 + ["x" * 200]
    clean = -rng.exponential(0.3, len(tokens))
    masked = clean - rng.normal(size=len(tokens))
    masked[2] = clean[2] - 3  # " green" comes from the image
    png, page = plots.perception_gain(
        picture(),
        [Image.new("RGB", (84, 84))],
        tokens,
        list(clean),
        list(masked),
        tmp_path / "gain.png",
        tmp_path / "gain.html",
        question="<b>How many</b> $\\frac$ dots & more?",
        answer="<3>",
    )
    return tokens, clean, masked, png, page


def spans(page):
    """(colour, hover text, shown text) of a page's tokens, unescaped; a raw < or " in one would break the match."""
    found = re.findall(
        r'<span style="background:(#\w{6})" title="([^"<>]*)">([^<>]*)</span>',
        page.read_text("utf-8"),
    )
    return [tuple(map(html.unescape, x)) for x in found]


def test_page_is_escaped_and_carries_the_numbers(gained):
    tokens, clean, masked, _, page = gained
    text, shown = page.read_text("utf-8"), spans(page)
    assert (
        "<script" not in text and "<b>" not in text and "http" not in text
    )  # nothing injected, nothing fetched
    assert html.escape("<b>How many</b> $\\frac$ dots & more?") in text
    assert len(shown) == len(tokens)
    for (_, tip, word), token, a, b in zip(shown, tokens, clean, masked, strict=True):
        assert (
            repr(token) in tip
            and f"{a:+.3f}" in tip
            and f"{b:+.3f}" in tip
            and f"gain {a - b:+.3f}" in tip
        )
        assert word.strip() and word.isprintable()  # nothing invisible is left
    words = [word for _, _, word in shown]
    assert [words[i] for i in (2, 3, 4, 6, 7, 14)] == [" green", "↵", "␣", "∅", "⇥↵↵", "\\x07"]
    assert '<script>alert("1")</script>' in words
    assert len(re.findall(r'<img [^>]*src="data:image/png;base64,[\w+/=]+">', text)) == 2
    assert (
        f"gain {(clean - masked).sum():.2f}" in text
        and f"{(clean - masked).mean():.3f} a token" in text
    )


def test_gain_picture(gained, figures):
    tokens, clean, masked, png, _ = gained
    assert_picture(png, (1000, 600))
    (figure,) = figures
    assert_legible(figure)
    sheet = figure.axes[2]  # the image, the masked image, the tokens
    assert [ax.get_title() for ax in figure.axes[:2]] == ["the image", "masked"]
    cells = list(zip(sheet.texts, sheet.patches, strict=True))
    shown = "".join(text.get_text() for text, _ in cells)
    assert "".join(map(plots._shown, tokens)).replace("一", "□") in shown
    figure.draw_without_rendering()
    for (
        text,
        cell,
    ) in cells:  # every token lies on its own colour, to two pixels, and inside the figure
        words, back = text.get_window_extent(), cell.get_window_extent()
        assert words.x0 >= back.x0 - 2 and words.x1 <= back.x1 + 2 and back.x1 <= figure.bbox.x1 + 1
        assert words.y0 >= back.y0 - 3 and words.y1 <= back.y1 + 3
    boxes = sorted((cell.get_y(), cell.get_x(), cell.get_width()) for _, cell in cells)
    assert all(
        b[0] > a[0] or b[1] >= a[1] + a[2] for a, b in zip(boxes, boxes[1:], strict=False)
    )  # side by side
    legend = figure.axes[3].texts[0].get_window_extent()
    assert legend.y0 >= 0 and legend.x1 <= figure.bbox.x1


def test_gain_colours_are_centred_and_robust(tmp_path, figures):
    gains = np.array(
        [0.0] + [1.0, -1.0] * 50 + [500.0]
    )  # one wild token must not bleach the others
    plots.perception_gain(
        [picture()],
        [],
        ["t"] * len(gains),
        gains - 600,
        np.full(len(gains), -600.0),
        tmp_path / "a.png",
        tmp_path / "a.html",
    )
    fills = [
        np.array([int(fill[i : i + 2], 16) / 255 for i in (1, 3, 5)])
        for fill, _, _ in spans(tmp_path / "a.html")
    ]
    assert fills[0].min() > 0.94  # gain 0 is white
    assert (
        (fills[1] == fills[-1]).all() and fills[1][2] > fills[1][0] and fills[2][0] > fills[2][2]
    )  # blue, red
    for fill in fills[:3]:
        assert fill**2.2 @ [0.2126, 0.7152, 0.0722] > 0.18  # black text reads: relative luminance
    bar = figures[0].axes[-1]
    assert bar.get_xlim() == pytest.approx((-1, 1))


@pytest.mark.parametrize(
    "tokens, clean, masked, message",
    [
        (["a", "b"], [-1.0], [-1.0, -2.0], "2 tokens but 1 and 2"),
        ([], [], [], "0 tokens"),
        (["a", "b"], [-1.0, -1.0], [-1.0, -math.inf], "token 1 "),
    ],
)
def test_gain_of_bad_input(tmp_path, tokens, clean, masked, message):
    with pytest.raises(ValueError, match=message):
        plots.perception_gain(
            picture(), [], tokens, clean, masked, tmp_path / "a.png", tmp_path / "a.html"
        )
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("size", [(84, 84), (280, 56), (56, 280)])
def test_heat_map(tmp_path, figures, size):
    heat = np.linspace(0, 1, 24).reshape(4, 6)
    assert_picture(
        plots.heat_map(picture().resize(size), heat, tmp_path / "a.png", "cost of $\\frac$ a patch")
    )
    plots.heat_map(picture().resize(size), heat - 0.2, tmp_path / "b.png")
    for figure in figures:
        assert_legible(figure)
    positive, signed = (figure.axes[1].images[-1] for figure in figures)
    assert (positive.norm.vmin, positive.norm.vmax) == (0, 1)
    assert signed.norm.vmin == -signed.norm.vmax == pytest.approx(-0.8)
    assert positive.get_extent() == [
        -0.5,
        size[0] - 0.5,
        size[1] - 0.5,
        -0.5,
    ]  # the grid covers the whole picture
    with pytest.raises(ValueError, match=r"\(24,\)"):
        plots.heat_map(picture(), heat.ravel(), tmp_path / "c.png")


# ------------------------------------------------------------------------------------------------ loggers elsewhere

LINE = {"step": 10, "eval/general": 0.5}
SAMPLES = [{"step": 10, "set": "general", "row": i, "prompt": "How many?", "predict": f"\\boxed{{{i}}}", "label": "1",
            "accuracy": float(i == 1), "format": 0.0} for i in range(2)]  # fmt: skip


def test_tensorboard_gets_numbers_and_samples(tmp_path):
    pytest.importorskip("tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    log = plots.LOGGERS["tensorboard"](tmp_path)
    log({"step": 9, "reward": 0.25}, [])
    log(LINE, SAMPLES)
    events = EventAccumulator(str(tmp_path))
    events.Reload()
    [reward] = events.Scalars("reward")
    [accuracy] = events.Scalars("eval/general")
    assert (reward.step, reward.value, accuracy.step, accuracy.value) == (9, 0.25, 10, 0.5)
    [text] = events.Tensors("general/1/text_summary")
    assert text.step == 10 and b"\\boxed{1}" in text.tensor_proto.string_val[0]


def test_wandb_gets_numbers_and_samples(tmp_path, monkeypatch):
    wandb = pytest.importorskip("wandb")
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setenv("WANDB_DIR", str(tmp_path))
    (tmp_path / "config.json").write_text('{"algo": "papo_g"}')
    log = plots.LOGGERS["wandb"](tmp_path)
    log({"step": 9, "reward": 0.25}, [])
    log(LINE, SAMPLES)
    log({"step": 11}, [])  # a step is whole for W&B once the next one comes
    summary = wandb.run.summary
    assert (summary["reward"], summary["eval/general"], wandb.run.config["algo"]) == (
        0.25,
        0.5,
        "papo_g",
    )
    assert summary["samples"]["nrows"] == 2
    wandb.finish()
