"""plots.py: what is drawn, and that it can be read. Synthetic runs, seconds on a CPU."""

import json
import math
import subprocess
import sys

import numpy as np
import pytest
from conftest import ROOT
from drawings import assert_drawn, assert_legible, tick_labels

from support import plots


def write_log(folder, lines, **config):
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    if config:
        (folder / "config.json").write_text(json.dumps(config))
    return folder


def write_run(folder, steps=30, seed=0, leave_out=(), **config):
    """A run with plausible metrics: a line per step, an evaluation of two sets every 10 steps."""
    rng = np.random.default_rng(seed)
    lines = []
    for step in range(1, steps + 1):
        x = step / steps
        line = {
            "step": step,
            "reward": 0.5 + 0.4 * x + 0.03 * rng.normal(),
            "accuracy": 0.4 + 0.4 * x,
            "format": 0.98 + 0.01 * x,
            "kl_prcp": 0.1 + 0.2 * x + 0.02 * rng.normal(),
            "kl_ref": 0.02 * x,
            "entropy": 0.4 - 0.3 * x,
            "masked_entropy": 0.9 - 0.2 * x,
            "clip_frac": 0.01 + 0.002 * rng.random(),
            "clip_frac_dual": 1e-4 * x,
            "grad_norm": 1 + rng.random(),
            "response_length": 60 - 10 * x,
            "truncated": 0.02 * (1 - x),
        }
        lines.append({key: value for key, value in line.items() if key not in leave_out})
        if step % 10 == 0:
            general, vision = 0.6 + 0.3 * x, 0.4 + 0.5 * x
            lines.append({"step": step, "eval/general": general, "eval/vision_dependent": vision})
    defaults = {"algo": "papo_g", "seed": seed, "model": "Qwen/Qwen2.5-VL-3B-Instruct"}
    return write_log(folder, lines, **defaults | config)


def titles(figure):
    return [ax.get_title() for ax in figure.axes]


# -------------------------------------------------------------------------- curves, comparisons


def test_curves_draws_every_panel(tmp_path, figures):
    out = plots.curves(write_run(tmp_path / "run"))
    assert out == tmp_path / "run" / "curves.png"
    assert_drawn(out, (1000, 700))
    [figure] = figures
    assert titles(figure) == [panel.title for panel in plots.PANELS]
    assert figure.get_suptitle() == "papo_g, Qwen2.5-VL-3B-Instruct, seed 0"
    legends = [text.get_text() for ax in figure.axes for text in ax.get_legend().get_texts()]
    assert {"reward", "accuracy", "format", "general", "vision_dependent"} <= set(legends)
    assert {"clean image", "masked image"} <= set(legends)
    assert_legible(figure)
    steps, _ = plots.read_metrics(tmp_path / "run")
    drawn = figure.axes[0].lines[0].get_xydata().tolist()
    assert drawn == [[line["step"], line["reward"]] for line in steps]


def test_curves_leaves_out_what_was_not_logged(tmp_path, figures):
    run = write_run(tmp_path / "run", model="$\\frac$", leave_out={"kl_ref", "truncated"})
    assert_drawn(plots.curves(run, tmp_path / "other.png"))
    assert not (run / "curves.png").exists()
    [figure] = figures
    assert len(titles(figure)) == len(plots.PANELS) - 2 and "KL_ref" not in str(titles(figure))
    assert figure.get_suptitle() == "papo_g, $\\frac$, seed 0"  # as math it would not parse


def test_curves_leaves_out_what_does_not_move(tmp_path, figures):
    """One update per step clips nothing; a toy's format and length never change. The reward and the
    evaluations stay: that they do not move is news."""
    still = {"clip_frac": 0.0, "clip_frac_dual": 0.0, "truncated": 0.0, "response_length": 31.0}
    lines = []
    for step in range(1, 6):
        moving = {"entropy": 0.1 * step, "masked_entropy": 0.9, "accuracy": 0.1 * step}
        lines.append({"step": step, "reward": 0.5, "format": 1.0} | still | moving)
    lines += [{"step": step, "eval/general": 0.25} for step in (0, 5)]
    plots.curves(write_log(tmp_path, lines))
    [figure] = figures
    drawn = {ax.get_title(): [line.get_label() for line in ax.lines] for ax in figure.axes}
    assert drawn == {
        "reward on training prompts": ["reward", "accuracy"],
        "evaluation accuracy": ["general"],
        "entropy (minus mean log-prob)": ["clean image"],
    }


