"""What a decoding step may not do, because a GPU would be slow or wrong.

test_rollout.py checks what is sampled, test_device.py that CUDA would sample the same.
"""

import weakref
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

WAITS = {torch.Tag.data_dependent_output, torch.Tag.dynamic_output_shape}


class Recorder(TorchDispatchMode):
    """Lists the operations, with shapes, numbers and the addresses of what was there before.

    `waits`: those for which a host would wait for CUDA, to read a value or a shape.
    """

    def __init__(self):
        super().__init__()
        self.calls, self.waits, self.made, self.largest = [], [], set(), 0

    def __torch_dispatch__(self, operation, types, args=(), kwargs=None):
        result = operation(*args, **(kwargs or {}))
        given, out = tree_leaves((args, kwargs)), tensors(result)
        numbers = [each for each in given if not isinstance(each, torch.Tensor)]
        old = [x.data_ptr() for x in tensors(given) if x.untyped_storage() not in self.made]
        shapes = [x.shape for x in tensors(given) + out]
        self.calls.append((str(operation), shapes, numbers, old))
        self.waits += [str(operation)] * bool(WAITS & {*operation.tags})
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
        assert not recorder.waits
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


def test_the_host_waits_once_per_block(endless_policy, prompts, monkeypatch):
    """For the number of groups left. Until then replays are queued, and their recording is kept."""
    run, keep, recordings, waits = DecodingLoop.run, DecodingLoop._keep, [], []

    def repeat(step, times, device):
        for _ in range(times):
            step()
        recording = Mock()
        recordings.append(weakref.ref(recording))
        return recording

    def keep_after_waiting(self, alive):
        assert recordings[-1]() is not None
        keep(self, alive)

    def run_and_count(self):
        with Recorder() as recorder:
            result = run(self)
        waits.extend(recorder.waits)
        return result

    monkeypatch.setattr(decoding, "repeat", repeat)
    monkeypatch.setattr(DecodingLoop, "_keep", keep_after_waiting)
    monkeypatch.setattr(DecodingLoop, "run", run_and_count)
    monkeypatch.setitem(decoding.BLOCK, "cpu", 2)
    sample_tokens(endless_policy, prompts, max_new_tokens=12)
    assert len(recordings) == len(waits) == 6


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
