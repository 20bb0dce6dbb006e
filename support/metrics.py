"""Tables, intervals, the collapse warning."""

from __future__ import annotations

import json
import math
from pathlib import Path

import numpy as np

# Sign of collapse -> least factor and least rise from the reference window's median to the last window's.
SIGNS = {
    "kl_prcp": (1.5, 0.05),
    "clip_frac": (1.5, 0.005),
    "entropy": (1.25, 0.02),
    "masked_entropy": (1.25, 0.02),
}


T_TABLE = [
    12.7062,
    4.3027,
    3.1824,
    2.7764,
    2.5706,
    2.4469,
    2.3646,
    2.3060,
    2.2622,
]  # Student's t, 97.5%, df 1 to 9


RESAMPLES = 1000  # of the bootstrap


def read_metrics(path) -> tuple[list[dict], list[dict]]:
    """metrics.jsonl, or the run folder that holds it -> (training lines, evaluation lines), each sorted by step.

    A later training line replaces an earlier one of its step (a resumed run repeats some); evaluation lines, those with
    an "eval/..." key, are merged. A line that does not parse, as a killed run leaves one, is ignored.
    """
    path = Path(path) / "metrics.jsonl" if Path(path).is_dir() else Path(path)
    if not path.is_file():
        raise FileNotFoundError(
            f"no metrics file at {path}: give a run folder or its metrics.jsonl"
        )
    steps, evals = {}, {}
    for text in path.read_text(encoding="utf-8", errors="replace").splitlines():
        try:
            line = json.loads(text)
        except json.JSONDecodeError:
            continue
        if not isinstance(line, dict) or not isinstance(line.get("step"), int):
            raise ValueError(f"{path}: a line without an integer step: {text[:60]!r}")
        if any(key.startswith("eval/") for key in line):
            evals.setdefault(line["step"], {}).update(line)
        else:
            steps[line["step"]] = line
    return [steps[s] for s in sorted(steps)], [evals[s] for s in sorted(evals)]


def _series(lines: list[dict], key: str) -> dict[int, float]:
    """{step: value} of the lines with a finite number under key (None and NaN are left out)."""
    return {
        x["step"]: float(x[key])
        for x in lines
        if isinstance(x.get(key), (int, float)) and math.isfinite(x[key])
    }


def _splits(evals) -> list[str]:
    return sorted({key for line in evals for key in line if key.startswith("eval/")})


def collapse_warning(steps: list[dict], window: int = 7) -> str | None:
    """One line when the paper's early signs of collapse appear together, else None.

    The last `window` training lines are compared with the `window` before them. A sign shows when half of the last
    window lies above ALL of the reference window and the median has grown by SIGNS' factor and rise. Every measured
    sign must show at once: KL_prcp, the PPO clip fraction, both entropies. So KL_prcp rising alone, which PAPO wants,
    never warns; nor a healthy run, whose entropies fall; nor noise. (The numbers are from the experiments' runs, where
    it comes in the midst of the plainest collapse and in no healthy run.) A slower collapse needs a larger window. Not
    measured: masked_entropy where not logged, the clip fraction where 0 throughout (one update a step).
    KL_prcp, the entropy and one sign more must be; lines without these two are skipped, and fewer than two windows of
    the rest give None.
    """
    recent = [x for x in steps if _series([x], "kl_prcp") and _series([x], "entropy")][
        -2 * window :
    ]
    found = []
    for key, (factor, rise) in SIGNS.items():
        values = np.array(list(_series(recent, key).values()))
        if len(values) < 2 * window or (key == "clip_frac" and not values.any()):
            continue
        before, after = np.median(values[:window]), np.median(values[window:])
        if after <= values[:window].max() or after < factor * before or after < before + rise:
            return None
        found.append(f"{key} {before:.3g} -> {after:.3g}")
    if len(found) < 3:
        return None
    return (
        f"step {recent[-1]['step']}: early signs of collapse over the last {window} steps: "
        + ", ".join(found)
    )


def mean_interval(values) -> tuple[float, float]:
    """(mean, half width of the 95% t interval) of independent values; the half width is NaN for a single one."""
    values = np.asarray(list(values), dtype=float)
    df = len(values) - 1
    if df < 1:
        return float(values[0]), math.nan
    t = (
        T_TABLE[df - 1] if df < 10 else 1.95996 + 2.37227 / df + 2.8225 / df**2
    )  # Cornish-Fisher, within 0.2%
    return float(values.mean()), float(t * values.std(ddof=1) / math.sqrt(df + 1))


