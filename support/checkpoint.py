"""Join the ranks, shard, save, resume, export; and what a run takes of disk and memory.

A checkpoint is runs/NAME/checkpoints/step_NNNNNN/: weights and optimiser state in shards (torch.distributed.checkpoint,
so another number of ranks can load it) and state.json (step, data position). It is written to a folder whose name
begins with a dot and renamed when every rank is done; an old one is renamed back before it is deleted. So whatever is
called step_NNNNNN is whole, and a run killed at any moment goes on from the newest of them.

There is no random state to save: every draw of a run is seeded by what it is for (papo.seeded).

    from checkpoint import complete; print(complete("runs/papo_g-toy-s0"))
"""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path

import torch.distributed.checkpoint as dcp
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_model_state_dict,
    get_state_dict,
    set_state_dict,
)
from transformers.utils import cached_file

from support.distributed import on_first_rank

# What a processor is loaded from: copied as it is, so that the export loads with AutoProcessor.
PROCESSOR_FILES = (
    "generation_config.json", "preprocessor_config.json", "video_preprocessor_config.json", "processor_config.json",
    "chat_template.json", "chat_template.jinja", "tokenizer.json", "tokenizer_config.json", "special_tokens_map.json",
    "added_tokens.json", "vocab.json", "merges.txt",
)  # fmt: skip


def first_failure(error: dcp.api.CheckpointException) -> OSError:
    """The first rank's failure in a collective save or load as one line; anything but trouble with files is raised."""
    rank, (cause, _) = sorted(error.failures.items())[0]
    if not isinstance(
        cause, (OSError, RuntimeError, EOFError)
    ):  # torch's writers turn some OSErrors to RuntimeErrors
        raise error
    return OSError(f"rank {rank}: {' '.join(f'{type(cause).__name__}: {cause}'.split())[:300]}")


def write_whole(path: Path, text: str) -> None:
    """A file that is the old or the new one, whenever the process is killed."""
    aside = path.with_name(f".{path.name}")
    aside.write_text(text)
    os.replace(aside, path)


def complete(folder: Path) -> list[Path]:
    """The whole checkpoints of a run, oldest first."""
    return sorted(
        p
        for p in (Path(folder) / "checkpoints").glob("step_[0-9]*")
        if (p / "state.json").is_file()
    )


def clean(folder: Path) -> None:
    """Delete what a save or a deletion that was cut short has left."""
    for rest in (Path(folder) / "checkpoints").glob(".step_*"):
        shutil.rmtree(rest, ignore_errors=True)


def state_dicts(model, optimizer) -> tuple[dict, dict]:
    """The state dicts. torch fills an optimiser that has taken no step yet by a step of nothing: it must not count."""
    fresh = not optimizer.state
    weights, moments = get_state_dict(model, optimizer)
    for state in optimizer.state.values() if fresh else ():
        state["step"].zero_()  # AdamW's bias correction goes by it
    return weights, moments


def save(folder: Path, model, optimizer, state: dict, keep: int) -> Path:
    """Checkpoint of the step in state["step"]; all ranks call it. The `keep` newest stay, older ones are deleted.

    OSError, the same on all ranks, where any of them cannot write (a full disk): what stood there is untouched.
    """
    place = Path(folder) / "checkpoints" / f"step_{state['step']:06d}"
    aside = place.with_name("." + place.name)
    if on_first_rank(lambda: clean(folder) or place.exists()):
        return place
    weights, moments = state_dicts(model, optimizer)

    def finish() -> None:
        write_whole(aside / "state.json", json.dumps(state))
        os.replace(aside, place)
        for old in complete(folder)[:-keep]:
            os.replace(old, old.with_name("." + old.name))
        clean(folder)

    try:
        dcp.save(
            {"model": weights, "optimizer": moments}, checkpoint_id=aside
        )  # fails on all ranks or on none
        on_first_rank(finish)
    except (OSError, dcp.api.CheckpointException) as error:
        on_first_rank(lambda: clean(folder))
        raise (error if isinstance(error, OSError) else first_failure(error)) from None
    return place


def load(place: Path, model, optimizer) -> dict:
    """Weights and moments of a checkpoint into model and optimiser, on any number of ranks; returns its state.

    OSError where its files are damaged.
    """
    weights, moments = state_dicts(model, optimizer)
    try:
        dcp.load({"model": weights, "optimizer": moments}, checkpoint_id=place)
    except dcp.api.CheckpointException as error:
        problem = f"{place} cannot be read: delete it to resume from the one before; {first_failure(error)}"
        raise OSError(problem) from error
    set_state_dict(model, optimizer, model_state_dict=weights, optim_state_dict=moments)
    return json.loads((Path(place) / "state.json").read_text())


def export(model, source: str, folder: Path, dtype) -> Path:
    """The weights as a plain Hugging Face folder in `dtype`; all ranks call it. `source` gave the processor files.

    OSError, the same on all ranks, where it cannot be written.
    """
    folder = Path(folder)
    aside = folder.with_name("." + folder.name)
    weights = get_model_state_dict(
        model, options=StateDictOptions(full_state_dict=True, cpu_offload=True)
    )

    def write() -> None:
        shutil.rmtree(aside, ignore_errors=True)
        parts = {name: tensor.to(dtype) for name, tensor in weights.items()}
        if model.lm_head.weight is model.get_input_embeddings().weight:
            parts.pop(
                "lm_head.weight", None
            )  # the embedding is the head: stored once, tied again on loading
        before, model.config.dtype = model.config.dtype, dtype
        model.save_pretrained(aside, state_dict=parts)
        model.config.dtype = before
        for name in PROCESSOR_FILES:
            if found := cached_file(source, name, _raise_exceptions_for_missing_entries=False):
                shutil.copyfile(found, aside / name)
        if folder.exists():
            shutil.rmtree(folder)
        os.replace(aside, folder)

    on_first_rank(write)
    return folder
