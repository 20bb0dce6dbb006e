r"""Draw report.md and figures/ from the lines of results/*.jsonl. Runs nothing.

python -m experiments.report
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from itertools import product
from pathlib import Path

import numpy as np
import pandas as pd
from matplotlib.figure import Figure

from experiments import run
from experiments.run import CONFIRMING_SEEDS, EIGHT_SEEDS, NEW_SEEDS, SPLITS, TASKS, THREE_SEEDS
from support.curves import mean_interval
from support.run_folder import read_log

HERE = Path(__file__).resolve().parent
Rows = dict[str, pd.DataFrame]  # label -> a line per seed, a column per number
Pairs = list[tuple[str, str]]  # a variant, and the one that it is compared with

# ------------------------------------------------------------------------------- what is compared


def against(base: str, names: Iterable[str]) -> Pairs:
    return [(name, base) for name in names if name != base]


def within(folder: str, pairs: Pairs) -> Pairs:
    return [(f"{folder}/{name}", f"{folder}/{base}") for name, base in pairs]


BASELINES = against("grpo", ["papo_g", "papo_g_0.1"]) + against("dapo", ["papo_d", "papo_d_0.1"])
METHODS = [*BASELINES, ("dapo", "grpo"), ("papo_g_0.1", "papo_g"), ("papo_d_0.1", "papo_d")]

# On the dots. The p of each of these questions are corrected together.
QUESTIONS = {
    "Which gamma": against("grpo", ["papo_g", *run.GAMMAS]),
    "What prevents collapse": against("large", run.COLLAPSING),
    "Which patches": against("random_0.17", ["papo_g_0.1", "semantic_0.17"]),
}
FURTHER = [
    ("papo_g_1.0", "papo_g"),
    *against("grpo", run.MASKS),
    ("semantic_0.17", "papo_g_0.1"),
    ("large_double_grad", "large_single"),
    *against("large_kl_ref_0.1", ["large_double_grad", "large_single"]),
]
CONFIRMED = [("semantic_0.17", "grpo")]
RELATIVES = [  # and what they are built on
    *against("grpo", ["papo_g", "dyco_rl", "tor", "noisy_rollout", "dapo"]),
    *against("dapo", ["papo_d", "vppo", "pgpo"]),
    ("dvrp", "papo_g"),
    ("tapo", "papo_d"),
    ("noisy_rollout_papo", "noisy_rollout"),
]
TABLE1 = [("papo_g", "grpo"), ("papo_d", "dapo"), ("dapo", "papo_g")]
OTHER_SETTINGS = [
    *against("grpo", ["papo_g", *run.OTHER_GAMMAS, *run.WITHOUT_KL_REF]),
    *against("papo_g", [*run.OTHER_MASKS, *run.OTHER_KLS]),
    ("masked_grad", "grpo"),
    *against("large", [*run.COLLAPSING, "large_double"]),
]

# ------------------------------------------------------------------------------------------ numbers

STEPS = list(range(0, 61, 10))  # of evaluations during training
AFTER = [f"after step {step}" for step in STEPS]
TIME, RATIO = "seconds per step", "seconds per step, relative"
LAST = ["gain in the last 20 steps", "gain in the last 10 steps"]
VISION = "vision_dependent minus general"
EVALUATED = [*SPLITS, "both"]

PRIMARY = ["overall", "mean over training"]  # how far, how fast
ENDS = ["overall", *SPLITS, "mean over training"]
DIFFERENCE, CHANGE, DELTA_REL = ", difference", ": change in %", "Delta_rel %"
GAINS = DIFFERENCE, CHANGE, DELTA_REL, "spent"  # columns that compare two runs


def beside(*names: str) -> list[str]:
    """Columns of runs, each followed by that of their differences."""
    return [column for name in names for column in (name, name + DIFFERENCE)]


def reading(of: str) -> list[str]:
    """Columns about wrong answers and misread images."""
    levels = [f"{what} %, {of}" for what in ("wrong", "misread of these", "cells read")]
    return levels + [f"{what} %, {of}{CHANGE}" for what in ("wrong", "misread")]


FAR_AND_FAST = [name + DIFFERENCE for name in PRIMARY]
ACCURACY = [*beside(*ENDS), DELTA_REL, VISION + DIFFERENCE, *LAST]
FALLS = beside(*ENDS, "collapsed")
CONFIRMING = [*beside(*ENDS, "after step 20"), DELTA_REL, *reading("both")]


def load(folder: Path) -> pd.DataFrame:
    """The lines of results, by variant and seed, with the numbers that the tables show."""
    lines = [line for file in sorted(folder.glob("*.jsonl")) for line in read_log(file)]
    if not lines:
        return pd.DataFrame(index=pd.MultiIndex.from_tuples([], names=["variant", "seed"]))
    runs = pd.json_normalize(lines).drop_duplicates(["variant", "seed"], keep="last")
    runs = runs.set_index(["variant", "seed"]).sort_index()
    runs = runs.assign(**at_the_end(runs), **in_training(runs))
    is_start = runs.index.get_level_values("variant").str.endswith("/start")
    of_start = runs[is_start].groupby("start_model")["overall"].first()
    # A run has collapsed if it ends below its start model.
    return runs.assign(collapsed=runs["overall"] < runs["start_model"].map(of_start))


def at_the_end(runs: pd.DataFrame) -> dict:
    """Accuracy in %, wrong answers, and how many of those rest on a misread image."""
    numbers = {split: 100 * runs[f"final.{split}.accuracy"] for split in SPLITS}
    general, vision_dependent = numbers.values()
    numbers["overall"] = (general + vision_dependent) / 2
    numbers[VISION] = vision_dependent - general
    for of in EVALUATED:
        splits = SPLITS if of == "both" else [of]
        responses, wrong, misread, cells_right = (
            sum(runs[f"final.{split}.{what}"] for split in splits)
            for what in ("responses", "wrong", "misread", "cells_right")
        )
        numbers |= {
            f"wrong %, {of}": 100 * wrong / responses,
            f"misread %, {of}": 100 * misread / responses,
            f"misread of these %, {of}": 100 * misread / wrong.clip(lower=1),
            f"cells read %, {of}": 100 * cells_right / len(splits),
        }
    return numbers


def in_training(runs: pd.DataFrame) -> dict:
    """Accuracy in % of the evaluations during training, both splits; and the time of a step.

    A step's time is the 10% quantile of a run's: other work made most steps of some runs slower.
    """
    curve = pd.DataFrame(index=runs.index)
    for step, name in zip(STEPS, AFTER, strict=True):
        general, vision = (runs.get(f"curve.{step}.{split}", math.nan) for split in SPLITS)
        curve[name] = 50 * (general + vision)
    numbers = dict(curve.items()) | {"mean over training": curve[AFTER[1:]].mean(axis=1)}
    for name, before in zip(LAST, (AFTER[-3], AFTER[-2]), strict=True):
        numbers[name] = curve[AFTER[-1]] - curve[before]
    fast = runs["seconds"].map(lambda steps: np.quantile(steps, 0.1), na_action="ignore")
    return numbers | {TIME: fast}


def first_bases(pairs: Pairs) -> dict[str, str]:
    """What each variant is compared with first."""
    bases = {}
    for variant, base in pairs:
        if variant != base:
            bases.setdefault(variant, base)
    return bases


def compared(runs: pd.DataFrame, pairs: Pairs, seeds: Iterable[int]) -> Rows:
    """The runs of some pairs after their start models; beside a run's numbers what it gains over
    the one it is compared with, the first of several."""
    bases = first_bases(pairs)
    variants = [name for pair in pairs for name in reversed(pair)]
    starts = [f"{variant.partition('/')[0]}/start" for variant in variants]
    rows = {}
    for variant in dict.fromkeys([*starts, *variants]):
        if (variant, seeds[0]) not in runs.index:  # a folder without start models of its own
            continue
        frame = runs.loc[variant].loc[list(seeds)]
        if variant in bases:
            gained = gains(runs, variant, bases[variant], seeds)
            rows[f"{variant} (minus {bases[variant]})"] = frame.join(gained)
        else:
            rows[variant] = frame
    return rows


def differences(runs: pd.DataFrame, pairs: Pairs, seeds: Iterable[int]) -> Rows:
    return {f"{own} minus {base}": gains(runs, own, base, seeds) for own, base in pairs}


def gains(runs: pd.DataFrame, variant: str, base: str, seeds: Iterable[int]) -> pd.DataFrame:
    """A variant's numbers minus another one's at the same seeds, and their changes in %.

    ValueError if the runs of a pair began from different start models.
    """
    own, other = (runs.loc[name].loc[list(seeds)] for name in (variant, base))
    differ = own["start_model"].fillna("") != other["start_model"].fillna("")
    if differ.any():
        raise ValueError(f"{variant} and {base}: two start models at seeds {[*own.index[differ]]}")
    own, other = (each.select_dtypes(["number", "bool"]).astype(float) for each in (own, other))
    changes = 100 * (own / other - 1)
    gained = (own - other).add_suffix(DIFFERENCE).join(changes.add_suffix(CHANGE))
    gained[RATIO] = own[TIME] / other[TIME]
    gained[DELTA_REL] = changes[[*SPLITS]].mean(axis=1)  # the paper's
    return gained


# ------------------------------------------------------------------------------------------- tables


def sign_flip_p(differences: Iterable[float]) -> float:
    """Two-sided exact p: the share of sign patterns whose mean is at least as far from 0."""
    values = np.array(differences)
    patterns = np.array(list(product((1, -1), repeat=len(values))))
    return float(np.mean(np.abs(patterns @ values) >= abs(values.sum()) - 1e-9))


def holm(ps: dict) -> dict:
    """The p corrected by Holm's method: the smallest times their number, the next times one less,
    and none below the one before it."""
    rising = pd.Series(ps, dtype=float).sort_values()
    return (rising * np.arange(len(rising), 0, -1)).cummax().clip(upper=1).to_dict()


def interval(values: pd.Series, sign: str = "") -> str:
    """Mean +- half the width of the 95% t interval; of facts, how many hold."""
    if values.dtype == bool:
        return f"{values.sum()} of {len(values)}"
    mean, half = mean_interval(values)
    return f"{mean:{sign}.1f}" + ("" if math.isnan(half) else f" +- {half:.1f}")


def tested(values: pd.Series) -> str:
    """The mean difference, how many of the differences are above 0, and p."""
    above = sum(values > 0)
    p = f"p {sign_flip_p(values):.{3 if len(values) < 9 else 5}f}"
    return f"{interval(values, '+')}, {above} of {len(values)}, {p}"


def each(name: str, values: pd.Series) -> str:
    return "" if values.isna().all() else " ".join(f"{value:.1f}" for value in values)


def show(name: str, values: pd.Series) -> str:
    """The text of a cell: its numbers are one per seed."""
    if values.isna().all():
        return ""
    if name == RATIO:
        return f"{values.median():.2f}"
    return tested(values) if name.endswith(GAINS) else interval(values)


def table(rows: Rows, columns: Iterable[str], corrected=(), show: Callable = show) -> str:
    """Rows down, numbers across; a column that no row has is left out.

    corrected: columns whose p are corrected together by Holm's method.
    """
    known = {name for frame in rows.values() for name in frame.columns[frame.notna().any()]}
    columns = [name for name in columns if name in known]
    rows = {row: frame.reindex(columns=columns) for row, frame in rows.items()}
    tests = [(row, name) for row in rows for name in corrected if rows[row][name].notna().any()]
    ps = {(row, name): sign_flip_p(rows[row][name]) for row, name in tests}
    corrections = {cell: f", corrected p {p:.5f}" for cell, p in holm(ps).items()}
    lines = [["", *columns], ["---"] * (len(columns) + 1)]
    for row, frame in rows.items():
        cells = [show(name, frame[name]) + corrections.get((row, name), "") for name in columns]
        lines.append([row, *cells])
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


SHARES = (0.25, 0.5, 0.75, 1.0)  # of the budget, what the cheapest of the compared runs spends


def at_equal_cost(runs: pd.DataFrame, pairs: Pairs, seeds: range) -> str:
    """Accuracy minus the baseline's when both have spent as much.

    Seconds are those of cost.jsonl: one run per method, alone on the machine. Tokens are each run's
    own, without prompts.
    """
    rows = {}
    for pair, unit in product(pairs, ("seconds", "sampled tokens")):
        clocks = [(f"cost/{variant}", seeds[0]) for variant in pair]
        if unit == "seconds" and not all(clock in runs.index for clock in clocks):
            continue
        spent = {}  # at each evaluation
        for (variant, clock), seed in product(zip(pair, clocks, strict=True), seeds):
            line = runs.loc[variant, seed]
            tokens = np.multiply(line["seconds"], line["tokens_per_second"])
            of_steps = runs.loc[clock]["seconds"] if unit == "seconds" else tokens
            spent[variant, seed] = np.cumsum([0.0, *of_steps])[STEPS]
        budget = min(costs[-1] for costs in spent.values())
        points = np.multiply(SHARES, budget)
        scores = {
            key: np.interp(points, costs, runs.loc[key][AFTER].astype(float))
            for key, costs in spent.items()
        }
        gained = [scores[pair[0], seed] - scores[pair[1], seed] for seed in seeds]
        label = f"{' minus '.join(pair)}, {unit} (of {budget:.0f})"
        rows[label] = pd.DataFrame(gained, columns=[f"{share:.0%} spent" for share in SHARES])
    return table(rows, [f"{share:.0%} spent" for share in SHARES])


def draw_curves(runs: pd.DataFrame, file: Path) -> None:
    """Mean accuracy over the steps, and the difference to the baseline; a row per task."""
    figure = Figure(figsize=(11, 6.8), layout="constrained")
    for task, (left, right) in zip(TASKS, figure.subplots(2, 2), strict=True):
        left.set_title(f"{task}: overall accuracy in %, mean", fontsize=9.5)
        right.set_title("minus its baseline, points; mean and 95% interval", fontsize=9.5)
        right.axhline(0, color="black", linewidth=0.8)
        colours = {f"{task}/{name}": f"C{index}" for index, name in enumerate(run.METHODS)}
        for variant, colour in colours.items():
            means = runs.loc[variant].loc[[*NEW_SEEDS], AFTER].mean()
            left.plot(STEPS, means, color=colour, label=variant.partition("/")[2])
        for variant, base in within(task, BASELINES):
            gained = gains(runs, variant, base, NEW_SEEDS)
            moments = [mean_interval(gained[name + DIFFERENCE]) for name in AFTER]
            means, halves = np.transpose(moments)
            right.plot(STEPS, means, color=colours[variant])
            low, high = means - halves, means + halves
            right.fill_between(STEPS, low, high, alpha=0.15, color=colours[variant])
        left.legend(fontsize=8)
    figure.savefig(file, dpi=110)


# ---------------------------------------------------------------------------------------- sections


def section(
    runs: pd.DataFrame, title: str, pairs: Pairs, seeds: range, *columns: list, corrected=()
) -> list[str]:
    """A table of the runs for each list of columns; further comparisons; perhaps seed by seed."""
    rows = compared(runs, pairs, seeds)
    further = [pair for pair in pairs if pair not in first_bases(pairs).items()]
    parts = [f"## {title}, seeds {seeds[0]} to {seeds[-1]}"]
    parts += [table(rows, names, corrected) for names in columns]
    if further:
        parts += [table(differences(runs, further, seeds), FAR_AND_FAST)]
    if seeds in (NEW_SEEDS, CONFIRMING_SEEDS):  # the second protocol
        parts += [table(rows, beside(*PRIMARY), show=each)]
    return parts


def two_tasks(runs: pd.DataFrame) -> list[str]:
    pairs = [(f"{task}/papo_g_0.1", f"{task}/grpo") for task in TASKS]
    pooled = pd.concat(differences(runs, pairs, NEW_SEEDS).values())
    parts = [
        "## Both tasks",
        table({"papo_g_0.1 minus grpo": pooled}, FAR_AND_FAST, FAR_AND_FAST),
        "![accuracy over the steps of both tasks](figures/both_tasks.png)",
    ]
    columns = ACCURACY, *map(reading, SPLITS)
    for task in TASKS:
        parts += section(runs, task, within(task, METHODS), NEW_SEEDS, *columns)
        parts += ["At equal cost:", at_equal_cost(runs, within(task, BASELINES), NEW_SEEDS)]
    return parts


def on_the_dots(runs: pd.DataFrame) -> list[str]:
    parts, far = [], FAR_AND_FAST[:1]
    for title, pairs in QUESTIONS.items():
        parts += section(runs, title, within("dots", pairs), NEW_SEEDS, FALLS, corrected=far)
    parts += [table(differences(runs, within("dots", FURTHER), NEW_SEEDS), FAR_AND_FAST)]
    pairs, title = within("dots", CONFIRMED), "Which patches, again"
    parts += section(runs, title, pairs, CONFIRMING_SEEDS, CONFIRMING, corrected=FAR_AND_FAST)
    return [*parts, "At equal cost:", at_equal_cost(runs, pairs, CONFIRMING_SEEDS)]


def adapters(runs: pd.DataFrame) -> list[str]:
    small, every = within("lora", [("semantic_0.17_r8", "grpo_r8")]), within("lora", CONFIRMED)
    lost = gains(runs, *small[0], EIGHT_SEEDS) - gains(runs, *every[0], EIGHT_SEEDS)
    columns = beside(*ENDS)
    return [
        *section(runs, "With adapters", small, EIGHT_SEEDS, columns, corrected=FAR_AND_FAST),
        *section(runs, "The same with all weights", every, EIGHT_SEEDS, columns),
        table({"adapters minus all weights": lost}, FAR_AND_FAST),
    ]


def difficulty(runs: pd.DataFrame) -> list[str]:
    folders = [folder for task in TASKS for folder in (f"{task}_easy", task, f"{task}_hard")]
    pairs = {folder: (f"{folder}/papo_g_0.1", f"{folder}/grpo") for folder in folders}
    gained = {folder: gains(runs, *pair, NEW_SEEDS) for folder, pair in pairs.items()}
    trends = {task: gained[f"{task}_hard"] - gained[f"{task}_easy"] for task in TASKS}
    both = {"gain from hard minus gain from easy": pd.concat(trends.values())}
    columns = [*beside(*PRIMARY), DELTA_REL, *LAST], reading("both")[:3]
    leads = [name + DIFFERENCE for name in (*AFTER[1:], LAST[0])]
    return [
        *section(runs, "When does it help", [*pairs.values()], NEW_SEEDS, *columns),
        "The lead during training:",
        table(differences(runs, [*pairs.values()], NEW_SEEDS), leads),
        "The gain from hard start models minus that from easy ones:",
        table(both, FAR_AND_FAST, FAR_AND_FAST),
        table(trends, FAR_AND_FAST),
    ]


def relatives(runs: pd.DataFrame) -> list[str]:
    pairs = within("variants", RELATIVES) + [("compare/papo_g", "variants/grpo")]
    return [
        *section(runs, "Relatives", pairs, EIGHT_SEEDS, [*beside("overall", *SPLITS), RATIO]),
        "compare/papo_g has gamma 0.2. The p are not corrected for their number. A step's time is "
        "the 10% quantile of a run's; the median of the ratios to the other run's is shown.",
    ]


def ideas_table(variants: dict[str, str], results: Path) -> str:
    """Algos beside the last one, at the seeds that all have. variants: algo -> its variant.

    An algo without any result, because all of its runs failed, is left out.
    """
    runs = load(results).rename({name: algo for algo, name in variants.items()})
    *_, last = variants
    found = [algo for algo in variants if algo in runs.index]
    if last not in found:
        return f"{last}, which the others are compared with, has no result"
    seeds = sorted(set.intersection(*({*runs.loc[algo].index} for algo in found)))
    if not seeds:
        return f"{', '.join(found)} have no seed in common"
    rows = compared(runs, [(last, last), *against(last, found)], seeds)
    return f"Accuracy at the end in %, seeds {seeds}:\n\n{table(rows, beside(*ENDS))}"


def main() -> None:
    runs = load(HERE / "results")
    (HERE / "figures").mkdir(exist_ok=True)
    draw_curves(runs, HERE / "figures" / "both_tasks.png")
    first, tried = (within("first", pairs) for pairs in (TABLE1, OTHER_SETTINGS))
    parts = [
        "# Results",
        "Drawn by `python -m experiments.report` from results/. Mean +- 95% interval over seeds; "
        "accuracies in %. A difference is to the other run at the same seed: mean, seeds above 0, "
        "sign-flip p. [README.md](README.md) says how to read them.",
        *two_tasks(runs),
        *on_the_dots(runs),
        *adapters(runs),
        *difficulty(runs),
        *relatives(runs),
        *section(runs, "Table 1", first, EIGHT_SEEDS, ACCURACY, reading("both")),
        *section(runs, "Other settings", tried, THREE_SEEDS, beside(*ENDS)),
    ]
    (HERE / "report.md").write_text("\n\n".join(parts) + "\n")
    print(HERE / "report.md")


if __name__ == "__main__":
    main()
