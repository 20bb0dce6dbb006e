"""Save, resume, export.

A checkpoint is runs/NAME/checkpoints/step_NNNNNN/: weights and optimiser state in shards (torch.distributed.checkpoint,
so another number of ranks can load it) and state.json (step, data position, counters). It is written to a folder whose
name begins with a dot and renamed when every rank is done, so whatever is called step_NNNNNN is whole.

There is no random state to save: every draw of a run is seeded by what it is for (papo.seeded).
"""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path

import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_model_state_dict,
    get_state_dict,
    set_state_dict,
)
from transformers.utils import cached_file

# What a processor is loaded from: copied as it is, so that the export loads with AutoProcessor.
PROCESSOR_FILES = (
    "generation_config.json", "preprocessor_config.json", "video_preprocessor_config.json", "processor_config.json",
    "chat_template.json", "chat_template.jinja", "tokenizer.json", "tokenizer_config.json", "special_tokens_map.json",
    "added_tokens.json", "vocab.json", "merges.txt",
)  # fmt: skip


def complete(folder: Path) -> list[Path]:
    """The whole checkpoints of a run, oldest first."""
    return sorted(p for p in (Path(folder) / "checkpoints").glob("step_[0-9]*") if (p / "state.json").is_file())


def save(folder: Path, model, optimizer, state: dict, keep: int) -> Path:
    """Checkpoint of the step in state["step"]; all ranks call it. The `keep` newest stay, older ones are deleted.

    OSError where the disk is full or the folder cannot be written: what stood there before is untouched.
    """
    place = Path(folder) / "checkpoints" / f"step_{state['step']:06d}"
    aside = place.with_name("." + place.name)
    if place.exists():
        return place
    weights, moments = get_state_dict(model, optimizer)
    dcp.save({"model": weights, "optimizer": moments}, checkpoint_id=aside)
    if dist.get_rank() == 0:
        (aside / "state.json").write_text(json.dumps(state))
        os.replace(aside, place)
        for old in complete(folder)[:-keep]:
            shutil.rmtree(old)
    dist.barrier()
    return place


def load(place: Path, model, optimizer) -> dict:
    """Weights and moments of a checkpoint into model and optimiser, on any number of ranks; returns its state."""
    weights, moments = get_state_dict(model, optimizer)
    dcp.load({"model": weights, "optimizer": moments}, checkpoint_id=place)
    set_state_dict(model, optimizer, model_state_dict=weights, optim_state_dict=moments)
    return json.loads((Path(place) / "state.json").read_text())


def export(model, source: str, folder: Path, dtype) -> Path:
    """The weights as a plain Hugging Face folder in `dtype`; all ranks call it. `source` gave the processor files."""
    folder = Path(folder)
    weights = get_model_state_dict(model, options=StateDictOptions(full_state_dict=True, cpu_offload=True))
    if dist.get_rank() == 0:
        aside = folder.with_name("." + folder.name)
        shutil.rmtree(aside, ignore_errors=True)
        weights = {name: tensor.to(dtype) for name, tensor in weights.items()}
        if model.lm_head.weight is model.get_input_embeddings().weight:
            weights.pop("lm_head.weight", None)  # the embedding is the head: stored once, tied again on loading
        before, model.config.dtype = model.config.dtype, dtype
        model.save_pretrained(aside, state_dict=weights)
        model.config.dtype = before
        for name in PROCESSOR_FILES:
            if found := cached_file(source, name, _raise_exceptions_for_missing_entries=False):
                shutil.copyfile(found, aside / name)
        if folder.exists():
            shutil.rmtree(folder)
        os.replace(aside, folder)
    if dist.is_initialized():
        dist.barrier()
    return folder
