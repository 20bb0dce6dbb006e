"""A run's folder: config, metrics, samples."""

from __future__ import annotations

import json
import os
import sys
from contextlib import suppress
from pathlib import Path

from support.checkpoint import clean, write_whole


def begin(folder: Path, config: dict, step: int) -> list[dict]:
    """Make a run's folder, or take it up again behind `step`; returns the lines of metrics that stay."""
    folder.mkdir(parents=True, exist_ok=True)
    clean(folder)
    write_whole(folder / "config.json", json.dumps(config, indent=1) + "\n")
    rewind(folder / "samples.jsonl", step)
    return rewind(folder / "metrics.jsonl", step)


def append(path: Path, lines: list[str]) -> list[str]:
    """Append lines to a file; returns those still to be written. A full disk costs a warning, not the run."""
    size = path.stat().st_size if path.exists() else 0
    try:
        with open(path, "a") as file:
            file.write("".join(lines))
        return []
    except OSError as error:
        print(f"{path.name}: {len(lines)} lines wait to be written: {error}", file=sys.stderr)
        with suppress(OSError):
            os.truncate(path, size)  # no half line
        return lines


def rewind(path: Path, step: int) -> list[dict]:
    """Drop the lines of a JSON-lines file behind `step`, whose steps will be taken again, and half a line; the rest."""
    kept: list[dict] = []
    if not path.exists():
        return kept
    for text in path.read_text(errors="replace").splitlines():
        with suppress(json.JSONDecodeError):
            kept += [line for line in [json.loads(text)] if line["step"] <= step]
    write_whole(path, "".join(json.dumps(line) + "\n" for line in kept))
    return kept
