r"""Draw report.md and figures/ from the lines of results/*.jsonl. Runs nothing.

python -m experiments.report
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from itertools import product
from operator import itemgetter
from pathlib import Path
from statistics import fmean, median
from typing import NamedTuple

import numpy as np
from matplotlib.figure import Figure

from experiments import run
from experiments.run import CONFIRMING_SEEDS, EIGHT_SEEDS, NEW_SEEDS, SPLITS, TASKS, THREE_SEEDS
from support.curves import mean_interval
from support.run_folder import read_log

HERE = Path(__file__).resolve().parent
Results = dict[str, dict[int, dict]]  # variant -> seed -> the line of results/
Rows = dict[str, list[tuple[str, ...]]]  # see `table`


def load(folder: Path) -> Results:
    found: Results = {}
    for file in sorted(folder.glob("*.jsonl")):
        for line in read_log(file):
            found.setdefault(line["variant"], {})[line["seed"]] = line
    for variant, lines in found.items():
        starts = found.get(f"{variant.partition('/')[0]}/start", {})
        for seed in lines.keys() & starts.keys():
            lines[seed]["start"] = starts[seed]["final"]
    return found


# ----------------------------------------------------------------------------------------- measures


class Measure(NamedTuple):
    """A number of a run, and of a run beside another one; None: not shown."""

    of: Callable | None  # line -> number, None where there is none
    gain: Callable | None = None  # line, line of the other run -> number
    show: Callable | None = None  # list of numbers -> text, instead of an interval


def minus(of: Callable) -> Callable:
    def difference(line: dict, base: dict) -> float | None:
        own, other = of(line), of(base)
        return None if own is None or other is None else own - other

    return difference


def accuracy(*splits: str) -> Callable:
    """Accuracy at the end in %, the mean of the splits."""
    return lambda line: 100 * fmean(line["final"][split]["accuracy"] for split in splits)


def overall_curve(line: dict) -> dict[int, float]:
    """Step -> mean accuracy of both splits in % of the evaluations during training."""
    curve = line.get("curve", {})
    return {int(step): 100 * fmean(scores.values()) for step, scores in curve.items()}


def at(step: int) -> Callable:
    return lambda line: overall_curve(line)[step]


def over_training(line: dict) -> float | None:
    """Mean accuracy in % of the evaluations during training, without the one before it."""
    scores = list(overall_curve(line).values())[1:]
    return fmean(scores) if scores else None


def last_gain(evaluations: int) -> Callable:
    """What accuracy gains over the last evaluations of a run."""

    def gained(line: dict) -> float | None:
        scores = list(overall_curve(line).values())
        return scores[-1] - scores[-1 - evaluations] if scores else None

    return gained


def delta_rel(line: dict, base: dict) -> float:
    """The paper's: the mean over splits of the relative gain, in %."""
    ratios = [accuracy(split)(line) / accuracy(split)(base) for split in SPLITS]
    return 100 * (fmean(ratios) - 1)


def collapsed(line: dict) -> bool:
    """Whether a run ends below its start model."""
    return OVERALL(line) < OVERALL({"final": line["start"]})


def time_ratio(line: dict, base: dict) -> float:
    """Of their steps' 10% quantiles: other work made most steps of the relatives' runs slower."""
    return np.quantile(line["seconds"], 0.1) / np.quantile(base["seconds"], 0.1)


def vision_gap(line: dict, base: dict) -> float:
    """How much more is gained on vision_dependent than on general, in points."""
    on_general, on_vision = (minus(accuracy(split))(line, base) for split in SPLITS)
    return on_vision - on_general


def measured(of: Callable) -> Measure:
    return Measure(of, minus(of))


def reading(*splits: str) -> dict[str, Measure]:
    """How many answers are wrong, and how many of those rest on a misread image."""

    def total(line: dict, what: str) -> float:
        return sum(line["final"][split][what] for split in splits)

    def share(what: str, whole: str) -> Measure:
        return Measure(lambda line: 100 * total(line, what) / max(total(line, whole), 1))

    def change(what: str) -> Measure:
        return Measure(None, lambda line, base: 100 * (total(line, what) / total(base, what) - 1))

    return {
        "wrong %": share("wrong", "responses"),
        "of these misread %": share("misread", "wrong"),
        "cells read right %": Measure(lambda line: 100 * total(line, "cells_right") / len(splits)),
        "wrong answers, relative to baseline %": change("wrong"),
        "misread answers, relative to baseline %": change("misread"),
    }


