"""Saving, resuming and stopping: on full disks, with damaged files, after signals and crashes."""

import fcntl
import itertools
import json
import os
import re
import resource
import shutil
import signal
import socket
import subprocess
import time
import weakref
from contextlib import contextmanager, nullcontext
from pathlib import Path

import faults
import pytest
import torch
import torch.distributed as dist
from conftest import (
    ENVIRONMENT,
    ROOT,
    TORCHRUN,
    check_same_metrics,
    check_same_weights,
    lines_with,
    metric_lines,
    on_ranks,
    process_restored,
    run_flags,
)
from torch.distributed.tensor import DTensor

import evaluate
import train
from support import checkpoint, decoding, distributed
from support import run as run_module
from support.qwen_vl import Policy

FAULTY_RANK = Path(__file__).parent / "faulty_rank.py"


@contextmanager
def full_disk(limit=2000):
    """No file may grow past `limit` bytes: writing fails as it does on a full disk."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (limit, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


def checkpoint_names(run_folder):
    return sorted(path.name for path in (run_folder / "checkpoints").iterdir())


# ----------------------------------------------------------------------------- checkpoints and logs


@pytest.fixture()
def model_and_optimizer():
    """A small model after one optimizer step, in a process group of one rank."""
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    model = torch.nn.Linear(64, 64)
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.1)
    model(torch.ones(1, 64)).sum().backward()
    optimizer.step()
    yield model, optimizer
    dist.destroy_process_group()


def test_the_newest_checkpoints_are_kept_and_leftovers_deleted(model_and_optimizer, tmp_path):
    for name in (".step_000001", ".step_000009"):  # as a killed save and deletion leave them
        leftover = tmp_path / "checkpoints" / name
        leftover.mkdir(parents=True)
        (leftover / "state.json").write_text("{")
    for step in range(1, 5):
        state = {"step": step, "position": 7 * step}
        checkpoint.save(tmp_path, *model_and_optimizer, state, keep=2)
    assert checkpoint_names(tmp_path) == ["step_000003", "step_000004"]
    complete = checkpoint.complete(tmp_path)
    assert [path.name for path in complete] == ["step_000003", "step_000004"]
    assert checkpoint.load(complete[-1], *model_and_optimizer) == {"step": 4, "position": 28}


def test_offloaded_optimizer_state_comes_back(model_and_optimizer):
    """In the same tensors, with the same values, even after an error inside the block."""
    _, optimizer = model_and_optimizer

    def state_tensors():
        return [tensor for state in optimizer.state.values() for tensor in state.values()]

    tensors = state_tensors()
    values = [tensor.clone() for tensor in tensors]
    assert len(tensors) >= 4
    offload = distributed.OptimizerOffload(optimizer)
    with pytest.raises(ZeroDivisionError), offload.active():
        assert all(tensor.untyped_storage().nbytes() == 0 for tensor in tensors)
        raise ZeroDivisionError
    assert [id(tensor) for tensor in state_tensors()] == [id(tensor) for tensor in tensors]
    assert all(map(torch.equal, tensors, values))

    buffer = offload.buffer
    for tensor in tensors:
        tensor += 1
    with offload.active():
        pass
    assert offload.buffer is buffer  # pinned memory is kept
    assert all(
        torch.equal(tensor, value + 1) for tensor, value in zip(tensors, values, strict=True)
    )
    with distributed.OptimizerOffload(optimizer, enabled=False).active():
        assert all(tensor.untyped_storage().nbytes() > 0 for tensor in tensors)


def test_offloading_before_the_first_step(model_and_optimizer):
    model, _ = model_and_optimizer
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.1)
    offload = distributed.OptimizerOffload(optimizer)
    with offload.active():
        pass
    optimizer.step()
    exp_avg = optimizer.state[model.weight]["exp_avg"]
    before = exp_avg.clone()
    with offload.active():
        assert exp_avg.untyped_storage().nbytes() == 0
    assert torch.equal(exp_avg, before)


def test_a_failed_save_leaves_earlier_checkpoints(model_and_optimizer, tmp_path):
    checkpoint.save(tmp_path, *model_and_optimizer, {"step": 1}, keep=1)
    with full_disk(), pytest.raises(OSError) as error:
        checkpoint.save(tmp_path, *model_and_optimizer, {"step": 2}, keep=1)
    assert "rank 0" in str(error.value)
    assert "\n" not in str(error.value)
    assert checkpoint_names(tmp_path) == ["step_000001"]
    checkpoint.save(tmp_path, *model_and_optimizer, {"step": 2}, keep=1)
    assert checkpoint_names(tmp_path) == ["step_000002"]


def test_an_unwritable_folder_is_an_os_error(model_and_optimizer, tmp_path):
    (tmp_path / "checkpoints").write_text("a file where the folder should be")
    with pytest.raises(OSError):
        checkpoint.save(tmp_path, *model_and_optimizer, {"step": 1}, keep=1)


@pytest.mark.parametrize("damaged", ["*.distcp", ".metadata", "state.json"])
@pytest.mark.parametrize("kept_bytes", [0, 100])
def test_a_damaged_checkpoint_is_named(model_and_optimizer, tmp_path, damaged, kept_bytes):
    state = {"step": 1, "position": list(range(100))}
    checkpoint_dir = checkpoint.save(tmp_path, *model_and_optimizer, state, keep=1)
    for file in checkpoint_dir.glob(damaged):
        file.write_bytes(file.read_bytes()[:kept_bytes])
    message = "step_000001 cannot be read: delete it to resume from the one before"
    with pytest.raises(OSError, match=message):
        checkpoint.load(checkpoint_dir, *model_and_optimizer)


def test_an_export_that_fills_the_disk_is_an_os_error(policy, folder, tmp_path, monkeypatch):
    """safetensors reports it as an error of its own."""
    with process_restored():
        distributed.init_distributed()
        with full_disk(100_000), pytest.raises(OSError, match="too large|No space"):
            checkpoint.export(policy.model, folder, tmp_path / "model", torch.float32)
    assert not (tmp_path / "model").exists()


def test_the_export_gathers_one_tensor_at_a_time(policy, monkeypatch):
    """Host memory holds the converted weights, and never a second fp32 tensor."""
    gathered, original = [], DTensor.full_tensor

    def full_tensor(self):
        assert all(earlier() is None for earlier in gathered)
        tensor = original(self)
        gathered.append(weakref.ref(tensor))
        return tensor

    monkeypatch.setattr(DTensor, "full_tensor", full_tensor)
    expected = policy.model.lm_head.weight.bfloat16()
    with process_restored():
        distributed.init_distributed()
        distributed.shard(policy.model, distributed.make_mesh("cpu"), torch.float32)
        weights = checkpoint.gather_weights(policy.model, torch.bfloat16)
    assert len(gathered) == len(weights) > 50
    assert all(tensor.dtype == torch.bfloat16 for tensor in weights.values())
    assert "lm_head.weight" not in weights  # tied: stored once
    assert torch.equal(weights["model.language_model.embed_tokens.weight"], expected)


def test_log_lines_survive_a_full_disk_and_a_kill(tmp_path, capsys):
    path = tmp_path / "metrics.jsonl"
    lines = [json.dumps({"step": step, "text": "x" * 50}) + "\n" for step in range(4)]
    assert run_module.append(path, lines[:1]) == []
    with full_disk(100):
        waiting = run_module.append(path, lines[1:2])
        waiting = run_module.append(path, waiting + lines[2:3])
    assert waiting == lines[1:3]
    assert path.read_text() == lines[0]
    assert "wait to be written" in capsys.readouterr().err
    assert run_module.append(path, waiting + lines[3:]) == []
    assert path.read_text() == "".join(lines)

    path.write_text("".join(lines) + '{"step": 4, "te')  # killed in the middle of a line
    assert [line["step"] for line in run_module.rewind(path, 2)] == [0, 1, 2]
    assert path.read_text() == "".join(lines[:3])


# --------------------------------------------------------------------------------- runs on one rank


def test_training_continues_when_a_save_fails(run, monkeypatch, capsys):
    original_save = train.Run.save

    def save(self):
        with full_disk(50_000) if self.step == 3 else nullcontext():
            original_save(self)

    monkeypatch.setattr(train.Run, "save", save)
    out = run("full", "--steps 4 --save_every 1 --eval_every 0 --keep 3")
    [error] = lines_with(capsys.readouterr().err, "error:")
    assert error.startswith("error: step 3 is not saved, training goes on: rank 0: ")
    assert checkpoint_names(out) == ["step_000001", "step_000002", "step_000004"]
    assert [line["step"] for line in metric_lines(out)] == [1, 2, 3, 4]


@pytest.fixture(scope="module")
def uninterrupted(folder, tmp_path_factory):
    """The run that interrupted ones are compared with."""
    out = tmp_path_factory.mktemp("runs") / "uninterrupted"
    with process_restored():
        train.main(run_flags(folder, out, "--steps 3 --save_every 3"))
    return out


@pytest.mark.parametrize(
    "module, function, call, last_step",
    [(train, "generate", 2, 1), (train, "grade", 2, 1), (evaluate, "generate", 2, 0)],
    ids=["sampling", "scoring", "evaluation"],
)
def test_a_signal_loses_nothing(
    run, uninterrupted, monkeypatch, capsys, module, function, call, last_step
):
    """SIGTERM while sampling, scoring or evaluating: saved at once, resumed to the same run."""
    original, calls = getattr(module, function), itertools.count(1)

    def signalled(*args, **kwargs):
        if next(calls) == call:
            signal.raise_signal(signal.SIGTERM)
        return original(*args, **kwargs)

    monkeypatch.setattr(module, function, signalled)
    out = run("stopped", "--steps 3 --save_every 3")
    monkeypatch.setattr(module, function, original)
    assert checkpoint_names(out) == [f"step_{last_step:06d}"]
    assert f"stopped after step {last_step}" in capsys.readouterr().out
    assert not (out / "model").exists()
    train.main(["--resume", str(out)])
    check_same_metrics(uninterrupted, out)
    check_same_weights(uninterrupted, out)


@pytest.mark.parametrize(
    "owner, function, phase, flag",
    [
        (Policy, "log_probs", "log-probs", "--tokens_per_forward"),
        (decoding, "prefill", "sampling", "--rollout_batch"),
        (Policy, "load", "loading", "smaller model"),
    ],
)
def test_out_of_memory_names_the_phase_and_the_flag(run, monkeypatch, owner, function, phase, flag):
    def out_of_memory(*args, **kwargs):
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 GiB.")

    monkeypatch.setattr(owner, function, out_of_memory)
    message = f"rank 0: out of memory while {phase}.*{flag}.*20.00 GiB"
    with pytest.raises(SystemExit, match=message):
        run("oom", "--steps 1 --eval_every 0")


def test_a_finished_run_without_a_checkpoint_is_kept(run, capsys):
    out = run("unsaved", "--steps 1 --eval_every 0 --save_every 0")
    before = (out / "metrics.jsonl").read_bytes()
    with pytest.raises(SystemExit):
        train.main(["--resume", str(out), "--steps", "2"])
    assert "unsaved has a model but no checkpoint: nothing to resume" in capsys.readouterr().err
    assert (out / "metrics.jsonl").read_bytes() == before
    dist.destroy_process_group()
    shutil.rmtree(out / "model")  # as if it had been killed
    train.main(["--resume", str(out), "--steps", "2"])
    assert "unsaved has no checkpoint: starting at step 0" in capsys.readouterr().out
    assert [line["step"] for line in metric_lines(out)] == [1, 2]


def test_a_folder_without_locks_is_used_with_a_warning(tmp_path, monkeypatch, capsys):
    def no_locks(file, operation):
        raise OSError(38, "Function not implemented")

    monkeypatch.setattr(fcntl, "flock", no_locks)
    run_module.lock(tmp_path).close()
    assert f"{tmp_path} cannot be locked" in capsys.readouterr().err
    assert "process" in (tmp_path / ".lock").read_text()


def test_two_processes_cannot_share_a_run_folder(run, capsys):
    """A killed torchrun's workers may still hold it when the job is started again."""
    out = run("shared", "--steps 1 --eval_every 0")
    before = (out / "metrics.jsonl").read_bytes()
    holder = run_module.lock(out)
    with pytest.raises(SystemExit):
        train.main(["--resume", str(out), "--steps", "2"])
    error = capsys.readouterr().err.strip().splitlines()[-1]
    assert f"{out} is in use by process {os.getpid()} on " in error
    assert (out / "metrics.jsonl").read_bytes() == before
    dist.destroy_process_group()
    holder.close()  # as when the process ends
    train.main(["--resume", str(out), "--steps", "2"])
    assert [line["step"] for line in metric_lines(out)] == [1, 2]


