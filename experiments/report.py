r"""Draw report.md and figures/ from results/*.json. Runs nothing.

python -m experiments.report
"""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
from matplotlib.figure import Figure

from experiments import report_confirm, report_difficulty, report_tasks
from experiments.measures import (
    MISREAD_CHANGE,
    READING,
    Results,
    accuracy,
    accuracy_cells,
    accuracy_gain,
    accuracy_over_training,
    at_seeds,
    collapse_warning,
    common_seeds,
    complete,
    count_ahead,
    delta_rel,
    gain_over_training,
    holm,
    interval,
    load,
    markdown,
    misread_change,
    overall_curve,
    paired,
    reading_cells,
    sign_flip_p,
)
from experiments.protocol import (
    CONFIRMING_SEEDS,
    DEVELOPMENT_SEEDS,
    EIGHT_SEEDS,
    EXPERIMENTS,
    FACTORS,
    GAMMA,
    GAMMAS,
    KL_WEIGHTS,
    NEW_SEEDS,
    TASKS,
)
from experiments.tasks import SPLITS
from support import plots

HERE = Path(__file__).resolve().parent

TABLE1_BASELINES = {"papo_g": "grpo", "papo_d": "dapo"}
TABLE1 = ["grpo", "papo_g", "dapo", "papo_d"]

# The other experiments: variant -> its name in tables and figures.
GAMMA_SWEEP = {
    "grpo": "gamma 0",
    "papo_g": "gamma 0.02",
    "gamma_0.1": "gamma 0.1",
    "gamma_0.2": "gamma 0.2",
    "gamma_0.5": "gamma 0.5",
    "gamma_1.0": "gamma 1",
}
REGULARISATION = {
    "large_no_kl_ref": "no KL_ref",
    "large": "KL_ref 0.01",
    "large_kl_ref_0.1": "KL_ref 0.1",
    "large_single": "single entropy",
    "large_double": "double entropy",
    "large_double_grad": "double entropy, gradient",
}
NO_KL_REF = {
    "grpo": "grpo",
    "grpo_no_kl_ref": "grpo_no_kl_ref",
    "papo_g": "papo_g",
    "papo_g_no_kl_ref": "papo_g_no_kl_ref",
}
MASKING = {
    "papo_g": "random 0.6",
    "mask_0.4": "random 0.4",
    "mask_0.8": "random 0.8",
    "mask_1.0": "random 1.0",
    "mask_semantic": "semantic 0.6",
    "mask_noise": "noise 0.6",
}
ESTIMATOR = {
    "papo_g": "k3 (released code)",
    "estimator_paper": "the paper's literal form",
    "masked_grad": "k3, masked log-probs with gradient",
}
# Experiment -> its names, and the variant that the others are compared with.
FIRST = {
    "gamma": (GAMMA_SWEEP, "grpo"),
    "regularisation": (REGULARISATION, "large"),
    "no_kl_ref": (NO_KL_REF, "grpo"),
    "masking": (MASKING, "papo_g"),
    "estimator": (ESTIMATOR, "papo_g"),
}

FURTHER = [
    ("variants/tapo", "variants/papo_d"),
    ("variants/dvrp", "variants/papo_g"),
    ("variants/noisy_rollout_papo", "variants/noisy_rollout"),
    ("variants/tapo_x20", "variants/papo_d_x5"),
    ("variants/dvrp_x5", "variants/papo_g_x5"),
    ("variants/noisy_rollout_papo_x5", "variants/noisy_rollout_scaled"),
    ("variants/noisy_rollout_scaled", "variants/noisy_rollout"),
    ("variants/papo_g_x5", "variants/papo_g"),
    ("variants/dyco_rl_scaled", "variants/dyco_rl"),
    ("compare/papo_g", "variants/grpo"),
    ("masked_grad", "grpo"),
    ("dapo", "papo_g"),
    ("dots/papo_g_0.1", "dots/papo_g"),
    ("digits/papo_g_0.1", "digits/papo_g"),
    ("dots/papo_d_0.1", "dots/papo_d"),
    ("digits/papo_d_0.1", "digits/papo_d"),
    ("dots/semantic_0.17", "dots/grpo"),
    ("dots/random_0.17", "dots/grpo"),
    ("dots/semantic_0.17", "dots/papo_g_0.1"),
    ("dots/semantic_0.17", "dots/random_0.17"),
    *[(f"dots/papo_g_{gamma}", "dots/papo_g") for gamma in (0.05, 0.2, 0.5, 1.0)],
    ("dots/large_double_grad", "dots/large_single"),
    ("dots/large_double_grad", "dots/large_kl_ref_0.1"),
    ("dots/large_single", "dots/large_kl_ref_0.1"),
    ("dots/dapo", "dots/grpo"),
    ("digits/dapo", "digits/grpo"),
    *report_difficulty.PAIRS,
]

