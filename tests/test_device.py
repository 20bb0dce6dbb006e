"""What CUDA would do with the code, shown on a CPU by a pretend device (pretend_device.py).

First the device itself; then a whole step, which gives what it gives on a CPU; then omissions
planted in the code, which the device must notice.
"""

import copy
from contextlib import nullcontext
from dataclasses import replace

import pytest
import torch
from conftest import generate
from pretend_device import CUDA, MIXED
from test_pages import data_of

import evaluate
import papo
import rollout
from papo import prepare, preset, update
from support import decoding, packing
from support.batch import mini_batches
from support.decoding import DecodingLoop, repeat
from support.qwen_vl import Policy

# -------------------------------------------------------------------------------- the device itself

HOST = torch.arange(4.0)
INDEX = torch.tensor([2, 0])

USES = {  # what is done with a tensor on the device, and the waits that this costs; None: an error
    "addition": (lambda x: x + HOST, None),
    "index of a host tensor": (lambda x: HOST[INDEX.to(CUDA)], None),
    "values to store": (lambda x: x.index_put_((INDEX.to(CUDA),), HOST[:2]), None),
    "backward": (lambda x: (x.requires_grad_() * x).backward(HOST), None),
    "a host scalar": (lambda x: x.masked_fill(x > 1, torch.tensor(0.0)) + torch.tensor(3.0), []),
    "tolist": (lambda x: x.tolist(), ["value"]),
    "boolean index": (lambda x: x[x > 1], ["shape"]),
    "cpu": (lambda x: x.cpu(), ["download"]),
    "new tensor": (lambda x: torch.tensor([1.0], device=x.device), ["upload"]),
    "host index": (lambda x: x[INDEX], ["index copied"]),
}


def test_mixed_devices_raise_and_waits_are_counted(device):
    with device:
        for name, (use, waits) in USES.items():
            with pytest.raises(RuntimeError, match=MIXED) if waits is None else nullcontext():
                x = HOST.to(CUDA)
                device.syncs.clear()
                use(x)
            assert waits in (None, [line.split(":")[0] for line in device.syncs]), name


def test_a_captured_graph_runs_when_it_is_replayed(device):
    """And must live until the host has waited for it. Memory that nobody has written is NaN."""
    with device:
        total, step, doubled = torch.zeros(2, device=CUDA), torch.ones(1, device=CUDA), None

        def function():
            nonlocal doubled
            doubled = total + total
            total.copy_(doubled + step)

        graph = repeat(function, 1, CUDA)  # once as it is; the recording has not run
        assert (total.tolist(), doubled.isnan().tolist()) == ([1, 1], [True, True])
        graph.replay()
        assert (total.tolist(), doubled.tolist()) == ([3, 3], [2, 2])
        graph.replay()
        del graph
        with pytest.raises(RuntimeError, match="freed while its replays were queued"):
            total.tolist()
        device.queued.clear()
        for cannot in (lambda: total.sum().item(), lambda: total + HOST[:2].to(CUDA)):
            with pytest.raises(RuntimeError, match="not permitted when stream is capturing"):
                repeat(cannot, 2, CUDA)

        def rebind():
            nonlocal step
            step = step + 1  # not in place: the graph reads one that nobody holds any more

        with pytest.raises(RuntimeError, match="freed since the capture"):
            repeat(rebind, 2, CUDA)


# ---------------------------------------------------------------------------- the step, as on a CPU


@pytest.fixture()
def policies(varied_policy):
    """The same policy twice: one stays on the CPU."""
    varied_policy.eos_ids = list(range(0, 400, 4))  # groups end at different times
    return varied_policy, copy.deepcopy(varied_policy)


def sample(policy, prompts):
    return generate(policy, prompts, 3, max_new_tokens=13, key=(0, 1), top_p=0.9)


def check_same_groups(*both):
    fields = ([(x.tokens, x.response_mask, x.sample_log_probs) for x in each] for each in both)
    torch.testing.assert_close(*fields, atol=1e-4, rtol=0)


