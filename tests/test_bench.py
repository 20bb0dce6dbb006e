"""The benchmark runs, in the small; no times are judged."""

import pytest
import torch

from experiments import bench
from rollout import generate


@pytest.fixture(scope="module")
def pair(tmp_path_factory):
    return bench.policies(str(tmp_path_factory.mktemp("bench")))


def test_both_ways_give_the_forced_lengths(pair):
    ours, plain = pair
    prompts = [bench.prompt_of(ours.encoder, 60, i) for i in range(3)]
    assert all(50 <= len(p) <= 70 for p in prompts) and len({len(p) for p in prompts}) > 1
    lengths = bench.draw_lengths(6, 5, 12).view(3, 2)
    groups = generate(ours, prompts, 2, max_new_tokens=12, lengths=lengths, rollout_batch=4)
    assert torch.equal(torch.stack([g.response_mask.sum(1) for g in groups]), lengths)
    out = bench.stock_generate(plain, prompts, lengths)[:, max(map(len, prompts)) :]
    ended = torch.isin(out, torch.tensor(plain.eos_ids)).int()
    assert (ended.argmax(1) + 1).tolist() == lengths.flatten().tolist() and ended.any(1).all()


def test_both_ways_give_the_same_log_probs(pair):
    ours, plain = pair
    group = bench.random_group(ours, bench.prompt_of(ours.encoder, 60, 0), torch.tensor([5, 1, 9]))
    torch.testing.assert_close(
        ours.log_probs([group]), bench.plain_log_probs(plain, group), atol=1e-5, rtol=0
    )


def test_the_draw_is_recorded():
    lengths = bench.draw_lengths(10_000, 50, 256)
    assert torch.equal(lengths, bench.draw_lengths(10_000, 50, 256))
    assert 45 < lengths.float().mean() < 51 and lengths.min() == 1 and lengths.max() == 256


def test_flops_count_every_weight_once(pair):
    """One response token more costs two operations a weight of the language model, and its attention."""
    ours, _ = pair
    config, linears = ours.model.config, bench.count_linears(ours.model)
    prompt = bench.prompt_of(ours.encoder, 60, 0)
    one, two = (
        bench.forward_flops(config, [bench.random_group(ours, prompt, torch.tensor([n]))], linears)
        for n in (1, 2)
    )
    attention = 4 * 128 * 4 * (len(prompt) + 1.5)
    assert two - one == pytest.approx(2 * (linears["text"] + linears["head"]) + attention)
    assert linears["text"] == 4 * (128 * 128 * 2 + 2 * 128 * 64 + 3 * 128 * 384)


def test_unknown_parts_name_the_choices(capsys):
    for argv, words in (
        (["--only", "speed"], "rollouts"),
        (["--model", "gpt"], "random:qwen2.5-vl-3b"),
    ):
        with pytest.raises(SystemExit):
            bench.main(argv)
        assert words in capsys.readouterr().err
