"""PAPO-Eval's files: write, resume, grade."""

from __future__ import annotations

import dataclasses
import json
import os
import shutil
from collections import Counter
from contextlib import suppress
from pathlib import Path

from mathruler.grader import extract_boxed_content

from support import benchmarks, metrics
from support.data import DataError
from support.reward import compute_score, rewrite
from support.sandbox import Grader


def boxed(text: str) -> str | None:
    """What the last box of a response holds, read as the grader reads it; None where there is no whole box."""
    content = extract_boxed_content(rewrite(text))
    return None if content == "None" else content


def grade_files(paths, config, names=()) -> dict[str, list[dict]]:
    """Name -> records, graded anew, of files of predictions or folders of such: all, or `names`.

    ValueError, in one line, where one of these is missing or a question's count is no multiple of n.
    """
    files = [
        file
        for p in map(Path, paths)
        for file in (sorted(p.glob("*.jsonl")) if p.is_dir() else [p])
    ]
    found = {benchmarks.ALIASES.get(file.stem, file.stem): file for file in files}
    if not files or len(found) < len(files) or not {*names} <= {*found}:
        wanted, there = (
            ", ".join(names or found or ["a set"]),
            ", ".join(file.name for file in files),
        )
        raise ValueError(
            f"{' '.join(map(str, paths))}: one NAME.jsonl for {wanted} expected, found {there or 'none'}"
        )
    results = {name: read_predictions(found[name]) for name in names or found}
    with Grader(config.reward or compute_score, budget=1e6) as grader:
        for name, records in results.items():
            metrics.in_questions(name, records, config.n)
            scores = grader([r["predict"] for r in records], [r["label"] for r in records])
            for record, score in zip(records, scores, strict=True):
                record |= score | {"unboxed": boxed(record["predict"]) is None}
    return results


def open_output(out: Path, config) -> None:
    """Make --out this evaluation's, or go on with it; ValueError where it holds one with other settings."""
    free = "out baseline grade ask image explain row masks compare protocol rollout_batch".split()
    settings = {k: v for k, v in dataclasses.asdict(config).items() if k not in free}
    for name in ("model", "data", "benchmarks"):  # the same name, but other files?
        path = Path(getattr(config, name)).expanduser()
        files = [f for f in (sorted(path.glob("*")) if path.is_dir() else [path]) if f.is_file()]
        settings[f"files of {name}"] = [
            [f.name, f.stat().st_size, f.stat().st_mtime] for f in files
        ]
    out.mkdir(parents=True, exist_ok=True)
    file = out / "evaluation.json"
    if not file.exists() and (others := sorted(p.name for p in out.glob("*.json*"))):
        raise ValueError(f"--out {out} holds {others[0]} and no evaluation: choose another folder")
    saved = json.loads(file.read_text()) if file.exists() else settings
    if changed := [
        f"{name} {str(saved.get(name))[:60]}"
        for name in settings
        if settings[name] != saved.get(name)
    ]:
        raise ValueError(
            f"--out {out} holds an evaluation with {', '.join(changed)}: choose another folder"
        )
    file.write_text(json.dumps(settings, indent=1) + "\n")


def load_partial(out: Path, name: str, n: int) -> list[dict]:
    """The records that --out keeps of a set, of questions with all n: what there is after an interruption."""
    found = {}
    for file in (out / f"{name}.jsonl", *(out / "partial" / name).glob("*.jsonl")):
        for line in (
            file.read_text(encoding="utf-8", errors="replace").split("\n") if file.exists() else []
        ):
            with suppress(json.JSONDecodeError):  # a killed run's last line
                record = json.loads(line)
                found[record["row"], record["loop"]] = record
    counts = Counter(row for row, _ in found)
    return [record for (row, _), record in found.items() if counts[row] == n]


def append_partial(out: Path, name: str, rank: int, records: list[dict]) -> None:
    """Append to this rank's part: on the disk before the next question is asked."""
    file = out / "partial" / name / f"{rank}.jsonl"
    file.parent.mkdir(parents=True, exist_ok=True)
    with open(file, "a", encoding="utf-8") as part:
        part.write(
            "\n" + "".join(json.dumps(r, ensure_ascii=False) + "\n" for r in records)
        )  # "\n": after a torn line
        part.flush()
        os.fsync(part.fileno())


def write_predictions(out: Path, name: str, records: list[dict]) -> None:
    """Write NAME.jsonl as PAPO-Eval does, loop after loop over the whole set, idx counting the lines."""
    half = out / f".{name}.half"
    lines = (json.dumps(r | {"idx": i}, ensure_ascii=False) + "\n" for i, r in enumerate(records))
    half.write_text("".join(lines), encoding="utf-8")
    os.replace(half, out / f"{name}.jsonl")
    shutil.rmtree(out / "partial" / name, ignore_errors=True)


def read_predictions(path: Path) -> list[dict]:
    """The records of a file of predictions, evaluate.py's or PAPO-Eval's: dicts with id, prompt, predict and label, all
    but id text. DataError names a line that is none."""
    records = []
    for number, line in enumerate(path.read_text(encoding="utf-8").split("\n"), 1):
        try:
            if line.strip():
                record = {"id": "", "prompt": ""} | json.loads(line)
                records.append(
                    record | {"predict": str(record["predict"]), "label": str(record["label"])}
                )
        except (ValueError, TypeError, KeyError) as error:
            raise DataError(
                f"{path}: line {number} is no prediction ({type(error).__name__}: {error})"
            ) from error
    return records
