"""Saving, resuming and stopping: on full disks, with damaged files, after signals and crashes."""

import fcntl
import itertools
import json
import os
import re
import resource
import signal
import socket
import subprocess
import weakref
from contextlib import contextmanager, nullcontext
from pathlib import Path

import faults
import pytest
import torch
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
from transformers import AutoModelForImageTextToText

import evaluate
import train
from support import checkpoint, distributed
from support import run as run_module
from support.qwen_vl import Policy

FAULTY_RANK = Path(__file__).parent / "faulty_rank.py"


@contextmanager
def full_disk(limit):
    """No file may grow past `limit` bytes: writing fails as it does on a full disk."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (limit, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


def checkpoint_names(run_folder):
    return sorted(path.name for path in run_folder.glob("checkpoints/*"))


# ----------------------------------------------------------------------------- checkpoints and logs


@pytest.fixture()
def one_rank():
    with process_restored():
        distributed.init_distributed()
        yield


@pytest.fixture()
def model_and_optimizer(one_rank):
    """A small model after one optimizer step."""
    model = torch.nn.Linear(64, 64)
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.1)
    model(torch.ones(1, 64)).sum().backward()
    optimizer.step()
    return model, optimizer


def test_the_newest_checkpoints_are_kept_and_leftovers_deleted(model_and_optimizer, tmp_path):
    """Killed saves leave folders without .metadata; step 1 is saved again here."""
    for name in ("step_000001", "step_000009"):
        (tmp_path / "checkpoints" / name).mkdir(parents=True)
    assert checkpoint.complete(tmp_path) == []
    left = []
    for step in (1, 2, 3):
        state = {"step": step, "position": 7 * step}
        checkpoint.save(tmp_path, *model_and_optimizer, state, keep=2)
        left.append([int(name[-6:]) for name in checkpoint_names(tmp_path)])
    assert left == [[1], [1, 2], [2, 3]]
    newest = checkpoint.complete(tmp_path)[-1]
    assert checkpoint.load(newest, *model_and_optimizer) == {"step": 3, "position": 21}


@pytest.mark.parametrize("damaged", ["*.distcp", ".metadata"])
@pytest.mark.parametrize("kept_bytes", [0, -50])
def test_a_damaged_checkpoint_is_named(model_and_optimizer, tmp_path, damaged, kept_bytes):
    checkpoint.save(tmp_path, *model_and_optimizer, {"step": 1, "position": 7}, keep=1)
    [saved] = checkpoint.complete(tmp_path)
    [file] = saved.glob(damaged)
    file.write_bytes(file.read_bytes()[:kept_bytes])
    with pytest.raises(OSError, match="step_000001 cannot be read: delete it") as error:
        checkpoint.load(saved, *model_and_optimizer)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("key", ["dtype", "torch_dtype"])
def test_the_export_keeps_the_sources_config(one_rank, policy, folder, tmp_path, key):
    """But for its dtype. So what reads the source, perhaps an older program, reads the export."""
    config = json.loads((Path(folder) / "config.json").read_text())
    config |= {key: config.pop("torch_dtype"), "unheard_of": [1]}
    source, exported = tmp_path / "source", tmp_path / "model"
    source.mkdir()
    (source / "config.json").write_text(json.dumps(config))
    checkpoint.export(policy.model, str(source), exported, torch.bfloat16)
    assert json.loads((exported / "config.json").read_text()) == config | {key: "bfloat16"}
    assert AutoModelForImageTextToText.from_pretrained(exported).dtype == torch.bfloat16


def test_an_export_that_fills_the_disk_is_an_os_error(one_rank, policy, folder, tmp_path):
    """safetensors reports it as an error of its own. An earlier export stays."""
    (tmp_path / "model" / "earlier").mkdir(parents=True)
    with full_disk(100_000), pytest.raises(OSError, match="too large|No space"):
        checkpoint.export(policy.model, folder, tmp_path / "model", torch.float32)
    assert [path.name for path in (tmp_path / "model").iterdir()] == ["earlier"]


def test_the_export_gathers_one_tensor_at_a_time(one_rank, policy, monkeypatch):
    """Host memory holds the converted weights, and never a second fp32 tensor."""
    gathered, original = [], DTensor.full_tensor

    def full_tensor(self):
        assert all(earlier() is None for earlier in gathered)
        tensor = original(self)
        gathered.append(weakref.ref(tensor))
        return tensor

    monkeypatch.setattr(DTensor, "full_tensor", full_tensor)
    distributed.shard(policy.model, distributed.make_mesh("cpu"), torch.float32)
    weights = checkpoint.gather_weights(policy.model, torch.bfloat16)
    assert len(gathered) == len(weights) > 50
    assert all(tensor.dtype == torch.bfloat16 for tensor in weights.values())


def test_log_lines_survive_a_full_disk_and_a_kill(tmp_path, capsys):
    path = tmp_path / "metrics.jsonl"
    lines = [{"step": step, "text": "x" * 50} for step in range(4)]
    run_module.append(path, lines[:1])
    with full_disk(100):
        run_module.append(path, lines[1:2])
    assert run_module.read_log(path) == lines[:1]  # no half line is left behind
    assert "error: a line of" in capsys.readouterr().err
    run_module.append(path, lines[1:])
    assert run_module.read_log(path) == lines

    path.write_text(path.read_text() + '{"step": 4, "te')  # killed in the middle of a line
    assert run_module.rewind(path, 2) == lines[:3]
    assert run_module.read_log(path) == lines[:3]


# --------------------------------------------------------------------------------- runs on one rank


def test_training_continues_when_a_save_fails(run, monkeypatch, capsys):
    original_save, left = train.Run.save, []

    def save(self):
        with full_disk(50_000) if self.step == 3 else nullcontext():
            original_save(self)
        left.append(checkpoint_names(self.folder))

    monkeypatch.setattr(train.Run, "save", save)
    out = run("full", "--steps 4 --save_every 1 --eval_every 0 --keep 1")
    [error] = lines_with(capsys.readouterr().err, "error:")
    assert error.startswith("error: the checkpoint of step 3 is not written: ")
    assert left == [["step_000001"], ["step_000002"], ["step_000002"], ["step_000004"]]
    assert [line["step"] for line in metric_lines(out)] == [1, 2, 3, 4]


def train_without_a_first_update(patch):
    """No group is left of step 1, as in dynamic sampling: AdamW has no state when it ends."""
    original = train.collect

    def collect(run, algo, step):
        groups, metrics = original(run, algo, step)
        return groups if step else [], metrics

    patch.setattr(train, "collect", collect)


@pytest.fixture(scope="module")
def uninterrupted(folder, tmp_path_factory):
    """The run that interrupted ones are compared with."""
    out = tmp_path_factory.mktemp("runs") / "uninterrupted"
    with process_restored(), pytest.MonkeyPatch.context() as patch:
        train_without_a_first_update(patch)
        train.main(run_flags(folder, out, "--steps 3 --save_every 3"))
    return out


@pytest.mark.parametrize(
    "at, number, saved",
    [
        ((train, "generate", 1), signal.SIGTERM, 0),  # after an evaluation is in the log
        ((train, "generate", 2), signal.SIGTERM, 1),
        ((train, "grade", 3), signal.SIGINT, 2),
        ((evaluate, "generate", 3), signal.SIGTERM, 2),
    ],
)
def test_a_signal_loses_nothing(run, uninterrupted, monkeypatch, capsys, at, number, saved):
    """Saved at once, but for step 0, and resumed to the same metrics and weights."""
    train_without_a_first_update(monkeypatch)
    module, function, call = at
    original, calls = getattr(module, function), itertools.count(1)

    def signalled(*args, **kwargs):
        if next(calls) == call:
            signal.raise_signal(number)
        return original(*args, **kwargs)

    monkeypatch.setattr(module, function, signalled)
    out = run("stopped", "--steps 3 --save_every 3")
    monkeypatch.setattr(module, function, original)
    assert checkpoint_names(out) == [f"step_{saved:06d}"] * (saved > 0)
    assert f"stopped after step {saved}" in capsys.readouterr().out
    assert not (out / "model").exists()
    train.main(["--resume", str(out)])
    check_same_metrics(uninterrupted, out)
    check_same_weights(uninterrupted, out)


def test_out_of_memory_is_one_line(run, monkeypatch):
    def out_of_memory(*args, **kwargs):
        raise torch.OutOfMemoryError("CUDA out of memory.\nTried to allocate 20.00 GiB.")

    monkeypatch.setattr(Policy, "log_probs", out_of_memory)
    message = "^rank 0: out of memory: lower --tokens_per_forward.*Tried to allocate 20.00 GiB.$"
    with pytest.raises(SystemExit, match=message):
        run("oom", "--steps 1 --eval_every 0")


def test_a_finished_run_without_a_checkpoint_is_kept(run, capsys):
    out = run("unsaved", "--steps 1 --eval_every 0 --save_every 0")
    before = (out / "metrics.jsonl").read_bytes()
    with pytest.raises(SystemExit):
        train.main(["--resume", str(out), "--steps", "2"])
    assert "unsaved has a model but no checkpoint: nothing to resume" in capsys.readouterr().err
    assert (out / "metrics.jsonl").read_bytes() == before


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
    assert f"{out} is in use by process {os.getpid()} on " in capsys.readouterr().err
    assert (out / "metrics.jsonl").read_bytes() == before
    holder.close()  # as when the process ends
    run_module.lock(out).close()


# ------------------------------------------------------------------------------------ several ranks


@pytest.mark.slow
def test_a_full_disk_on_one_rank_and_resuming_on_other_numbers(run, folder, tmp_path):
    """Two ranks, then one, then two replicas: the numbers of one rank throughout."""
    out, flags = tmp_path / "changing", "--eval_every 0 --save_every 1"
    args = run_flags(folder, out, f"{flags} --steps 2")
    done = on_ranks(2, *args, script=FAULTY_RANK, FAULT="full_disk")
    assert done.returncode == 0, done.stderr[-3000:]
    [error] = lines_with(done.stderr, "error:")
    assert error.startswith("error: the checkpoint of step 1 is not written: ")
    assert checkpoint_names(out) == ["step_000002"]
    one_rank = run("one_rank", f"{flags} --steps 4")
    train.main(["--resume", str(out), "--steps", "3"])
    done = on_ranks(2, "--resume", str(out), "--steps", "4", "--shard_size", "1")
    assert done.returncode == 0, done.stderr[-3000:]
    check_same_metrics(one_rank, out, rel=1e-3, abs=1e-5)


@pytest.mark.slow
def test_a_crashed_rank_ends_the_job_with_its_own_error(folder, tmp_path):
    args = run_flags(folder, tmp_path / "crashed", "--steps 3 --eval_every 0")
    done = on_ranks(2, *args, script=FAULTY_RANK, FAULT="crash")
    assert done.returncode != 0
    error = re.compile(r"^(?:\[rank\d\]:? ?)?(\w*(?:Error|Exception)\b.*)", re.MULTILINE)
    assert error.search(done.stderr)[1] == "ZeroDivisionError: something broke on rank 1"


@pytest.mark.slow
def test_two_machines_give_the_metrics_of_one(folder, tmp_path):
    """Two torchrun agents with one rank each, a replica on each, and one agent with two ranks."""
    with socket.socket() as free:
        free.bind(("localhost", 0))
        port = free.getsockname()[1]
    rendezvous = f"--rdzv_backend c10d --rdzv_id papo --rdzv_endpoint localhost:{port}".split()
    two, one, flags = tmp_path / "two", tmp_path / "one", "--steps 2 --eval_every 0"
    command = [*TORCHRUN, "--nnodes", "2", "--nproc_per_node", "1", *rendezvous]
    command += [str(ROOT / "train.py"), *run_flags(folder, two, flags)]
    agents = [
        subprocess.Popen(command, env=ENVIRONMENT, stderr=subprocess.PIPE, text=True)
        for _ in range(2)
    ]
    errors = [agent.communicate(timeout=300)[1] for agent in agents]
    assert [agent.returncode for agent in agents] == [0, 0], errors
    done = on_ranks(2, *run_flags(folder, one, flags))
    assert done.returncode == 0, done.stderr[-3000:]
    check_same_metrics(two, one, rel=1e-3, abs=1e-5)


@pytest.mark.slow
def test_kills_at_random_moments(folder, tmp_path):
    """Three SIGKILLs and resumes, one of them during a save; tests/faults.py does twenty."""
    result = faults.compare_with_killed(folder, tmp_path, kills=3, ranks=1, steps=8)
    moments = result.pop("during")
    assert moments[0] == "saving"
    assert all(result.values()), (moments, result)
