"""distributed.py: meshes of many ranks, and what is set up for CUDA without one."""

import os
from unittest.mock import MagicMock

import pytest
import torch
import torch.distributed as dist
from conftest import process_restored, run_flags
from torch.testing._internal.distributed.fake_pg import FakeStore

import evaluate
import train
from support import distributed
from support.protocol import EvalConfig
from support.qwen_vl import Policy


@pytest.fixture()
def twelve_ranks():
    """This process as the first of twelve ranks; the others, and all communication, are fake."""
    dist.init_process_group("fake", store=FakeStore(), rank=0, world_size=12)
    yield
    dist.destroy_process_group()


@pytest.mark.parametrize("machines, shape", [([12], (12,)), ([8, 4], (3, 4)), ([7, 5], (12, 1))])
def test_weights_are_sharded_within_machines_by_default(twelve_ranks, monkeypatch, machines, shape):
    """`machines`: the number of ranks on each."""
    local_sizes = [ranks for ranks in machines for _ in range(ranks)]
    monkeypatch.setattr(distributed, "gather_over_ranks", lambda value: local_sizes)
    assert distributed.make_mesh("cpu").shape == shape
    with pytest.raises(ValueError, match="shard_size=5: must divide the number of ranks, 12; choi"):
        distributed.make_mesh("cpu", 5)


def test_cudnn_attention_is_off_and_each_process_has_a_gpu(monkeypatch):
    torch.backends.cuda.enable_cudnn_sdp(True)
    with process_restored():
        distributed.init_distributed()
    assert not torch.backends.cuda.cudnn_sdp_enabled()
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 4)
    monkeypatch.setenv("LOCAL_RANK", "4")
    with pytest.raises(ValueError, match="above this machine's number of GPUs, 4"):
        distributed.init_distributed()


def test_a_gpu_that_torch_cannot_use_is_an_error(monkeypatch, tmp_path):
    """Unless there is none, torch has no CUDA, or the user wants the CPU."""
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    monkeypatch.setattr(torch.version, "cuda", "13.0")
    monkeypatch.setattr(distributed, "NVIDIA_DRIVER", tmp_path)
    with pytest.raises(ValueError, match="cannot use this machine's GPU"):
        distributed.check_cuda()
    for owner, name, value in [
        (distributed, "NVIDIA_DRIVER", tmp_path / "none"),
        (torch.version, "cuda", None),
        (os, "environ", {"CUDA_VISIBLE_DEVICES": ""}),
    ]:
        with monkeypatch.context() as patch:
            patch.setattr(owner, name, value)
            distributed.check_cuda()


def test_a_step_in_bf16(one_rank, folder, encoder, groups):
    """Layers compute in bf16, also when recomputed, and round no more than a model stored in bf16:
    FSDP2 would also round what is passed to its units, such as the angles of the vision tower.
    Weights, gradients, moments and log-probs are fp32. (test_ranks.py sums gradients in fp32.)"""
    plain = Policy.load(folder, encoder, torch.bfloat16)
    policy = Policy.load(folder, encoder, checkpointing=True)
    policy.model.train()
    seen = []

    def note(module, args, out):
        seen.append({x.dtype for x in [*args, out] if isinstance(x, torch.Tensor)})

    distributed.shard(policy.model, distributed.make_mesh("cpu"), torch.bfloat16)
    for block in distributed.fsdp_blocks(policy.model):
        for module in block.modules():
            if not list(module.children()):
                module.register_forward_hook(note)
    log_probs = policy.log_probs(groups[:1])
    n_forward = len(seen)
    with torch.no_grad():
        assert torch.equal(log_probs, plain.log_probs(groups[:1]))
    log_probs.sum().backward()
    optimizer = torch.optim.AdamW(policy.model.parameters())
    optimizer.step()
    assert len(seen) > 1.5 * n_forward and all(each == {torch.bfloat16} for each in seen)
    gradients = [parameter.grad.to_local() for parameter in policy.model.parameters()]
    moments = [x for state in optimizer.state.values() for x in state.values()]
    for tensor in (log_probs, *policy.model.parameters(), *gradients, *moments):
        assert tensor.dtype == torch.float32


def test_ranks_wait_for_the_longest_scoring(folder, tmp_path, record_calls):
    """That of a round, or of a chunk of an evaluation, on top of half an hour."""
    calls = record_calls(dist, "init_process_group")
    with process_restored():
        train.build_run(run_flags(folder, tmp_path / "run", "--reward_budget 5000")).grader.close()
    with process_restored():
        evaluate.load(EvalConfig(folder, "toy"))
    waits = [options["timeout"].total_seconds() - 30 * 60 for _, options in calls]
    assert waits == [5000, evaluate.SCORING_SECONDS]


def test_evaluation_loads_one_rank_at_a_time(folder, monkeypatch):
    """Host memory holds one copy of the weights at a time."""
    turn, load = MagicMock(), Policy.load

    def load_in_turn(*args):
        assert turn().__enter__.called and not turn().__exit__.called
        return load(*args)

    monkeypatch.setattr(distributed, "one_rank_at_a_time", turn)
    monkeypatch.setattr(Policy, "load", load_in_turn)
    with process_restored():
        evaluate.load(EvalConfig(folder, "toy", eval_rows=1))
    assert turn().__exit__.called
