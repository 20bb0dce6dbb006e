"""What a run needs of disk and device memory."""

from __future__ import annotations

import shutil
import traceback
from pathlib import Path

import torch

from support.decoding import PREFILL_TOKENS
from support.distributed import fsdp_blocks

GIB = 2**30


def disk_line(folder: Path, model, keep: int) -> str:
    """One line: the size of a checkpoint (fp32 weights, two moments of what is trained) and the room there is."""
    size = sum(4 * w.numel() for w in model.state_dict().values())
    size += sum(8 * w.numel() for w in model.parameters() if w.requires_grad)
    need, free = (keep + 1) * size, shutil.disk_usage(folder).free
    line = f"checkpoints: {size / GIB:.3g} GiB each, up to {need / GIB:.3g} GiB with --keep {keep} while one is saved"
    return f"{line}; {free / GIB:.3g} GiB free in {folder}" + (
        ": NOT ENOUGH" if free < need else ""
    )


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
    sizes = [sum(p.numel() for p in block.parameters()) for block in fsdp_blocks(model)]
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
    kinds = {
        kind: [v for k, v in table.items() if k.startswith(kind)] for kind in ("sampling", "update")
    }
    stays = sum(table.values()) - sum(map(sum, kinds.values()))
    whole, cache, logits, encoding = kinds[
        "sampling"
    ]  # the cache is fanned out once the prompts are encoded
    away = offload_optimizer * table["AdamW's moments, fp32, sharded"]
    table["PEAK of sampling"] = (
        stays - away + whole + max(cache + logits, encoding + cache / group_size)
    )
    table["PEAK of an update"] = stays + sum(kinds["update"])
    return table


def resource_report(folder: Path, model, config, world: int, reference: bool, device) -> str:
    """disk_line and, on CUDA, the memory table for usual and for greatest lengths. config: train.Config."""
    lines = [disk_line(folder, model, config.keep)]
    if device.type == "cuda":
        names = ("group_size", "tokens_per_forward", "rollout_batch", "max_prompt_tokens", "max_new_tokens",
                 "offload_optimizer")  # fmt: skip
        flags = {name: getattr(config, name) for name in names}
        usual, most = (
            memory_table(model, world, reference, **flags, length=share) for share in (0.3, 1.0)
        )
        capacity = torch.cuda.get_device_properties(device).total_memory / GIB
        lines.append(
            f"{'GiB a device, estimated':<62} {'usual':>7} {'at most':>7}   of {capacity:.1f}"
        )
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
    names = [
        frame.name for frame in traceback.extract_tb(error.__traceback__) if frame.name in PHASES
    ]
    phase = PHASES[names[-1]] if names else "setting up"
    return f"out of memory in {phase}. {' '.join(str(error).split())[:300]}"
