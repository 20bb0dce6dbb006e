"""metrics.py: reading a log, t intervals, and when the collapse warning speaks."""

import json
import math
from pathlib import Path

import numpy as np
import pytest

from support import metrics

RESULTS = Path(__file__).parent.parent / "experiments" / "results"


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


def test_errors_of_read_metrics_name_the_file_or_the_line(tmp_path):
    with pytest.raises(FileNotFoundError, match="nowhere"):
        metrics.read_metrics(tmp_path / "nowhere")
    (tmp_path / "metrics.jsonl").write_text('{"reward": 0.125}\n')
    with pytest.raises(ValueError, match="0.125"):
        metrics.read_metrics(tmp_path)


@pytest.mark.parametrize(
    "n, t", [(2, 12.706), (3, 4.303), (10, 2.262), (11, 2.228), (31, 2.042), (121, 1.980)]
)
def test_the_interval_is_students_t(n, t):
    values = np.random.default_rng(n).normal(size=n)
    mean, half = metrics.mean_interval(values)
    assert mean == pytest.approx(values.mean())
    assert half == pytest.approx(t * values.std(ddof=1) / math.sqrt(n), rel=2e-3)
    assert math.isnan(metrics.mean_interval(values[:1])[1])


# ------------------------------------------------------------------------------ collapse warning


def collapsing(healthy=20, flat=(), leave_out=()):
    """`healthy` lines, then 10 in which every sign grows except those in `flat`."""
    start_and_growth = {
        "kl_prcp": (0.3, 0.2),
        "clip_frac": (0.01, 0.002),
        "entropy": (0.3, 0.05),
        "masked_entropy": (0.8, 0.1),
    }
    rng = np.random.default_rng(0)
    lines = []
    for step in range(1, healthy + 11):
        line = {"step": step}
        for metric, (start, growth) in start_and_growth.items():
            grown = 0 if metric in flat else growth * max(0, step - healthy)
            value = (start + grown) * (1 + 0.02 * rng.normal())
            if metric not in leave_out:
                line[metric] = value
        lines.append(line)
    return lines


def test_collapse_is_named_with_its_numbers():
    lines = collapsing()
    warning = metrics.collapse_warning(lines)
    assert warning.startswith("step 30:") and "\n" not in warning
    assert all(sign in warning for sign in metrics.COLLAPSE_SIGNS) and warning.count("->") == 4
    before = np.median([line["kl_prcp"] for line in lines[-14:-7]])
    after = np.median([line["kl_prcp"] for line in lines[-7:]])
    assert f"kl_prcp {before:.3g} -> {after:.3g}" in warning


@pytest.mark.parametrize("flat", metrics.COLLAPSE_SIGNS)
def test_one_calm_sign_is_enough_for_silence(flat):
    assert metrics.collapse_warning(collapsing(flat={flat})) is None


def test_kl_prcp_rising_alone_is_no_collapse():
    others = {"clip_frac", "entropy", "masked_entropy"}
    assert metrics.collapse_warning(collapsing(flat=others)) is None
    falling_entropies = [
        {
            "step": step,
            "kl_prcp": 0.02 * step,
            "clip_frac": 0.001 * step,
            "entropy": 1 / step,
            "masked_entropy": 1 / step,
        }
        for step in range(1, 101)
    ]
    assert not any(metrics.collapse_warning(falling_entropies[:n]) for n in range(101))


def test_short_runs_are_silent():
    assert metrics.collapse_warning([]) is None
    assert metrics.collapse_warning(collapsing()[-13:]) is None
    assert metrics.collapse_warning(collapsing()[-14:]) is not None


@pytest.mark.parametrize("spread, columns, most", [(0.7, 4, 0), (0.25, 1, 3)])
def test_noise_is_silent(spread, columns, most):
    """Heavy-tailed noise never warns; the four signs moving as one, in 1% of 300 runs at most."""
    rng = np.random.default_rng(0)
    warnings = 0
    for _ in range(300):
        noise = np.exp(spread * rng.normal(size=(20, columns))) * np.ones(4)
        lines = [
            {"step": step, **dict(zip(metrics.COLLAPSE_SIGNS, values, strict=True))}
            for step, values in enumerate(noise.tolist())
        ]
        warnings += metrics.collapse_warning(lines) is not None
    assert warnings <= most


def test_small_or_doubtful_growth_is_silent():
    slow = [
        {"step": step} | {sign: 1 + 0.03 * step for sign in metrics.COLLAPSE_SIGNS}
        for step in range(20)
    ]
    assert metrics.collapse_warning(slow) is None
    from_nothing = [line | {"clip_frac": line["clip_frac"] / 100} for line in collapsing()]
    assert metrics.collapse_warning(from_nothing) is None
    as_high_before = collapsing()
    as_high_before[-10]["entropy"] = 1.0
    assert metrics.collapse_warning(as_high_before) is None


def test_signs_that_are_not_measured():
    assert metrics.collapse_warning(collapsing(leave_out={"masked_entropy"})) is not None
    one_update = [line | {"clip_frac": 0.0} for line in collapsing()]
    assert "clip_frac" not in metrics.collapse_warning(one_update)
    two_signs = [line | {"clip_frac": 0.0} for line in collapsing(leave_out={"masked_entropy"})]
    assert metrics.collapse_warning(two_signs) is None
    without_masked_view = collapsing(leave_out={"kl_prcp"})
    assert metrics.collapse_warning(without_masked_view) is None
    with_gaps = []
    for line in collapsing():
        gap = {"step": line["step"], "kl_prcp": None, "entropy": math.nan}
        with_gaps += [line, gap]
    assert metrics.collapse_warning(with_gaps) == metrics.collapse_warning(collapsing())


def test_the_runs_of_the_experiments():
    """The warning comes halfway through a collapse, and in no run that stayed near its best."""
    warned_at = {}
    for file in RESULTS.glob("*.json"):
        result = json.loads(file.read_text())
        signs = {k: v for k, v in result.get("metrics", {}).items() if k in metrics.COLLAPSE_SIGNS}
        lines = [
            {"step": step, **dict(zip(signs, values, strict=True))}
            for step, values in enumerate(zip(*signs.values(), strict=True), 1)
        ]
        warned = [n for n in range(len(lines) + 1) if metrics.collapse_warning(lines[:n])]
        final = np.mean([split["accuracy"] for split in result["final"].values()])
        evaluations = result.get("curve", {}).values()
        best = max([np.mean(list(line.values())) for line in evaluations], default=0)
        assert not warned or final < best - 0.2, file.name
        warned_at[file.stem] = warned
    assert warned_at["large-s10"][0] == 37 and len(warned_at) > 40
