r"""Tables and figures of the experiments, redrawn from results/*.json into report.md and figures/; runs nothing.

python -m experiments.report
"""

from __future__ import annotations

import json
from itertools import product
from pathlib import Path

import numpy as np
from matplotlib.figure import Figure

from support import metrics, plots

HERE = Path(__file__).resolve().parent


SPLITS = ("general", "vision_dependent")
GAMMAS = {
    "grpo": 0.0,
    "papo_g": 0.02,
    "gamma_0.1": 0.1,
    "gamma_0.2": 0.2,
    "gamma_0.5": 0.5,
    "gamma_1.0": 1.0,
}
LARGE = {
    "large_no_kl_ref": "no KL_ref", "large": "KL_ref 0.01", "large_kl_ref_0.1": "KL_ref 0.1",
    "large_single": "single entropy", "large_double": "double entropy", "large_double_grad": "double entropy, gradient",
}  # fmt: skip
TABLES = {  # title -> (variants, compared with, names shown)
    "gamma": (list(GAMMAS), "grpo", {name: f"gamma {value:g}" for name, value in GAMMAS.items()}),
    "regularisation": (list(LARGE), "large", LARGE),
    "no_kl_ref": (["grpo", "grpo_no_kl_ref", "papo_g", "papo_g_no_kl_ref"], "grpo", {}),
    "masking": (["papo_g", "mask_0.4", "mask_0.8", "mask_1.0", "mask_semantic", "mask_noise"], "papo_g",
                {"papo_g": "random 0.6", "mask_0.4": "random 0.4", "mask_0.8": "random 0.8", "mask_1.0": "random 1.0",
                 "mask_semantic": "semantic 0.6", "mask_noise": "noise 0.6"}),
    "estimator": (["papo_g", "estimator_paper", "masked_grad"], "papo_g",
                  {"papo_g": "k3 (released code)", "estimator_paper": "the paper's literal form",
                   "masked_grad": "k3, masked log-probs with gradient"}),
}  # fmt: skip
Results = dict[str, dict[int, dict]]  # variant -> seed -> result


def load() -> Results:
    found: Results = {}
    for file in sorted((HERE / "results").glob("*.json")):
        result = json.loads(file.read_text())
        found.setdefault(result["variant"], {})[result["seed"]] = result
    return found


def score(result: dict, what: str = "overall") -> float:
    """In %: a split's accuracy at the end, their mean (overall), or the mean of the evaluations on the way (way)."""
    if what == "way":
        return 100 * float(
            np.mean([list(line.values()) for step, line in result["curve"].items() if int(step)])
        )
    splits = SPLITS if what == "overall" else (what,)
    return 100 * float(np.mean([result["final"][name]["accuracy"] for name in splits]))


def delta_rel(result: dict, base: dict) -> float:
    return float(np.mean([100 * (score(result, name) / score(base, name) - 1) for name in SPLITS]))


def paired(found: Results, variant: str, base: str, measure) -> list[float]:
    """measure(result, base's result) at each seed that both have."""
    seeds = sorted(found.get(variant, {}).keys() & found.get(base, {}).keys())
    return [measure(found[variant][seed], found[base][seed]) for seed in seeds]


def sign_flip(differences: list[float]) -> float:
    """Two-sided exact p: the share of sign patterns whose mean is at least as far from 0."""
    values = np.array(differences)
    means = [abs(float(np.mean(values * signs))) for signs in product((1, -1), repeat=len(values))]
    return float(np.mean(np.array(means) >= abs(values.mean()) - 1e-12))


def pm(values: list[float], digits: int = 1, sign: bool = False) -> str:
    mean, half = metrics.mean_interval(values) if values else (float("nan"), float("nan"))
    shown = f"{mean:{'+' if sign else ''}.{digits}f}"
    return "-" if not values else shown + (f" +- {half:.{digits}f}" if half == half else "")


def markdown(rows: list[list[str]]) -> str:
    lines = ["| " + " | ".join(row) + " |" for row in rows]
    return "\n".join([lines[0], "|" + "---|" * len(rows[0]), *lines[1:]])