OVERALL = accuracy(*SPLITS)
FAR, FAST = measured(OVERALL), measured(over_training)
ENDS = {"overall": FAR} | {split: measured(accuracy(split)) for split in SPLITS}
WITH_TRAINING = ENDS | {"mean over training": FAST}
DELTA_REL = {"Delta_rel %": Measure(None, delta_rel)}
VISION = {"gain on vision_dependent minus gain on general": Measure(None, vision_gap)}
LAST = {f"gain in the last {10 * n} steps": Measure(last_gain(n)) for n in (2, 1)}
QUESTIONS = {"how far": FAR._replace(of=None), "how fast": FAST._replace(of=None)}


# --------------------------------------------------------------------------------------- statistics


def sign_flip_p(differences: list[float]) -> float:
    """Two-sided exact p: the share of sign patterns whose mean is at least as far from 0."""
    values = np.array(differences)
    patterns = np.array(list(product((1, -1), repeat=len(values))))
    return float(np.mean(np.abs(patterns @ values) >= abs(values.sum()) - 1e-9))


def holm(ps: list[float]) -> list[float]:
    """The p corrected by Holm's method: the smallest times their number, the next times one less,
    and none below the one before it."""
    corrected, least = [0.0] * len(ps), 0.0
    for rank, index in enumerate(sorted(range(len(ps)), key=ps.__getitem__)):
        least = max(least, min(1.0, (len(ps) - rank) * ps[index]))
        corrected[index] = least
    return corrected


def interval(values: list[float | None], sign: str = "") -> str:
    """Mean +- half the width of the 95% t interval."""
    known = [value for value in values if value is not None]
    if not known:
        return "-"
    mean, half = mean_interval(known)
    return f"{mean:{sign}.1f}" + ("" if math.isnan(half) else f" +- {half:.1f}")


def tested(values: list[float]) -> str:
    """The mean difference, how many of the differences are above 0, and p."""
    above = sum(value > 0 for value in values)
    shown = [interval(values, "+"), f"{above} of {len(values)}"]
    return ", ".join([*shown, f"p {sign_flip_p(values):.{3 if len(values) < 9 else 5}f}"])


def each(values: list[float]) -> str:
    return " ".join(f"{value:.1f}" for value in values)


# ---------------------------------------------------------------------------------------- the table


def table(
    found: Results,
    rows: Rows,
    measures: dict[str, Measure],
    seeds: Iterable[int],
    corrected: Iterable[str] = (),
) -> str:
    """Variants down, measures across: the number, then its difference to a baseline.

    rows: label -> comparisons, whose seeds are pooled: (variant,), (variant, baseline), or
    (variant, baseline, other, its baseline) for the difference of two differences. A row that lacks
    a run is left out. corrected: measures whose p are corrected together by Holm's method.
    """
    cells, ps = {}, {}
    shown = [label for label in rows if is_complete(found, rows[label], seeds)]
    for name, measure in measures.items():
        column = f"{name}, difference" if measure.of else name
        for label in shown:
            if measure.of:
                lines = [found[names[0]][seed] for names in rows[label] for seed in seeds]
                cells[label, name] = (measure.show or interval)([measure.of(x) for x in lines])
            differences = gains(found, rows[label], measure.gain, seeds)
            if differences:
                show = tested if measure.of else measure.show or tested
                cells[label, column] = show(differences)
                if name in corrected:
                    ps[label, column] = sign_flip_p(differences)
    for key, p in zip(ps, holm(list(ps.values())), strict=True):
        cells[key] += f", corrected p {p:.5f}"
    columns = list(dict.fromkeys(column for _, column in cells))
    body = [[label, *(cells.get((label, column), "") for column in columns)] for label in shown]
    return markdown([["", *columns], *body])