def copied_indices(device):
    """The lines of our own that index a tensor on the device by one on the host."""
    lines = [line for line in device.syncs if line.startswith("index copied: ")]
    return [line for line in lines if "transformers" not in line]


@pytest.mark.parametrize("block", [4, 128])
def test_sampling_equals_the_cpus(policies, prompts, device, monkeypatch, block):
    """Through captured graphs; with several images or none, and a last block of a single step."""
    policy, on_device = policies
    expected = sample(policy, prompts)
    monkeypatch.setitem(decoding.BLOCK, "cuda", block)
    with device:
        on_device.model.to(CUDA)
        found = sample(on_device, prompts)
    assert not copied_indices(device)
    check_same_groups(found, expected)
    assert len({int(group.response_mask.sum(1).max()) for group in found}) > 2


def train_step(policy, groups, name):
    """Metrics of one step of two mini-batches, and the weights after it on the host."""
    algo = preset(name)
    if name == "dyco_rl":
        algo = replace(algo, shortest_response=0)
    policy.tokens_per_forward = 150
    optimizer = torch.optim.AdamW(policy.model.parameters(), lr=1e-3, eps=1e-4)
    batches = mini_batches(groups, 2)
    metrics = prepare(policy, policy, batches, algo, key=(0, 0))
    metrics |= update(policy, optimizer, batches, algo)
    return metrics, [parameter.detach().cpu() for parameter in policy.model.parameters()]


@pytest.mark.parametrize("name", ["papo_g", "vppo", "dyco_rl", "dvrp"])
def test_a_training_step_equals_the_cpus(policies, groups, device, name):
    """With log-probs of a reference, checkpointing, and a text-only row."""
    policy, on_device = policies
    for each in policies:
        each.model.gradient_checkpointing_enable({"use_reentrant": False})
    expected, expected_weights = train_step(policy, copy.deepcopy(groups), name)
    with device:
        on_device.model.to(CUDA)
        found, weights = train_step(on_device, groups, name)
    assert found == pytest.approx(expected, rel=1e-3, abs=1e-5)
    torch.testing.assert_close(weights, expected_weights, atol=1e-5, rtol=0)


def test_an_explanation_runs(policies, prompts, device, tmp_path):
    settings = {"max_new_tokens": 4, "masks": 2, "heat_patches": 4, "temperature": 0.0}
    _, on_device = policies
    with device:
        on_device.model.to(CUDA)
        evaluate.explain(on_device, prompts[1], evaluate.EvalConfig(out=str(tmp_path), **settings))
    assert len(data_of(tmp_path / "explanation.html")["images"]) == 2


# ------------------------------------------------------------------------------- planted omissions

OMISSIONS = [  # a function, and a piece of its source: what follows | is left out
    (rollout._sample_chunk, "uniforms=uniforms|.to(device)"),
    (DecodingLoop.__init__, "torch.tensor(ends|, device=device"),
    (Policy.per_group, "of_groups = values|.cpu()"),
    (papo.pack_loss, "has_image=has_image(pack)|.to(policy.device)"),
]


@pytest.fixture()
def step_without(policy, groups, device, plant):
    """step_without(function, piece) leaves out what follows | in the piece, and takes a step."""

    def plant_and_run(function, piece):
        before, left_out = piece.split("|")
        plant(function, before + left_out, before)
        with device:
            policy.model.to(CUDA)
            sample(policy, [group.prompt for group in groups])
            train_step(policy, groups, "papo_g")

    return plant_and_run


@pytest.mark.parametrize("omission", OMISSIONS, ids=lambda each: f"{each[0].__name__}: {each[1]}")
def test_an_omission_raises(step_without, omission):
    with pytest.raises(RuntimeError, match=MIXED):
        step_without(*omission)


def test_a_slow_omission_is_counted(step_without, device):
    """CUDA takes an index from the host, and copies it every time."""
    step_without(packing.build_pack, "torch.cat(predicts)|.to(device)")
    assert copied_indices(device)
