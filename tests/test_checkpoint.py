"""Saving, resuming and stopping: on full disks, with damaged files, after signals."""

import copy
import itertools
import json
import os
import shutil
import signal
import weakref
from contextlib import nullcontext
from pathlib import Path

import pytest
import torch
from conftest import (
    FINISHED,
    check_same_metrics,
    check_same_weights,
    checkpoint_names,
    full_disk,
    lines_with,
    metric_lines,
    process_restored,
)
from torch.distributed.tensor import DTensor
from transformers import AutoModelForImageTextToText

import evaluate
import train
from support import checkpoint, distributed, run_folder


def step(model, optimizer):
    model(torch.ones(1, 64)).square().sum().backward()
    optimizer.step()
    optimizer.zero_grad()


@pytest.fixture()
def model_and_optimizer(one_rank):
    """A small model before its first optimizer step."""
    torch.manual_seed(0)
    model = torch.nn.Linear(64, 64)
    return model, torch.optim.AdamW(model.parameters(), lr=0.1)


def test_the_newest_checkpoints_are_kept_and_leftovers_deleted(model_and_optimizer, tmp_path):
    """Killed saves leave folders without .metadata; step 1 is saved again here."""
    for name in ("step_000001", "step_000009"):
        (tmp_path / "checkpoints" / name).mkdir(parents=True)
    assert checkpoint.complete(tmp_path) == []
    left = []
    for number in (1, 2, 3):
        step(*model_and_optimizer)
        state = {"step": number, "position": 7 * number}
        checkpoint.save(tmp_path, *model_and_optimizer, state, keep=2)
        left.append([int(name[-6:]) for name in checkpoint_names(tmp_path)])
    assert left == [[1], [1, 2], [2, 3]]
    newest = checkpoint.complete(tmp_path)[-1]
    assert checkpoint.load(newest, *model_and_optimizer) == {"step": 3, "position": 21}
    for damaged, kept_bytes in itertools.product(("*.distcp", ".metadata"), (0, -50)):
        damaged_dir = shutil.copytree(newest, tmp_path / "copy", dirs_exist_ok=True)
        [file] = damaged_dir.glob(damaged)
        file.write_bytes(file.read_bytes()[:kept_bytes])
        with pytest.raises(OSError, match="copy cannot be read: delete it"):
            checkpoint.load(damaged_dir, *model_and_optimizer)


def test_a_checkpoint_before_the_first_update_resumes_exactly(model_and_optimizer, tmp_path):
    """As dynamic sampling may leave it: AdamW has no state, and its counter must start at 0, both
    in the run that goes on and in the one that resumes."""
    model, optimizer = model_and_optimizer
    expected = copy.deepcopy(model)
    step(expected, torch.optim.AdamW(expected.parameters(), lr=0.1))
    checkpoint.save(tmp_path, model, optimizer, {"step": 1, "position": 7}, keep=1)
    step(model, optimizer)
    other = torch.nn.Linear(64, 64)
    other_optimizer = torch.optim.AdamW(other.parameters(), lr=0.1)
    checkpoint.load(checkpoint.complete(tmp_path)[-1], other, other_optimizer)
    step(other, other_optimizer)
    assert torch.equal(model.weight, expected.weight)
    assert torch.equal(other.weight, expected.weight)


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


def test_an_export_that_fills_the_disk_is_an_os_error(one_rank, policy, folder, tmp_path):
    """safetensors reports it as an error of its own. An earlier export stays."""
    (tmp_path / "model" / "earlier").mkdir(parents=True)
    with full_disk(100_000), pytest.raises(OSError, match="too large|No space"):
        checkpoint.export(policy.model, folder, tmp_path / "model", torch.float32)
    assert [path.name for path in (tmp_path / "model").iterdir()] == ["earlier"]


def test_log_lines_survive_a_full_disk_and_a_kill(tmp_path, capsys):
    path = tmp_path / "metrics.jsonl"
    lines = [{"step": step, "text": "x" * 50} for step in range(4)]
    run_folder.append(path, lines[:1])
    with full_disk(100):
        run_folder.append(path, lines[1:2])
    assert run_folder.read_log(path) == lines[:1]  # no half line is left behind
    assert "error: a line of" in capsys.readouterr().err
    run_folder.append(path, lines[1:])
    path.write_text(path.read_text() + '{"step": 4, "te')  # killed in the middle of a line
    assert run_folder.rewind(path, 2) == run_folder.read_log(path) == lines[:3]


def test_training_continues_when_a_save_fails(run, monkeypatch, capsys):
    original_save, left = train.Run.save, []

    def save(self):
        with full_disk(50_000) if self.step == 2 else nullcontext():
            original_save(self)
        left.append(checkpoint_names(self.folder))

    monkeypatch.setattr(train.Run, "save", save)
    out = run("full", "--steps 3 --save_every 1 --eval_every 0 --keep 1")
    [error] = lines_with(capsys.readouterr().err, "error:")
    assert error.startswith("error: the checkpoint of step 2 is not written: ")
    assert left == [["step_000001"], ["step_000001"], ["step_000003"]]
    assert [line["step"] for line in metric_lines(out)] == [1, 2, 3]


@pytest.mark.parametrize(
    "at, number, saved",
    [
        ((train, "generate", 1), signal.SIGTERM, 0),  # after an evaluation is in the log
        ((train, "grade", 2), signal.SIGINT, 1),
        ((evaluate, "generate", 3), signal.SIGTERM, 2),
    ],
)
def test_a_signal_loses_nothing(run, finished, monkeypatch, capsys, at, number, saved):
    """Saved at once, but for step 0, and resumed to the same metrics and weights."""
    module, function, call = at
    original, calls = getattr(module, function), itertools.count(1)

    def signalled(*args, **kwargs):
        if next(calls) == call:
            signal.raise_signal(number)
        return original(*args, **kwargs)

    monkeypatch.setattr(module, function, signalled)
    out = run("stopped", FINISHED)
    monkeypatch.setattr(module, function, original)
    assert checkpoint_names(out) == [f"step_{saved:06d}"] * (saved > 0)
    assert f"stopped after step {saved}" in capsys.readouterr().out
    assert not (out / "model").exists()
    train.main(["--resume", str(out)])
    check_same_metrics(finished, out)
    check_same_weights(finished, out)


def test_a_folder_in_use_or_without_a_checkpoint_is_kept(finished, tmp_path, capsys):
    """A killed torchrun's workers may still hold it when the job is started again."""
    folder = shutil.copytree(finished, tmp_path / "finished")
    before = (folder / "metrics.jsonl").read_bytes()

    def check_refused(message):
        with process_restored(), pytest.raises(SystemExit, match="2"):
            train.main(["--resume", str(folder), "--steps", "4"])
        assert message in capsys.readouterr().err
        assert (folder / "metrics.jsonl").read_bytes() == before

    holder = run_folder.lock(folder)
    check_refused(f"{folder} is in use by process {os.getpid()} on ")
    holder.close()  # as when the process ends
    shutil.rmtree(folder / "checkpoints")
    check_refused(f"{folder} has a model but no checkpoint: nothing to resume")