# The second protocol's further experiments on the dots, by the same plan as FIRST.
SECOND = {
    "more_gammas": (
        {"dots/grpo": "gamma 0", "dots/papo_g": "gamma 0.02"}
        | {f"dots/papo_g_{gamma}": f"gamma {gamma}" for gamma in (*GAMMAS, 0.5, 1.0)},
        "dots/grpo",
    ),
    "remedies": (
        {
            "dots/large_no_kl_ref": "no KL_ref",
            "dots/large": "KL_ref 0.01",
            "dots/large_kl_ref_0.1": "KL_ref 0.1",
            "dots/large_single": "single entropy",
            "dots/large_double_grad": "double entropy, gradient",
        },
        "dots/large",
    ),
    "semantic": (
        {
            f"dots/papo_g_{GAMMA}": "random 0.6",
            "dots/random_0.17": "random 0.17",
            "dots/semantic_0.17": "semantic 0.17",
        },
        "dots/random_0.17",
    ),
}

ACCURACY_PANELS = {
    "general": "accuracy, general",
    "vision_dependent": "accuracy, vision_dependent",
}
COLLAPSE_PANELS = ACCURACY_PANELS | {
    "kl_prcp": "KL_prcp",
    "clip_frac": "share of tokens clipped",
    "entropy": "entropy",
    "masked_entropy": "entropy, masked image",
}


# Tables


def table1(found: Results) -> str:
    rows = [
        [
            "",
            "seeds",
            *SPLITS,
            "overall",
            "mean over training",
            "Delta_rel %",
            "overall, paired difference",
            "p",
        ]
    ]
    for variant in ["start", *TABLE1]:
        if variant not in found:
            continue
        runs = list(found[variant].values())
        cells = ["", "", ""]
        base = TABLE1_BASELINES.get(variant)
        if base in found:
            gains = paired(found, variant, base, accuracy_gain)
            relative = paired(found, variant, base, delta_rel)
            cells = [interval(relative, sign=True), interval(gains, sign=True)]
            cells.append(f"{sign_flip_p(gains):.3f}")
        rows.append([variant, str(len(runs)), *accuracy_cells(runs), *cells])
    return markdown(rows)


def perception_table(found: Results) -> str:
    """Share of wrong answers whose reading was wrong, and PAPO's change of their number."""
    rows = [["", *READING, MISREAD_CHANGE]]
    for variant in ["start", *TABLE1]:
        if variant not in found:
            continue
        relative = ""
        if variant in TABLE1_BASELINES:
            changes = paired(found, variant, TABLE1_BASELINES[variant], misread_change)
            relative = interval(changes, sign=True)
        rows.append([variant, *reading_cells(found[variant].values()), relative])
    return markdown(rows)


def comparison_table(found: Results, names: dict[str, str], base: str) -> str:
    """Every variant at the seeds that all of them have, and its paired difference to `base`."""
    variants = [variant for variant in names if variant in found]
    if base not in variants:
        return "(not run yet)"
    seeds = common_seeds(found, variants)
    found = at_seeds(found, seeds)
    header = ["", "seeds", *SPLITS, "overall", "mean over training"]
    rows = [[*header, f"overall, minus {names[base]}"]]
    for variant in variants:
        gains = paired(found, variant, base, accuracy_gain)
        cells = accuracy_cells(list(found[variant].values()))
        rows.append([names[variant], str(len(seeds)), *cells, interval(gains, sign=True)])
    return markdown(rows)


