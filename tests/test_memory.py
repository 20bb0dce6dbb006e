"""memory.py: the estimates against published sizes and against a checkpoint on disk."""

import os
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import torch.distributed as dist
from PIL import Image
from transformers import AutoModelForImageTextToText
from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil

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
        "prompts_per_step": 384,
        "max_pixels": 1_003_520,
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


def test_host_memory(monkeypatch):
    """Images of the largest size, three copies each: two views of a step's, one of the next's."""
    model, config = qwen("3b"), paper_config(offload_optimizer=True)
    cuda, cpu = torch.device("cuda"), torch.device("cpu")
    size = {"shortest_edge": 200_704, "longest_edge": config.max_pixels}
    largest = Image.fromarray(np.zeros((896, 1120, 3), dtype=np.uint8))
    pixels = Qwen2VLImageProcessorPil(size=size)(largest, return_tensors="pt")["pixel_values"]
    assert pixels.nbytes == 24 * config.max_pixels

    monkeypatch.setenv("LOCAL_WORLD_SIZE", "2")
    host = memory.host_memory(model, config, (2,), cuda)
    assert host["encoded images"] == 3 * 384 * pixels.nbytes
    assert host["offloaded moments"] == 2 * 2**34  # a power of two per rank
    assert 0.8 < 8 * 3_754_622_976 / host["offloaded moments"] < 1
    assert host["export"] == 2 * 3_754_622_976
    assert host["PEAK"] == host["encoded images"] + host["offloaded moments"]
    config.offload_optimizer = False
    host = memory.host_memory(model, config, (2,), cuda)
    assert host["PEAK"] == host["encoded images"]
    config.prompts_per_step = 4  # few images: the export needs more
    few = memory.host_memory(model, config, (2,), cuda)
    assert few["PEAK"] == few["encoded images"] / 3 + few["export"]
    config.prompts_per_step = 384

    half = memory.host_memory(model, config, (4,), cuda)  # two ranks on each of two machines
    assert half["encoded images"] == host["encoded images"] / 2
    on_cpu = memory.host_memory(model, config, (2,), cpu)
    assert on_cpu["gradients and moments"] == 12 * 3_754_622_976
    sharded_wider = memory.host_memory(model, config, (4,), cpu)
    assert sharded_wider["gradients and moments"] == 12 * 3_754_622_976 / 2
    replicated = memory.host_memory(model, config, (2, 2), cpu)
    assert replicated["gradients and moments"] == 12 * 3_754_622_976


def test_the_report_compares_host_memory_with_the_machines(tmp_path, monkeypatch):
    model, config, cpu = qwen("3b"), paper_config(prompts_per_step=4), torch.device("cpu")

    def host_line():
        report = memory.resource_report(tmp_path, model, config, (1,), reference=True, device=cpu)
        [line] = [line for line in report.splitlines() if line.startswith("host memory")]
        return line

    monkeypatch.setattr(memory, "available_host_memory", lambda: 2**40)
    assert host_line().endswith("1.02e+03 GiB available")
    monkeypatch.setattr(memory, "available_host_memory", lambda: 2**30)
    assert "1 GiB available: NOT ENOUGH; lower --prompts_per_step or --max_pixels" in host_line()
    monkeypatch.setattr(memory, "available_host_memory", lambda: None)
    assert "available" not in host_line()


@pytest.mark.skipif(not Path("/proc/meminfo").exists(), reason="Linux only")
def test_available_host_memory():
    total = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    assert 2**20 < memory.available_host_memory() <= total
