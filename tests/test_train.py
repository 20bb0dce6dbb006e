"""train.py, with a tiny model: full runs, dynamic sampling, rewards, bad rows, errors."""

import itertools
import json
import re
from collections import Counter
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from unittest.mock import MagicMock, Mock

import pytest
import torch
from conftest import (
    ROOT,
    check_same_metrics,
    error_line,
    lines_with,
    metric_lines,
    on_ranks,
    run_flags,
    write_parquet,
)
from test_data import row, text, truncated

import evaluate
import train
from papo import preset
from support import checkpoint, curves, distributed, pages, run_folder
from support import run as run_module
from support.run import Run
from support.sandbox import Grader


def training_lines(run_folder):
    return [line for line in metric_lines(run_folder) if "reward" in line]


# ---------------------------------------------------------------------------------------- full runs


def test_a_run_writes_its_folder(finished):
    """test_hub_shapes.py has its model."""
    config = json.loads((finished / "config.json").read_text())
    assert (config["algo"], config["steps"]) == ("papo_g", 3)
    assert (config["kl_prcp_coef"], config["group_size"]) == (0.02, 3)
    steps = training_lines(finished)
    assert [line["step"] for line in steps] == [1, 2, 3]
    for line in steps:
        assert (line["groups_kept"], line["skipped_updates"]) == (5, 0)
        assert line["masked_entropy"] > line["entropy"]
        assert line["sampler_gap"] < 1e-5 and line["sampler_gap_max"] < 1e-4
    assert steps[0]["sampler_gap"] > 0
    assert [line["step"] for line in metric_lines(finished) if "eval/general" in line] == [0, 2, 3]
    assert (finished / "curves.png").stat().st_size > 1000 and (finished / "sample0.png").exists()
    page = (finished / "samples.html").read_text()
    assert re.findall(r"<b>step (\d+) ", page) == ["0", "2", "3"] * 8  # four questions per set
    assert page.count("<img ") == 8
    assert [path.name for path in checkpoint.complete(finished)] == ["step_000003"]
    assert (finished / "model" / "task.json").exists()  # so that evaluate.py needs no flags


def test_the_glossary_lists_exactly_the_metrics_of_a_run(finished):
    """And one that only CUDA has."""
    glossary = (ROOT / "docs" / "metrics.md").read_text()
    listed = set(re.findall(r"^\| `([^`]+)`", glossary, re.MULTILINE))
    logged = {key for line in metric_lines(finished) for key in line}
    assert {re.sub("eval/.*", "eval/SET", key) for key in logged} | {"peak_memory"} == listed


def test_what_is_printed_and_pictures_that_fail(run, monkeypatch, capsys, record_calls):
    """The best and the worst response; a line per picture, and the run goes on. Its evaluations
    sample from the policy itself, without top-p."""

    def full(*args):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(run_module, "SHOW_EVERY", 1)
    monkeypatch.setattr(curves, "draw_run", full)
    monkeypatch.setattr(pages, "samples", full)
    sampled = record_calls(evaluate, "generate")
    out = run("a", "--algo papo_g --steps 1 --top_k 3")
    assert {(each.top_p, each.top_k) for (*_, each), _ in sampled} == {(1.0, 0)}
    text = capsys.readouterr()
    assert len(re.findall(r"^step 1: <image>", text.out, re.M)) == 1
    assert len(re.findall(r"^  reward \d\.\d\d: ", text.out, re.M)) == 2
    for name in ("curves.png", "samples.html"):
        assert f"{out / name} is not written: [Errno 28]" in text.err
    assert f"model: {out}/model" in text.out


@pytest.mark.parametrize("algo", ["tapo", pytest.param("noisy_rollout", marks=pytest.mark.slow)])
def test_two_ranks_give_the_metrics_of_one(run, folder, tmp_path, varying_reward, algo):
    """With 5 prompts per step and mini-batches of 3, which do not divide evenly.

    TAPO is PAPO_D with two groups per prompt. test_ranks.py has the updates of other objectives.
    """
    flags = f"--steps 2 --algo {algo} --top_p 1.0 {varying_reward}"
    one, two = run("one", flags), tmp_path / "two"
    for line in training_lines(one):
        assert line["groups_kept"] > 0 and line["format"] == 1 and line["reward"] > 0
    done = on_ranks(2, *run_flags(folder, two, flags))
    assert done.returncode == 0, done.stderr[-3000:]
    check_same_metrics(one, two, rel=1e-4, abs=2e-6)
    assert (one / "samples.jsonl").read_text() == (two / "samples.jsonl").read_text()


