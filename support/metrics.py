"""What the numbers of a run say: its log and its evaluation table.

evaluate.py prints the table, plots.py draws what `read_metrics` returns. Not in the paper: t
intervals over seeds and bootstrap intervals over questions.
"""

from __future__ import annotations

import json
import math
import sys
from collections.abc import Iterable
from pathlib import Path

import numpy as np

# 97.5% quantiles of Student's t for 1 to 9 degrees of freedom. No library we require has them.
T_TABLE = (12.7062, 4.3027, 3.1824, 2.7764, 2.5706, 2.4469, 2.3646, 2.3060, 2.2622)

RESAMPLES = 1000  # bootstrap samples per evaluation set


def read_metrics(path) -> tuple[list[dict], list[dict]]:
    """Read metrics.jsonl, or the one in a run's folder: (training lines, evaluation lines).

    Both are sorted by step. A resumed run repeats steps: the later training line of a step
    replaces the earlier one. Lines with an "eval/..." key are evaluations; those of one step are
    merged. A line that is no JSON is skipped: a killed run may leave half a line.
    """
    path = Path(path)
    if path.is_dir():
        path = path / "metrics.jsonl"
    if not path.is_file():
        raise FileNotFoundError(
            f"no metrics file at {path}: give a run folder or its metrics.jsonl"
        )
    steps: dict[int, dict] = {}
    evals: dict[int, dict] = {}
    for text in path.read_text(encoding="utf-8", errors="replace").splitlines():
        try:
            line = json.loads(text)
        except json.JSONDecodeError:
            continue
        if not isinstance(line, dict) or not isinstance(line.get("step"), int):
            raise ValueError(f"{path}: a line without an integer step: {text[:60]!r}")
        if eval_keys([line]):
            evals.setdefault(line["step"], {}).update(line)
        else:
            steps[line["step"]] = line
    return [steps[step] for step in sorted(steps)], [evals[step] for step in sorted(evals)]


def eval_keys(lines: Iterable[dict]) -> list[str]:
    """The names of all evaluation metrics ("eval/SET") in these lines, sorted."""
    return sorted({key for line in lines for key in line if key.startswith("eval/")})


def finite_series(lines: list[dict], metric: str) -> dict[int, float]:
    """{step: value} of the lines in which the metric is a finite number."""
    series = {}
    for line in lines:
        value = line.get(metric)
        if isinstance(value, (int, float)) and math.isfinite(value):
            series[line["step"]] = float(value)
    return series


def mean_interval(values: Iterable[float]) -> tuple[float, float]:
    """(mean, half width of its 95% t interval) of independent values; NaN wide for a single one."""
    values = np.asarray(list(values), dtype=float)
    df = len(values) - 1
    if df < 1:
        return float(values[0]), math.nan
    if df <= len(T_TABLE):
        t = T_TABLE[df - 1]
    else:  # Cornish-Fisher expansion, within 0.2%
        t = 1.95996 + 2.37227 / df + 2.8225 / df**2
    return float(values.mean()), float(t * values.std(ddof=1) / math.sqrt(len(values)))


def in_questions(name: str, records: list[dict], n: int) -> list[list[dict]]:
    """Group the records of evaluation set `name` into questions of n responses each.

    As in PAPO-Eval, records with equal id, prompt and label belong together. ValueError, naming
    the question, where their number is not a multiple of n.
    """
    groups: dict[tuple, list[dict]] = {}
    for record in records:
        groups.setdefault((record["id"], record["prompt"], record["label"]), []).append(record)
    questions = []
    for (row, prompt, label), group in groups.items():
        repeats, remainder = divmod(len(group), n)
        if remainder:
            text = " ".join(prompt.split("user\n")[-1].split())[:80]
            raise ValueError(
                f"{name}: {len(group)} responses to question {row!r} ({text!r}, answer {label!r}) "
                f"are not a multiple of n={n}"
            )
        # A set may hold a question several times. Records come loop after loop over the set, so
        # the n responses to one of its copies are `repeats` apart.
        questions += [group[copy::repeats] for copy in range(repeats)]
    return questions


