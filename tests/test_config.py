"""Flags and where their defaults come from."""

import json
import shutil
from types import SimpleNamespace

import pytest

import train
from support import toy


@pytest.fixture()
def resolve(monkeypatch):
    """resolve(flags) -> the flags of a run that would be trained, as attributes."""

    def no_run(config, algo, encoder, ranks):
        return SimpleNamespace(**vars(config), **vars(algo))

    monkeypatch.setattr(train, "Run", no_run)
    monkeypatch.setattr(train.distributed, "init_distributed", lambda scoring_seconds: None)
    return lambda flags: train.build_run(flags.split())


def test_the_task_follows_the_data_and_the_learning_rate_the_model(resolve, folder, tmp_path):
    """A 3B model on the toy's data must not be trained at the tiny model's learning rate."""
    other = shutil.copytree(folder, tmp_path / "m", ignore=shutil.ignore_patterns("task.json"))
    paper, tiny = train.Config(), toy.MODEL_DEFAULTS["lr"]
    default = resolve("")
    assert (default.algo, default.data, default.val_data) == ("papo_g", "toy", "toy")
    assert (default.lr, default.steps, default.max_new_tokens) == (tiny, 30, 40)
    large_on_toy = resolve(f"--model {other} --data toy:grid=4,colours=4")
    assert (large_on_toy.lr, large_on_toy.steps, large_on_toy.max_new_tokens) == (paper.lr, 30, 61)
    toy_on_file = resolve("--data mine.jsonl")
    assert (toy_on_file.lr, toy_on_file.prompts_per_step) == (tiny, paper.prompts_per_step)
    for flags, lr in (("--lora_rank 4", 1e-5), ("--lora_rank=4 --lr 1", 1.0)):  # adapters have one
        assert resolve(f"--model {other} --data toy {flags}").lr == lr


def test_a_resumed_run_keeps_its_flags(resolve, tmp_path, capsys):
    """But for those that may change, and for one that it predates: that has its default."""
    saved = {"algo": "grpo", "kl_ref_coef": 0.5, "lr": 0.25, "steps": 5, "keep": 3, "gone": 1}
    (tmp_path / "config.json").write_text(json.dumps(saved))
    resume = f"--resume {tmp_path}"
    run = resolve(f"{resume} --steps 9 --tokens_per_forward 8192 --lr 0.25")
    assert (run.algo, run.kl_ref_coef, run.lr, run.steps) == ("grpo", 0.5, 0.25, 9)
    assert (run.keep, run.top_p, run.resume) == (3, 0.99, str(tmp_path))
    for flags, kept in (("--lr 0.5", "0.25"), ("--algo dapo", "grpo")):
        with pytest.raises(SystemExit, match="2"):
            train.main(f"{resume} {flags}".split())
        [line] = capsys.readouterr().err.splitlines()
        assert line.endswith(f"{flags} contradicts the run's {kept}")


def test_help_has_a_title_per_dataclass(resolve, capsys):
    with pytest.raises(SystemExit, match="0"):
        resolve("--algo vppo --help")
    printed = capsys.readouterr().out
    assert "\nConfig:\n  --algo" in printed and "\nVPPO:\n  --kl_ref_coef" in printed


def test_values_out_of_range_are_named():
    with pytest.raises(ValueError, match="rollout_batch=0: must be at least 1"):
        train.Config(rollout_batch=0)
    with pytest.raises(ValueError, match="mask_ratio=nan: must be between 0 and 1"):
        train.Algo(mask_ratio=float("nan"))