def is_complete(found: Results, comparisons: list[tuple[str, ...]], seeds: Iterable[int]) -> bool:
    variants = {name for names in comparisons for name in names}
    return all(seed in found.get(name, {}) for name in variants for seed in seeds)


def gains(
    found: Results, comparisons: list[tuple[str, ...]], gain: Callable | None, seeds: Iterable[int]
) -> list:
    """gain(line, baseline's line) of each comparison and seed; [] where there is no baseline.

    ValueError if the runs of a pair began from different start models.
    """
    if gain is None:
        return []
    result = []
    for names, seed in product(comparisons, seeds):
        lines = [found[name][seed] for name in names]
        pairs = list(zip(lines[::2], lines[1::2], strict=False))
        if any(line.get("start_model") != base.get("start_model") for line, base in pairs):
            raise ValueError(f"{' and '.join(names)}: two start models at seed {seed}")
        values = [gain(line, base) for line, base in pairs]
        if values and values[0] is not None:
            result.append(values[0] if len(values) == 1 else values[0] - values[1])
    return result


def markdown(rows: list[list[str]]) -> str:
    """A table of a header and rows; a note if there are none."""
    if len(rows) < 2:
        return "(not complete)"
    lines = ["| " + " | ".join(row) + " |" for row in rows]
    return "\n".join([lines[0], "|" + "---|" * len(rows[0]), *lines[1:]])


def named(folder: str, names: str, bases: dict[str, str] | str) -> Rows:
    """Rows of a folder's variants. bases: what each is compared with, or one for all."""
    rows = {}
    for name in names.split():
        base = bases if isinstance(bases, str) else bases.get(name, name)
        pair = (name,) if base == name else (name, base)
        rows[name] = [tuple(f"{folder}/{each}" for each in pair)]
    return rows


# ----------------------------------------------------------------------------------- at equal cost

SHARES = (0.25, 0.5, 0.75, 1.0)  # of the budget, what the cheapest of the compared runs spends


def at_equal_cost(found: Results, pairs: dict[str, tuple[str, str]], seeds: range) -> str:
    """Accuracy minus the baseline's when both have spent as much.

    Seconds are those of cost.jsonl: one run per method, alone on the machine. Tokens are each run's
    own, without prompts.
    """
    rows, paid = {}, {}
    for (name, pair), unit in product(pairs.items(), ("seconds", "sampled tokens")):
        clocks = [found.get(f"cost/{each}", {}).get(seeds[0]) for each in pair]
        if unit == "seconds" and None in clocks:
            continue
        spent = {
            (each, seed): spending(found[each][seed], clock if unit == "seconds" else None)
            for each, clock in zip(pair, clocks, strict=True)
            for seed in seeds
        }
        budget = min(spendings[-1] for spendings in spent.values())
        label = f"{name}, {unit} (of {budget:.0f})"
        for (each, seed), spendings in spent.items():
            line = found[each][seed]
            scores = list(overall_curve(line).values())
            at_shares = {x: np.interp(x * budget, spendings, scores) for x in SHARES}
            at_shares["start_model"] = line["start_model"]
            paid.setdefault(f"{label} {each}", {})[seed] = at_shares
        rows[label] = [tuple(f"{label} {each}" for each in pair)]
    measures = {f"{x:.0%} spent": Measure(None, minus(itemgetter(x))) for x in SHARES}
    return table(paid, rows, measures, seeds)


def spending(line: dict, clock: dict | None) -> np.ndarray:
    """What a run had spent at each of its evaluations: seconds of `clock`, else its tokens."""
    tokens = np.multiply(line["seconds"], line["tokens_per_second"])
    of_steps = clock["seconds"] if clock else tokens
    return np.cumsum([0.0, *of_steps])[list(overall_curve(line))]


# ----------------------------------------------------------------------------------------- figures


