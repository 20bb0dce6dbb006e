"""The benchmark compares like with like. No times are judged."""

import math

import pytest
import torch
from conftest import generate
from transformers import Qwen2_5_VLConfig

from experiments import bench, start_model


def test_both_sides_decode_as_many_tokens():
    ours, stock = bench.toy_policies()
    prompts = bench.noise_prompts(ours.encoder, tokens=60, count=2)
    with bench.random_stops(ours, math.inf), bench.random_stops(stock, math.inf):
        groups = generate(ours, prompts, 2, max_new_tokens=12)
        tokens = bench.stock_generate(stock, prompts, 2, 12)[:, max(map(len, prompts)) :]
    assert [group.response_mask.sum() for group in groups] == [24, 24]
    assert tokens.shape == (4, 12)
    hidden = torch.randn(3, 1, 128, generator=torch.Generator().manual_seed(0))
    with torch.no_grad(), bench.random_stops(ours, mean=50):
        ends = ours.model.lm_head(hidden).softmax(-1)[..., ours.eos_ids[0]]
    assert ends.flatten().tolist() == pytest.approx([1 / 50] * 3, rel=1e-5)


def test_one_step_runs_sharded(capsys, monkeypatch):
    """The command of docs/on-gpus.md in small: under FSDP, too, responses end at random."""
    tokenizer = start_model.make_tokenizer()
    tiny = start_model.hub_config(len(tokenizer), special=tokenizer.pad_token_id)
    monkeypatch.setattr(start_model, "random_config", lambda *args: Qwen2_5_VLConfig(**tiny))
    flags = "--model random:qwen2.5-vl-3b --prompts 3 --group_size 2 --mini_batch 2 --mean 4"
    flags += " --prompt_tokens 60 --max_new_tokens 12 --rollout_batch 4 --tokens_per_forward 200"
    bench.main(flags.split())
    printed = capsys.readouterr().out
    assert "mean length" in printed and "mean length 12" not in printed
    assert "papo_g: 2 updates" in printed and "papo_g over grpo at equal rollouts" in printed
