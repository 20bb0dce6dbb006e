"""What decoding may cost: operations, memory, waits of the host, hooks of FSDP, shapes of SDPA.

test_rollout.py checks what is sampled, test_device.py that CUDA would sample the same.
"""

import pytest
import torch
from conftest import process_restored
from pretend_device import CUDA
from torch.nn import functional as F
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from rollout import generate
from support import decoding, distributed
from support.batch import Example
from support.decoding import DecodingLoop, GroupedCache

OPERATIONS = 300  # per step of the toy with top-p; today 57 for each of 4 layers, and 47 more


class Recorder(TorchDispatchMode):
    """Lists the operations that compute something, and the bytes of memory that each one takes."""

    def __init__(self):
        super().__init__()
        self.calls = []

    def __torch_dispatch__(self, operation, types, args=(), kwargs=None):
        result = operation(*args, **(kwargs or {}))
        before, after = storages(args), storages(result)
        nbytes = sum(storage.nbytes() for storage in after - before)
        if nbytes or operation._schema.is_mutable:
            self.calls.append((str(operation), nbytes))
        return result


def storages(values):
    tensors = [each for each in tree_leaves(values) if isinstance(each, torch.Tensor)]
    return {tensor.untyped_storage() for tensor in tensors}


@pytest.fixture()
def record(monkeypatch):
    """record(name) lists the recorded calls of each call of DecodingLoop's method `name`."""

    def install(name):
        original, recorded = getattr(DecodingLoop, name), []

        def method(self, *args):
            with Recorder() as recorder:
                result = original(self, *args)
            recorded.append(recorder.calls)
            return result

        monkeypatch.setattr(DecodingLoop, name, method)
        return recorded

    return install


@pytest.fixture()
def endless_policy(policy):
    """Its responses never end: its only end token is one that is never sampled."""
    policy.eos_ids = policy.suppressed_ids[:1]
    return policy


@pytest.fixture()
def long_prompts(encoder):
    """Two prompts of more than 500 tokens, longer than the vocabulary."""
    questions = ["How many dots are there" + " really" * n + "?" for n in (100, 85)]
    return [encoder.encode(Example(text, "1", []), i) for i, text in enumerate(questions)]


# --------------------------------------------------------------------------------------- operations


def test_a_step_has_few_operations(endless_policy, prompts, record):
    steps = record("step")
    generate(endless_policy, prompts, 2, max_new_tokens=20, top_p=0.9)
    assert len(steps) < 20  # most are replays
    for calls in steps:
        assert len(calls) <= OPERATIONS


def test_sdpa_is_called_while_prefilling_only(endless_policy, prompts, record_calls):
    """As often, and with the same shapes, however many tokens are decoded: on CUDA cuDNN would
    build a plan for every new shape."""
    calls = record_calls(F, "scaled_dot_product_attention")
    shapes = []
    for max_new_tokens in (1, 20):
        calls.clear()
        generate(endless_policy, prompts, 2, max_new_tokens=max_new_tokens)
        shapes.append([[tensor.shape for tensor in args] for args, _ in calls])
    assert shapes[0] == shapes[1] != []


# ------------------------------------------------------------------------------------------- memory


def check_memory(policy, prompts, runs):
    """No operation of decoding takes more memory than the keys of one layer."""
    group_size, steps = 4, 20
    generate(policy, prompts, group_size, max_new_tokens=steps)
    config = policy.model.config.get_text_config()
    keys_per_token = decoding.cache_bytes_per_token(config, 4) // (2 * config.num_hidden_layers)
    n_tokens = len(prompts) * (max(map(len, prompts)) + group_size * steps)
    [calls] = runs
    for operation, nbytes in calls:
        assert nbytes <= n_tokens * keys_per_token, operation


def test_decoding_makes_nothing_larger_than_the_keys_of_a_layer(
    endless_policy, long_prompts, record
):
    assert min(map(len, long_prompts)) > 500
    check_memory(endless_policy, long_prompts, record("run"))


COPIES = {
    "per response": "self.prompts[layer][0][self.prompt_of]",
    "per query head": "self.prompts[layer][0].repeat_interleave(2, 1)",
}


@pytest.mark.parametrize("copied", COPIES.values(), ids=COPIES)
def test_a_copy_of_the_prompts_keys_is_noticed(endless_policy, long_prompts, record, plant, copied):
    line = "keys, values = self.generated[layer]"
    plant(GroupedCache.attend, line, f"{line}; {copied}")
    with pytest.raises(AssertionError, match="aten"):
        check_memory(endless_policy, long_prompts, record("run"))


# ---------------------------------------------------------------------------------------- the host


@pytest.mark.parametrize("block, n_blocks", [(2, 6), (6, 2)])
def test_the_host_waits_once_per_block(
    endless_policy, prompts, device, monkeypatch, block, n_blocks
):
    """For values; beside that, all tokens and log-probs are fetched at the end."""
    monkeypatch.setitem(decoding.BLOCK, "cuda", block)
    with device:
        endless_policy.model.to(CUDA)
        generate(endless_policy, prompts, 2, max_new_tokens=12, top_p=0.9)
    waits = {"value": 0, "shape": 0, "download": 0}
    for line, count in device.syncs.items():
        kind, file, _ = line.split(": ", 2)
        if file == "decoding.py" and kind in waits:
            waits[kind] += count
    assert waits == {"value": n_blocks, "shape": 0, "download": 3}


# -------------------------------------------------------------------------------------------- FSDP


def test_no_unit_of_fsdp_is_called_while_decoding(endless_policy, prompts):
    """Each one runs once per prefill, and its hooks with it; responses stay the same."""
    policy = endless_policy
    options = {"max_new_tokens": 20, "top_p": 0.9}
    expected = generate(policy, prompts, 2, **options)
    with process_restored():
        distributed.init_distributed()
        distributed.shard(policy.model, distributed.make_mesh("cpu"), torch.float32)
        units = distributed.fsdp_blocks(policy.model)
        calls = []
        for unit in units:
            unit.register_forward_pre_hook(lambda unit, args: calls.append(unit))
        groups = generate(policy, prompts, 2, **options)
    assert calls == units
    for ours, theirs in zip(groups, expected, strict=True):
        assert torch.equal(ours.tokens, theirs.tokens)