@pytest.mark.parametrize(
    "metric, low, high, axis_low, axis_high",
    [
        ("response_length", 30.95, 31.10, 29, 33.1),  # 4 tokens
        ("response_length", 500, 510, 480, 530),  # 10% of the mean
        ("reward", 0.990, 0.995, 0.9, 1.0),  # 0.1, within [0, 1]
        ("reward", 0.2, 0.8, 0.2, 0.8),
        ("eval/general", 0.0, 0.002, 0.0, 0.1),
        ("eval/general", 0.2, 1.2, 0.2, 1.2),  # an interval over seeds may leave [0, 1]
        ("eval/general", 2.0, 2.001, 1.901, 2.001),  # so may a custom reward
        ("entropy", 0.30, 0.32, 0.26, 0.36),  # 0.1
        ("grad_norm", 0.50, 0.52, 0.0, 0.52),  # from 0
        ("kl_ref", 0.0, 0.0001, 0.0, 0.01),
        ("clip_frac", 0.003, 0.004, 0.0, 0.01),
    ],
)
def test_an_axis_spans_more_than_noise(metric, low, high, axis_low, axis_high):
    limits = plots.axis_of(metric).limits(low, high)
    assert limits == pytest.approx((axis_low, axis_high), rel=0.01, abs=1e-9)


def test_noise_does_not_fill_a_panel(tmp_path, figures):
    lines = [{"step": step, "response_length": 31 + 0.1 * (step % 2)} for step in range(5)]
    run = write_log(tmp_path, lines, algo="grpo")
    plots.curves(run)
    plots.compare([run], tmp_path)
    for figure in figures:
        low, high = figure.axes[0].get_ylim()
        assert low < 29.1 and high > 33


def test_compare_leaves_out_what_moves_in_no_run(tmp_path, figures):
    folders = []
    for algo, clipped in (("grpo", 0.0), ("papo_g", 0.1)):
        lines = [
            {"step": step, "reward": 0.5, "entropy": 0.3, "clip_frac": clipped, "kl_ref": step}
            for step in (1, 2)
        ]
        folders.append(write_log(tmp_path / algo, lines, algo=algo))
    plots.compare(folders, tmp_path)
    assert titles(figures[0]) == ["reward", "kl_ref", "clip_frac"]


def test_curves_of_one_step_with_gaps_and_no_config(tmp_path, figures):
    gaps = {"kl_ref": None, "grad_norm": math.nan}
    assert_drawn(plots.curves(write_log(tmp_path, [{"step": 7, "reward": 0.5} | gaps])))
    [figure] = figures
    assert titles(figure) == ["reward on training prompts"]
    assert figure.axes[0].lines[0].get_marker() == "."  # one point makes no line
    assert [label.get_text() for label in tick_labels(figure.axes[0].xaxis)] == ["7"]


def test_nothing_to_draw(tmp_path):
    with pytest.raises(ValueError, match="nothing to draw"):
        plots.curves(write_log(tmp_path, [{"step": 1, "reward": math.nan}]))
    with pytest.raises(ValueError, match="nothing to draw"):
        plots.compare([], tmp_path)


def test_the_backend_is_left_alone():
    code = "import sys; from support import plots; assert 'matplotlib.pyplot' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True, cwd=ROOT)


def test_compare_equals_the_hand_calculation(tmp_path, figures):
    folders = []
    for seed, last in enumerate([0.5, 0.6, 0.7]):
        lines = [
            {"step": 0, "eval/general": 0.4},
            {"step": 1, "reward": last - 0.1},
            {"step": 2, "reward": last},
            {"step": 2, "eval/general": last},
        ]
        if seed:  # two runs are longer than the first
            lines.append({"step": 3, "reward": 0.7 + 0.1 * seed})
        folders.append(write_log(tmp_path / f"s{seed}", lines, algo="papo_g", seed=seed))
    table, _ = plots.compare(folders, tmp_path)
    rows = [line.split() for line in table.splitlines()]
    # sd 0.1, t(2) = 4.303: half width 4.303 * 0.1 / sqrt(3) = 0.248.
    assert rows[1] == "papo_g eval/general 3 0.400 +- 0.000 0 0.600 +- 0.248 2".split()
    # Last rewards 0.5, 0.8, 0.9: sd 0.2082, half width 0.517.
    assert rows[2] == "papo_g reward 3 0.500 +- 0.248 1 0.733 +- 0.517 2-3".split()
    reward = figures[0].axes[1]
    assert reward.lines[0].get_xydata() == pytest.approx(np.array([[1, 0.5], [2, 0.6], [3, 0.85]]))
    band = reward.collections[0].get_paths()[0].vertices
    assert band[:, 0].max() == 2  # beyond the shortest run the mean continues, its interval ends
    assert band[:, 1].max() == pytest.approx(0.6 + 0.2484, abs=1e-4)


