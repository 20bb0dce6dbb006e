"""Flags and where their defaults come from."""

import dataclasses
import json

import pytest

import evaluate
import train
from support import toy
from support.cli import data_of, parse_flags, resolve_config
from support.run_folder import with_saved_config

HARDER = "toy:grid=4,colours=4"


@pytest.fixture()
def real_model(tmp_path):
    """The folder of some other model: no task.json."""
    (tmp_path / "model").mkdir()
    return str(tmp_path / "model")


@pytest.fixture()
def exported(tmp_path):
    """The export of a toy model that was trained on a harder setting."""
    (tmp_path / "export").mkdir()
    (tmp_path / "export" / "task.json").write_text(json.dumps({"data": HARDER}))
    return str(tmp_path / "export")


def test_the_task_follows_the_data_and_the_learning_rate_the_model(real_model):
    """A 3B model on the toy's data must not be trained at the tiny model's learning rate."""
    paper = train.Config()
    large_on_toy = resolve_config(train.Config, {"model": real_model, "data": "toy"})
    assert (large_on_toy.lr, large_on_toy.steps) == (paper.lr, 50)
    toy_on_file = resolve_config(train.Config, {"data": "mine.jsonl"})
    assert toy_on_file.lr == toy.MODEL_DEFAULTS["lr"]
    assert toy_on_file.prompts_per_step == paper.prompts_per_step
    assert resolve_config(train.Config, {}).lr == toy.MODEL_DEFAULTS["lr"]
    assert resolve_config(train.Config, {"lr": 0.5}).lr == 0.5


def test_an_exported_toy_is_evaluated_on_its_own_task(exported, real_model):
    config = evaluate.configure({"model": exported})
    assert config.data == HARDER and config.max_new_tokens > 40
    assert data_of({"model": real_model}) == ""
    assert evaluate.configure({"model": exported, "data": "toy"}).data == "toy"


def test_resuming_a_run_that_predates_a_flag_takes_its_default(tmp_path, capsys):
    saved = {"algo": "grpo", "lr": 0.25, "steps": 5}
    (tmp_path / "config.json").write_text(json.dumps(saved))
    defaults = dataclasses.asdict(train.Config())
    given = {"resume": str(tmp_path), "top_k": 0, "lr": 0.25}
    config = with_saved_config(given, defaults)
    assert (config["lr"], config["top_k"], config["top_p"]) == (0.25, 0, 0.99)
    with pytest.raises(SystemExit):
        with_saved_config(given | {"top_k": 7}, defaults)
    assert "--top_k 7 contradicts the run's 0" in capsys.readouterr().err
    rounding_only = {"tokens_per_forward": 8192, "rollout_batch": 64}  # what a full device asks for
    assert with_saved_config(given | rounding_only, defaults)["tokens_per_forward"] == 8192


def test_help_is_grouped_with_everyday_flags_first(capsys):
    with pytest.raises(SystemExit):
        parse_flags(train.__doc__, train.Config, train.Algo, argv=["--help"])
    text = capsys.readouterr().out
    order = [
        text.index(word) for word in ("what to train", "--algo", "sizes", "memory", "--clip_low")
    ]
    assert order == sorted(order)
    assert "[preset]" in text.split("--clip_low")[1].split("--clip_high")[0]


@pytest.mark.parametrize(
    "make, words",
    [
        (lambda: train.Config(rollout_batch=0), "rollout_batch=0: must be at least 1"),
        (lambda: train.Config(eval_n=0), "eval_n=0: must be at least 1"),
        (lambda: evaluate.EvalConfig(heat_patches=0), "heat_patches=0: must be at least 1"),
        (lambda: train.Config(max_grad_norm=0.0), "max_grad_norm=0.0: must be above 0"),
        (lambda: train.Config(save_every=-1), "save_every=-1: must be at least 0"),
        (lambda: evaluate.EvalConfig(eval_rows=-1), "eval_rows=-1: must be at least 0"),
        (lambda: train.Algo(clip_dual=0.0), "clip_dual=0.0: must be above 1"),
        (lambda: train.Algo(kl_prcp_clip=-1.0), "kl_prcp_clip=-1.0: must be at least 0"),
    ],
)
def test_values_out_of_range_are_named(make, words):
    with pytest.raises(ValueError, match=words):
        make()
