r"""An evaluation's files and its table: written while it runs, read to resume it, graded again.

evaluate.py samples and grades; this module keeps the responses and computes avg@n, pass@n,
intervals and Delta_rel. A question is the list of its n records, one per response. --out holds

    evaluation.json           the settings it was started with and the files it reads
    NAME.partial              a set that is being evaluated, one line per question
    NAME.jsonl                a finished set, one line per response, loop after loop over the set
    table.txt, table.json     the accuracies, once all sets are finished

The keys `idx`, `id`, `prompt`, `predict` and `label` of a NAME.jsonl are PAPO-Eval's, which grades
these files and whose own files are graded here. The bootstrap interval and pass@n are ours.
"""

from __future__ import annotations

import itertools
import json
import math
import sys
from collections.abc import Iterable
from pathlib import Path
from statistics import multimode

import numpy as np

from support.batch import Group
from support.checkpoint import write_atomically
from support.reward import boxed
from support.run_folder import read_log
from support.sandbox import Grader
from support.tables import ALIASES, BENCHMARKS, GENERAL, VISION, read_json

RESAMPLES = 1000  # bootstrap samples per evaluation set
# Flags that change the results: a resumed evaluation must have the same values.
CHANGES_RESULTS = """model data benchmarks n eval_rows reward reward_deadline seed temperature top_p
top_k max_prompt_tokens max_new_tokens min_pixels max_pixels prompt_suffix""".split()

Question = list[dict]


def make_question(tokenizer, group: Group, scores: list[dict]) -> Question:
    """One record per response, with PAPO-Eval's keys, then ours and its score."""
    example, row = group.prompt.example, group.prompt.index
    prompt = tokenizer.decode(group.prompt.input_ids, skip_special_tokens=True)
    return [
        {
            "id": example.id,
            "prompt": prompt,
            "predict": response,
            "label": example.answer,
            "row": row,
            "loop": loop,
            "accuracy": score["accuracy"],
            "format": score["format"],
            "unboxed": boxed(response) is None,
            "truncated": bool(group.truncated[loop]),
        }
        for loop, (response, score) in enumerate(zip(group.responses, scores, strict=True))
    ]


# ----------------------------------------------------------------------------- a running evaluation


def open_output(config) -> None:
    """Start an evaluation in the folder of --out, or resume the one that is there.

    To be resumed, an evaluation must have the same settings. What it reads is compared by name,
    size and modification time, as a path may be the same and its content new. ValueError if the
    folder holds other results. config: protocol.EvalConfig.
    """
    if not config.out:
        return
    current = {name: getattr(config, name) for name in CHANGES_RESULTS}
    for name in ("model", "data", "benchmarks"):
        current[f"files of {name}"] = file_stamps(Path(current[name]).expanduser())
    out = Path(config.out)
    out.mkdir(parents=True, exist_ok=True)
    file = out / "evaluation.json"
    if not any(out.glob("*.json*")):
        write_atomically(file, json.dumps(current, indent=1) + "\n")
    saved = json.loads(file.read_text()) if file.exists() else {}
    if not saved:
        raise ValueError(f"--out {out} holds JSON files and no evaluation: choose another folder")
    changed = [name for name in current if current[name] != saved.get(name)]
    if changed:
        values = ", ".join(f"{name} {str(saved.get(name, 'unknown'))[:60]}" for name in changed)
        raise ValueError(f"--out {out} holds results with {values}: choose another folder")


def file_stamps(path: Path) -> list[list]:
    """[name, bytes, modification time] of the file `path`, or of each file in the folder `path`."""
    files = [file for file in [path, *sorted(path.glob("*"))] if file.is_file()]
    return [[file.name, file.stat().st_size, file.stat().st_mtime] for file in files]


def append(out: str, name: str, questions: list[Question]) -> None:
    """Keep new questions of a set."""
    if not out:
        return
    with open(Path(out, f"{name}.partial"), "a") as file:
        file.write("\n")  # ends a line that a killed process left incomplete
        file.writelines(json.dumps(question) + "\n" for question in questions)