# ------------------------------------------------------------------------------------ several ranks


@pytest.mark.slow
def test_a_full_disk_on_one_rank_and_resuming_on_other_numbers(run, folder, tmp_path):
    """Two ranks, then one, then two replicas: the numbers of one rank throughout."""
    out, flags = tmp_path / "changing", "--eval_every 0 --save_every 1"
    args = run_flags(folder, out, f"{flags} --steps 2")
    done = on_ranks(2, *args, script=FAULTY_RANK, FAULT="full_disk")
    assert done.returncode == 0, done.stderr[-3000:]
    [error] = lines_with(done.stderr, "error:")
    assert error.startswith("error: step 1 is not saved, training goes on: rank 1: ")
    assert checkpoint_names(out) == ["step_000002"]
    one_rank = run("one_rank", f"{flags} --steps 4")
    train.main(["--resume", str(out), "--steps", "3"])
    done = on_ranks(2, "--resume", str(out), "--steps", "4", "--shard_size", "1")
    assert done.returncode == 0, done.stderr[-3000:]
    check_same_metrics(one_rank, out, rel=1e-3, abs=1e-5)


@pytest.mark.slow
def test_a_crashed_rank_ends_the_job_at_once(folder, tmp_path):
    args = run_flags(folder, tmp_path / "crashed", "--steps 3 --eval_every 0")
    done = on_ranks(2, *args, script=FAULTY_RANK, FAULT="crash")
    crashed_at = float(re.search(r"crashed at ([\d.]+)", done.stderr)[1])
    assert done.returncode != 0
    assert time.time() - crashed_at < 25, done.stderr[-3000:]
    error = re.compile(r"^(?:\[rank\d\]:? ?)?(\w*(?:Error|Exception)\b.*)", re.MULTILINE)
    assert error.search(done.stderr)[1] == "ZeroDivisionError: something broke on rank 1"


