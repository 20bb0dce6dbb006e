"""curves.py: what is drawn, and the table of a comparison. Synthetic runs, seconds on a CPU."""

import json
import math

import pytest
from conftest import write_jsonl

from support import curves


def write_log(folder, lines, **config):
    write_jsonl(folder / "metrics.jsonl", lines)
    if config:
        (folder / "config.json").write_text(json.dumps(config))
    return folder


def test_a_run_is_drawn(tmp_path):
    """Its name may look like math that does not parse, and values may not be finite."""
    lines = [{"step": step, "reward": 0.1 * step, "kl_ref": math.nan} for step in range(1, 6)]
    run = write_log(tmp_path, lines, algo="papo_g", model="some/$\\frac$", seed=3)
    assert curves.draw_run(run).stat().st_size > 5000
    with pytest.raises(ValueError, match="nothing to draw"):
        curves.draw_run(write_log(tmp_path, [{"step": 1, "reward": math.nan}]))


def test_a_resumed_run_repeats_steps_and_a_killed_one_leaves_half_a_line(tmp_path):
    lines = [{"step": 1, "reward": 0.1}, {"step": 2, "reward": 0.2}, {"step": 2, "reward": 0.3}]
    run = write_log(tmp_path, [*lines, {"step": 2, "eval/general": 0.5}])
    with open(run / "metrics.jsonl", "a") as file:
        file.write('{"step": 3, "rew')
    assert curves.read_metrics(run) == {"reward": {1: 0.1, 2: 0.3}, "eval/general": {2: 0.5}}
    with pytest.raises(FileNotFoundError, match="give the folder of a run"):
        curves.read_metrics(tmp_path / "none")


def test_compare_keeps_settings_apart(tmp_path):
    """Repetitions differ in seed and steps."""
    for i, config in enumerate(
        [{"algo": "grpo"}, {"algo": "grpo"}, {"kl_prcp_coef": 0.02}, {"kl_prcp_coef": 0.04}]
    ):
        lines = [{"step": step, "reward": 0.1 * step + i} for step in (1, 2)]
        own = {"seed": i % 2, "steps": i, "out": f"runs/{i}"}
        write_log(tmp_path / f"{i}", lines, **own, **({"algo": "papo_g"} | config))
    table, _ = curves.compare([tmp_path / f"{i}" for i in range(4)], tmp_path)
    rewards = [line.split(" reward ") for line in table.splitlines() if " reward " in line]
    seeds = {label.strip(): numbers.split()[0] for label, numbers in rewards}
    assert seeds == {"grpo": "2", "papo_g kl_prcp_coef=0.02": "1", "papo_g kl_prcp_coef=0.04": "1"}


def test_compare_equals_the_hand_calculation(tmp_path):
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