def answered(out: str, name: str) -> list[Question]:
    """The questions of a set that the folder holds already."""
    if not out:
        return []
    finished = Path(out, f"{name}.jsonl")
    if finished.exists():
        return into_questions(name, read_predictions(finished))
    return read_log(Path(out, f"{name}.partial"))


def finish(out: str, name: str, questions: list[Question]) -> None:
    """Write the finished set, and delete its partial file."""
    if not out:
        return
    records = itertools.chain.from_iterable(zip(*questions, strict=True))  # loop after loop
    lines = [json.dumps({"idx": idx} | record) + "\n" for idx, record in enumerate(records)]
    write_atomically(Path(out, f"{name}.jsonl"), "".join(lines))
    Path(out, f"{name}.partial").unlink(missing_ok=True)


# ----------------------------------------------------------------------------------- grading again


def grade_files(paths: Iterable, grader: Grader, names=()) -> dict[str, list[Question]]:
    """Grade prediction files, or folders of them, again: set name -> its questions.

    names: the sets to grade, of those that are found; by default all. ValueError if none is found,
    or one twice or incomplete.
    """
    files = []
    for path in map(Path, paths):
        files += sorted(path.glob("*.jsonl")) if path.is_dir() else [path]
    results = {}
    for file in files:
        name = ALIASES.get(file.stem, file.stem)
        if names and name not in names:
            continue
        if name in results:
            raise ValueError(f"{file}: set {name} is given twice")
        results[name] = into_questions(name, read_predictions(file))
        records = list(itertools.chain.from_iterable(results[name]))
        responses, labels = ([each[key] for each in records] for key in ("predict", "label"))
        for record, score in zip(records, grader(responses, labels, budget=math.inf), strict=True):
            record |= score | {"unboxed": boxed(record["predict"]) is None}
    if not results:
        where = " ".join(map(str, paths))
        raise ValueError(f"{where}: no NAME.jsonl of {', '.join(names) or 'a set'} there")
    n_responses = {name: len(questions[0]) for name, questions in results.items() if questions}
    if len(set(n_responses.values())) > 1:
        raise ValueError(f"responses per question differ between the sets: {n_responses}")
    return results


def read_predictions(path: Path) -> list[dict]:
    """The records of a prediction file; a missing id or prompt is "".

    ValueError names the first record that is not a prediction.
    """
    records = []
    for record in read_json(path):
        if not isinstance(record, dict) or not {"predict", "label"} <= record.keys():
            shown = str(record)[:80]
            raise ValueError(f"{path}: not a prediction, with predict and label: {shown}")
        texts = {key: str(record[key]) for key in ("predict", "label")}
        records.append({"id": "", "prompt": ""} | record | texts)
    return records


def into_questions(name: str, records: list[dict]) -> list[Question]:
    """Group the records of a set into questions of n responses each, n being what most have.

    As in PAPO-Eval, records with equal id, prompt and label belong together; so do ours with an
    equal row. ValueError names a question with another number of responses.
    """
    groups: dict[tuple, list[dict]] = {}
    for record in records:
        key = (record["id"], record["prompt"], record["label"], record.get("row"))
        groups.setdefault(key, []).append(record)
    n = min(multimode(map(len, groups.values())), default=0)
    questions = []
    for (question_id, prompt, label, _), group in groups.items():
        repeats, remainder = divmod(len(group), n)
        if remainder:
            text = " ".join(prompt.split("user\n")[-1].split())[:80]
            question = f"question {question_id!r} ({text!r}, answer {label!r})"
            raise ValueError(f"{name}: {len(group)} responses to {question}, but {n} to others")
        # A set may hold a question several times. Records come loop after loop over the set, so
        # the n responses to one of its copies are `repeats` apart.
        questions += [group[copy::repeats] for copy in range(repeats)]
    return questions


# ---------------------------------------------------------------------------------------- the table


def mean_accuracy(questions: list[Question]) -> float:
    """avg@n in [0, 1]; 0 if there is no question."""
    accuracies = [record["accuracy"] for question in questions for record in question]
    return sum(accuracies) / max(len(accuracies), 1)


