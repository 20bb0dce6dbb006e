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
from contextlib import suppress
from pathlib import Path
from statistics import multimode

import numpy as np

from support.batch import Group
from support.checkpoint import write_atomically
from support.reward import boxed
from support.sandbox import Grader
from support.tables import ALIASES, BENCHMARKS, GENERAL, VISION

RESAMPLES = 1000  # bootstrap samples per evaluation set
# Flags that change the results: a resumed evaluation must have the same values.
CHANGES_RESULTS = """model data benchmarks n eval_rows reward reward_deadline seed temperature top_p
top_k max_prompt_tokens max_new_tokens min_pixels max_pixels prompt_suffix""".split()

Question = list[dict]


def make_question(tokenizer, group: Group, scores: list[dict]) -> Question:
    """One record per response, with PAPO-Eval's keys, then ours and its score."""
    prompt = group.prompt
    prompt_text = tokenizer.decode(prompt.input_ids, skip_special_tokens=True)
    question = []
    for loop, (response, score) in enumerate(zip(group.responses, scores, strict=True)):
        record = {"idx": prompt.index, "id": prompt.example.id or str(prompt.index)}
        record |= {"prompt": prompt_text, "predict": response, "label": prompt.example.answer}
        record |= {"row": prompt.index, "loop": loop}
        record |= {"accuracy": score["accuracy"], "format": score["format"]}
        record |= {"unboxed": boxed(response) is None, "truncated": bool(group.truncated[loop])}
        question.append(record)
    return question


# ----------------------------------------------------------------------------- a running evaluation


def open_output(config) -> None:
    """Start an evaluation in the folder of --out, or resume the one that is there.

    To be resumed, an evaluation must have the same settings. What it reads is compared by name,
    size and modification time, as a path may be the same and its content new. ValueError if the
    folder holds another evaluation, or other JSON files. config: protocol.EvalConfig.
    """
    if not config.out:
        return
    current = {name: getattr(config, name) for name in CHANGES_RESULTS}
    for name in ("model", "data", "benchmarks"):
        current[f"files of {name}"] = file_stamps(Path(current[name]).expanduser())
    out = Path(config.out)
    out.mkdir(parents=True, exist_ok=True)
    file, others = out / "evaluation.json", sorted(path.name for path in out.glob("*.json*"))
    if others and not file.exists():
        raise ValueError(f"--out {out} holds {others[0]} and no evaluation: choose another folder")
    if not others:
        write_atomically(file, json.dumps(current, indent=1) + "\n")
    saved = json.loads(file.read_text())
    changed = [f"{k} {str(saved.get(k))[:60]}" for k in current if current[k] != saved.get(k)]
    if changed:
        values = ", ".join(changed)
        raise ValueError(f"--out {out} holds an evaluation with {values}: choose another folder")


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
    finished, partial = Path(out, f"{name}.jsonl"), Path(out, f"{name}.partial")
    if finished.exists():
        return into_questions(name, read_predictions(finished))
    questions = []
    if partial.exists():
        for line in partial.read_text(errors="replace").split("\n"):
            with suppress(json.JSONDecodeError):  # blank or incomplete, see `append`
                questions.append(json.loads(line))
    return questions


def finish(out: str, name: str, questions: list[Question]) -> None:
    """Write the finished set, and delete its partial file."""
    if not out:
        return
    records = itertools.chain.from_iterable(zip(*questions, strict=True))  # loop after loop
    lines = [json.dumps(record | {"idx": idx}) + "\n" for idx, record in enumerate(records)]
    write_atomically(Path(out, f"{name}.jsonl"), "".join(lines))
    Path(out, f"{name}.partial").unlink(missing_ok=True)


# ----------------------------------------------------------------------------------- grading again


