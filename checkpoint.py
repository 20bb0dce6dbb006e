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
import sys
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from datetime import timedelta
from pathlib import Path

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_model_state_dict,
    get_state_dict,
    set_state_dict,
)
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard, register_fsdp_forward_method
from torch.distributed.tensor import DTensor
from transformers.utils import cached_file

# What a processor is loaded from: copied as it is, so that the export loads with AutoProcessor.
PROCESSOR_FILES = (
    "generation_config.json", "preprocessor_config.json", "video_preprocessor_config.json", "processor_config.json",
    "chat_template.json", "chat_template.jinja", "tokenizer.json", "tokenizer_config.json", "special_tokens_map.json",
    "added_tokens.json", "vocab.json", "merges.txt",
)  # fmt: skip


GIB = 2**30
PREFILL_TOKENS = 32_768  # rollout's, which imports more than this file may

# ------------------------------------------------------------------------------------------------------ all the ranks


def distributed() -> tuple[int, int, torch.device]:
    """(rank, world size, device) of this process; joins the process group torchrun describes, or one of its own."""
    cuda = torch.cuda.is_available()
    device = torch.device("cuda", int(os.environ.get("LOCAL_RANK", "0"))) if cuda else torch.device("cpu")
    if cuda:
        torch.cuda.set_device(device)
    alone = {} if "RANK" in os.environ else dict(store=dist.HashStore(), rank=0, world_size=1)  # plain python
    # A dead rank is torchrun's to notice; a slow one, with the longest responses of an evaluation, is waited for.
    dist.init_process_group("cpu:gloo,cuda:nccl" if cuda else "gloo", timeout=timedelta(hours=4), **alone)
    return dist.get_rank(), dist.get_world_size(), device


def on_first_rank(task: Callable):
    """What `task()` returns on the first rank, told to all; its OSError is raised on all. All ranks call it."""
    told: list = [None, None]
    if not dist.is_initialized() or dist.get_rank() == 0:
        try:
            told[0] = task()
        except OSError as error:
            told[1] = str(error)
    if dist.is_initialized():
        dist.broadcast_object_list(told)
    if told[1] is not None:
        raise OSError(told[1])
    return told[0]


@contextmanager
def in_turn() -> Iterator[None]:
    """The ranks of each machine run the block one after the other. All ranks enter it."""
    rank, ranks = (int(os.environ.get(name, default)) for name, default in (("LOCAL_RANK", 0), ("LOCAL_WORLD_SIZE", 1)))
    most = [None] * dist.get_world_size()
    dist.all_gather_object(most, ranks)
    for _ in range(rank):
        dist.barrier()
    try:
        yield
    finally:  # a rank that fails lets the others go on to their own error
        for _ in range(max(most) - rank):
            dist.barrier()


def first_failure(error: dcp.api.CheckpointException) -> OSError:
    """The first rank's failure in a collective save or load as one line; anything but trouble with files is raised."""
    rank, (cause, _) = sorted(error.failures.items())[0]
    if not isinstance(cause, (OSError, RuntimeError, EOFError)):  # torch's writers turn some OSErrors to RuntimeErrors
        raise error
    return OSError(f"rank {rank}: {' '.join(f'{type(cause).__name__}: {cause}'.split())[:300]}")


def write_whole(path: Path, text: str) -> None:
    """A file that is the old or the new one, whenever the process is killed."""
    aside = path.with_name(f".{path.name}")
    aside.write_text(text)
    os.replace(aside, path)


# ------------------------------------------------------------------------------------------------------- checkpoints


def complete(folder: Path) -> list[Path]:
    """The whole checkpoints of a run, oldest first."""
    return sorted(p for p in (Path(folder) / "checkpoints").glob("step_[0-9]*") if (p / "state.json").is_file())


def clean(folder: Path) -> None:
    """Delete what a save or a deletion that was cut short has left."""
    for rest in (Path(folder) / "checkpoints").glob(".step_*"):
        shutil.rmtree(rest, ignore_errors=True)


def both_states(model, optimizer) -> tuple[dict, dict]:
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
    weights, moments = both_states(model, optimizer)

    def finish() -> None:
        write_whole(aside / "state.json", json.dumps(state))
        os.replace(aside, place)
        for old in complete(folder)[:-keep]:
            os.replace(old, old.with_name("." + old.name))
        clean(folder)

    try:
        dcp.save({"model": weights, "optimizer": moments}, checkpoint_id=aside)  # fails on all ranks or on none
        on_first_rank(finish)
    except (OSError, dcp.api.CheckpointException) as error:
        on_first_rank(lambda: clean(folder))
        raise (error if isinstance(error, OSError) else first_failure(error)) from None
    return place


