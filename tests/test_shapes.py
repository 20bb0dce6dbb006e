"""The published models by their shapes alone: the activations that docs/on-gpus.md states."""

import re
from pathlib import Path
from types import MethodType

import pytest
import torch
from shape_only import ShapeOnly, VarlenAttention, image_prompt
from transformers import AutoModelForImageTextToText

from experiments import start_model
from support import decoding, packing
from support.batch import Group
from support.lora import add_adapters
from support.qwen_vl import use_faster_forwards

PAGE = Path(__file__).parent.parent / "docs" / "on-gpus.md"


@pytest.fixture(params=["3b", pytest.param("7b", marks=pytest.mark.slow)])
def by_shape(request, monkeypatch):
    """A published model in bf16 on the meta device, with the attention of a GPU."""
    monkeypatch.setattr(
        packing,
        "varlen_kernel",
        lambda query: lambda q, k, v, *lengths, scale, causal: VarlenAttention.apply(q, k, v),
    )
    with torch.device("meta"):
        config = start_model.random_config(f"qwen2.5-vl-{request.param}")
        model = AutoModelForImageTextToText.from_config(config)
    model = model.to(torch.bfloat16).eval()
    model.set_attn_implementation(packing.ATTENTION)
    use_faster_forwards(model)
    model.pack_hidden_states = MethodType(packing.pack_hidden_states, model)
    return request.param, model


def check_stated(shapes, size, what):
    """The table states the GiB at the peak."""
    [line] = [line for line in PAGE.read_text().splitlines() if line.startswith(f"| {what} |")]
    stated = float(re.findall(r"\d+\.\d+", line)[("3b", "7b").index(size)])
    assert shapes.peak / 2**30 == pytest.approx(stated, rel=0.02)


def test_sampling(by_shape, monkeypatch):
    """Prefill of 16 prompts x 5 responses, then the steps at 450 tokens per response."""
    size, model = by_shape
    prompts = [image_prompt(1300, 64, 80) for _ in range(16)]
    chunk = decoding.Chunk(
        prompts,
        uniforms=torch.rand(16, 5, 450),
        temperature=1.0,
        top_p=0.99,
        eos_ids=torch.tensor([5]),
        stop=lambda: False,
    )
    text = model.config.get_text_config()
    shared = text.num_attention_heads // text.num_key_value_heads
    cache = decoding.GroupCache(prompts, 5, shared, "cpu")
    weights = [*model.parameters(), *model.buffers()]
    with torch.no_grad(), ShapeOnly(ignored=weights) as shapes:
        decoding.prefill(model, chunk, cache)
    check_stated(shapes, size, "prefill, 16 prompts")
    monkeypatch.setattr(decoding, "repeat", lambda step, times, device: (step(), step()))
    monkeypatch.setitem(decoding.BLOCK, "cpu", 450)
    loop = decoding.DecodingLoop(model, cache, chunk, lambda ids, scores: scores, True)
    stored = [tensor for layer in cache.layers for tensor in layer]
    with torch.no_grad(), ShapeOnly(ignored=weights, counted=stored) as shapes:
        loop.run()
    assert cache.mask.dtype == torch.bfloat16  # else SDPA would convert it in every layer
    check_stated(shapes, size, "decoding, 16 prompts x 5 responses")


@pytest.mark.parametrize(
    "what, n_prompts, lora_rank",
    [
        ("one pack of an update, 4 prompts x 5 responses", 4, 0),
        ("one pack with adapters, 4 prompts x 5 responses", 4, 16),
        ("one pack with adapters, 1 prompt x 5 responses", 1, 16),
    ],
)
def test_an_update(by_shape, what, n_prompts, lora_rank):
    """The backward of one row, with checkpointing, gradients of weights left out."""
    size, model = by_shape
    if lora_rank:
        add_adapters(model, lora_rank, 32.0, "source")
    model.train()
    model.gradient_checkpointing_enable({"use_reentrant": False})
    for parameter in model.parameters():  # FSDP takes each gradient away at once
        if parameter.requires_grad:
            parameter.register_post_accumulate_grad_hook(lambda each: setattr(each, "grad", None))
    tokens = torch.full((5, 450), 20)
    rest = tokens > 0, torch.zeros(5, dtype=torch.bool), torch.zeros(5, 450)
    groups = [Group(image_prompt(1300, 64, 80), tokens, *rest) for _ in range(n_prompts)]
    row = packing.build_pack(groups, "", "cpu")
    row = row._replace(images=(row.images[0].to("meta"), row.images[1]))
    with ShapeOnly(ignored=[*model.parameters(), *model.buffers()]) as shapes:
        packing.pack_log_probs(model, row, 1.0).sum().backward()
    check_stated(shapes, size, what)
