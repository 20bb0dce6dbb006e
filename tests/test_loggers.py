"""run_folder.py: --tensorboard and --wandb, where the packages are installed."""

import pytest

from support.run_folder import LOGGERS

LINES = [{"step": 9, "reward": 0.25}, {"step": 10, "eval/general": 0.5}, {"step": 11}]
SAMPLE = {"step": 10, "set": "general", "row": 1, "prompt": "How many?", "predict": "\\boxed{1}"}
SAMPLE |= {"label": "1", "accuracy": 1.0, "format": 0.0}


def log_to(name, folder):
    log = LOGGERS[name](folder)
    for line in LINES:  # W&B completes a step when the next one begins
        log(line, [SAMPLE] if line["step"] == 10 else [])


def test_tensorboard_gets_numbers_and_samples(tmp_path):
    pytest.importorskip("tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    log_to("tensorboard", tmp_path)
    events = EventAccumulator(str(tmp_path))
    events.Reload()
    [reward], [accuracy] = events.Scalars("reward"), events.Scalars("eval/general")
    assert (reward.step, reward.value, accuracy.step, accuracy.value) == (9, 0.25, 10, 0.5)
    [text] = events.Tensors("general/1/text_summary")
    assert text.step == 10 and b"\\boxed{1}" in text.tensor_proto.string_val[0]


def test_wandb_gets_numbers_and_samples(tmp_path, monkeypatch):
    wandb = pytest.importorskip("wandb")
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setenv("WANDB_DIR", str(tmp_path))
    (tmp_path / "config.json").write_text('{"algo": "papo_g"}')
    log_to("wandb", tmp_path)
    summary = wandb.run.summary
    assert summary["reward"] == 0.25 and summary["eval/general"] == 0.5
    assert wandb.run.config["algo"] == "papo_g"
    assert summary["samples"]["nrows"] == 1
    wandb.finish()