def draw_curves(found: Results, file: Path) -> None:
    """Mean accuracy over the steps, and the difference to the baseline; a row per task."""
    figure = Figure(figsize=(11, 6.8), layout="constrained")
    steps = range(0, 61, 10)
    for task, (left, right) in zip(TASKS, figure.subplots(2, 2), strict=True):
        left.set_title(f"{task}: overall accuracy in %, mean", fontsize=9.5)
        right.set_title("minus its baseline, points; mean and 95% interval", fontsize=9.5)
        right.axhline(0, color="black", linewidth=0.8)
        rows = named(task, " ".join(run.METHODS), BASELINES)
        for index, (name, row) in enumerate(rows.items()):
            style = {"color": f"C{index}", "label": name}
            curves = [overall_curve(found[row[0][0]][seed]) for seed in NEW_SEEDS]
            left.plot(steps, [fmean(curve[step] for curve in curves) for step in steps], **style)
            if name in BASELINES:
                gained = [gains(found, row, minus(at(step)), NEW_SEEDS) for step in steps]
                means, halves = np.transpose([mean_interval(values) for values in gained])
                right.plot(steps, means, **style)
                right.fill_between(steps, means - halves, means + halves, alpha=0.15, **style)
        left.legend(fontsize=8)
    figure.savefig(file, dpi=110)


# ---------------------------------------------------------------------------------------- sections

BASELINES = {"papo_g": "grpo", "papo_g_0.1": "grpo", "papo_d": "dapo", "papo_d_0.1": "dapo"}
BASES = BASELINES | {  # what a relative is built on
    "dyco_rl": "grpo",
    "noisy_rollout": "grpo",
    "tor": "grpo",
    "vppo": "dapo",
    "pgpo": "dapo",
    "dvrp": "papo_g",
    "noisy_rollout_papo": "noisy_rollout",
    "tapo": "papo_d",
}
FIRST = {  # of the first protocol: names, what they are compared with
    "gamma": ("grpo papo_g gamma_0.1 gamma_0.2 gamma_0.5 gamma_1.0", "grpo"),
    "regularisation": (" ".join([*run.COLLAPSING, "large_double"]), "large"),
    "no_kl_ref": ("grpo grpo_no_kl_ref papo_g papo_g_no_kl_ref", "grpo"),
    "masking": ("papo_g mask_0.4 mask_0.8 mask_1.0 mask_semantic mask_noise", "papo_g"),
    "estimator": ("papo_g estimator_paper masked_grad grpo", "papo_g"),
}
FURTHER = {  # what the README quotes beside the sections' tables: variant, what it is compared with
    NEW_SEEDS: [
        "dots/dapo dots/grpo",
        "digits/dapo digits/grpo",
        "dots/papo_g_0.1 dots/papo_g",
        "digits/papo_g_0.1 digits/papo_g",
        "dots/papo_d_0.1 dots/papo_d",
        "digits/papo_d_0.1 digits/papo_d",
        "dots/papo_g_1.0 dots/papo_g",
        "dots/semantic_0.17 dots/grpo",
        "dots/random_0.17 dots/grpo",
        "dots/semantic_0.17 dots/papo_g_0.1",
        "dots/large_double_grad dots/large_single",
        "dots/large_double_grad dots/large_kl_ref_0.1",
        "dots/large_single dots/large_kl_ref_0.1",
    ],
    EIGHT_SEEDS: [
        "variants/dapo variants/grpo",
        "compare/papo_g variants/grpo",
        "first/dapo first/papo_g",
    ],
    THREE_SEEDS: ["first/masked_grad first/grpo"],
}


def two_tasks(found: Results) -> list[str]:
    pooled = [(f"{task}/papo_g_0.1", f"{task}/grpo") for task in TASKS]
    parts = ["## Both tasks"]
    parts += [table(found, {"papo_g_0.1 minus grpo": pooled}, QUESTIONS, NEW_SEEDS, QUESTIONS)]
    parts += ["![accuracy over the steps of both tasks](figures/both_tasks.png)"]
    for task in TASKS:
        rows = named(task, " ".join(["start", *run.METHODS]), BASELINES)
        parts += [
            f"## {task}",
            table(found, rows, WITH_TRAINING | DELTA_REL | VISION | LAST, NEW_SEEDS),
        ]
        for split in SPLITS:
            parts += [f"Reading, {split}:", table(found, rows, reading(split), NEW_SEEDS)]
        pairs = {name: pair for name, [pair] in rows.items() if len(pair) == 2}
        parts += ["At equal cost:", at_equal_cost(found, pairs, NEW_SEEDS)]
    return parts