def tested_table(found: Results, names: dict[str, str], base: str) -> str:
    """As comparison_table, with tests of the difference to `base` and the runs that collapsed."""
    others = [variant for variant in names if variant != base]
    gains = {variant: paired(found, variant, base, accuracy_gain) for variant in others}
    ps = [sign_flip_p(values) for values in gains.values()]
    differs = {base: ["", "", "", ""]}
    for variant, p, corrected in zip(others, ps, holm(ps), strict=True):
        mean, ahead = interval(gains[variant], sign=True), count_ahead(gains[variant])
        differs[variant] = [mean, ahead, f"{p:.3f}", f"{corrected:.3f}"]

    difference = f"overall, minus {names[base]}"
    header = ["", *SPLITS, "overall", "mean over training", difference, "ahead", "p", "corrected p"]
    rows = [[*header, "collapsed", "p (collapsed)", "warned"]]
    for variant, name in names.items():
        runs = found[variant].values()
        collapses = collapse_cells(found, variant, base)
        warned = sum(warning_step(run) is not None for run in runs)
        rows.append([name, *accuracy_cells(list(runs)), *differs[variant], *collapses, str(warned)])
    return markdown(rows)


def collapse_cells(found: Results, variant: str, base: str) -> list[str]:
    """How many runs end below their start model, and p of the difference to those of `base`."""
    collapsed = paired(found, variant, start_of(variant), ends_lower)
    of_base = paired(found, base, start_of(base), ends_lower)
    p = sign_flip_p(np.subtract(collapsed, of_base).tolist())
    return [f"{sum(collapsed)} of {len(collapsed)}", "" if variant == base else f"{p:.3f}"]


def start_of(variant: str) -> str:
    return f"{variant.rpartition('/')[0]}/start"


def ends_lower(result: dict, start: dict) -> int:
    return int(accuracy(result) < accuracy(start))


def training_lines(run: dict) -> list[dict]:
    """The stored metrics as the lines of a run's log."""
    columns = run["metrics"]
    lines = []
    for step, values in enumerate(zip(*columns.values(), strict=True), start=1):
        line = dict(zip(columns, values, strict=True))
        line["step"] = step
        lines.append(line)
    return lines


def warning_step(run: dict) -> int | None:
    """The step after which the trainer's rule first warns of a collapse."""
    lines = training_lines(run)
    for end in range(1, len(lines) + 1):
        if collapse_warning(lines[:end]):
            return end
    return None


def warnings_table(found: Results) -> str:
    """Every run of all experiments that the rule warns of. It needs KL_prcp."""
    rows = [["warned", "seed", "after step", "overall at the end"]]
    silent = 0
    for variant, runs in found.items():
        for seed, run in runs.items():
            if "kl_prcp" not in run.get("metrics", {}):
                continue
            step = warning_step(run)
            if step is None:
                silent += 1
            else:
                rows.append([variant, str(seed), str(step), f"{accuracy(run):.1f}"])
    note = f"No warning in the other {silent} runs that log KL_prcp, those computed again included."
    return f"{markdown(rows)}\n\n{note}"


# Methods of variants/ that drop groups and sample more: they are compared with DAPO as well.
DYNAMIC = ("papo_d", "vppo", "pgpo", "tapo")


def method_names(experiment: str) -> list[str]:
    return [name.removeprefix("variants/") for name in EXPERIMENTS[experiment][0]]


def compared(found: Results, variant: str, base: str) -> list[str]:
    """Paired difference in overall accuracy and its p; blank where there is none."""
    gains = paired(found, f"variants/{variant}", f"variants/{base}", accuracy_gain)
    if variant == base or len(gains) < 2:
        return ["", ""]
    return [interval(gains, sign=True), f"{sign_flip_p(gains):.3f}"]


def variants_table(found: Results) -> str:
    """Every method as published, then the further settings, at the reported seeds.

    A method whose runs are not complete is left out: it would be compared on other seeds.
    """
    header = [
        "",
        "seeds",
        *SPLITS,
        "overall",
        "minus grpo",
        "p",
        "minus dapo",
        "p",
        "seconds / grpo's",
    ]
    rows = [header]
    costs = relative_costs()
    for name in [*method_names("variants"), *method_names("variants_scaled")]:
        by_seed = found.get(f"variants/{name}", {})
        runs = [by_seed[seed] for seed in EIGHT_SEEDS if seed in by_seed]
        if len(runs) < max(1, len(found.get("variants/grpo", ()))):
            continue
        cells = [interval([accuracy(run, split) for run in runs]) for split in (*SPLITS, "overall")]
        is_dynamic = any(name.startswith(dynamic) for dynamic in DYNAMIC)
        with_dapo = compared(found, name, "dapo") if is_dynamic else ["", ""]
        cells += [*compared(found, name, "grpo"), *with_dapo, costs.get(name, "")]
        rows.append([name, str(len(runs)), *cells])
    return markdown(rows)


