"""metrics.py: reading a log, and t intervals."""

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
