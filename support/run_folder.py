"""A run's folder: its name, its lock and its logs, and the loggers outside it.

config.json     every flag, resolved
data.json       checksums of the rows, so that a resumed run notices other data
metrics.jsonl   one line per step, one per evaluation
samples.jsonl   decoded responses of evaluations
NAME.py         a copy of the file that --algo names, if it is one
checkpoints/    see checkpoint.py
curves.png, samples.html, model/, sample0.png    written at the end
.lock           held as long as a process writes here
"""

from __future__ import annotations

import fcntl
import itertools
import json
import os
import secrets
import shutil
import socket
import sys
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from tqdm import tqdm

from support.checkpoint import write_atomically
from support.config import saved_config
from support.distributed import rank


@contextmanager
def survivable(what) -> Iterator[None]:
    """A file that cannot be written, to a full disk say, costs a line and not the run."""
    try:
        yield
    except OSError as error:
        if rank() == 0:
            tqdm.write(f"error: {what} is not written: {error}", file=sys.stderr)


def free_name(config) -> str:
    """runs/ALGO-MODEL-sSEED, or the next free suffix: no existing folder is ever overwritten."""
    name = f"runs/{Path(config.algo).stem}-{Path(config.model).name}-s{config.seed}"
    suffixes = itertools.chain([""], (f"-{i}" for i in itertools.count(2)))
    return next(name + suffix for suffix in suffixes if not Path(name + suffix).exists())


def lock(folder: Path):
    """Claim a run's folder; returns the open lock file. OSError, naming the holder, if it is taken.

    The lock ends with the process however it dies. A killed torchrun leaves its workers alive, and
    they must not write beside the run that replaces them.
    """
    file = open(folder / ".lock", "a+")  # noqa: SIM115  (open as long as the run)
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        file.seek(0)
        holder = file.read().strip() or "another process"
        raise OSError(f"{folder} is in use by {holder}: end it, or choose another folder") from None
    except OSError as error:  # some network file systems have no locks
        print(f"{folder} cannot be locked, let nothing else write there: {error}", file=sys.stderr)
    file.truncate(0)
    file.write(f"process {os.getpid()} on {socket.gethostname()}")
    file.flush()
    return file


def keep_copy(source: Path, folder: Path, resuming: bool) -> None:
    """Copy a file of the user's into a new run; warn where a resumed run meets another version."""
    copy = folder / source.name
    if not resuming or not copy.exists():
        shutil.copy(source, copy)
    elif copy.read_bytes() != source.read_bytes():
        print(f"{source} differs from the run's copy of it, {copy}", file=sys.stderr)


def keep_checksums(folder: Path, checksums: dict[str, int], resuming: bool) -> None:
    """Keep the checksums of a run's data sets. OSError if a resumed run has other rows."""
    file = folder / "data.json"
    before = json.loads(file.read_text()) if resuming and file.exists() else {}
    for name in before.keys() & checksums.keys():
        if before[name] != checksums[name]:
            raise OSError(f"data {name} has changed since the run began: restore it or start anew")
    write_atomically(file, json.dumps(before | checksums, indent=1) + "\n")


def append(path: Path, lines: list[dict]) -> None:
    """Append lines to a log."""
    size = path.stat().st_size if path.exists() else 0
    with survivable(f"a line of {path}"):
        try:
            with open(path, "a") as file:
                file.writelines(json.dumps(line) + "\n" for line in lines)
        except OSError:
            os.truncate(path, size)  # leave no half line
            raise


def read_log(path: Path) -> list[dict]:
    """The lines of a log, without blank or torn ones; none if there is no file."""
    lines: list[dict] = []
    texts = path.read_text(errors="replace").splitlines() if path.exists() else []
    for text in texts:
        with suppress(json.JSONDecodeError):
            lines.append(json.loads(text))
    return lines


def rewind(path: Path, step: int) -> list[dict]:
    """Drop the lines of a log after `step`, and a torn last line; returns the rest."""
    kept = [line for line in read_log(path) if line["step"] <= step]
    if path.exists():
        write_atomically(path, "".join(json.dumps(line) + "\n" for line in kept))
    return kept


# -------------------------------------------------------------------------- --wandb, --tensorboard

# A maker takes the run's folder and returns log(line, samples): a line of metrics.jsonl with its
# step, and the decoded samples of an evaluation. Each package is needed only with its flag.

SAMPLE_COLUMNS = ["set", "row", "prompt", "predict", "label", "accuracy", "format"]


def wandb_logger(folder: Path):
    """Log to Weights & Biases. A resumed run continues its own record. ValueError if that fails."""
    import wandb

    id_file = folder / "wandb_id"
    if not id_file.exists():
        id_file.write_text(secrets.token_hex(6))
    record = {"name": folder.name, "id": id_file.read_text(), "config": saved_config(folder)}
    try:
        wandb.init(project="papo", resume="allow", **record)
    except wandb.Error as error:  # no key, for example
        raise ValueError(f"--wandb: {error}") from error

    def log(line: dict, samples: list[dict]) -> None:
        values = {key: value for key, value in line.items() if key != "step"}
        if samples:
            rows = [[sample[column] for column in SAMPLE_COLUMNS] for sample in samples]
            values["samples"] = wandb.Table(columns=SAMPLE_COLUMNS, data=rows)
        wandb.log(values, step=line["step"])

    return log


def tensorboard_logger(folder: Path):
    """Log to TensorBoard files in the run's folder."""
    from torch.utils.tensorboard import SummaryWriter

    writer = SummaryWriter(folder)

    def log(line: dict, samples: list[dict]) -> None:
        step = line["step"]
        for metric in line.keys() - {"step"}:
            writer.add_scalar(metric, line[metric], step)
        for sample in samples:
            paragraphs = [f"**{column}** {sample[column]}" for column in SAMPLE_COLUMNS]
            writer.add_text(f"{sample['set']}/{sample['row']}", "\n\n".join(paragraphs), step)
        writer.flush()

    return log


LOGGERS = {"wandb": wandb_logger, "tensorboard": tensorboard_logger}  # flag -> maker
