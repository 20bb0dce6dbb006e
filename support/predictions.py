r"""PAPO-Eval's prediction files: written while an evaluation runs, read to resume it, graded again.

The end of the pipeline: evaluate.py samples and grades the responses, and this module keeps them.
A prediction file NAME.jsonl has one JSON line per response, loop after loop over the whole set,
with PAPO-Eval's keys `idx`, `id`, `prompt`, `predict` and `label`. Further keys are ours; PAPO-Eval
does not read them. The folder of an evaluation holds

    evaluation.json           the settings it was started with and the files it reads
    partial/NAME/RANK.jsonl   the responses of a set that is being evaluated, in no order
    NAME.jsonl                the responses of a finished set
    table.txt, table.json     the accuracies, once all sets are finished (protocol.py)
"""

from __future__ import annotations

import json
import os
import shutil
from collections import Counter
from collections.abc import Iterable
from contextlib import suppress
from pathlib import Path

from mathruler.grader import extract_boxed_content

from support import metrics
from support.batch import Group
from support.benchmarks import ALIASES
from support.checkpoint import write_atomically
from support.data import DataError
from support.reward import compute_score, rewrite
from support.sandbox import Grader


def boxed(response: str) -> str | None:
    r"""The content of the last \boxed{...}, as the grader reads it; None without a complete box."""
    content = extract_boxed_content(rewrite(response))
    return None if content == "None" else content  # mathruler's word for a missing box


def grade_files(
    paths: Iterable, names: Iterable[str] = (), *, n: int, reward: str = "", **limits
) -> dict[str, list[dict]]:
    """Grade prediction files, or folders of them, again. Returns the records of each set by name.

    `names`: the sets to grade; by default all that are found. `reward`: "path/file.py:function", by
    default the released rule. `limits`: deadline and memory of the Grader. ValueError if a set is
    missing or present twice, or if a question's number of responses is not a multiple of n.
    """
    results = {
        name: read_predictions(path) for name, path in find_predictions(paths, names).items()
    }
    with Grader(reward or compute_score, budget=1e6, **limits) as grader:
        for name, records in results.items():
            metrics.in_questions(name, records, n)  # checks the counts before the slow part
            responses = [record["predict"] for record in records]
            scores = grader(responses, [record["label"] for record in records])
            for record, score in zip(records, scores, strict=True):
                record |= score
                record["unboxed"] = boxed(record["predict"]) is None
    return results


def find_predictions(paths: Iterable, names: Iterable[str]) -> dict[str, Path]:
    """Set name -> its prediction file, among files and folders. No names: all sets found there."""
    files = []
    for path in map(Path, paths):
        files += sorted(path.glob("*.jsonl")) if path.is_dir() else [path]
    found = {ALIASES.get(file.stem, file.stem): file for file in files}
    wanted = list(names) or list(found)
    missing = [name for name in wanted if name not in found]
    if not files or missing or len(found) < len(files):
        expected = ", ".join(wanted) or "a set"
        present = ", ".join(file.name for file in files) or "none"
        where = " ".join(map(str, paths))
        raise ValueError(f"{where}: one NAME.jsonl for {expected} expected, found {present}")
    return {name: found[name] for name in wanted}


def read_predictions(path: Path) -> list[dict]:
    """The records of a prediction file; a missing id or prompt is "".

    DataError names the first line that is not a prediction.
    """
    records = []
    with open(path, encoding="utf-8") as lines:
        for number, line in enumerate(lines, 1):
            if not line.strip():
                continue
            try:
                record = {"id": "", "prompt": ""} | json.loads(line)
                record |= {"predict": str(record["predict"]), "label": str(record["label"])}
            except (ValueError, TypeError, KeyError) as error:
                problem = f"line {number} is not a prediction ({type(error).__name__}: {error})"
                raise DataError(f"{path}: {problem}") from error
            records.append(record)
    return records


