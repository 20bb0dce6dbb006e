"""Loggers outside the run's folder: train.py's --wandb and --tensorboard.

Each maker takes the run's folder and returns a function log(line, samples). `line` is a line of
metrics.jsonl with its step, `samples` are the decoded samples of an evaluation. The packages are
optional and imported only where their flag is set.
"""

from __future__ import annotations

import secrets
from pathlib import Path

from support.config import saved_config

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
