"""What CUDA would do with the code, shown on a CPU by a pretend device (pretend_device.py).

A whole step gives what it gives on a CPU; then one omission is planted, which it must notice.
"""

import copy

import pytest
import torch
from conftest import generate
from pretend_device import CUDA, MIXED
from test_packing import reference_varlen
from test_pages import data_of

import evaluate
import papo
from papo import prepare, preset, update
from support import decoding, lora, packing
from support.batch import cat_view, mini_batches

# ---------------------------------------------------------------------------- the step, as on a CPU


@pytest.fixture()
def policies(varied_policy):
    """The same policy twice: one stays on the CPU."""
    varied_policy.eos_ids = list(range(0, 400, 4))  # groups end at different times
    return varied_policy, copy.deepcopy(varied_policy)


def sample(policy, prompts):
    return generate(policy, prompts, 3, max_new_tokens=13, key=(0, 1), top_p=0.9)


def test_sampling_equals_the_cpus(policies, prompts, device, monkeypatch):
    """With several images or none, and a last block of a single step."""
    policy, on_device = policies
    expected = sample(policy, prompts)
    monkeypatch.setitem(decoding.BLOCK, "cuda", 4)
    with device:
        on_device.model.to(CUDA)
        found = sample(on_device, prompts)
    both = ([(x.tokens, x.sample_log_probs) for x in groups] for groups in (found, expected))
    torch.testing.assert_close(*both, atol=1e-4, rtol=0)
    assert len({int(group.response_mask.sum(1).max()) for group in found}) > 2


def train_step(policy, groups, name):
    """Metrics of one step of two mini-batches, and the weights after it on the host."""
    algo = preset(name)
    policy.tokens_per_forward = 150
    optimizer = torch.optim.AdamW(policy.model.parameters(), lr=1e-3, eps=1e-4)
    batches = mini_batches(groups, 2)
    prepare(policy, policy, batches, algo, key=(0, 0))
    metrics = update(policy, optimizer, batches, algo)
    return metrics, [parameter.detach().cpu() for parameter in policy.model.parameters()]


def checked_kernel(*inputs, **options):
    assert all(tensor.is_cuda for tensor in inputs[:5])  # q, k, v and both boundaries
    return reference_varlen(*inputs, **options)


@pytest.mark.parametrize("name, kernel", [("papo_g", checked_kernel), ("dyco_rl", None)])
def test_a_training_step_equals_the_cpus(policies, groups, device, monkeypatch, name, kernel):
    """With log-probs of a reference, checkpointing, and a text-only row."""
    policy, on_device = policies
    for each in policies:
        each.model.gradient_checkpointing_enable({"use_reentrant": False})
    expected, expected_weights = train_step(policy, copy.deepcopy(groups), name)
    monkeypatch.setattr(packing, "varlen_kernel", lambda query: kernel)
    with device:
        on_device.model.to(CUDA)
        found, weights = train_step(on_device, groups, name)
    assert found == pytest.approx(expected, rel=1e-3, abs=1e-5)
    torch.testing.assert_close(weights, expected_weights, atol=1e-5, rtol=0)


def test_an_explanation_runs(policies, prompts, device, tmp_path):
    """With adapters, whose random numbers a CPU's generator has to draw on the CPU."""
    settings = {"max_new_tokens": 4, "masks": 2, "heat_patches": 4, "temperature": 0.0}
    _, on_device = policies
    with device:
        on_device.model.to(CUDA)
        lora.add_adapters(on_device.model, 4, 8.0, "source")
        evaluate.explain(on_device, prompts[1], evaluate.EvalConfig(out=str(tmp_path), **settings))
    assert len(data_of(tmp_path / "explanation.html")["images"]) == 2


def test_an_omission_raises(policy, groups, device, monkeypatch):
    """So that the other tests here mean something: masked log-probs are left on the host."""
    monkeypatch.setattr(papo, "cat_view", lambda pack, view, device: cat_view(pack, view))
    with device, pytest.raises(RuntimeError, match=MIXED):
        policy.model.to(CUDA)
        train_step(policy, groups, "papo_g")
