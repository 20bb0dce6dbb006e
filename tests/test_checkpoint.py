"""Saving, resuming, stopping, and the faults a long run meets: full disks, kills, damaged files, dead ranks."""

import json
import os
import re
import resource
import signal
import subprocess
import sys
import time
from contextlib import contextmanager

import pytest
import torch
import torch.distributed as dist
from test_train import ENV, ROOT, TINY, lines, reader, run, steady  # noqa: F401  (run is a fixture)
from transformers import AutoModelForImageTextToText

import rollout
import train
from support import checkpoint, distributed
from support import run as run_files
from support.qwen_vl import Policy


@pytest.fixture()
def alone():
    """A process group of one."""
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield
    dist.destroy_process_group()


@pytest.fixture()
def small(alone):
    """A plain model after one optimiser step."""
    model = torch.nn.Linear(64, 64)
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.1)
    model(torch.ones(1, 64)).sum().backward()
    optimizer.step()
    return model, optimizer


@contextmanager
def full_disk(limit=2000):
    """No file may grow past `limit` bytes: a write fails as it does on a full disk."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (limit, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


def names(folder):
    return sorted(p.name for p in (folder / "checkpoints").iterdir())


def test_the_newest_stay_and_leftovers_go(small, tmp_path):
    for left in (".step_000001", ".step_000009"):  # a save and a deletion that were killed
        (tmp_path / "checkpoints" / left).mkdir(parents=True)
        (tmp_path / "checkpoints" / left / "state.json").write_text("{")
    for step in range(1, 5):
        checkpoint.save(tmp_path, *small, {"step": step, "position": 7 * step}, keep=2)
    assert names(tmp_path) == ["step_000003", "step_000004"]
    assert [p.name for p in checkpoint.complete(tmp_path)] == names(tmp_path)
    assert checkpoint.load(checkpoint.complete(tmp_path)[-1], *small) == {"step": 4, "position": 28}


def test_parked_moments_come_back(small):
    """Gone while the block runs, the same tensors with the same values after it, an error inside it included."""
    model, optimizer = small
    tensors = [t for state in optimizer.state.values() for t in state.values()]
    before = [t.clone() for t in tensors]
    with pytest.raises(ZeroDivisionError), distributed.optimizer_offloaded(optimizer):
        assert all(t.untyped_storage().nbytes() == 0 for t in tensors)
        1 / 0  # noqa: B018
    after = [t for state in optimizer.state.values() for t in state.values()]
    assert len(before) >= 4 and all(a is t for a, t in zip(after, tensors, strict=True))
    assert all(torch.equal(a, b) for a, b in zip(after, before, strict=True))
    with distributed.optimizer_offloaded(optimizer, enabled=False):
        assert all(torch.equal(t, b) for t, b in zip(tensors, before, strict=True))


def test_a_full_disk_leaves_what_stood_there(small, tmp_path):
    model, optimizer = small
    checkpoint.save(tmp_path, model, optimizer, {"step": 1}, keep=1)
    with full_disk(), pytest.raises(OSError) as failed:
        checkpoint.save(tmp_path, model, optimizer, {"step": 2}, keep=1)
    assert "rank 0" in str(failed.value) and "\n" not in str(failed.value)
    assert names(tmp_path) == ["step_000001"]
    checkpoint.save(tmp_path, model, optimizer, {"step": 2}, keep=1)
    assert names(tmp_path) == ["step_000002"]


def test_a_folder_that_cannot_be_written(small, tmp_path):
    (tmp_path / "checkpoints").write_text("a file where the folder should be")
    with pytest.raises(OSError):
        checkpoint.save(tmp_path, *small, {"step": 1}, keep=1)


def test_a_damaged_checkpoint_is_named(small, tmp_path):
    place = checkpoint.save(tmp_path, *small, {"step": 1}, keep=1)
    for shard in place.glob("*.distcp"):
        shard.write_bytes(shard.read_bytes()[:100])
    with pytest.raises(
        OSError, match="step_000001 cannot be read: delete it to resume from the one before"
    ):
        checkpoint.load(place, *small)


def test_lines_survive_a_full_disk_and_a_kill(tmp_path, capsys):
    path = tmp_path / "metrics.jsonl"
    texts = [json.dumps({"step": step, "text": "x" * 50}) + "\n" for step in range(4)]
    assert run_files.append(path, texts[:1]) == []
    with full_disk(100):
        waiting = run_files.append(path, texts[1:2])
        waiting = run_files.append(path, waiting + texts[2:3])
    assert (
        waiting == texts[1:3]
        and path.read_text() == texts[0]
        and "wait to be written" in capsys.readouterr().err
    )
    assert run_files.append(path, waiting + texts[3:]) == [] and path.read_text() == "".join(texts)
    path.write_text("".join(texts) + '{"step": 4, "te')  # killed in the middle of a line
    assert [line["step"] for line in run_files.rewind(path, 2)] == [0, 1, 2]
    assert path.read_text() == "".join(texts[:3])


def test_training_goes_on_when_a_save_fails(run, folder, monkeypatch, capsys):  # noqa: F811
    save = train.Run.save

    def sometimes(self):
        with full_disk(50_000) if self.step == 3 else contextmanager(lambda: iter([0]))():
            save(self)

    monkeypatch.setattr(train.Run, "save", sometimes)
    out = run("full", "--steps", "4", "--save_every", "1", "--eval_every", "0", "--keep", "3")
    said = [line for line in capsys.readouterr().err.splitlines() if "error:" in line]
    assert len(said) == 1 and said[0].startswith(
        "error: step 3 is not saved, training goes on: rank 0: "
    )
    assert names(out) == ["step_000001", "step_000002", "step_000004"]
    assert [m["step"] for m in lines(out)] == [1, 2, 3, 4]


@pytest.mark.parametrize("moment", ["sampling", "evaluation"])
def test_a_signal_loses_nothing(run, folder, monkeypatch, capsys, moment):  # noqa: F811
    """SIGTERM in the midst of sampling or of an evaluation: saved at once, and the resumed run is the untouched one."""
    whole = run("whole", "--steps", "3", "--save_every", "3")
    decode, calls = train.generate, []

    def interrupted(*args, **kwargs):
        calls.append(kwargs["key"])
        if calls[-1] == ((0, 1) if moment == "sampling" else ("eval", 0)) and len(calls) > (
            moment == "evaluation"
        ):
            signal.raise_signal(signal.SIGTERM)
        return decode(*args, **kwargs)

    import evaluate

    module = train if moment == "sampling" else evaluate
    monkeypatch.setattr(module, "generate", interrupted)
    out = run("stopped", "--steps", "3", "--save_every", "3")
    monkeypatch.setattr(module, "generate", decode)
    step = {"sampling": 1, "evaluation": 0}[moment]
    assert (
        names(out) == [f"step_{step:06d}"]
        and f"stopped after step {step}" in capsys.readouterr().out
    )
    assert not (out / "model").exists()
    train.main(["--resume", str(out)])
    assert [steady(m) for m in lines(whole)] == [steady(m) for m in lines(out)]
    a, b = (
        AutoModelForImageTextToText.from_pretrained(p / "model").state_dict() for p in (whole, out)
    )
    assert all(torch.equal(a[name], b[name]) for name in a)


@pytest.mark.parametrize(
    "phase, flag", [("log-probs", "--tokens_per_forward"), ("sampling", "--rollout_batch")]
)
def test_out_of_memory_names_the_phase_and_the_flag(run, folder, monkeypatch, phase, flag):  # noqa: F811
    def broken(*args, **kwargs):
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 GiB.")

    targets = {"log-probs": (Policy, "log_probs"), "sampling": (rollout, "prefill")}
    monkeypatch.setattr(*targets[phase], broken)
    expected = f"rank 0: out of memory while {phase}.*{flag}.*20.00 GiB"
    with pytest.raises(SystemExit, match=expected):
        run("oom", "--steps", "1", "--eval_every", "0")


def test_two_processes_cannot_share_a_run_folder(run, folder, tmp_path, capsys):  # noqa: F811
    """As after SIGKILL of torchrun, whose workers live on while the job is started again."""
    out = run("shared", "--steps", "1", "--eval_every", "0")
    before = (out / "metrics.jsonl").read_bytes()
    holder = run_files.lock(out)
    with pytest.raises(SystemExit):
        train.main(["--resume", str(out), "--steps", "2"])
    error = capsys.readouterr().err.strip().splitlines()[-1]
    assert f"{out} is in use by process {os.getpid()} on " in error
    assert (out / "metrics.jsonl").read_bytes() == before
    dist.destroy_process_group()
    holder.close()  # as when the process ends
    train.main(["--resume", str(out), "--steps", "2"])
    assert [line["step"] for line in lines(out)] == [1, 2]


# ------------------------------------------------------------------------------------------------------- several ranks

FAULTY = """
import os, resource, sys, time
sys.path.insert(0, {root!r})
import train
rank = int(os.environ["RANK"])
save, prepare = train.Run.save, train.prepare

