"""What a decoding step may not do, because a GPU would be slow or wrong.

test_rollout.py checks what is sampled, test_device.py that CUDA would sample the same.
"""

from contextlib import nullcontext
from unittest.mock import Mock

import pytest
import torch
from conftest import generate
from pretend_device import CUDA
from torch.nn import functional as F
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from support import decoding, distributed
from support.batch import Example, pad_and_cat
from support.decoding import DecodingLoop


class Recorder(TorchDispatchMode):
    """Lists the operations, with shapes, numbers and the addresses of what was there before."""

    def __init__(self):
        super().__init__()
        self.calls, self.made, self.largest = [], set(), 0

    def __torch_dispatch__(self, operation, types, args=(), kwargs=None):
        result = operation(*args, **(kwargs or {}))
        given, out = tree_leaves((args, kwargs)), tensors(result)
        numbers = [each for each in given if not isinstance(each, torch.Tensor)]
        old = [x.data_ptr() for x in tensors(given) if x.untyped_storage() not in self.made]
        shapes = [x.shape for x in tensors(given) + out]
        self.calls.append((str(operation), shapes, numbers, old))
        new = {x.untyped_storage() for x in out} - {x.untyped_storage() for x in tensors(given)}
        self.made |= new
        self.largest = max([self.largest, *(storage.nbytes() for storage in new)])
        return result


def tensors(values):
    return [each for each in tree_leaves(values) if isinstance(each, torch.Tensor)]


@pytest.fixture()
def endless_policy(policy):
    """Its responses never end: its only end token is one that is never sampled."""
    policy.eos_ids = policy.suppressed_ids[:1]
    return policy


def sample_tokens(policy, prompts, **options):
    groups = generate(policy, prompts, 3, **{"max_new_tokens": 20, "top_p": 0.9} | options)
    return pad_and_cat(groups, "tokens")


def test_a_step_can_be_replayed(endless_policy, encoder, monkeypatch):
    """All steps of a block are the same operations on the same memory, and none makes anything as
    large as the keys of one layer. The prompts are longer than the vocabulary."""
    original, steps = DecodingLoop.step, []

    def step(self):
        with Recorder() as recorder:
            original(self)
        steps.append(recorder.calls)
        assert recorder.largest < self.cache.layers[0][0].nbytes

    monkeypatch.setattr(DecodingLoop, "step", step)
    monkeypatch.setitem(decoding.BLOCK, "cpu", 5)
    questions = ["How many dots are there" + " really" * n + "?" for n in (100, 85)]
    prompts = [encoder.encode(Example(text, "1", []), i) for i, text in enumerate(questions)]
    sample_tokens(endless_policy, prompts, max_new_tokens=10)
    assert len(steps) == 10
    assert steps[:5] == [steps[0]] * 5 and steps[5:] == [steps[5]] * 5


def test_a_step_is_taken_once_then_recorded_and_replayed(monkeypatch):
    graph, step = Mock(), Mock()
    monkeypatch.setattr(torch.cuda, "CUDAGraph", lambda: graph)
    monkeypatch.setattr(torch.cuda, "graph", lambda graph, **options: nullcontext())
    assert decoding.repeat(step, 5, CUDA) is graph
    assert (step.call_count, graph.replay.call_count) == (2, 4)


def test_the_host_waits_once_per_block(endless_policy, prompts, device, monkeypatch):
    """For the number of groups left; beside that, tokens and log-probs are fetched at the end."""
    monkeypatch.setitem(decoding.BLOCK, "cuda", 2)
    with device:
        endless_policy.model.to(CUDA)
        sample_tokens(endless_policy, prompts, max_new_tokens=12)
    waits = {"value": 0, "shape": 0, "download": 0}
    for line, count in device.syncs.items():
        kind, file, _ = line.split(": ", 2)
        if file == "decoding.py" and kind in waits:
            waits[kind] += count
    assert waits == {"value": 0, "shape": 6, "download": 2}


def test_cudas_attention_is_allowed_for(varied_policy, prompts, groups, monkeypatch):
    """CUDA's SDPA gives NaN for a query without a key, and its result lies in memory as
    [B, S, H, D]."""
    expected = varied_policy.log_probs(groups), sample_tokens(varied_policy, prompts)
    attend = F.scaled_dot_product_attention

    def as_on_cuda(*args, attn_mask=None, **options):
        out = attend(*args, attn_mask=attn_mask, **options)
        if attn_mask is not None:
            out = out.where(attn_mask.isfinite().any(-1, keepdim=True), torch.nan)
        return out.transpose(1, 2).contiguous().transpose(1, 2)

    monkeypatch.setattr(F, "scaled_dot_product_attention", as_on_cuda)
    found = varied_policy.log_probs(groups), sample_tokens(varied_policy, prompts)
    assert all(map(torch.equal, found, expected))


def test_no_unit_of_fsdp_is_called_while_decoding(one_rank, endless_policy, prompts):
    """Each one runs once per prefill, and its hooks with it; responses stay the same."""
    policy, calls = endless_policy, []
    expected = sample_tokens(policy, prompts)
    distributed.shard(policy.model, distributed.make_mesh("cpu"), torch.float32)
    units = distributed.fsdp_blocks(policy.model)
    for unit in units:
        unit.register_forward_pre_hook(lambda unit, args: calls.append(unit))
    assert torch.equal(sample_tokens(policy, prompts), expected)
    assert calls == units
