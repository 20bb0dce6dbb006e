"""memory.py: the estimates against published sizes and against a checkpoint on disk."""

import os
from functools import partial
from pathlib import Path
from types import MethodType, SimpleNamespace

import numpy as np
import pytest
import torch
import torch.distributed as dist
from PIL import Image
from shape_only import ShapeOnly, VarlenAttention
from transformers import AutoModelForImageTextToText
from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil

from experiments import bench
from support import checkpoint, decoding, memory, packing, toy
from support.batch import Example, Prompt

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
    assert table["sampling: keys and values of prompts"] == cache_per_token * 64 * 4096
    assert table["sampling: keys and values of responses"] == cache_per_token * 320 * 2048

    usual = memory.memory_table(model, config, world, reference=True, length=0.3)
    assert usual["PEAK of sampling"] < 79 * GIB and usual["PEAK of an update"] < 79 * GIB
    config.offload_optimizer = True
    offloaded = memory.memory_table(model, config, world, reference=True, length=0.3)
    saved = usual["PEAK of sampling"] - offloaded["PEAK of sampling"]
    assert saved == pytest.approx(table["AdamW's moments, fp32, sharded"])
    assert usual["PEAK of an update"] == offloaded["PEAK of an update"]

    model.model.visual.requires_grad_(False)
    frozen = memory.memory_table(model, config, world, reference=False)
    vision = sum(p.numel() for p in model.model.visual.parameters())
    assert frozen["reference model, bf16, sharded"] == 0
    assert frozen["update: gradients, fp32, sharded"] == 4 * (count - vision) / world


RUNS = {  # the rows of docs/reliability.md: model, devices, fields of train.Config
    "3B on 2 devices": ("3b", 2, {}),
    "3B on 2, `--offload_optimizer`": ("3b", 2, {"offload_optimizer": True}),
    "7B on 4 devices": ("7b", 4, {}),
    "7B on 4, `--offload_optimizer`": ("7b", 4, {"offload_optimizer": True}),
    "3B on 8 devices": ("3b", 8, {}),
    "7B on 8 devices": ("7b", 8, {}),
}