def accuracies(found: Results, variant: str, seeds) -> list[str]:
    """Cells: each split, overall, on the way; means with 95% intervals over the seeds."""
    runs = [found[variant][seed] for seed in seeds]
    ways = [score(run, "way") for run in runs if "curve" in run]
    return [pm([score(run, what) for run in runs]) for what in (*SPLITS, "overall")] + [pm(ways)]


def table(found: Results, variants: list[str], base: str, names: dict[str, str]) -> str:
    """Variants at the seeds that all of those run at all have in common, with the paired difference to `base`."""
    variants = [v for v in variants if v in found]
    if base not in variants:
        return "(not run yet)"
    seeds = sorted(set.intersection(*(set(found[v]) for v in variants)))
    rows = [
        ["", "seeds", *SPLITS, "overall", "on the way", f"overall, minus {names.get(base, base)}"]
    ]
    for variant in variants:
        part = {v: {s: found[v][s] for s in seeds} for v in (variant, base)}
        gains = paired(part, variant, base, lambda a, b: score(a) - score(b))
        shown = names.get(variant, variant)
        rows.append(
            [shown, str(len(seeds)), *accuracies(found, variant, seeds), pm(gains, sign=True)]
        )
    return markdown(rows)


def table1(found: Results) -> str:
    names = [v for v in ("start", "grpo", "papo_g", "dapo", "papo_d") if v in found]
    rows = [["", "seeds", *SPLITS, "overall", "on the way", "Delta_rel %", "overall, paired", "p"]]
    for variant in names:
        base = {"papo_g": "grpo", "papo_d": "dapo"}.get(variant)
        cells = ["", "", ""]
        if base in found:
            gains = paired(found, variant, base, lambda a, b: score(a) - score(b))
            cells = [pm(paired(found, variant, base, delta_rel), sign=True), pm(gains, sign=True)]
            cells.append(f"{sign_flip(gains):.3f}")
        rows.append(
            [
                variant,
                str(len(found[variant])),
                *accuracies(found, variant, sorted(found[variant])),
                *cells,
            ]
        )
    return markdown(rows)


def perception(found: Results) -> str:
    """How many answers are wrong, in how many the reading is, and PAPO's change of the latter against its baseline."""
    rows = [
        [
            "",
            "wrong %",
            "of them misread %",
            "cells read right %",
            "misread answers, relative to baseline %",
        ]
    ]
    total = lambda run, key: sum(run["final"][name][key] for name in SPLITS)  # noqa: E731
    for variant in [v for v in ("start", "grpo", "papo_g", "dapo", "papo_d") if v in found]:
        runs, base = found[variant].values(), {"papo_g": "grpo", "papo_d": "dapo"}.get(variant, "")
        change = paired(
            found, variant, base, lambda a, b: 100 * (total(a, "misread") / total(b, "misread") - 1)
        )
        rows.append([
            variant, pm([100 * total(run, "wrong") / total(run, "responses") for run in runs]),
            pm([100 * total(run, "misread") / max(total(run, "wrong"), 1) for run in runs]),
            pm([50 * total(run, "cells_right") for run in runs]), pm(change, sign=True) if base else "",
        ])  # fmt: skip
    return markdown(rows)


def cost(found: Results) -> str:
    """Seconds a step of one thread, the median over all steps of the seeds that both have."""
    rows = [["", "seconds a step", "over its baseline %"]]
    median = lambda run: float(np.median(run["metrics"]["seconds"]))  # noqa: E731
    for variant, base in (("grpo", ""), ("papo_g", "grpo"), ("dapo", ""), ("papo_d", "dapo")):
        if variant in found:
            over = paired(found, variant, base, lambda a, b: 100 * (median(a) / median(b) - 1))
            rows.append(
                [
                    variant,
                    pm([median(run) for run in found[variant].values()], 2),
                    pm(over, sign=True),
                ]
            )
    return markdown(rows)


def series(run: dict, key: str) -> dict[int, float]:
    """{step: value} of one run: of an evaluation's split, or of a metric."""
    if key in SPLITS:
        return {int(step): line[key] for step, line in run["curve"].items()}
    return {i + 1: value for i, value in enumerate(run["metrics"].get(key, []))}