def in_questions(name: str, records: list[dict], n: int) -> list[list[dict]]:
    """Evaluation records by question, n each, grouped by id, prompt and label as PAPO-Eval groups them.

    A question that is asked k times has k * n records, loop after loop, so every k-th belongs together. ValueError,
    naming the question, where a count is no multiple of n.
    """
    groups: dict[tuple, list[dict]] = {}
    for record in records:
        groups.setdefault((record["id"], record["prompt"], record["label"]), []).append(record)
    for (number, prompt, label), group in groups.items():
        if len(group) % n:
            question = " ".join(prompt.split("user\n")[-1].split())[:80]
            told = f"{name}: {len(group)} responses to question {number!r} ({question!r}, answer {label!r})"
            raise ValueError(f"{told} are no multiple of n={n}")
    return [
        group[i :: len(group) // n] for group in groups.values() for i in range(len(group) // n)
    ]


def _measure(name: str, records: list[dict], n: int) -> dict:
    """A row of `summarise`, with bootstrap draws [RESAMPLES] of the accuracy: questions drawn anew, fixed seed."""
    accuracies = [[r["accuracy"] for r in question] for question in in_questions(name, records, n)]
    means, rng = (
        np.array(accuracies).reshape(-1, n).mean(1),
        np.random.default_rng([0, *name.encode()]),
    )
    columns = {"accuracy": means, "pass": [max(a) > 0 for a in accuracies]}
    for key in ("unboxed", "truncated"):  # PAPO-Eval's files do not say whether a response was cut
        columns[key] = [r[key] for r in records if key in r]
    row = {
        key: 100 * float(np.mean(values)) if len(values) else math.nan
        for key, values in columns.items()
    }
    draws = (
        [100 * rng.choice(means, len(means)).mean() for _ in range(RESAMPLES)]
        if len(means)
        else [math.nan]
    )
    return {
        "name": name,
        "questions": len(means),
        "delta": math.nan,
        **row,
        "draws": np.array(draws),
    }


def summarise(
    results: dict[str, list[dict]], n: int, groups: dict[str, tuple], baseline=None
) -> list[dict]:
    """The rows of an evaluation's table, in %: each set, then the averages of `groups`, plain means over their sets.

    results, baseline: name -> graded records. accuracy: avg@n; low, high: its bootstrap 95% interval over questions;
    pass: questions with a right answer among n; delta: Delta_rel, a set's gain relative to its baseline, and the mean
    of these over an average's sets (the paper's definition). An average over the same sets as another is left out.
    """
    rows, averages = [_measure(name, records, n) for name, records in results.items()], {}
    for row in rows if baseline else []:
        before = _measure(row["name"], baseline[row["name"]], n)["accuracy"]
        row["delta"] = 100 * (row["accuracy"] / before - 1) if before else math.nan
    for label, names in groups.items():
        part = [row for row in rows if row["name"] in names]
        if len(part) > 1:
            missing = f" ({len(part)} of {len(names)})" if len(part) < len(names) else ""
            mean = {
                key: sum(row[key] for row in part) / len(part) for key in part[0] if key != "name"
            }
            mean |= {
                "name": f"{label} average{missing}",
                "questions": sum(row["questions"] for row in part),
            }
            averages.setdefault(tuple(row["name"] for row in part), mean)
    rows += averages.values()
    for row in rows:
        row["low"], row["high"] = map(float, np.quantile(row.pop("draws"), [0.025, 0.975]))
    return rows


def table(rows: list[dict], n: int) -> str:
    """The rows of `summarise` as plain text; a dash where there is nothing to say."""
    heads = [
        "",
        "questions",
        f"avg@{n} %",
        "95% interval",
        f"pass@{n} %",
        "unboxed %",
        "truncated %",
        "Delta_rel %",
    ]
    lines = [heads[: 7 + any(math.isfinite(row["delta"]) for row in rows)]]
    for row in rows:
        numbers = [
            f"{row[key]:.2f}" for key in ("accuracy", "pass", "unboxed", "truncated", "delta")
        ]
        line = [
            row["name"],
            str(row["questions"]),
            numbers[0],
            f"{row['low']:.2f} to {row['high']:.2f}",
            *numbers[1:],
        ]
        lines.append(["-" if cell.startswith("nan") else cell for cell in line[: len(lines[0])]])
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    return "\n".join(
        "  ".join([x[0].ljust(widths[0]), *map(str.rjust, x[1:], widths[1:])]) for x in lines
    )
