"""The paper's evaluation protocol, and the table that an evaluation reports."""

from __future__ import annotations

import json
from pathlib import Path

from support import benchmarks, cli, metrics, plots, predictions

# Settings that PAPO-Eval samples with: its script's, and its program's top_k and pixel defaults.
PAPER_PROTOCOL = {
    "n": 8,
    "temperature": 1.0,
    "top_p": 1.0,
    "top_k": 50,
    "max_new_tokens": 2048,
    "max_prompt_tokens": 9216,
    "min_pixels": 1024,
    "max_pixels": 589_824,
}
PROTOCOLS = {"paper": PAPER_PROTOCOL, "training": {}}  # training: EvalConfig's own defaults


def with_protocol(given: dict) -> dict:
    """The given flags of evaluate.py, over the settings of the protocol they choose."""
    data = cli.data_of(given) or "all"
    default = "paper" if benchmarks.benchmark_names(data) else "training"
    protocol = given.get("protocol") or default
    if protocol not in PROTOCOLS:
        raise ValueError(f"--protocol {protocol}: choose one of {', '.join(PROTOCOLS)}")
    settings = dict(PROTOCOLS[protocol])
    if given.get("ask") or given.get("explain"):
        settings["temperature"] = 0.0
    rows = given.get("eval_rows", 0)  # all of them, where training evaluates on some
    return settings | given | {"data": data, "protocol": protocol, "eval_rows": rows}


def protocol_line(config) -> str:
    """The settings behind the numbers of a table. config: evaluate.EvalConfig."""
    settings = []
    for name in PAPER_PROTOCOL:
        value = getattr(config, name)
        changed = PROTOCOLS[config.protocol].get(name, value) != value
        settings.append(f"{name} {value}" + (" (CHANGED)" if changed else ""))
    return f"protocol {config.protocol}: {', '.join(settings)}; the box decides, not the format"


def report(config, results: dict, baseline: dict | None, notes: list[str]) -> None:
    """Print the table with its notes, and write it to --out."""
    paper_sets = benchmarks.BENCHMARKS["all"]
    known = set(results) & set(paper_sets)
    averages = {
        "general": benchmarks.GENERAL,
        "vision-dependent": benchmarks.VISION,
        "overall": paper_sets if len(known) == len(results) else tuple(results),
    }
    rows = metrics.summarise(results, config.n, averages, baseline)
    notes = list(notes)
    if known:
        notes.append("the benchmarks hold no free-form questions: PAPO-Eval's authors removed them")
    notes.append("interval: bootstrap over questions; unboxed: without a complete \\boxed{...}")
    text = "\n".join([metrics.table(rows, config.n), *notes])
    print(text)
    if config.out:
        out = Path(config.out)
        (out / "table.txt").write_text(text + "\n", encoding="utf-8")
        as_json = json.dumps(rows, indent=1).replace("NaN", "null")
        (out / "table.json").write_text(as_json + "\n")


def compare_or_grade(config) -> None:
    """Handle --compare and --grade, which need no model. config: evaluate.EvalConfig."""
    out = Path(config.out)
    out.mkdir(parents=True, exist_ok=True)
    if config.compare:
        figure, table = plots.compare(config.compare, out / "compare.png")
        print(table, figure, sep="\n")
        return
    how = {"n": config.n, "reward": config.reward, **config.limits}
    results = predictions.grade_files(config.grade, **how)
    baseline = None
    if config.baseline:
        baseline = predictions.grade_files([config.baseline], results, **how)
    report(config, results, baseline, notes=[])