def grade_files(paths: Iterable, grader: Grader, names=(), n: int = 0) -> dict[str, list[Question]]:
    """Grade prediction files, or folders of them, again: set name -> its questions.

    names: the sets to grade; by default all that are found. n: responses per question; by default
    what the files hold. ValueError if a set is missing, present twice or incomplete.
    """
    results = {}
    for name, path in find_predictions(paths, names).items():
        results[name] = into_questions(name, read_predictions(path))
        found = responses_per_question({name: results[name]})
        n = n or found
        if found != n:
            raise ValueError(f"{path} holds {found} responses per question, not {n} (see --n)")
    for questions in results.values():
        records = list(itertools.chain.from_iterable(questions))
        responses, labels = ([each[key] for each in records] for key in ("predict", "label"))
        for record, score in zip(records, grader(responses, labels, budget=math.inf), strict=True):
            record |= score | {"unboxed": boxed(record["predict"]) is None}
    return results


def find_predictions(paths: Iterable, names: Iterable[str]) -> dict[str, Path]:
    """Set name -> its prediction file, among files and folders. No names: all sets found there."""
    files = []
    for path in map(Path, paths):
        files += sorted(path.glob("*.jsonl")) if path.is_dir() else [path]
    found = {ALIASES.get(file.stem, file.stem): file for file in files}
    wanted = list(names) or list(found)
    if not files or len(found) < len(files) or not found.keys() >= set(wanted):
        expected = ", ".join(wanted) or "a set"
        present = ", ".join(file.name for file in files) or "none"
        where = " ".join(map(str, paths))
        raise ValueError(f"{where}: one NAME.jsonl for {expected} expected, found {present}")
    return {name: found[name] for name in wanted}


def read_predictions(path: Path) -> list[dict]:
    """The records of a prediction file; a missing id or prompt is "".

    ValueError names the first line that is not a prediction.
    """
    records = []
    with open(path, encoding="utf-8") as lines:
        for number, line in enumerate(lines, 1):
            if not line.strip():
                continue
            try:
                record = json.loads(line)
                texts = {key: str(record[key]) for key in ("predict", "label")}
            except (ValueError, TypeError, KeyError) as error:
                problem = f"is not a prediction ({type(error).__name__}: {error})"
                raise ValueError(f"{path}: line {number} {problem}") from error
            names = {key: record.get(key, "") for key in ("id", "prompt")}
            records.append(record | texts | names)
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


def responses_per_question(results: dict[str, list[Question]]) -> int:
    """n of avg@n; 0 if there is no question."""
    return max(
        (len(question) for questions in results.values() for question in questions), default=0
    )


# ---------------------------------------------------------------------------------------- the table


def mean_accuracy(questions: list[Question]) -> float:
    """avg@n in [0, 1]; 0 if there is no question."""
    accuracies = [record["accuracy"] for question in questions for record in question]
    return sum(accuracies) / max(len(accuracies), 1)


def summarise(results: dict[str, list[Question]], baseline: dict | None = None) -> list[dict]:
    """The rows of an evaluation's table, in %: one per set, then averages over groups of sets.

    results, baseline: set name -> graded questions. Columns:
    accuracy   avg@n; low and high: its bootstrap 95% interval over questions
    pass       questions with at least one correct response among n
    unboxed    responses without a complete \\boxed{}; truncated: cut at max_new_tokens
    delta      Delta_rel, the relative gain over the baseline
    An average is the plain mean over its sets, of delta too (the paper's definition); an average
    over the same sets as an earlier one is left out. NaN: unknown.
    """
    rows = [_set_row(name, questions) for name, questions in results.items()]
    for row in rows if baseline else ():
        before = _set_row(row["name"], baseline[row["name"]])
        if row["questions"] != before["questions"]:
            counts = f"{before['questions']} questions, this evaluation {row['questions']}"
            print(f"{row['name']}: no Delta_rel, the baseline has {counts}", file=sys.stderr)
        elif before["accuracy"]:
            row["delta"] = 100 * (row["accuracy"] / before["accuracy"] - 1)
    all_sets = BENCHMARKS["all"] if results.keys() <= set(BENCHMARKS["all"]) else tuple(results)
    groups = {"general": GENERAL, "vision-dependent": VISION, "overall": all_sets}
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


