"""Save, resume and export.

A checkpoint is checkpoints/step_NNNNNN/ in a run's folder: weights, optimizer state, step and data
position in shards (torch.distributed.checkpoint), which another number of ranks can load. Its
.metadata is written last and deleted first, so a folder that has one is complete, and a run killed
at any moment resumes from the newest.

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
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_state_dict, set_state_dict
from torch.distributed.tensor import DTensor
from transformers.utils import cached_file

from support.distributed import from_first_rank
from support.lora import adapted_layers

# Copied to the export unchanged: what AutoProcessor reads, and a toy model's task.
COPIED_FILES = """task.json generation_config.json preprocessor_config.json processor_config.json
video_preprocessor_config.json chat_template.json chat_template.jinja tokenizer.json vocab.json
merges.txt tokenizer_config.json special_tokens_map.json added_tokens.json""".split()


def complete(folder: Path) -> list[Path]:
    """The complete checkpoints of a run, oldest first."""
    return sorted(path.parent for path in folder.glob("checkpoints/step_*/.metadata"))


def clean(folder: Path, keep: int) -> None:
    """Delete all but the `keep` newest checkpoints, and what an interrupted save has left."""
    for old in complete(folder)[:-keep]:
        (old / ".metadata").unlink()
    for path in folder.glob("checkpoints/step_*"):
        if not (path / ".metadata").exists():
            shutil.rmtree(path, ignore_errors=True)


def save(folder: Path, model, optimizer, state: dict, keep: int) -> None:
    """Save the checkpoint of state["step"] and delete all but the `keep` newest; all ranks call it.

    Does nothing if that checkpoint exists. OSError, the same on all ranks, if any of them cannot
    write; earlier checkpoints are untouched then.
    """
    checkpoint_dir = folder / "checkpoints" / f"step_{state['step']:06d}"
    if from_first_rank((checkpoint_dir / ".metadata").exists):
        return
    content = state_dicts(model, optimizer) | {"state": state}
    try:
        dcp.save(content, checkpoint_id=checkpoint_dir)  # fails on all ranks or on none
    except dcp.api.CheckpointException as error:  # which is no Exception
        raise OSError(str(error).strip().splitlines()[-1]) from error
    finally:
        from_first_rank(lambda: clean(folder, keep))


def disk_line(folder: Path, model, keep: int) -> str:
    """The size of a run's checkpoints, as `save` keeps them, beside the room for them."""
    frozen = 0 if adapted_layers(model) else 4  # bytes; a trained weight has two moments, too
    size = sum(p.numel() * (12 if p.requires_grad else frozen) for p in model.parameters())
    each, free = size / 2**30, shutil.disk_usage(folder).free / 2**30
    need = (keep + 1) * each
    line = (
        f"checkpoints: {each:.3g} GiB each, up to {need:.3g} GiB with --keep {keep} while one is "
        f"saved; {free:.3g} GiB free in {folder}"
    )
    return line if need <= free else f"{line}: NOT ENOUGH"


def load(checkpoint_dir: Path, model, optimizer) -> dict:
    """Load weights and optimizer state, on any number of ranks; returns the saved state.

    OSError if the files are damaged.
    """
    content = state_dicts(model, optimizer) | {"state": {"step": 0, "position": 0}}
    try:
        dcp.load(content, checkpoint_id=checkpoint_dir)
    except dcp.api.CheckpointException as error:
        raise OSError(
            f"{checkpoint_dir} cannot be read: delete it to resume from the one before"
        ) from error
    states = {"model_state_dict": content["model"], "optim_state_dict": content["optimizer"]}
    set_state_dict(model, optimizer, **states, options=state_options(model))
    return content["state"]


def state_dicts(model, optimizer) -> dict:
    """State dicts of model and optimizer.

    torch fills an optimizer that has taken no step by taking an empty one, and leaves its counter
    at 1. AdamW's bias correction goes by that counter, so it is set back.
    """
    untouched = not optimizer.state
    weights, moments = get_state_dict(model, optimizer, options=state_options(model))
    if untouched:
        for state in optimizer.state.values():
            state["step"].zero_()
    return {"model": weights, "optimizer": moments}


def state_options(model) -> StateDictOptions:
    """With adapters, only they are saved: the source has the frozen weights."""
    has_adapters = bool(adapted_layers(model))
    return StateDictOptions(ignore_frozen_params=has_adapters, strict=not has_adapters)


def export(model, source: str, folder: Path, dtype) -> None:
    """Write the weights in `dtype` as a plain Hugging Face folder; all ranks call it.

    `source`: the folder or hub id that config.json and the processor files are copied from.
    OSError, the same on all ranks, if it cannot be written.
    """
    weights = gather_weights(model, dtype)

    def write() -> None:
        partial_dir = folder.with_name(f".{folder.name}")
        shutil.rmtree(partial_dir, ignore_errors=True)
        try:
            model.save_pretrained(partial_dir, state_dict=weights)
        except SafetensorError as error:  # a full disk, say
            raise OSError(str(error)) from error
        for name in COPIED_FILES:
            if path := cached_file(source, name, _raise_exceptions_for_missing_entries=False):
                shutil.copyfile(path, partial_dir / name)
        # The source's own, which older transformers and vLLM can read.
        config = json.loads(Path(cached_file(source, "config.json")).read_text())
        config["dtype" if "dtype" in config else "torch_dtype"] = str(dtype).removeprefix("torch.")
        (partial_dir / "config.json").write_text(json.dumps(config, indent=2) + "\n")
        shutil.rmtree(folder, ignore_errors=True)
        os.replace(partial_dir, folder)

    from_first_rank(write)


@torch.no_grad()
def gather_weights(model, dtype) -> dict[str, torch.Tensor]:
    """The whole weights in `dtype` in host memory: on the first rank, {} on the others.

    All ranks call it. They gather one tensor at a time, and nothing keeps its fp32 values. Adapters
    are merged into the weights that they belong to.
    """
    adapted = {f"{name}.base_layer.weight": layer for name, layer in adapted_layers(model).items()}
    is_tied = model.lm_head.weight is model.get_input_embeddings().weight
    weights = {}
    for name, tensor in model.state_dict().items():
        if "lora_" in name or (is_tied and name == "lm_head.weight"):
            continue  # merged; stored once, tied again on loading
        if isinstance(tensor, DTensor):
            tensor = tensor.full_tensor()
        if name in adapted:
            tensor = tensor.float() + adapted[name].get_delta_weight("default")  # W + s B A
        if dist.get_rank() == 0:
            name = name.replace(".base_layer", "")
            weights[name] = tensor.to(device="cpu", dtype=dtype)
    return weights


def write_atomically(path: Path, text: str) -> None:
    """Replace a file: whenever the process is killed, it holds the old or the new text."""
    partial = path.with_name(f".{path.name}")
    partial.write_text(text)
    os.replace(partial, path)