def further_table(found: Results) -> str:
    """Differences that a README quotes beside its main tables."""
    rows = [["", "minus", "seeds", "overall", "p", "mean over training", "p"]]
    for variant, base in FURTHER:
        gains = paired(found, variant, base, accuracy_gain)
        if len(gains) < 2:
            continue
        cells = [str(len(gains)), interval(gains, sign=True), f"{sign_flip_p(gains):.3f}"]
        runs = [*found[variant].values(), *found[base].values()]
        if all(len(run["curve"]) > 1 for run in runs):  # evaluated during training
            gains = paired(found, variant, base, gain_over_training)
            cells += [interval(gains, sign=True), f"{sign_flip_p(gains):.3f}"]
        else:
            cells += ["", ""]
        rows.append([variant, base, *cells])
    return markdown(rows)


def seeds_table(everything: Results, seeds: range, value: Callable, gain: Callable) -> str:
    """A column per seed: what the baselines reach, then gain(result, base) of the other variants.

    Variants that lack one of the seeds are left out.
    """
    found = complete(everything, seeds)
    shown = [pair for pair in seed_pairs() if all(variant in found for variant in pair)]
    rows = [["", *(str(seed) for seed in seeds)]]
    for base in dict.fromkeys(base for _, base in shown):
        rows.append([base, *(f"{value(found[base][seed]):.1f}" for seed in seeds)])
    for variant, base in shown:
        gains = paired(found, variant, base, gain)
        rows.append([f"{variant} minus {base}", *(f"{points:+.1f}" for points in gains)])
    return markdown(rows)


def seed_pairs() -> list[tuple[str, str]]:
    """Every variant and base that a table of the second protocol compares, or a README quotes."""
    pairs = [
        (f"{task}/{method}", f"{task}/{base}")
        for task in TASKS
        for method, base in report_tasks.BASELINES.items()
    ]
    for names, base in SECOND.values():
        pairs += [(variant, base) for variant in names if variant != base]
    return list(dict.fromkeys([*pairs, *FURTHER]))


def load_costs(group: str = "methods") -> dict[str, dict]:
    """What cost.py measured: variant -> {"seconds": of each step}."""
    file = HERE / "cost.json"
    return json.loads(file.read_text()).get(group, {}) if file.exists() else {}


def relative_costs() -> dict[str, str]:
    """Method of variants/ -> its median seconds per step, divided by grpo's."""
    medians = {name: np.median(cost["seconds"]) for name, cost in load_costs().items()}
    prefix = "variants/"
    return {
        name.removeprefix(prefix): f"{median / medians[prefix + 'grpo']:.2f}"
        for name, median in medians.items()
        if name.startswith(prefix)
    }


def choice_table(found: Results) -> str:
    """Overall accuracy on the development seeds, by the factor of the KLs' weights."""
    rows = [["", *(f"x{factor}" for factor in FACTORS), "chosen"]]
    for name in KL_WEIGHTS:
        means = {}
        for factor in FACTORS:
            runs = found.get(f"variants/{name}_x{factor}", {})
            values = [accuracy(runs[seed]) for seed in DEVELOPMENT_SEEDS if seed in runs]
            if len(values) == len(DEVELOPMENT_SEEDS):
                means[factor] = float(np.mean(values))
        if len(means) == len(FACTORS):
            best = max(means, key=means.get)
            rows.append([name, *(f"{mean:.1f}" for mean in means.values()), f"x{best}"])
    return markdown(rows)


def variants_figure(found: Results) -> str:
    """Difference to grpo at the end: each seed, the mean and its 95% interval."""
    names = [*method_names("variants"), *method_names("variants_scaled")]
    gains = {}
    for name in names:
        values = paired(found, f"variants/{name}", "variants/grpo", accuracy_gain)
        if name != "grpo" and 1 < len(values) == len(found["variants/grpo"]):
            gains[name] = values
    if not gains:
        return ""
    figure = Figure(figsize=(8, 0.6 + 0.34 * len(gains)), layout="constrained")
    ax = figure.subplots()
    for row, values in enumerate(gains.values()):
        mean, half = plots.mean_interval(values)
        ax.plot(values, [row] * len(values), ".", color="tab:gray", markersize=5)
        ax.errorbar(mean, row, xerr=half, fmt="o", color="tab:blue", capsize=3)
    ax.axvline(0, color="black", linewidth=0.8)
    ax.set_yticks(range(len(gains)), gains.keys())
    ax.invert_yaxis()
    ax.set_xlabel("overall accuracy at the end, minus grpo's, points; mean, 95% interval and seeds")
    ax.grid(axis="x", alpha=0.3)
    return save_figure(figure, "variants")