def summarise(results: dict[str, list[Question]], baseline: dict | None = None):
    """An evaluation's table, in %: a DataFrame with a row per set, then averages over groups.

    results, baseline: set name -> graded questions. Columns:
    accuracy   avg@n; low and high: its bootstrap 95% interval over questions
    pass       questions with at least one correct response among n
    unboxed    responses without a complete \\boxed{}; truncated: cut at max_new_tokens
    delta      Delta_rel, the relative gain over the baseline
    An average is the plain mean over its sets, of delta too (the paper's definition). NaN: unknown.
    """
    table = measures(results)
    resampled = {name: bootstrap(name, questions) for name, questions in results.items()}
    if baseline:
        before = measures({name: baseline.get(name, []) for name in results})
        comparable = table["questions"] == before["questions"]
        for name in table.index[~comparable]:
            print(f"{name}: no Delta_rel, the baseline has other questions", file=sys.stderr)
        gain = 100 * (table["accuracy"] / before["accuracy"] - 1)
        table["delta"] = gain.where(comparable & (before["accuracy"] > 0))
    all_sets = BENCHMARKS["all"] if results.keys() <= set(BENCHMARKS["all"]) else tuple(results)
    groups = {"general": GENERAL, "vision-dependent": VISION, "overall": all_sets}
    for label, names in groups.items():
        members = [name for name in results if name in names]
        if len(members) < 2:
            continue
        missing = f" ({len(members)} of {len(names)})" if len(members) < len(names) else ""
        label = f"{label} average{missing}"
        table.loc[label] = table.loc[members].mean(skipna=False)
        table.loc[label, "questions"] = table.loc[members, "questions"].sum()
        resampled[label] = np.mean([resampled[name] for name in members], axis=0)
    table["low"], table["high"] = np.quantile(list(resampled.values()), [0.025, 0.975], axis=1)
    return table.astype({"questions": int})


def measures(results: dict[str, list[Question]]):
    """The columns of each set's row, except its interval: a DataFrame."""
    from pandas import DataFrame, Series  # slow to import, and training needs no table

    measured = ["accuracy", "unboxed", "truncated"]  # the last is not in PAPO-Eval's own files
    rows = {}
    for name, questions in results.items():
        records = DataFrame(itertools.chain.from_iterable(questions), columns=measured)
        solved = [any(record["accuracy"] for record in question) for question in questions]
        means = dict(100 * records.astype(float).mean())
        shares = {"questions": len(questions), "pass": 100 * Series(solved, dtype=float).mean()}
        rows[name] = means | shares | {"delta": math.nan}
    return DataFrame.from_dict(rows, orient="index", dtype=float)


def bootstrap(name: str, questions: list[Question]) -> np.ndarray:
    """Accuracies of resampled questions, [RESAMPLES]. They depend on the arguments alone."""
    if not questions:
        return np.full(RESAMPLES, math.nan)
    accuracies = [np.mean([record["accuracy"] for record in question]) for question in questions]
    rng = np.random.default_rng([0, *name.encode()])
    return 100 * rng.choice(accuracies, (RESAMPLES, len(questions))).mean(1)


def report(results: dict[str, list[Question]], baseline: dict | None, notes: list, out: str):
    """Print the table with its notes, and write it to the folder `out`, if there is one."""
    table = summarise(results, baseline)
    n = max((len(questions[0]) for questions in results.values() if questions), default=0)
    columns = {"questions": "questions", "accuracy": f"avg@{n} %", "low": "95% from", "high": "to"}
    columns |= {"pass": f"pass@{n} %", "unboxed": "unboxed %", "truncated": "truncated %"}
    columns |= {"delta": "Delta_rel %"}
    shown = table[list(columns)].rename(columns=columns).dropna(axis="columns", how="all")
    legend = "95%: bootstrap over questions; unboxed: without a complete \\boxed{...}"
    text = "\n".join([shown.to_string(float_format="%.2f", na_rep="-"), *notes, legend])
    print(text)
    if out:
        Path(out).mkdir(parents=True, exist_ok=True)
        Path(out, "table.txt").write_text(text + "\n", encoding="utf-8")
        table.reset_index(names="name").to_json(Path(out, "table.json"), orient="records", indent=1)
