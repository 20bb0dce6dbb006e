"""The benchmark compares like with like. No times are judged."""

import copy
from functools import partial

import pytest
import torch
from conftest import generate

from experiments import bench


@pytest.fixture(scope="module")
def pair(tmp_path_factory):
    return bench.make_policies(str(tmp_path_factory.mktemp("bench")))


def test_both_sides_decode_the_same_lengths(pair):
    ours, stock = pair
    prompts = bench.noise_prompts(ours.encoder, tokens=60, count=3)
    assert all(50 <= len(prompt) <= 70 for prompt in prompts)
    assert len({len(prompt) for prompt in prompts}) > 1
    sample = partial(generate, ours, prompts, 2, max_new_tokens=12, rollout_batch=4)
    with bench.random_stops(ours, mean=5):
        lengths = bench.response_lengths(sample())
        assert torch.equal(lengths, bench.response_lengths(sample()))
    assert len(lengths.unique()) > 1
    tokens = bench.stock_generate(stock, prompts, lengths)[:, max(map(len, prompts)) :]
    ended = torch.isin(tokens, torch.tensor(stock.eos_ids)).int()
    assert ended.any(1).all()
    assert torch.equal(ended.argmax(1) + 1, lengths.flatten())


def test_a_response_ends_at_each_token_with_the_same_probability(pair):
    policy, _ = pair
    hidden = torch.randn(3, 1, 128, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        before = policy.model.lm_head(hidden).softmax(-1)
        with bench.random_stops(policy, mean=50):
            inside = policy.model.lm_head(hidden).softmax(-1)
        assert torch.equal(policy.model.lm_head(hidden).softmax(-1), before)
    end_token, *other_ends = policy.eos_ids
    torch.testing.assert_close(inside[..., end_token], torch.full((3, 1), 1 / 50))
    assert inside[..., other_ends].eq(0).all()
    others = [i for i in range(before.shape[-1]) if i not in policy.eos_ids]
    ratios = (inside / before)[..., others]
    torch.testing.assert_close(ratios, ratios[..., :1].expand_as(ratios))


def test_both_sides_give_the_same_log_probs(pair):
    ours, stock = pair
    prompt = bench.noise_prompt(ours.encoder, 60, 0)
    group = bench.random_group(prompt, torch.tensor([5, 1, 9]))
    expected = bench.padded_log_probs(stock, group)
    torch.testing.assert_close(ours.log_probs([group]), expected, atol=1e-5, rtol=0)


def test_casting_leaves_the_frequencies_of_rope_alone(pair):
    model = copy.deepcopy(pair[0].model)
    before = {name: buffer.clone() for name, buffer in model.named_buffers()}
    bench.cast_parameters(model, torch.bfloat16)
    assert {parameter.dtype for parameter in model.parameters()} == {torch.bfloat16}
    assert any("inv_freq" in name for name in before)
    for name, buffer in model.named_buffers():
        assert torch.equal(buffer, before[name]) and buffer.dtype == before[name].dtype


def test_flops_count_every_weight_once(pair):
    """One more response token costs two operations per weight, and its attention."""
    policy, _ = pair
    config, linears = policy.model.config, bench.count_linears(policy.model)
    prompt = bench.noise_prompt(policy.encoder, 60, 0)
    one, two = (
        bench.forward_flops(config, [bench.random_group(prompt, torch.tensor([n]))], linears)
        for n in (1, 2)
    )
    attention = 4 * 128 * 4 * (len(prompt) + 1.5)
    assert two - one == pytest.approx(2 * (linears["text"] + linears["head"]) + attention)
    assert linears["text"] == 4 * (128 * 128 * 2 + 2 * 128 * 64 + 3 * 128 * 384)


def test_one_step_runs_sharded(capsys):
    """The command of docs/on-gpus.md in small: under FSDP, too, responses end at random."""
    flags = "--model random:tiny --prompts 3 --group_size 2 --mini_batch 2 --prompt_tokens 60"
    flags += " --mean 4 --max_new_tokens 12 --rollout_batch 4 --tokens_per_forward 200"
    bench.main(flags.split())
    printed = capsys.readouterr().out
    assert "mean length" in printed and "mean length 12" not in printed
    assert "papo_g: 2 updates" in printed
    assert "papo_g over grpo at equal rollouts" in printed