def save_on_a_full_disk(run):
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    if rank == 1 and run.step == 1:
        resource.setrlimit(resource.RLIMIT_FSIZE, (50_000, hard))
    save(run)
    resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))

def break_down(*arguments, key):
    if rank == 1 and key[1] == 1:
        print("broken at", time.time(), file=sys.stderr)
        raise ZeroDivisionError("something broke on rank 1")
    return prepare(*arguments, key=key)

train.Run.save = save_on_a_full_disk
if os.environ.get("BREAK"):
    train.prepare = break_down
train.main()
"""


def two_ranks(tmp_path, folder, out, *flags, **environment):
    script = tmp_path / "faulty.py"
    script.write_text(FAULTY.format(root=str(ROOT)))
    command = reader(folder, out, "--nproc_per_node", "2")
    command[command.index(str(ROOT / "train.py"))] = str(script)
    return subprocess.run(
        [*command, *flags], env=ENV | environment, capture_output=True, text=True, timeout=300
    )


def test_a_full_disk_on_one_rank_and_resuming_on_another_number(run, folder, tmp_path):  # noqa: F811
    out = tmp_path / "two"
    flags = ["--eval_every", "0", "--save_every", "1"]
    done = two_ranks(tmp_path, folder, out, *flags, "--steps", "2")
    assert done.returncode == 0, done.stderr[-3000:]
    said = [line for line in done.stderr.splitlines() if "error:" in line]
    assert len(said) == 1 and said[0].startswith(
        "error: step 1 is not saved, training goes on: rank 1: "
    ), done.stderr
    assert names(out) == ["step_000002"]
    train.main(["--resume", str(out), "--steps", "3"])
    one = run("one", *flags, "--steps", "3")
    for a, b in zip(lines(one), lines(out), strict=True):
        for key, value in steady(a).items():
            assert value == pytest.approx(b[key], rel=1e-3, abs=1e-5), key
    whole, other = run("whole", *flags, "--steps", "4"), tmp_path / "grown"
    os.rename(one, other)
    command = [
        sys.executable,
        "-m",
        "torch.distributed.run",
        "--nproc_per_node",
        "2",
        str(ROOT / "train.py"),
    ]
    done = subprocess.run(
        [*command, "--resume", str(other), "--steps", "4"], env=ENV, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr[-3000:]
    for a, b in zip(lines(whole), lines(other), strict=True):
        for key, value in steady(a).items():
            assert value == pytest.approx(b[key], rel=1e-3, abs=1e-5), key


def test_a_rank_that_dies_takes_the_job_down_at_once(folder, tmp_path):
    done = two_ranks(
        tmp_path, folder, tmp_path / "dead", "--steps", "3", "--eval_every", "0", BREAK="1"
    )
    seconds = time.time() - float(re.search(r"broken at ([\d.]+)", done.stderr)[1])
    assert done.returncode != 0 and seconds < 25, done.stderr[-3000:]
    errors = re.findall(
        r"^(?:\[rank\d\]:? ?)?(\w*(?:Error|Exception)\b.*)", done.stderr, re.MULTILINE
    )
    assert errors and errors[0] == "ZeroDivisionError: something broke on rank 1", done.stderr[
        -3000:
    ]


@pytest.mark.slow
def test_two_machines(folder, tmp_path):
    """Two torchrun agents that meet at a rendezvous: the numbers of one."""
    import socket

    with socket.socket() as free:
        free.bind(("localhost", 0))
        port = free.getsockname()[1]
    flags = f"--nnodes 2 --nproc_per_node 1 --rdzv_backend c10d --rdzv_id papo --rdzv_endpoint localhost:{port}".split()
    outs = [tmp_path / "nodes", tmp_path / "ranks"]
    more = ["--steps", "2", "--eval_every", "0"]
    agents = [subprocess.Popen([*reader(folder, outs[0], *flags), *more], env=ENV, stderr=subprocess.PIPE, text=True)
              for _ in range(2)]  # fmt: skip
    errors = [agent.communicate(timeout=300)[1] for agent in agents]
    assert [agent.returncode for agent in agents] == [0, 0], errors
    subprocess.run(
        [*reader(folder, outs[1], "--nproc_per_node", "2"), *more], env=ENV, check=True, timeout=300
    )
    assert [steady(m) for m in lines(outs[0])] == [steady(m) for m in lines(outs[1])]


@pytest.mark.slow
def test_kills_at_random_moments(folder, tmp_path):
    """Three SIGKILLs and resumes, one of them in the middle of a save (tests/faults.py does twenty)."""
    import faults

    result = faults.compare_with_killed(folder, tmp_path, kills=3, ranks=1, steps=8)
    during = result.pop("during")
    assert during[0] == "saving" and all(result.values()), (during, result)