def dots(found: Results, labels: dict[str, str], name: str) -> str:
    """Each seed's accuracy at the end, variant beside variant, a seed's dots joined; the bar is the mean."""
    labels = {variant: label for variant, label in labels.items() if variant in found}
    if len(labels) < 2:
        return ""
    seeds = sorted(set.intersection(*(set(found[variant]) for variant in labels)))
    drawn = Figure(figsize=(13.8, 3.6), layout="constrained")
    for ax, what in zip(drawn.subplots(1, 3), (*SPLITS, "overall"), strict=True):
        ax.set_title(f"{what}: accuracy at the end, %", fontsize=9.5)
        values = np.array(
            [[score(found[variant][seed], what) for variant in labels] for seed in seeds]
        )
        for row, seed in zip(values, seeds, strict=True):
            ax.plot(
                range(len(labels)), row, marker="o", linewidth=0.7, alpha=0.7, label=f"seed {seed}"
            )
        ax.hlines(
            values.mean(0),
            np.arange(len(labels)) - 0.3,
            np.arange(len(labels)) + 0.3,
            "black",
            linewidth=2,
        )
        ax.set_xticks(range(len(labels)), labels.values(), rotation=25, ha="right", fontsize=8)
        ax.grid(alpha=0.3)
        ax.legend(fontsize=7)
    drawn.savefig(HERE / "figures" / f"{name}.png", dpi=110)
    return f"![{name}](figures/{name}.png)"


def seed_lines(found: Results, labels: dict[str, str], keys: dict[str, str], name: str) -> str:
    """Metrics over the steps, a line for each seed, a colour for each variant."""
    if not any(variant in found for variant in labels):
        return ""
    drawn = Figure(figsize=(13.8, 3.1 * -(-len(keys) // 3) + 0.5), layout="constrained")
    for i, (key, title) in enumerate(keys.items()):
        ax = drawn.add_subplot(-(-len(keys) // 3), 3, i + 1)
        ax.set_title(title, fontsize=9.5)
        ax.grid(alpha=0.3)
        for colour, (variant, label) in enumerate(labels.items()):
            for number, run in enumerate(found.get(variant, {}).values()):
                values = series(run, key)
                ax.plot(
                    values.keys(),
                    values.values(),
                    f"C{colour}",
                    linewidth=1,
                    label="" if number else label,
                )
    drawn.legend(*ax.get_legend_handles_labels(), loc="outside lower center", ncols=3, fontsize=9)
    drawn.savefig(HERE / "figures" / f"{name}.png", dpi=110)
    return f"![{name}](figures/{name}.png)"


def table1_figure(found: Results, keys: dict[str, str]) -> str:
    panels = {title: {algo: [s for run in found.get(algo, {}).values() if (s := series(run, key))]
                      for algo in ("grpo", "papo_g", "dapo", "papo_d")} for key, title in keys.items()}  # fmt: skip
    plots.draw(
        panels,
        "mean over eight seeds; band: 95% interval",
        HERE / "figures" / "table1.png",
        shared_legend=True,
    )
    return "![Table 1 in the small](figures/table1.png)"


def main() -> None:
    found = load()
    (HERE / "figures").mkdir(exist_ok=True)
    counts = sum(len(runs) for runs in found.values())
    accuracy = {"general": "accuracy, general", "vision_dependent": "accuracy, vision_dependent"}
    signs = {"kl_prcp": "KL_prcp", "clip_frac": "share of tokens clipped", "entropy": "entropy",
             "masked_entropy": "entropy, masked image"}  # fmt: skip
    parts = [
        "# What came out", f"Redrawn by `report.py` from {counts} results. Mean +- 95% interval over seeds; accuracies "
        "in %. The protocol and the reading are in README.md.",
        "## table1", table1(found), table1_figure(found, accuracy | {"kl_prcp": "KL_prcp"}),
        "## perception (from table1)", perception(found), "## cost (from table1)", cost(found),
    ]  # fmt: skip
    for name, (variants, base, shown) in TABLES.items():
        labels = {variant: shown.get(variant, variant) for variant in variants}
        parts += [f"## {name}", table(found, variants, base, shown), dots(found, labels, name)]
    parts += [
        "## signs of collapse (from regularisation)",
        seed_lines(found, LARGE, accuracy | signs, "collapse"),
    ]
    (HERE / "report.md").write_text("\n\n".join(filter(None, parts)) + "\n")
    print(HERE / "report.md")


if __name__ == "__main__":
    main()