def documented(label):
    """A row of docs/reliability.md: a device's share of 384 x 5 responses, sampled at once."""
    size, devices, changes = RUNS[label]
    config = paper_config(rollout_batch=384 * 5 // devices, **changes)
    usual, limit = (
        memory.memory_table(qwen(size), config, devices, reference=True, length=length)
        for length in (0.3, 1.0)
    )
    peaks = (usual["PEAK of sampling"], limit["PEAK of sampling"], usual["PEAK of an update"])
    return f"| {label} | " + " | ".join(f"{peak / GIB:.1f}" for peak in peaks) + " |"


@pytest.mark.parametrize("label", RUNS)
def test_the_documented_peaks_are_those_of_the_code(label):
    text = (Path(__file__).parent.parent / "docs" / "reliability.md").read_text()
    assert documented(label) in text.splitlines()


def test_a_group_longer_than_a_row_counts_whole():
    table = partial(memory.memory_table, qwen("3b"), shard_size=2, reference=False)
    groups_of_16 = paper_config(group_size=16, rollout_batch=320)
    whole = 4096 + 16 * 2048
    longer_rows = paper_config(group_size=16, rollout_batch=320, tokens_per_forward=whole)
    assert table(config=groups_of_16) == table(config=longer_rows)
    peak = "PEAK of an update"
    assert table(config=groups_of_16)[peak] > table(config=paper_config())[peak]


def test_device_line_says_what_does_not_fit_and_which_flag_helps():
    table = {"PEAK of sampling": 100 * GIB, "PEAK of an update": 40 * GIB}
    line = memory.device_line("the length limits", table, 80 * GIB)
    assert "sampling 100.0 GiB (fewer responses at a time, which takes longer; --offload" in line
    assert "an update 40.0 GiB; each device has 80.0 GiB" in line
    line = memory.device_line("the length limits", table, 30 * GIB)
    assert "an update 40.0 GiB (does not fit: lower --tokens_per_forward" in line


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


# ------------------------------------------------------------------- the estimates against shapes


def image_prompt(tokens):
    """A prompt of 1,200 or 4,096 tokens, nearly all of them of one image."""
    grid = {1200: (1, 64, 72), 4096: (1, 160, 100)}[tokens]
    patches = grid[1] * grid[2]
    return Prompt(
        example=Example("", "", []),
        input_ids=torch.zeros(tokens, dtype=torch.long),
        position_ids=torch.arange(tokens).expand(3, -1),
        is_image_token=torch.arange(tokens) < patches // 4,
        pixel_values=torch.zeros(patches, 1176, dtype=torch.bfloat16),
        image_grid_thw=torch.tensor([grid]),
    )


@pytest.fixture(params=["3b", pytest.param("7b", marks=pytest.mark.slow)])
def by_shape(request, monkeypatch):
    """The published model in bf16 on the meta device, with the attention of a GPU."""
    monkeypatch.setattr(
        packing,
        "varlen_kernel",
        lambda *_: lambda q, k, v, *lengths, scale, causal: VarlenAttention.apply(q, k, v),
    )
    model = qwen(request.param).to(torch.bfloat16).eval()
    model.set_attn_implementation(packing.ATTENTION)
    model.row_hidden_states = MethodType(packing.row_hidden_states, model)
    return model


def table_of(model, groups, prompt, response, row=16_384):
    config = paper_config(
        rollout_batch=5 * groups,
        max_prompt_tokens=prompt,
        max_new_tokens=response,
        tokens_per_forward=row,
    )
    return memory.memory_table(model, config, 1, reference=True)


def test_the_estimate_of_sampling_agrees_with_the_shapes(by_shape, monkeypatch):
    """Prefill, then two steps at 600 tokens, one prompt being more than three times as long."""
    model = by_shape
    encoder = SimpleNamespace(images=SimpleNamespace(merge_size=2), black_patch=torch.zeros(1176))
    prompts = [image_prompt(tokens) for tokens in (*[1200] * 7, 4096)]
    prompt_of = torch.arange(8).repeat_interleave(5)
    like = torch.empty(0, dtype=torch.bfloat16)  # indices stay real
    cache = decoding.GroupedCache(model.config.get_text_config(), prompts, prompt_of, like)
    weights = [*model.parameters(), *model.buffers()]

    with torch.no_grad(), ShapeOnly(ignored=weights) as shapes:
        decoding.prefill(model, prompts, cache, encoder)
    stored = shapes.live()
    padded = table_of(model, groups=8, prompt=4096, response=600)
    assert stored == pytest.approx(padded["sampling: keys and values of prompts"], rel=0.01)
    mean = sum(map(len, prompts)) / 8
    table = table_of(model, groups=8, prompt=mean, response=600)
    with_cache = stored + table["sampling: ~encoding prompts"]
    expected = max(table["sampling: ~encoding images"], with_cache)
    assert shapes.peak == pytest.approx(expected, rel=0.2)

    chunk = decoding.Chunk(
        encoder,
        prompts,
        prompt_of,
        uniforms=torch.rand(40, 600),
        room=2**50,
        temperature=1.0,
        top_p=0.99,
        eos_ids=torch.tensor([5]),
        stop=lambda: False,
        report=lambda _: None,
    )
    monkeypatch.setattr(decoding, "repeat", lambda step, times, device: (step(), step()))
    monkeypatch.setitem(decoding.BLOCK, "cpu", 600)
    tokens = torch.zeros(40, dtype=torch.long)
    how = {"process": lambda ids, scores: scores, "do_sample": True}
    loop = decoding.DecodingLoop(model, cache, chunk, tokens, **how)
    prompt_tensors = [tensor for layer in cache.prompts for tensor in layer]
    with torch.no_grad(), ShapeOnly(ignored=weights, counted=prompt_tensors) as shapes:
        loop.run()
    parts = ("keys and values of prompts", "keys and values of responses", "~scores")
    expected = sum(padded[f"sampling: {part}"] for part in parts)
    assert shapes.peak == pytest.approx(expected, rel=0.2)


def test_the_estimate_of_an_update_agrees_with_the_shapes(by_shape):
    """The backward of one row, with checkpointing, gradients of weights left out."""
    model = by_shape.train()
    model.gradient_checkpointing_enable({"use_reentrant": False})
    for parameter in model.parameters():  # FSDP takes each gradient away at once
        parameter.register_post_accumulate_grad_hook(lambda each: setattr(each, "grad", None))
    prompts = [image_prompt(tokens) for tokens in (1200, 1200, 4096)]
    groups = [bench.random_group(prompt, torch.full((5,), 600)) for prompt in prompts]
    row = packing.build_row(groups, "", torch.zeros(1176), 2, "cpu")
    row = row._replace(pixel_values=row.pixel_values.to("meta"))
    with ShapeOnly(ignored=[*model.parameters(), *model.buffers()]) as shapes:
        packing.row_log_probs(model, row, 1.0).sum().backward()
    table = table_of(model, groups=8, prompt=1200, response=600, row=row.input_ids.shape[1])
    expected = table["update: layer inputs, bf16"] + table["update: ~inside a layer, or logits"]
    assert shapes.peak == pytest.approx(expected, rel=0.2)
