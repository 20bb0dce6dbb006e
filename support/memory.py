"""What a run needs of disk, host and device memory.

`resource_report` is printed once everything is loaded. None of the estimates steers the run.
"""

from __future__ import annotations

import math
import os
import shutil
from pathlib import Path

import torch

from support.decoding import PREFILL_TOKENS, SCORE_BYTES, cache_bytes_per_token
from support.distributed import fsdp_blocks
from support.packing import CHUNK

GIB = 2**30

# Phase of a step -> what makes room for it.
ROOM_FOR = {
    "sampling": "fewer responses at a time, which takes longer; --offload_optimizer makes room",
    "an update": "does not fit: lower --tokens_per_forward or --group_size, shard over more ranks "
    "or set --freeze_vision",
}


def resource_report(
    folder: Path, model, config, mesh_shape: tuple, reference: bool, device, image_copies: int = 3
) -> str:
    """Whether the run will fit: a line on disk, one on host memory and, on CUDA, two on devices.

    model: the policy's, loaded. config: train.Config. mesh_shape: that of distributed.make_mesh.
    reference: whether there is a reference model. Sampling is counted with one group per prompt.
    """
    lines = [disk_line(folder, model, config.keep)]
    lines.append(host_line(host_memory(model, config, mesh_shape, device, image_copies)))
    if device.type == "cuda":
        capacity = torch.cuda.get_device_properties(device).total_memory
        usual = memory_table(model, config, mesh_shape[-1], reference, length=0.3)
        greatest = memory_table(model, config, mesh_shape[-1], reference, length=1.0)
        lines.append(device_line("30% of the length limits", usual, capacity))
        lines.append(device_line("the length limits", greatest, capacity))
    return "\n".join(lines)


def disk_line(folder: Path, model, keep: int) -> str:
    """The size of a checkpoint (fp32 weights and two moments of each trained one) and the room."""
    size = sum(4 * weight.numel() for weight in model.state_dict().values())
    size += sum(8 * weight.numel() for weight in model.parameters() if weight.requires_grad)
    need = (keep + 1) * size
    free = shutil.disk_usage(folder).free
    line = (
        f"checkpoints: {size / GIB:.3g} GiB each, up to {need / GIB:.3g} GiB with --keep {keep} "
        f"while one is saved; {free / GIB:.3g} GiB free in {folder}"
    )
    return line if need <= free else f"{line}: NOT ENOUGH"


def host_line(host: dict[str, float]) -> str:
    """The peak of `host_memory`, its parts (not all at once), and what the machine has left."""
    parts = [f"{name} {size / GIB:.3g}" for name, size in host.items() if size and name != "PEAK"]
    line = f"host memory, estimated: {host['PEAK'] / GIB:.3g} GiB per machine ({', '.join(parts)})"
    available = available_host_memory()
    if available is None:
        return line
    line += f"; {available / GIB:.3g} GiB available"
    if host["PEAK"] > available:
        line += ": NOT ENOUGH; lower --prompts_per_step or --max_pixels for fewer images"
    return line


def available_host_memory() -> int | None:
    """Bytes that Linux can still hand out, whatever a container's own limit; None elsewhere."""
    try:
        text = Path("/proc/meminfo").read_text()
    except OSError:
        return None
    kilobytes = [line.split()[1] for line in text.splitlines() if "MemAvailable:" in line]
    return int(kilobytes[0]) * 1024 if kilobytes else None


def host_memory(
    model, config, mesh_shape: tuple, device, image_copies: int = 3
) -> dict[str, float]:
    """Estimate the bytes a loaded run will still take on this machine: the parts and their peak.

    config: train.Config. mesh_shape: (replicas, ranks in each), or the ranks alone. Images are
    counted at --max_pixels, one per prompt, image_copies times: those of a step, their views, and
    those of the next round, which the stream encodes ahead. Decoded images (3 bytes per pixel of
    the file) and the libraries' own memory come on top.

    On CUDA, moments may be offloaded while sampling, to pinned memory that is kept. The export at
    the end gathers the weights in bf16 on the first rank; only the images read ahead are left then.
    """
    world, shard_size = math.prod(mesh_shape), mesh_shape[-1]
    ranks = int(os.environ.get("LOCAL_WORLD_SIZE", 1))
    vision = model.config.vision_config
    bytes_per_pixel = 4 * vision.in_channels * vision.temporal_patch_size
    prompts = math.ceil(config.prompts_per_step / world) * ranks
    total = sum(p.numel() for p in model.parameters())
    trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
    read_ahead = prompts * config.max_pixels * bytes_per_pixel
    images = image_copies * read_ahead
    if device.type != "cuda":
        update = 12 * trained * ranks / shard_size
        parts = {"encoded images": images, "gradients and moments": update}
        return parts | {"PEAK": images + update}
    moments = 0
    if config.offload_optimizer:  # torch rounds a pinned piece up to a power of two
        moments = ranks * 2 ** math.ceil(math.log2(8 * trained / shard_size))
    export = 2 * total
    parts = {"encoded images": images, "offloaded moments": moments, "export": export}
    return parts | {"PEAK": moments + max(images, read_ahead + export)}


