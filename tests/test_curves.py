"""curves.py: what is drawn, and the table of a comparison. Synthetic runs, seconds on a CPU."""

import json
import math

import numpy as np
import pytest
from PIL import Image

from support import curves

SCIPYS_T = {1: 12.7062047, 4: 2.7764451, 9: 2.2621572, 10: 2.2281388, 30: 2.0422724}


def write_log(folder, lines, **config):
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    if config:
        (folder / "config.json").write_text(json.dumps(config))
    return folder


def test_curves_leave_out_what_does_not_move(tmp_path, figures):
    """One update per step clips nothing; a toy's format and length never change. The reward and the
    evaluations stay: that they do not move is news. Nor is drawn what is not finite."""
    still = {"clip_frac": 0.0, "clip_frac_dual": 0.0, "truncated": 0.0, "response_length": 31.0}
    lines = []
    for step in range(1, 6):
        moving = {"entropy": 0.1 * step, "masked_entropy": 0.9, "accuracy": 0.1 * step}
        lines.append({"step": step, "reward": 0.5, "format": 1.0} | still | moving)
    lines += [{"step": step, "eval/general": 0.25, "kl_ref": math.nan} for step in (0, 5)]
    run = write_log(tmp_path, lines, algo="papo_g", model="some/$\\frac$", seed=3)
    out = curves.draw_run(run)
    [figure] = figures
    drawn = {ax.get_title(): [line.get_label() for line in ax.lines] for ax in figure.axes}
    assert drawn == {
        "reward on training prompts": ["reward", "accuracy"],
        "evaluation accuracy": ["general"],
        "entropy (minus mean log-prob)": ["entropy"],
    }
    assert figure.get_suptitle() == "papo_g, $\\frac$, seed 3"  # as math it would not parse
    image = Image.open(out)
    assert image.width > 1000 and np.asarray(image.convert("L"), dtype=float).std() > 10


def test_a_resumed_run_repeats_steps_and_a_killed_one_leaves_half_a_line(tmp_path):
    lines = [{"step": 1, "reward": 0.1}, {"step": 2, "reward": 0.2}, {"step": 2, "reward": 0.3}]
    run = write_log(tmp_path, [*lines, {"step": 2, "eval/general": 0.5}])
    with open(run / "metrics.jsonl", "a") as file:
        file.write('{"step": 3, "rew')
    assert curves.read_metrics(run) == {"reward": {1: 0.1, 2: 0.3}, "eval/general": {2: 0.5}}
    with pytest.raises(FileNotFoundError, match="give the folder of a run"):
        curves.read_metrics(tmp_path / "none")
    with pytest.raises(ValueError, match="nothing to draw"):
        curves.draw_run(write_log(tmp_path, [{"step": 1, "reward": math.nan}]))


def test_the_interval_is_students_t():
    for df, t in SCIPYS_T.items():
        values = np.random.default_rng(df).normal(size=df + 1)
        mean, half = curves.mean_interval(values.tolist())
        assert mean == pytest.approx(values.mean())
        assert half == pytest.approx(t * values.std(ddof=1) / math.sqrt(df + 1), rel=0.002)


def test_compare_keeps_settings_apart(tmp_path, figures):
    """Repetitions differ in seed and steps."""
    for i, config in enumerate(
        [{"algo": "grpo"}, {"algo": "grpo"}, {"kl_prcp_coef": 0.02}, {"kl_prcp_coef": 0.04}]
    ):
        lines = [{"step": step, "reward": 0.1 * step + i, "clip_frac": 0.1} for step in (1, 2)]
        own = {"seed": i % 2, "steps": i, "out": f"runs/{i}"}
        write_log(tmp_path / f"{i}", lines, **own, **({"algo": "papo_g"} | config))
    table, _ = curves.compare([tmp_path / f"{i}" for i in range(4)], tmp_path)
    rewards = [line.split(" reward ") for line in table.splitlines() if " reward " in line]
    seeds = {label.strip(): numbers.split()[0] for label, numbers in rewards}
    assert seeds == {"grpo": "2", "papo_g kl_prcp_coef=0.02": "1", "papo_g kl_prcp_coef=0.04": "1"}
    [figure] = figures
    assert [ax.get_title() for ax in figure.axes] == ["reward"]  # clip_frac moves in no run


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
    table, figure = curves.compare(folders, tmp_path / "new")
    assert figure == tmp_path / "new" / "compare.png" and figure.exists()
    rows = [line.split() for line in table.splitlines()]
    # sd 0.1, t(2) = 4.303: half width 4.303 * 0.1 / sqrt(3) = 0.248.
    assert rows[1] == "papo_g eval/general 3 0.400 +- 0.000 0.600 +- 0.248".split()
    # Last rewards 0.5, 0.8, 0.9: sd 0.2082, half width 0.517.
    assert rows[2] == "papo_g reward 3 0.500 +- 0.248 0.733 +- 0.517".split()
    reward = figures[0].axes[1]
    assert reward.lines[0].get_xydata() == pytest.approx(np.array([[1, 0.5], [2, 0.6], [3, 0.85]]))
    band = reward.collections[0].get_paths()[0].vertices
    assert band[:, 0].max() == 2  # beyond the shortest run the mean continues, its interval ends
    assert band[:, 1].max() == pytest.approx(0.6 + 0.2484, abs=1e-4)