def summarise(
    results: dict[str, list[dict]], n: int, groups: dict[str, tuple], baseline=None
) -> list[dict]:
    """The rows of an evaluation's table, in %: one per set, then one average per group of sets.

    results, baseline: set name -> graded records. groups: label -> set names. Columns:
    accuracy   avg@n; low and high: its bootstrap 95% interval over questions
    pass       questions with at least one correct response among n
    unboxed    responses without a complete \\boxed{}; truncated: cut at max_new_tokens
    delta      Delta_rel, the relative gain over the baseline
    An average is the plain mean over its sets, of delta too (the paper's definition); an average
    over the same sets as an earlier one is left out. NaN: unknown.
    """
    rows = [_set_row(name, records, n) for name, records in results.items()]
    if baseline:
        for row in rows:
            before = _set_row(row["name"], baseline[row["name"]], n)
            if row["questions"] != before["questions"]:
                counts = f"{before['questions']} questions, this evaluation {row['questions']}"
                print(f"{row['name']}: no Delta_rel, the baseline has {counts}", file=sys.stderr)
            elif before["accuracy"]:
                row["delta"] = 100 * (row["accuracy"] / before["accuracy"] - 1)
    averages: dict[tuple, dict] = {}
    for label, names in groups.items():
        members = [row for row in rows if row["name"] in names]
        if len(members) > 1:
            key = tuple(row["name"] for row in members)
            averages.setdefault(key, _average_row(label, members, len(names)))
    rows += averages.values()
    for row in rows:
        low, high = np.quantile(row.pop("resampled"), [0.025, 0.975])
        row["low"], row["high"] = float(low), float(high)
    return rows


def _set_row(name: str, records: list[dict], n: int) -> dict:
    """One set's row, with bootstrap samples of its accuracy [RESAMPLES] under "resampled".

    The samples depend on the name and the accuracies alone.
    """
    questions = in_questions(name, records, n)
    accuracies = np.array([[r["accuracy"] for r in question] for question in questions])
    per_question = accuracies.reshape(-1, n).mean(1)
    resampled = np.array([math.nan])
    if len(questions):
        rng = np.random.default_rng([0, *name.encode()])
        resampled = 100 * rng.choice(per_question, (RESAMPLES, len(questions))).mean(1)
    return {
        "name": name,
        "questions": len(questions),
        "delta": math.nan,
        "accuracy": _percent(per_question),
        "pass": _percent((accuracies.reshape(-1, n) > 0).any(1)),
        # PAPO-Eval's own files do not say whether a response was cut.
        "unboxed": _percent([r["unboxed"] for r in records if "unboxed" in r]),
        "truncated": _percent([r["truncated"] for r in records if "truncated" in r]),
        "resampled": resampled,
    }


def _percent(values) -> float:
    return 100 * float(np.mean(values)) if len(values) else math.nan


def _average_row(label: str, rows: list[dict], n_sets: int) -> dict:
    """The mean of these rows; the name says so where the group has sets that were not evaluated."""
    missing = f" ({len(rows)} of {n_sets})" if len(rows) < n_sets else ""
    row = {key: sum(r[key] for r in rows) / len(rows) for key in rows[0] if key != "name"}
    return row | {
        "name": f"{label} average{missing}",
        "questions": sum(r["questions"] for r in rows),
    }


def table(rows: list[dict], n: int) -> str:
    """The rows of `summarise` as plain text; a dash stands for NaN."""
    percentages = {
        "pass": f"pass@{n} %",
        "unboxed": "unboxed %",
        "truncated": "truncated %",
    }
    if any(math.isfinite(row["delta"]) for row in rows):
        percentages["delta"] = "Delta_rel %"
    lines = [["", "questions", f"avg@{n} %", "95% interval", *percentages.values()]]
    for row in rows:
        interval = "-"
        if math.isfinite(row["low"]):
            interval = f"{row['low']:.2f} to {row['high']:.2f}"
        line = [row["name"], str(row["questions"]), _cell(row["accuracy"]), interval]
        lines.append(line + [_cell(row[key]) for key in percentages])
    return align_columns(lines, left=1)


def _cell(value: float) -> str:
    return "-" if math.isnan(value) else f"{value:.2f}"


def align_columns(lines: list[list[str]], left: int) -> str:
    """Lines of cells as text: the first `left` columns are flush left, the others flush right."""
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    text = []
    for line in lines:
        names = [cell.ljust(width) for cell, width in zip(line, widths, strict=True)]
        numbers = [cell.rjust(width) for cell, width in zip(line, widths, strict=True)]
        text.append("  ".join(names[:left] + numbers[left:]).rstrip())
    return "\n".join(text)
