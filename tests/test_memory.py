"""memory.py: the estimates against published sizes and against a checkpoint on disk."""

from types import SimpleNamespace

import pytest
import torch
import torch.distributed as dist
from transformers import AutoModelForImageTextToText

from support import checkpoint, memory, toy

GIB = memory.GIB


def paper_config(**changes):
    """The fields of train.Config that memory.py reads, at the paper's values."""
    values = {
        "group_size": 5,
        "tokens_per_forward": 16_384,
        "rollout_batch": 320,
        "max_prompt_tokens": 4096,
        "max_new_tokens": 2048,
        "offload_optimizer": False,
        "keep": 2,
    }
    return SimpleNamespace(**values | changes)


def qwen(size):
    """Qwen2.5-VL at its real size, without memory for its weights."""
    with torch.device("meta"):
        return AutoModelForImageTextToText.from_config(toy.random_config(f"qwen2.5-vl-{size}"))


def test_disk_line(tmp_path):
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    try:
        model = torch.nn.Linear(512, 512)
        optimizer = torch.optim.AdamW(model.parameters())
        saved = checkpoint.save(tmp_path, model, optimizer, {"step": 1}, keep=1)
    finally:
        dist.destroy_process_group()
    size = 3 * 4 * (512 * 512 + 512)
    on_disk = sum(file.stat().st_size for file in saved.iterdir())
    assert size < on_disk < size + 50_000  # and torch's headers
    gibibyte = torch.nn.Linear(2**14, 2**14, bias=False, device="meta")
    line = memory.disk_line(tmp_path, gibibyte, keep=2)
    assert line.startswith("checkpoints: 3 GiB each, up to 9 GiB with --keep 2")
    assert "GiB free in" in line
    huge = torch.nn.Linear(2**25, 2**25, bias=False, device="meta")
    assert memory.disk_line(tmp_path, huge, keep=2).endswith("NOT ENOUGH")


@pytest.mark.parametrize(
    "size, count, world, cache_per_token",
    [
        ("3b", 3_754_622_976, 2, 2 * 2 * 36 * 2 * 128),
        ("7b", 8_292_166_656, 4, 2 * 2 * 28 * 4 * 128),
    ],
)
def test_memory_table(size, count, world, cache_per_token):
    """The parts that can be counted, against the published sizes."""
    model, config = qwen(size), paper_config()
    table = memory.memory_table(model, config, world, reference=True)
    assert table["parameters, fp32, sharded"] == 4 * count / world
    assert table["AdamW's moments, fp32, sharded"] == 8 * count / world
    assert table["reference model, bf16, sharded"] == 2 * count / world
    assert table["sampling: full weights, bf16"] == 2 * count
    assert table["sampling: key-value cache"] == cache_per_token * 320 * (4096 + 2048)

    usual = memory.memory_table(model, config, world, reference=True, length=0.3)
    assert usual["PEAK of sampling"] < 79 * GIB and usual["PEAK of an update"] < 79 * GIB
    config.offload_optimizer = True
    offloaded = memory.memory_table(model, config, world, reference=True, length=0.3)
    saved = usual["PEAK of sampling"] - offloaded["PEAK of sampling"]
    assert saved == table["AdamW's moments, fp32, sharded"]
    assert usual["PEAK of an update"] == offloaded["PEAK of an update"]

    model.model.visual.requires_grad_(False)
    frozen = memory.memory_table(model, config, world, reference=False)
    vision = sum(p.numel() for p in model.model.visual.parameters())
    assert frozen["reference model, bf16, sharded"] == 0
    assert frozen["update: gradients, fp32, sharded"] == 4 * (count - vision) / world


def test_device_line_says_what_does_not_fit_and_which_flag_helps():
    table = {"PEAK of sampling": 100 * GIB, "PEAK of an update": 40 * GIB}
    line = memory.device_line("the length limits", table, 80 * GIB)
    assert "sampling 100.0 GiB (does not fit: lower --rollout_batch" in line
    assert "an update 40.0 GiB; each device has 80.0 GiB" in line