def load(place: Path, model, optimizer) -> dict:
    """Weights and moments of a checkpoint into model and optimiser, on any number of ranks; returns its state.

    OSError where its files are damaged.
    """
    weights, moments = both_states(model, optimizer)
    try:
        dcp.load({"model": weights, "optimizer": moments}, checkpoint_id=place)
    except dcp.api.CheckpointException as error:
        problem = f"{place} cannot be read: delete it to resume from the one before; {first_failure(error)}"
        raise OSError(problem) from error
    set_state_dict(model, optimizer, model_state_dict=weights, optim_state_dict=moments)
    return json.loads((Path(place) / "state.json").read_text())


# ---------------------------------------------------------------------------------------------------- a run's folder


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


# ------------------------------------------------------------------------------------------------------------ export


def export(model, source: str, folder: Path, dtype) -> Path:
    """The weights as a plain Hugging Face folder in `dtype`; all ranks call it. `source` gave the processor files.

    OSError, the same on all ranks, where it cannot be written.
    """
    folder = Path(folder)
    aside = folder.with_name("." + folder.name)
    weights = get_model_state_dict(model, options=StateDictOptions(full_state_dict=True, cpu_offload=True))

    def write() -> None:
        shutil.rmtree(aside, ignore_errors=True)
        parts = {name: tensor.to(dtype) for name, tensor in weights.items()}
        if model.lm_head.weight is model.get_input_embeddings().weight:
            parts.pop("lm_head.weight", None)  # the embedding is the head: stored once, tied again on loading
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


# --------------------------------------------------------------------------------------------------- what a run takes


def units(model) -> list:
    """The blocks that are sharded and gathered one at a time; the rest (embeddings, head) is the root's."""
    return [*model.model.visual.blocks, *model.model.language_model.layers]


def shard(model, mesh, dtype: torch.dtype) -> None:
    """FSDP2 in place: each vision block and decoder layer is one unit, the rest (embeddings, head) the root."""
    precision = MixedPrecisionPolicy(param_dtype=dtype, reduce_dtype=torch.float32)
    for block in units(model):
        fully_shard(block, mesh=mesh, mp_policy=precision)
    fully_shard(model, mesh=mesh, mp_policy=precision)
    register_fsdp_forward_method(model, "row_log_probs")


@contextmanager
def parked(optimizer, on: bool = True) -> Iterator[None]:
    """The optimiser's moments wait in host memory while the block samples; their device memory is given back.

    The tensors stay where they are and lose their storage for a while, as FSDP does with gathered weights.
    """
    tensors = [t for state in optimizer.state.values() for t in state.values() if on and isinstance(t, torch.Tensor)]
    storages = [(t.to_local() if isinstance(t, DTensor) else t).untyped_storage() for t in tensors]
    copies = [storage.clone() if storage.device.type == "cpu" else storage.cpu() for storage in storages]
    for storage in storages:
        storage.resize_(0)
    try:
        yield
    finally:
        for storage, copy in zip(storages, copies, strict=True):
            storage.resize_(copy.nbytes())
            storage.copy_(copy)


def disk_line(folder: Path, model, keep: int) -> str:
    """One line: the size of a checkpoint (fp32 weights, two moments of what is trained) and the room there is."""
    size = sum(4 * w.numel() for w in model.state_dict().values())
    size += sum(8 * w.numel() for w in model.parameters() if w.requires_grad)
    need, free = (keep + 1) * size, shutil.disk_usage(folder).free
    line = f"checkpoints: {size / GIB:.3g} GiB each, up to {need / GIB:.3g} GiB with --keep {keep} while one is saved"
    return f"{line}; {free / GIB:.3g} GiB free in {folder}" + (": NOT ENOUGH" if free < need else "")