def rounding_table(found: Results) -> str:
    """How far the same run spreads when nothing but rounding differs."""
    rows = [["", "runs", "overall: mean", "standard deviation", "lowest", "highest"]]
    for method in ("grpo", "papo_g"):
        every_name, _ = EXPERIMENTS["rounding"]
        names = [name for name in every_name if name.startswith(f"rounding/{method}")]
        values = [accuracy(run) for name in names for run in found.get(name, {}).values()]
        if len(values) > 1:
            spread = [np.mean(values), np.std(values, ddof=1), min(values), max(values)]
            rows.append([method, str(len(values)), *(f"{value:.1f}" for value in spread)])
    return markdown(rows)


def rerun_table(found: Results) -> str:
    """Results beside those of the same runs on another machine."""
    rows = [["", "seed", "overall", "again", "start model, overall", "again"]]
    for variant, runs in found.items():
        folder, _, name = variant.partition("/")
        if folder != "rerun":
            continue
        for seed, again in runs.items():
            both = (found[name][seed], again)
            ends = [f"{accuracy(run):.1f}" for run in both]
            starts = [f"{overall_curve(run)[0]:.1f}" for run in both]
            rows.append([name, str(seed), *ends, *starts])
    return markdown(rows)


# Figures


def series(run: dict, key: str) -> dict[int, float]:
    """{step: value} of one run: a split's evaluations, or a metric."""
    if key in SPLITS:
        return {int(step): scores[key] for step, scores in run["curve"].items()}
    values = dict(enumerate(run["metrics"].get(key, []), start=1))
    return {step: value for step, value in values.items() if value is not None}


def save_figure(figure: Figure, name: str) -> str:
    figure.savefig(HERE / "figures" / f"{name}.png", dpi=110)
    return f"![{name}](figures/{name}.png)"


def table1_figure(found: Results) -> str:
    panels = {}
    for key, title in (ACCURACY_PANELS | {"kl_prcp": "KL_prcp"}).items():
        lines = {}
        for variant in TABLE1:
            curves = [series(run, key) for run in found.get(variant, {}).values()]
            lines[variant] = [curve for curve in curves if curve]
        panels[title] = lines
    heading = "mean over eight seeds; band: 95% interval"
    plots.draw(panels, heading, HERE / "figures" / "table1.png", shared_legend=True)
    return "![Table 1 at toy scale](figures/table1.png)"


def seed_lines_figure(found: Results, names: dict[str, str], title: str) -> str:
    """Each seed's accuracy at the end, variants side by side; the bar is the mean."""
    variants = [variant for variant in names if variant in found]
    if len(variants) < 2:
        return ""
    seeds = common_seeds(found, variants)
    labels = [names[variant] for variant in variants]
    positions = np.arange(len(variants))
    figure = Figure(figsize=(13.8, 3.6), layout="constrained")
    axes = figure.subplots(1, 3)
    for ax, split in zip(axes, (*SPLITS, "overall"), strict=True):
        ax.set_title(f"{split}: accuracy at the end, %", fontsize=9.5)
        values = []
        for seed in seeds:
            values.append([accuracy(found[variant][seed], split) for variant in variants])
            ax.plot(positions, values[-1], "o-", linewidth=0.7, alpha=0.7, label=f"seed {seed}")
        means = np.mean(values, axis=0)
        ax.hlines(means, positions - 0.3, positions + 0.3, "black", linewidth=2)
        ax.set_xticks(positions, labels, rotation=25, ha="right", fontsize=8)
        ax.grid(alpha=0.3)
    figure.legend(*ax.get_legend_handles_labels(), loc="outside right center", fontsize=8)
    return save_figure(figure, title)