def test_a_label_keeps_its_colour_where_another_has_no_such_metric(tmp_path, figures):
    series = [{1: 0.1, 2: 0.2}]
    panels = {"reward": {"grpo": series, "papo_g": series}, "kl_prcp": {"papo_g": series}}
    plots.draw(panels, "two runs", tmp_path / "two.png", shared_legend=True)
    reward, kl_prcp = figures[0].axes
    grpo, papo_g = (line.get_color() for line in reward.lines)
    assert kl_prcp.lines[0].get_color() == papo_g != grpo
    [legend] = figures[0].legends
    assert [text.get_text() for text in legend.get_texts()] == ["grpo", "papo_g"]
    assert [line.get_color() for line in legend.get_lines()] == [grpo, papo_g]


def test_compare_groups_by_algorithm_and_keeps_settings_apart(tmp_path, figures):
    runs = [
        {"algo": "grpo"},
        {"algo": "grpo"},
        {"algo": "papo_g", "kl_prcp_coef": 0.02},
        {"algo": "papo_g", "kl_prcp_coef": 0.04},
        {"algo": "papo_d"},
    ]
    folders = [
        write_run(tmp_path / f"{i}", seed=i % 2, steps=10 + i, out=f"runs/{i}", **config)
        for i, config in enumerate(runs)
    ]
    table, path = plots.compare(folders, tmp_path)
    assert_drawn(path)
    rewards = [line.split(" reward ") for line in table.splitlines() if " reward " in line]
    seeds = {label.strip(): numbers.split()[0] for label, numbers in rewards}
    assert seeds == {
        "grpo": "2",
        "papo_g kl_prcp_coef=0.02": "1",
        "papo_g kl_prcp_coef=0.04": "1",
        "papo_d": "1",
    }
    [figure] = figures
    assert [text.get_text() for text in figure.legends[0].get_texts()] == list(seeds)
    colours = [[line.get_color() for line in ax.lines] for ax in figure.axes]
    assert all(panel == colours[0] for panel in colours)
    assert_legible(figure)


# ---------------------------------------------------------------------- numbers behind the figures


def test_read_metrics(tmp_path):
    """A resumed run repeats steps, and a killed one leaves half a line."""
    lines = [
        '{"step": 0, "eval/general": 0.5, "eval/vision_dependent": 0.3}',
        '{"step": 1, "reward": 0.1}',
        '{"step": 2, "reward": 0.2}',
        '{"step": 2, "eval/general": 0.61}',
        '{"step": 2, "eval/other": 0.4}',
        '{"step": 1, "reward": 0.15}',
        '{"step": 0, "eval/general": 0.55}',
        '{"step": 3, "rew',
    ]
    (tmp_path / "metrics.jsonl").write_text("\n".join(lines))
    steps, evals = plots.read_metrics(tmp_path)
    assert steps == [{"step": 1, "reward": 0.15}, {"step": 2, "reward": 0.2}]
    assert evals == [
        {"step": 0, "eval/general": 0.55, "eval/vision_dependent": 0.3},
        {"step": 2, "eval/general": 0.61, "eval/other": 0.4},
    ]
    with pytest.raises(FileNotFoundError, match="nowhere"):
        plots.read_metrics(tmp_path / "nowhere")
    (tmp_path / "metrics.jsonl").write_text('{"reward": 0.125}\n')
    with pytest.raises(ValueError, match="0.125"):
        plots.read_metrics(tmp_path)


@pytest.mark.parametrize("n, t", [(2, 12.706), (10, 2.262), (11, 2.228), (121, 1.980)])
def test_the_interval_is_students_t(n, t):
    values = np.random.default_rng(n).normal(size=n)
    mean, half = plots.mean_interval(values)
    assert mean == pytest.approx(values.mean())
    assert half == pytest.approx(t * values.std(ddof=1) / math.sqrt(n), rel=2e-3)
    assert math.isnan(plots.mean_interval(values[:1])[1])
