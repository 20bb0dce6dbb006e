"""loggers.py: --tensorboard and --wandb, where the packages are installed."""

import pytest

from support.loggers import LOGGERS

LINE = {"step": 10, "eval/general": 0.5}
SAMPLES = [
    {
        "step": 10,
        "set": "general",
        "row": row,
        "prompt": "How many?",
        "predict": f"\\boxed{{{row}}}",
        "label": "1",
        "accuracy": float(row == 1),
        "format": 0.0,
    }
    for row in range(2)
]


def test_tensorboard_gets_numbers_and_samples(tmp_path):
    pytest.importorskip("tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    log = LOGGERS["tensorboard"](tmp_path)
    log({"step": 9, "reward": 0.25}, [])
    log(LINE, SAMPLES)
    events = EventAccumulator(str(tmp_path))
    events.Reload()
    [reward] = events.Scalars("reward")
    [accuracy] = events.Scalars("eval/general")
    assert (reward.step, reward.value, accuracy.step, accuracy.value) == (9, 0.25, 10, 0.5)
    [text] = events.Tensors("general/1/text_summary")
    assert text.step == 10 and b"\\boxed{1}" in text.tensor_proto.string_val[0]


def test_wandb_gets_numbers_and_samples(tmp_path, monkeypatch):
    wandb = pytest.importorskip("wandb")
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setenv("WANDB_DIR", str(tmp_path))
    (tmp_path / "config.json").write_text('{"algo": "papo_g"}')
    log = LOGGERS["wandb"](tmp_path)
    log({"step": 9, "reward": 0.25}, [])
    log(LINE, SAMPLES)
    log({"step": 11}, [])  # W&B completes a step when the next one begins
    summary = wandb.run.summary
    assert summary["reward"] == 0.25 and summary["eval/general"] == 0.5
    assert wandb.run.config["algo"] == "papo_g"
    assert summary["samples"]["nrows"] == 2
    wandb.finish()
