"""Save, resume and export.

A checkpoint is checkpoints/step_NNNNNN/ in a run's folder: weights and optimizer state in shards
(torch.distributed.checkpoint, so another number of ranks can load it), and state.json (step, data
position). It is written under a name that begins with a dot and renamed once every rank is done;
an old one gets a dot again before it is deleted. So whatever is called step_NNNNNN is complete, and
a run killed at any moment resumes from the newest.

There is no random state to save: every random number is seeded by its purpose (batch.seeded).
"""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from safetensors import SafetensorError
from torch.distributed.checkpoint.state_dict import get_state_dict, set_state_dict
from torch.distributed.tensor import DTensor
from transformers.utils import cached_file

from support.distributed import on_first_rank

# Copied to the export unchanged: what AutoProcessor reads, and a toy model's task.
COPIED_FILES = (
    "task.json",
    "generation_config.json",
    "preprocessor_config.json",
    "video_preprocessor_config.json",
    "processor_config.json",
    "chat_template.json",
    "chat_template.jinja",
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.json",
    "merges.txt",
)


# -------------------------------------------------------------------------------------- checkpoints


def complete(folder: Path) -> list[Path]:
    """The complete checkpoints of a run, oldest first."""
    named = (Path(folder) / "checkpoints").glob("step_[0-9]*")
    return sorted(path for path in named if (path / "state.json").is_file())


def clean(folder: Path) -> None:
    """Delete what an interrupted save or deletion has left."""
    for leftover in (Path(folder) / "checkpoints").glob(".step_*"):
        shutil.rmtree(leftover, ignore_errors=True)


def save(folder: Path, model, optimizer, state: dict, keep: int) -> Path:
    """Save the checkpoint of state["step"] and delete all but the `keep` newest; all ranks call it.

    Does nothing if that checkpoint exists. OSError, the same on all ranks, if any of them cannot
    write; earlier checkpoints are untouched then.
    """
    checkpoint_dir = Path(folder) / "checkpoints" / f"step_{state['step']:06d}"
    partial_dir = _hidden(checkpoint_dir)

    def already_saved() -> bool:
        clean(folder)
        return checkpoint_dir.exists()

    def publish() -> None:
        write_atomically(partial_dir / "state.json", json.dumps(state))
        os.replace(partial_dir, checkpoint_dir)
        for old in complete(folder)[:-keep]:
            os.replace(old, _hidden(old))
        clean(folder)

    if on_first_rank(already_saved):
        return checkpoint_dir
    weights, optimizer_state = state_dicts(model, optimizer)
    content = {"model": weights, "optimizer": optimizer_state}
    try:
        dcp.save(content, checkpoint_id=partial_dir)  # fails on all ranks or on none
        on_first_rank(publish)
    except OSError:
        on_first_rank(lambda: clean(folder))
        raise
    except dcp.api.CheckpointException as error:
        on_first_rank(lambda: clean(folder))
        if not _is_about_files(error):
            raise
        raise _first_failure(error) from None
    return checkpoint_dir


def load(checkpoint_dir: Path, model, optimizer) -> dict:
    """Load weights and optimizer state, on any number of ranks; returns the saved state.

    OSError if the files are damaged.
    """
    weights, optimizer_state = state_dicts(model, optimizer)
    content = {"model": weights, "optimizer": optimizer_state}
    try:
        dcp.load(content, checkpoint_id=checkpoint_dir)
        state = json.loads((Path(checkpoint_dir) / "state.json").read_text())
    except (dcp.api.CheckpointException, ValueError) as error:
        cause = error
        if isinstance(error, dcp.api.CheckpointException):
            cause = _first_failure(error)
        advice = "delete it to resume from the one before"
        raise OSError(f"{checkpoint_dir} cannot be read: {advice}; {cause}") from error
    set_state_dict(model, optimizer, model_state_dict=weights, optim_state_dict=optimizer_state)
    return state


def state_dicts(model, optimizer) -> tuple[dict, dict]:
    """State dicts of model and optimizer.

    torch fills an optimizer that has taken no step by taking an empty one, and leaves its counter
    at 1. AdamW's bias correction goes by that counter, so it is set back.
    """
    untouched = not optimizer.state
    weights, optimizer_state = get_state_dict(model, optimizer)
    if untouched:
        for state in optimizer.state.values():
            state["step"].zero_()
    return weights, optimizer_state


# ------------------------------------------------------------------------------------------- export


def export(model, source: str, folder: Path, dtype) -> Path:
    """Write the weights in `dtype` as a plain Hugging Face folder; all ranks call it.

    `source`: the folder or hub id that the processor files are copied from. OSError, the same on
    all ranks, if it cannot be written.
    """
    folder = Path(folder)
    weights = gather_weights(model, dtype)

    def write() -> None:
        partial_dir = _hidden(folder)
        shutil.rmtree(partial_dir, ignore_errors=True)
        original_dtype = model.config.dtype
        model.config.dtype = dtype
        try:
            model.save_pretrained(partial_dir, state_dict=weights)
        except SafetensorError as error:  # a full disk, say
            raise OSError(str(error)) from error
        finally:
            model.config.dtype = original_dtype
        for name in COPIED_FILES:
            path = cached_file(source, name, _raise_exceptions_for_missing_entries=False)
            if path:
                shutil.copyfile(path, partial_dir / name)
        if folder.exists():
            shutil.rmtree(folder)
        os.replace(partial_dir, folder)

    on_first_rank(write)
    return folder


@torch.no_grad()
def gather_weights(model, dtype) -> dict[str, torch.Tensor]:
    """The whole weights in `dtype` in host memory: on the first rank, {} on the others.

    All ranks call it. They gather one tensor at a time, and nothing keeps its fp32 values.
    """
    is_tied = model.lm_head.weight is model.get_input_embeddings().weight
    weights = {}
    for name, tensor in model.state_dict().items():
        if is_tied and name == "lm_head.weight":
            continue  # stored once, tied again on loading
        if isinstance(tensor, DTensor):
            tensor = tensor.full_tensor()
        if dist.get_rank() == 0:
            weights[name] = tensor.to(device="cpu", dtype=dtype)
    return weights


# ------------------------------------------------------------------------------------------ helpers


def write_atomically(path: Path, text: str) -> None:
    """Replace a file: whenever the process is killed, it holds the old or the new text."""
    partial = _hidden(path)
    partial.write_text(text)
    os.replace(partial, path)


def _hidden(path: Path) -> Path:
    return path.with_name(f".{path.name}")


def _is_about_files(error: dcp.api.CheckpointException) -> bool:
    causes = [cause for cause, _ in error.failures.values()]
    return isinstance(causes[0], (OSError, RuntimeError, EOFError))  # torch wraps some OSErrors


def _first_failure(error: dcp.api.CheckpointException) -> OSError:
    """The first rank's failure as one line."""
    rank, (cause, _) = sorted(error.failures.items())[0]
    text = " ".join(f"{type(cause).__name__}: {cause}".split())
    return OSError(f"rank {rank}: {text[:300]}")