def test_adamw_is_fused_on_cuda_which_computes_in_bf16(monkeypatch):
    """Without fusing it makes a copy of all parameters in every step."""
    for owner, name in ((distributed, "make_mesh"), (run_module, "Grader"), (torch.optim, "AdamW")):
        monkeypatch.setattr(owner, name, Mock())
    monkeypatch.setattr(Run, "_load_data", lambda _, encoder: ([0], {}))
    monkeypatch.setattr(Run, "_load_policy", lambda _, encoder, dtype: MagicMock())
    run = Run(train.Config(), preset("grpo_no_kl_ref"), None, (0, 1, torch.device("cuda")))
    assert torch.optim.AdamW.call_args.kwargs["fused"] and run.dtype == torch.bfloat16


def test_a_sampler_that_disagrees_with_training_is_named_once(run, monkeypatch, capsys):
    """The metric is the same in the first mini-batch, which records no old log-probs. Every step
    draws other random numbers."""
    original, keys = train.generate, []

    def generate_shifted(*args, key, **kwargs):
        keys.append(key)
        groups = original(*args, key=key, **kwargs)
        for group in groups:
            group.sample_log_probs += 0.5 * group.response_mask
        return groups

    monkeypatch.setattr(train, "generate", generate_shifted)
    for line in training_lines(run("shifted", "--steps 2 --eval_every 0")):
        for name in ("sampler_gap", "sampler_gap_max"):
            assert line[name] == pytest.approx(0.5, abs=1e-4)
    assert keys == [(0, 0), (0, 1)]
    [warning] = lines_with(capsys.readouterr().err, "warning:")
    assert "sampler_gap is above 0.1" in warning


# ----------------------------------------------------------------------------------------- rollouts


def test_dynamic_sampling_drops_groups_and_samples_more(run, monkeypatch, record_calls):
    """Every second group is all wrong, so sampling goes on for three rounds, and keeps one group
    more than is asked for."""
    monkeypatch.setattr(train, "MAX_ROUNDS", 3)
    numbers = itertools.count()

    def one_right_in_every_second_group(self, responses, *_):
        is_right = [float(next(numbers) % 6 == 0) for _ in responses]
        return [{"overall": x, "accuracy": x, "format": 0.0} for x in is_right]

    monkeypatch.setattr(Grader, "__call__", one_right_in_every_second_group)
    updates, saves = record_calls(train, "update"), record_calls(checkpoint, "save")
    flags = "--algo papo_d --steps 1 --eval_every 0 --prompts_per_step 4"
    [step] = training_lines(run("dapo", flags))
    assert (step["rounds"], step["groups_kept"], step["zero_advantage_groups"]) == (3, 4, 4)
    [((_, _, batches, *_), _)] = updates
    assert sum(map(len, batches)) == 4
    [((*_, state), _)] = saves
    assert state == {"step": 1, "position": 3 * 3}


@pytest.mark.parametrize("algo", ["papo_d", "papo_g"])
def test_steps_without_an_advantage_are_warned_of_once(run, monkeypatch, capsys, algo):
    """With dynamic sampling there is no update; without it one response is shown."""
    zero = {"overall": 0.0, "accuracy": 0.0, "format": 0.0}
    monkeypatch.setattr(train, "MAX_ROUNDS", 2)
    monkeypatch.setattr(run_module, "MAX_USELESS_STEPS", 1)
    monkeypatch.setattr(Grader, "__call__", lambda self, responses, *_: [zero] * len(responses))
    steps = training_lines(run("none", f"--algo {algo} --steps 2 --eval_every 0"))
    printed = capsys.readouterr()
    [warning] = lines_with(printed.err, "warning:")
    assert "in 1 steps no group had different rewards" in warning
    assert len(lines_with(printed.out, "(answer: ")) == (algo == "papo_g")
    if algo == "papo_d":
        assert [(step["groups_kept"], step["rounds"]) for step in steps] == [(0, 2)] * 2
        assert not any("pg_loss" in step for step in steps)