def on_the_dots(found: Results) -> list[str]:
    measures = WITH_TRAINING | {
        "collapsed": Measure(
            collapsed, minus(collapsed), lambda values: f"{sum(values)} of {len(values)}"
        )
    }
    tried = {
        "Which gamma": named("dots", " ".join(["grpo", "papo_g", *run.GAMMAS]), "grpo"),
        "What prevents collapse": named("dots", " ".join(run.COLLAPSING), "large"),
        "Which patches": named("dots", "papo_g_0.1 random_0.17 semantic_0.17", "random_0.17"),
    }
    parts = []
    for title, rows in tried.items():
        parts += [f"## {title}", table(found, rows, measures, NEW_SEEDS, ["overall"])]
    pair = "dots/semantic_0.17", "dots/grpo"
    rows = {"semantic_0.17": [pair], "grpo": [pair[1:]]}
    at_20 = {"overall after step 20": measured(at(20))}
    secondary = WITH_TRAINING | at_20 | DELTA_REL | reading(*SPLITS)
    return [
        *parts,
        "## Which patches, at new seeds",
        table(found, {"semantic_0.17 minus grpo": [pair]}, QUESTIONS, CONFIRMING_SEEDS, QUESTIONS),
        table(found, rows, secondary, CONFIRMING_SEEDS),
        at_equal_cost(found, {"semantic_0.17": pair}, CONFIRMING_SEEDS),
    ]


def adapters(found: Results) -> list[str]:
    every, small = ((f"lora/semantic_0.17{rank}", f"lora/grpo{rank}") for rank in ("", "_r8"))
    others = {"all weights": [every], "adapters minus all weights": [small + every]}
    levels = {name.removeprefix("lora/"): [(name,)] for name in every + small}
    return [
        "## With adapters",
        "semantic_0.17 minus grpo, at rank 8 and with all weights:",
        table(found, {"adapters": [small]}, QUESTIONS, EIGHT_SEEDS, QUESTIONS),
        table(found, others, QUESTIONS, EIGHT_SEEDS),
        table(found, levels, WITH_TRAINING, EIGHT_SEEDS),
    ]


def difficulty(found: Results) -> list[str]:
    levels = {
        f"{task}, {level}": task if level == "middle" else f"{task}_{level}"
        for task in TASKS
        for level in run.MISREAD
    }
    pairs = {label: [(f"{name}/papo_g_0.1", f"{name}/grpo")] for label, name in levels.items()}
    trends = {task: [pairs[f"{task}, hard"][0] + pairs[f"{task}, easy"][0]] for task in TASKS}
    both = {"gain from hard minus gain from easy": [trends[task][0] for task in TASKS]}
    leads = {f"after step {n}": Measure(None, minus(at(n))) for n in range(10, 61, 10)}
    leads["change in the last 20 steps"] = Measure(None, minus(last_gain(2)))
    starts = {label: [(f"{name}/start",)] for label, name in levels.items()}
    of_grpo = {label: [(f"{name}/grpo",)] for label, name in levels.items()}
    return [
        "## When does it help",
        table(found, both, QUESTIONS, NEW_SEEDS, QUESTIONS),
        table(found, trends, QUESTIONS, NEW_SEEDS),
        "papo_g_0.1 minus grpo:",
        table(found, pairs, QUESTIONS | DELTA_REL, NEW_SEEDS),
        "The start models:",
        table(found, starts, {"overall": Measure(OVERALL)} | reading(*SPLITS), NEW_SEEDS),
        "grpo:",
        table(found, of_grpo, {"overall": Measure(OVERALL)} | LAST, NEW_SEEDS),
        "papo_g_0.1 minus grpo, evaluations during training:",
        table(found, pairs, leads, NEW_SEEDS),
    ]