def memory_table(
    model, world: int, reference: bool, group_size: int, tokens_per_forward: int, rollout_batch: int,
    max_prompt_tokens: int, max_new_tokens: int, offload_optimizer: bool = False, length: float = 1.0,
) -> dict[str, float]:  # fmt: skip
    """Bytes on each of `world` CUDA devices: what stays, what sampling adds, what an update adds, and the two peaks.

    model: with its requires_grad flags set; sharded or not, or on the meta device. reference: whether there is one.
    offload_optimizer: the moments are away while sampling. length: the share of the longest prompts and responses to
    reckon with. Parameters are counted, the shapes of caches and stored layer inputs follow from the config; what one
    layer holds while it runs, and the logits, are estimates (marked ~). The allocator's fragments and CUDA's own
    gigabyte come on top.
    """
    text, vision = model.config.get_text_config(), model.config.vision_config
    sizes = [sum(p.numel() for p in block.parameters()) for block in units(model)]
    total = sum(p.numel() for p in model.parameters())
    trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
    root = total - sum(sizes)
    head_dim = getattr(text, "head_dim", None) or text.hidden_size // text.num_attention_heads
    prompt, response = length * max_prompt_tokens, length * max_new_tokens
    inside = 2 * (6 * text.hidden_size + 4 * text.intermediate_size)  # of a layer, bytes a token
    patches = vision.spatial_merge_size**2 * tokens_per_forward / 2  # half of a row is pictures
    table = {
        "parameters, fp32, sharded": 4 * total / world,
        "AdamW's moments, fp32, sharded": 8 * trained / world,
        "reference model, bf16, sharded": 2 * total / world * reference,
        "sampling: whole weights, bf16": 2 * total,
        "sampling: key-value cache": 4 * rollout_batch * (prompt + response) * text.num_hidden_layers
        * text.num_key_value_heads * head_dim,
        "sampling: ~logits": 40 * rollout_batch * text.vocab_size,
        "sampling: ~encoding prompts": min(rollout_batch / group_size * prompt, PREFILL_TOKENS) * inside,
        "update: gradients, fp32, sharded": 4 * trained / world,
        "update: embeddings and head, bf16, whole, and their gradients": 8 * root,
        "update: two layers, bf16, whole, and their gradients": 2 * 8 * max(sizes),
        "update: layer inputs, bf16": 2 * (tokens_per_forward * text.num_hidden_layers * text.hidden_size
                                           + patches * vision.depth * vision.hidden_size),
        "update: ~inside a layer, and logits": 2 * tokens_per_forward * inside + 12 * 256 * text.vocab_size,
    }  # fmt: skip
    kinds = {kind: [v for k, v in table.items() if k.startswith(kind)] for kind in ("sampling", "update")}
    stays = sum(table.values()) - sum(map(sum, kinds.values()))
    whole, cache, logits, encoding = kinds["sampling"]  # the cache is fanned out once the prompts are encoded
    away = offload_optimizer * table["AdamW's moments, fp32, sharded"]
    table["PEAK of sampling"] = stays - away + whole + max(cache + logits, encoding + cache / group_size)
    table["PEAK of an update"] = stays + sum(kinds["update"])
    return table


def what_it_takes(folder: Path, model, config, world: int, reference: bool, device) -> str:
    """disk_line and, on CUDA, the memory table for usual and for greatest lengths. config: train.Config."""
    lines = [disk_line(folder, model, config.keep)]
    if device.type == "cuda":
        names = ("group_size", "tokens_per_forward", "rollout_batch", "max_prompt_tokens", "max_new_tokens",
                 "offload_optimizer")  # fmt: skip
        flags = {name: getattr(config, name) for name in names}
        usual, most = (memory_table(model, world, reference, **flags, length=share) for share in (0.3, 1.0))
        capacity = torch.cuda.get_device_properties(device).total_memory / GIB
        lines.append(f"{'GiB a device, estimated':<62} {'usual':>7} {'at most':>7}   of {capacity:.1f}")
        lines += [f"{name:<62} {usual[name] / GIB:>7.1f} {most[name] / GIB:>7.1f}" for name in most]
    return "\n".join(lines)


# Which of our functions an error came through -> what was going on, and what to turn. The innermost decides.
PHASES = {
    "_load": "loading: more ranks, or a smaller model",
    "generate": "sampling: lower --rollout_batch (or --max_new_tokens, --max_pixels), or --offload_optimizer",
    "prepare": "log-probs before the update: lower --tokens_per_forward (or --max_pixels)",
    "update": "the update: lower --tokens_per_forward (or --max_pixels); more ranks; --freeze_vision",
    "save": "saving a checkpoint: lower --tokens_per_forward",
    "export": "exporting: --resume the run on more ranks",
}


def out_of_memory(error: BaseException) -> str:
    """One line for an out-of-memory error: in which phase, which flag to turn, and what torch says."""
    names = [frame.name for frame in traceback.extract_tb(error.__traceback__) if frame.name in PHASES]
    phase = PHASES[names[-1]] if names else "setting up"
    return f"out of memory in {phase}. {' '.join(str(error).split())[:300]}"