def device_line(lengths: str, table: dict[str, float], capacity: int) -> str:
    """The two peaks of a memory table against the device's capacity in bytes."""
    peaks = []
    for phase, advice in ROOM_FOR.items():
        peak = table[f"PEAK of {phase}"]
        problem = f" ({advice})" if peak > capacity else ""
        peaks.append(f"{phase} {peak / GIB:.1f} GiB{problem}")
    return (
        f"device memory at {lengths}, estimated: {', '.join(peaks)}; "
        f"each device has {capacity / GIB:.1f} GiB"
    )


def memory_table(
    model, config, shard_size: int, reference: bool, length: float = 1.0
) -> dict[str, float]:
    """Estimate the bytes on each CUDA device: part by part, then the two peaks.

    model: with its requires_grad flags set; plain, sharded or on the meta device. config:
    train.Config. shard_size: how many devices split one copy of the weights. reference: whether
    there is a reference model. length: prompts and responses as a share of their limits.

    Parameters are counted; caches and stored layer inputs follow from their shapes. Parts marked ~
    (activations within a layer, logits) are estimates. The allocator's fragmentation and the CUDA
    context, about 1 GiB, come on top.
    """
    text, vision = model.config.get_text_config(), model.config.vision_config
    blocks = [sum(p.numel() for p in block.parameters()) for block in fsdp_blocks(model)]
    total = sum(p.numel() for p in model.parameters())
    trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
    root = total - sum(blocks)  # embeddings and head

    prompt, response = length * config.max_prompt_tokens, length * config.max_new_tokens
    groups = config.rollout_batch / config.group_size
    patches_per_token = vision.spatial_merge_size**2
    prefill = min(groups * prompt, PREFILL_TOKENS)
    # A group is never split, so its row may be longer than asked for.
    row = max(config.tokens_per_forward, prompt + config.group_size * response)
    patches = patches_per_token * row / 2  # half of a row is images
    layer_inputs = row * text.num_hidden_layers * text.hidden_size
    layer_inputs += patches * vision.depth * vision.hidden_size

    moments = 8 * trained / shard_size
    full_weights = 2 * total
    per_token = cache_bytes_per_token(text, element_size=2)
    prompts = per_token * groups * prompt
    responses = per_token * config.rollout_batch * response
    scores = SCORE_BYTES * config.rollout_batch * text.vocab_size
    # Of one layer at a time: so many intermediate and hidden sizes live at once, as counted in
    # tests/test_memory.py. A prompt is mostly an image.
    images = prefill * patches_per_token * _inside(vision, 4, 10)
    encoding = prefill * _inside(text, 4, 4)
    inside = max(row * _inside(text, 6, 9), patches * _inside(vision, 6, 9))
    logits = 12 * CHUNK * text.vocab_size
    resident = {
        "parameters, fp32, sharded": 4 * total / shard_size,
        "AdamW's moments, fp32, sharded": moments,
        "reference model, bf16, sharded": 2 * total / shard_size * reference,
    }
    sampling = {
        "sampling: full weights, bf16": full_weights,
        "sampling: keys and values of prompts": prompts,
        "sampling: keys and values of responses": responses,
        "sampling: ~scores": scores,
        "sampling: ~encoding images": images,
        "sampling: ~encoding prompts": encoding,
    }
    update = {
        "update: gradients, fp32, sharded": 4 * trained / shard_size,
        "update: full embeddings and head, bf16, and their gradients": 8 * root,
        "update: two full layers, bf16, and their gradients": 2 * 8 * max(blocks),
        "update: layer inputs, bf16": 2 * layer_inputs,
        "update: ~inside a layer, or logits": max(inside, logits),
    }
    stays = sum(resident.values())
    offloaded = moments if config.offload_optimizer else 0
    # The first row of prompts is encoded before their cache is made, later ones beside it.
    beside_images = prompts if groups * prompt > PREFILL_TOKENS else 0
    peak_cache = max(beside_images + images, prompts + encoding, prompts + responses + scores)
    peaks = {
        "PEAK of sampling": stays - offloaded + full_weights + peak_cache,
        "PEAK of an update": stays + sum(update.values()),
    }
    return resident | sampling | update | peaks


def _inside(config, intermediate: int, hidden: int) -> int:
    """Bytes per token or patch of so many tensors of each size, in bf16."""
    return 2 * (intermediate * config.intermediate_size + hidden * config.hidden_size)