def open_output(out: Path, settings: dict) -> None:
    """Start an evaluation in the folder `out`, or resume the one that is there.

    To be resumed, an evaluation must have the same `settings`. What it reads is compared by name,
    size and modification time, as a path may be the same and its content new. ValueError if `out`
    holds another evaluation, or other JSON files.
    """
    current = dict(settings)
    for name in ("model", "data", "benchmarks"):
        current[f"files of {name}"] = file_stamps(Path(settings[name]).expanduser())
    out.mkdir(parents=True, exist_ok=True)
    file = out / "evaluation.json"
    if not file.exists():
        others = sorted(path.name for path in out.glob("*.json*"))
        if others:
            problem = f"holds {others[0]} and no evaluation"
            raise ValueError(f"--out {out} {problem}: choose another folder")
        write_atomically(file, json.dumps(current, indent=1) + "\n")
        return
    saved = json.loads(file.read_text())
    changed = [name for name in current if current[name] != saved.get(name)]
    if changed:
        values = ", ".join(f"{name} {str(saved.get(name))[:60]}" for name in changed)
        raise ValueError(f"--out {out} holds an evaluation with {values}: choose another folder")


def file_stamps(path: Path) -> list[list]:
    """[name, bytes, modification time] of the file `path`, or of each file in the folder `path`."""
    candidates = sorted(path.glob("*")) if path.is_dir() else [path]
    files = [file for file in candidates if file.is_file()]
    return [[file.name, file.stat().st_size, file.stat().st_mtime] for file in files]


def append_partial(out: Path, name: str, rank: int, records: list[dict]) -> None:
    """Append new records of a set to this rank's part. They are on disk when this returns."""
    file = out / "partial" / name / f"{rank}.jsonl"
    file.parent.mkdir(parents=True, exist_ok=True)
    with open(file, "a", encoding="utf-8") as part:
        part.write("\n")  # ends a line that a killed process left incomplete
        part.writelines(json.dumps(record) + "\n" for record in records)
        part.flush()
        os.fsync(part.fileno())


def load_partial(out: Path, name: str, n: int) -> list[dict]:
    """The records of a set that `out` holds already, for the questions with all n responses."""
    files = [out / f"{name}.jsonl", *(out / "partial" / name).glob("*.jsonl")]
    records = {}
    for file in filter(Path.exists, files):
        with open(file, encoding="utf-8", errors="replace") as lines:
            for line in lines:
                with suppress(json.JSONDecodeError):  # blank or incomplete, see append_partial
                    record = json.loads(line)
                    records[record["row"], record["loop"]] = record
    responses = Counter(row for row, _ in records)
    return [record for (row, _), record in records.items() if responses[row] == n]


def write_predictions(out: Path, name: str, records: list[dict]) -> None:
    """Write the finished set's records, ordered loop after loop, and delete its partial files."""
    temporary = out / f".{name}.tmp"
    with open(temporary, "w", encoding="utf-8") as lines:
        for idx, record in enumerate(records):
            lines.write(json.dumps(record | {"idx": idx}) + "\n")
    os.replace(temporary, out / f"{name}.jsonl")
    shutil.rmtree(out / "partial" / name, ignore_errors=True)


def make_records(tokenizer, groups: list[Group], scores: list[dict]) -> list[dict]:
    """One record per response, with PAPO-Eval's keys and then ours; scores in the same order."""
    scores = iter(scores)
    records = []
    for group in groups:
        prompt = group.prompt
        prompt_text = tokenizer.decode(prompt.input_ids, skip_special_tokens=True)
        for loop, response in enumerate(group.responses):
            score = next(scores)
            records.append(
                {
                    "idx": prompt.index,
                    "id": prompt.example.id or str(prompt.index),
                    "prompt": prompt_text,
                    "predict": response,
                    "label": prompt.example.answer,
                    "row": prompt.index,
                    "loop": loop,
                    "accuracy": score["accuracy"],
                    "format": score["format"],
                    "unboxed": boxed(response) is None,
                    "truncated": bool(group.truncated[loop]),
                }
            )
    return records