def collapse_figure(found: Results) -> str:
    """Accuracy and the signs of collapse over the steps: a line per seed, a colour per variant."""
    if not any(variant in found for variant in REGULARISATION):
        return ""
    figure = Figure(figsize=(13.8, 6.7), layout="constrained")
    axes = figure.subplots(2, 3).flat
    for ax, (key, title) in zip(axes, COLLAPSE_PANELS.items(), strict=True):
        ax.set_title(title, fontsize=9.5)
        ax.set_xlabel("step", fontsize=8)
        ax.grid(alpha=0.3)
        for index, (variant, label) in enumerate(REGULARISATION.items()):
            for number, run in enumerate(found.get(variant, {}).values()):
                curve = series(run, key)
                shown = label if number == 0 else ""
                ax.plot(curve.keys(), curve.values(), f"C{index}", linewidth=1, label=shown)
    figure.legend(*ax.get_legend_handles_labels(), loc="outside lower center", ncols=3, fontsize=9)
    return save_figure(figure, "collapse")


def provenance_table(found: Results) -> str:
    """Where the results in each folder of results/ come from."""
    rows = [["folder", "results", "commits", "torch", "transformers", "processors"]]
    folders: dict[str, list[dict]] = {}
    for variant, runs in found.items():
        folders.setdefault(variant.rpartition("/")[0], []).extend(runs.values())
    for folder, results in sorted(folders.items()):
        machines = [result.get("machine", {}) for result in results]
        facts = [{result["commit"] for result in results}]
        for key in ("torch", "transformers", "processor"):
            facts.append({machine.get(key, "not recorded") for machine in machines})
        cells = [", ".join(sorted(of_folder)) for of_folder in facts]
        rows.append([folder or "(top)", str(len(results)), *cells])
    return markdown(rows)


def first_sections(found: Results) -> list[str]:
    """The first protocol."""
    parts = ["## table1", table1(found), table1_figure(found)]
    parts += ["## perception (from table1)", perception_table(found)]
    for title, (names, base) in FIRST.items():
        parts += [f"## {title}", comparison_table(found, names, base)]
        parts.append(seed_lines_figure(found, names, title))
    return [*parts, "## signs of collapse (from regularisation)", collapse_figure(found)]


def variants_sections(found: Results, everything: Results) -> list[str]:
    note = "The p-values of the ten comparisons with grpo are not corrected for their number."
    parts = ["## variants", variants_table(found), note, variants_figure(found)]
    return [*parts, "## variants: choice of the factor", choice_table(everything)]


def second_sections(everything: Results) -> list[str]:
    """The second protocol."""
    parts = report_tasks.sections(everything, load_costs(), HERE / "figures")
    found = complete(everything, NEW_SEEDS)
    for title, (names, base) in SECOND.items():
        parts.append(f"## {title}")
        if names.keys() <= found.keys():
            parts += [tested_table(found, names, base), seed_lines_figure(found, names, title)]
        else:
            parts.append("(not complete)")
    parts += report_confirm.sections(everything, load_costs("confirm"), HERE / "figures")
    parts += report_difficulty.sections(everything, HERE / "figures")
    parts += ["## seed by seed", "Variants are named as in [protocol.py](protocol.py)."]
    for seeds in (NEW_SEEDS, CONFIRMING_SEEDS):
        parts += ["At the end:", seeds_table(everything, seeds, accuracy, accuracy_gain)]
        of_training = seeds_table(everything, seeds, accuracy_over_training, gain_over_training)
        parts += ["Mean over training:", of_training]
    parts += ["## rounding", rounding_table(everything)]
    return [*parts, "## results computed again", rerun_table(everything)]


def main() -> None:
    everything = load(HERE / "results")
    found = at_seeds(everything, EIGHT_SEEDS)  # without the development seeds
    (HERE / "figures").mkdir(exist_ok=True)
    parts = [
        "# Results",
        "Drawn by `python -m experiments.report` from the JSON files in results/. Mean +- 95% "
        "interval over seeds; accuracies in %. [README.md](README.md) says how to read them, "
        "[protocols.md](protocols.md) how they were planned.",
        *second_sections(everything),
        *variants_sections(found, everything),
        *first_sections(found),
        "## warnings of a collapse",
        warnings_table(everything),
        "## further differences",
        further_table(at_seeds(everything, [*EIGHT_SEEDS, *NEW_SEEDS])),
        "## where the results come from",
        provenance_table(everything),
    ]
    (HERE / "report.md").write_text("\n\n".join(filter(None, parts)) + "\n")
    print(HERE / "report.md")


if __name__ == "__main__":
    main()