def _set_row(name: str, questions: list[Question]) -> dict:
    """One set's row, with bootstrap samples of its accuracy [RESAMPLES] under "resampled".

    The samples depend on the name and the accuracies alone.
    """
    accuracies = [np.mean([record["accuracy"] for record in question]) for question in questions]
    resampled = np.array([math.nan])
    if questions:
        rng = np.random.default_rng([0, *name.encode()])
        resampled = 100 * rng.choice(accuracies, (RESAMPLES, len(questions))).mean(1)
    records = list(itertools.chain.from_iterable(questions))
    return {
        "name": name,
        "questions": len(questions),
        "delta": math.nan,
        "accuracy": _percent(accuracies),
        "pass": _percent([accuracy > 0 for accuracy in accuracies]),
        # PAPO-Eval's own files do not say whether a response was cut.
        "unboxed": _percent([r["unboxed"] for r in records if "unboxed" in r]),
        "truncated": _percent([r["truncated"] for r in records if "truncated" in r]),
        "resampled": resampled,
    }


def _percent(values: list) -> float:
    return 100 * float(np.mean(values)) if values else math.nan


def _average_row(label: str, rows: list[dict], n_sets: int) -> dict:
    """The mean of these rows; the name says so where the group has sets that were not evaluated."""
    missing = f" ({len(rows)} of {n_sets})" if len(rows) < n_sets else ""
    mean = {key: sum(row[key] for row in rows) / len(rows) for key in rows[0] if key != "name"}
    n_questions = sum(row["questions"] for row in rows)
    return mean | {"name": f"{label} average{missing}", "questions": n_questions}


def report(results: dict[str, list[Question]], baseline: dict | None, notes: list, out: str):
    """Print the table with its notes, and write it to the folder `out`, if there is one."""
    rows = summarise(results, baseline)
    lines = [table(rows, responses_per_question(results)), *notes]
    if results.keys() & set(BENCHMARKS["all"]):
        lines.append("the benchmarks hold no free-form questions: PAPO-Eval's authors removed them")
    lines.append("interval: bootstrap over questions; unboxed: without a complete \\boxed{...}")
    text = "\n".join(lines)
    print(text)
    if out:
        Path(out).mkdir(parents=True, exist_ok=True)
        Path(out, "table.txt").write_text(text + "\n", encoding="utf-8")
        as_json = json.dumps(rows, indent=1).replace("NaN", "null")
        Path(out, "table.json").write_text(as_json + "\n")


def table(rows: list[dict], n: int) -> str:
    """The rows of `summarise` as plain text; a dash stands for NaN."""
    columns = {"pass": f"pass@{n} %", "unboxed": "unboxed %", "truncated": "truncated %"}
    if any(math.isfinite(row["delta"]) for row in rows):
        columns["delta"] = "Delta_rel %"
    lines = [["", "questions", f"avg@{n} %", "95% interval", *columns.values()]]
    for row in rows:
        interval = f"{row['low']:.2f} to {row['high']:.2f}" if math.isfinite(row["low"]) else "-"
        line = [row["name"], str(row["questions"]), _cell(row["accuracy"]), interval]
        lines.append(line + [_cell(row[key]) for key in columns])
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    return "\n".join(_aligned(line, widths) for line in lines)


def _aligned(line: list[str], widths: list[int]) -> str:
    """Cells as text: the first is flush left, the others flush right."""
    numbers = [cell.rjust(width) for cell, width in zip(line[1:], widths[1:], strict=True)]
    return "  ".join([line[0].ljust(widths[0]), *numbers])


def _cell(value: float) -> str:
    return "-" if math.isnan(value) else f"{value:.2f}"