@pytest.mark.parametrize("dynamic_sampling", [False, True])
def test_the_responses_to_a_prompt_are_compared(groups, dynamic_sampling):
    """Those of two groups together. There is no advantage where rewards are equal, and where the
    grader had no time for a response."""
    equal, incomplete, half, other_half = groups
    other_half.prompt = replace(other_half.prompt, index=half.prompt.index)
    good = {"overall": 1.0, "format": 0.0, "accuracy": 1.0}
    bad = {"overall": 0.0, "format": 0.0, "accuracy": 0.0}
    scores = [good] * 3 + [good, bad, bad | {"unscored": 1.0}] + [good, bad, bad] + [bad] * 3
    run, sums = Mock(grader=Mock(timeouts=1, errors=2, unscored=3)), Counter()
    run.grader.of_groups.return_value = scores
    kept = train.grade(run, SimpleNamespace(dynamic_sampling=dynamic_sampling), groups, sums)
    metrics = train.rollout_metrics(sums)
    n_tokens = sum(int(group.response_mask.sum()) for group in groups)
    assert (metrics["zero_advantage_groups"], metrics["response_length"]) == (2, n_tokens / 12)
    assert metrics["accuracy"] == pytest.approx(5 / 12)
    counts = [metrics[f"reward_{name}"] for name in ("timeouts", "errors", "unscored")]
    assert counts == [1, 2, 3]
    assert equal.advantages.abs().max() < 1e-6
    assert incomplete.advantages.eq(0).all()
    advantages = torch.cat([half.advantages, other_half.advantages])
    assert advantages.tolist() == pytest.approx([2.0412] + [-0.4082] * 5, abs=1e-3)
    expected = [half, other_half] if dynamic_sampling else groups
    assert [id(group) for group in kept] == [id(group) for group in expected]


def test_a_reward_that_never_works_ends_the_run(run, tmp_path, capsys):
    file = tmp_path / "mine.py"
    file.write_text("def score(response, answer):\n    raise KeyError('none')\n")
    with pytest.raises(SystemExit, match="2"):
        run("never", f"--steps 1 --eval_every 0 --reward {file}:score")
    assert "KeyError: 'none'" in error_line(capsys)


def test_a_new_run_overwrites_none(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    config = SimpleNamespace(algo="../some/my_idea.py", model="toy/", seed=3)
    for name in ("runs/my_idea-toy-s3", "runs/my_idea-toy-s3-2"):
        assert run_folder.free_name(config) == name
        Path(name).mkdir(parents=True)


def test_errors_are_one_line(run, finished, capsys):
    for flags, message in [
        ("--algo ppo", "'ppo': choose one of grpo, dapo, papo_g"),
        ("--model toy:grid=4", "build it with `python -m experiments.start_model toy:grid=4 --out"),
        (f"--model {finished}", f"is the folder of a run: its model is {finished}/model"),
        ("--resume /no/such/run", "no config.json there"),
        ("--group_size 1", "group_size=1: give at least 2"),
        (f"--out {finished}", "exists: choose another, delete it, or --resume it"),
    ]:
        with pytest.raises(SystemExit, match="2"):
            run("run", f"--steps 1 {flags}")
        assert message in error_line(capsys)


def test_bad_rows_are_counted_and_skipped(run, tmp_path, capsys):
    """One that is found when the data are loaded, and one whose image breaks when it is read."""
    rows = [text(i, images=None) for i in range(10)] + [row(truncated()), text(11, answer=" ")]
    file = write_parquet(tmp_path / "rows.parquet", rows)
    lines = metric_lines(run("rows", f"--data {file} --val_data none --steps 5 --algo grpo"))
    assert [line["unusable_rows"] for line in lines] == [1] * 5
    skipped = sum(line["skipped_rows"] for line in lines)
    assert 2 <= skipped <= 3  # in 25 rows of 11
    assert sum(line["groups_kept"] for line in lines) + skipped == 25
    printed = capsys.readouterr().err
    assert "row 11 is skipped, no text in answer:" in printed
    assert "row 10 is skipped, broken image:" in printed