def seed_by_seed(found: Results) -> list[str]:
    """The second protocol's runs and their differences to the baselines, a number per seed."""
    names = [*run.METHODS, *run.GAMMAS, *run.MASKS, *run.COLLAPSING]
    bases = dict.fromkeys(names, "grpo") | {"dapo": "dapo"} | BASELINES
    bases |= dict.fromkeys(run.COLLAPSING, "large")
    rows, measures = {}, {}
    for folder in (*TASKS, *run.LEVELS):
        compared = named(folder, " ".join(names), bases)
        rows |= {f"{folder}/{name}": row for name, row in compared.items()}
    for name, of in {"at the end": OVERALL, "mean over training": over_training}.items():
        measures[name] = Measure(of, None, each)
        measures[f"{name}, difference"] = Measure(None, minus(of), each)
    both = (NEW_SEEDS, CONFIRMING_SEEDS)
    return ["## Seed by seed", *(table(found, rows, measures, seeds) for seeds in both)]


def relatives(found: Results) -> list[str]:
    rows = named("variants", " ".join(run.PUBLISHED), BASES)
    measures = ENDS | {
        "seconds per step, relative": Measure(
            None, time_ratio, lambda values: f"{median(values):.2f}"
        )
    }
    return [
        "## Relatives",
        "Each method beside the one it is built on. The p are not corrected for their number. "
        "A step's time is the 10% quantile of a run's, because other work shared the machine; the "
        "median of the eight ratios is shown.",
        table(found, rows, measures, EIGHT_SEEDS),
    ]


def first_protocol(found: Results) -> list[str]:
    rows = named("first", "start grpo papo_g dapo papo_d", BASELINES)
    parts = ["## Table 1", table(found, rows, WITH_TRAINING | DELTA_REL, EIGHT_SEEDS)]
    parts += [table(found, rows, VISION | reading(*SPLITS), EIGHT_SEEDS)]
    for title, (names, base) in FIRST.items():
        rows = named("first", names, base)
        parts += [f"## {title}", table(found, rows, WITH_TRAINING, THREE_SEEDS)]
    return parts


def ideas_table(variants: dict[str, str], results: Path) -> str:
    """Algos beside the last one, at the seeds that all have. variants: algo -> its variant.

    An algo without any result, because all of its runs failed, is left out.
    """
    found = load(results)
    *_, (last, base) = variants.items()
    with_results = {algo: variant for algo, variant in variants.items() if variant in found}
    if last not in with_results:
        return f"{last}, which the others are compared with, has no result"
    seeds = sorted(set.intersection(*(set(found[name]) for name in with_results.values())))
    rows = {algo: [(variant, base)] for algo, variant in with_results.items()}
    rows[last] = [(base,)]
    title = f"Overall accuracy at the end in %, seeds {seeds}; difference to {last}:"
    return f"{title}\n\n{table(found, rows, {'overall': FAR}, seeds)}"


def main() -> None:
    found = load(HERE / "results")
    (HERE / "figures").mkdir(exist_ok=True)
    draw_curves(found, HERE / "figures" / "both_tasks.png")
    further = {
        seeds: {
            f"{names.split()[0]} minus {names.split()[1]}": [tuple(names.split())]
            for names in pairs
        }
        for seeds, pairs in FURTHER.items()
    }
    parts = [
        "# Results",
        "Drawn by `python -m experiments.report` from results/. Mean +- 95% interval over seeds; "
        "accuracies in %. A difference is to the baseline at the same seed: mean, seeds above 0, "
        "sign-flip p. [README.md](README.md) says how to read them.",
        *two_tasks(found),
        *on_the_dots(found),
        *adapters(found),
        *difficulty(found),
        *seed_by_seed(found),
        *relatives(found),
        *first_protocol(found),
        "## Further differences",
        "Seeds 20 to 27, then 10 to 17, then 10 to 12:",
        *(table(found, rows, QUESTIONS, seeds) for seeds, rows in further.items()),
    ]
    (HERE / "report.md").write_text("\n\n".join(parts) + "\n")
    print(HERE / "report.md")


if __name__ == "__main__":
    main()