@pytest.mark.slow
def test_two_machines_give_the_metrics_of_one(folder, tmp_path):
    """Two torchrun agents with one rank each, a replica on each, and one agent with two ranks."""
    with socket.socket() as free:
        free.bind(("localhost", 0))
        port = free.getsockname()[1]
    rendezvous = f"--rdzv_backend c10d --rdzv_id papo --rdzv_endpoint localhost:{port}".split()
    two_machines, one_machine = tmp_path / "two", tmp_path / "one"
    flags = "--steps 2 --eval_every 0"
    command = [*TORCHRUN, "--nnodes", "2", "--nproc_per_node", "1", *rendezvous]
    command += [str(ROOT / "train.py"), *run_flags(folder, two_machines, flags)]
    agents = [
        subprocess.Popen(command, env=ENVIRONMENT, stderr=subprocess.PIPE, text=True)
        for _ in range(2)
    ]
    errors = [agent.communicate(timeout=300)[1] for agent in agents]
    assert [agent.returncode for agent in agents] == [0, 0], errors
    done = on_ranks(2, *run_flags(folder, one_machine, flags))
    assert done.returncode == 0, done.stderr[-3000:]
    check_same_metrics(two_machines, one_machine, rel=1e-3, abs=1e-5)


@pytest.mark.slow
def test_kills_at_random_moments(folder, tmp_path):
    """Three SIGKILLs and resumes, one of them during a save; tests/faults.py does twenty."""
    result = faults.compare_with_killed(folder, tmp_path, kills=3, ranks=1, steps=8)
    moments = result.pop("during")
    assert moments[0] == "saving"
    assert all(result.values()), (moments, result)
