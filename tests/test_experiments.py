"""Experiments: what is run and kept, how runs are paired and tested, what the README quotes."""

import re
from pathlib import Path
from types import SimpleNamespace

import pandas as pd
import pytest
from conftest import ROOT, write_jsonl

import train
from experiments import report, run
from papo import algo_class, preset_settings
from support import toy
from support.config import parse_flags
from support.run_folder import read_log
from support.variants import variant_names


def test_every_planned_run_has_its_flags():
    for variant, flags in run.VARIANTS.items():
        defaults = preset_settings(flags.get("algo", "papo_g")) | toy.task_defaults(run.SETTING)
        classes = train.Config, algo_class(flags.get("algo", "papo_g"))
        words = run.words_of(run.TRAINING | flags)
        config, objective = parse_flags("A run.", *classes, defaults=defaults, argv=words)
        assert flags.items() <= (vars(config) | vars(objective)).items(), variant


def test_the_stored_results_are_the_plans():
    """Each was made with the flags that the protocol has, and none is there twice."""
    stored = [line for file in run.RESULTS.glob("*.jsonl") for line in read_log(file)]
    pairs = [(line["variant"], line["seed"]) for line in stored]
    assert len(set(pairs)) == len(pairs) > 500
    folders = {variant.partition("/")[0] for variant, _ in pairs}
    assert run.missing_of(folders, run.RESULTS) == []


def test_results_of_other_flags_do_not_count(tmp_path):
    flags = run.flags_of("first/grpo")
    for seed, steps in ((10, 30), (11, 31)):
        line = {"variant": "first/grpo", "seed": seed, "flags": flags | {"steps": steps}}
        run.append(tmp_path / "first.jsonl", line)
    missing = run.missing_of(["first"], tmp_path)
    assert [("first/grpo", seed) in missing for seed in (10, 11, 12)] == [False, True, True]
    assert not any(variant.startswith("dots/") for variant, _ in missing)


def test_a_run_continues_one_with_its_flags_and_start_model_alone(tmp_path, monkeypatch):
    """The commands are recorded; the first training is interrupted once its folder is there."""
    monkeypatch.setattr(run, "WORK", tmp_path)
    commands = []

    def record(words, log):
        commands.append(dict(word.removeprefix("--").partition("=")[::2] for word in words))
        folder = Path(commands[-1].get("out", commands[-1].get("resume")))
        write_jsonl(folder / "config.json", [{}])

    monkeypatch.setattr(run, "run_python", record)
    start = tmp_path / "start" / "dots-s10" / "model"
    for weights, variant in (("a", "grpo"), ("a", "grpo"), ("b", "grpo"), ("b", "dapo")):
        (start / run.WEIGHTS).parent.mkdir(parents=True, exist_ok=True)
        (start / run.WEIGHTS).write_text(weights)
        with pytest.raises(RuntimeError, match="stopped early"):
            run.run(f"first/{variant}", 10, tmp_path)
    assert commands[0]["model"] == str(start) and commands[0]["algo"] == "grpo"
    assert [command.get("resume") for command in commands] == [None, commands[0]["out"], None, None]


def test_an_answer_is_misread_where_the_cells_read_have_another_answer(tmp_path):
    cells = ["red", "red", "blue", *["none"] * 6]  # how many are red?
    task = SimpleNamespace(scene_of=lambda *_: (cells, lambda read: read.count("red")))
    one_more, same_count = (["red", "red", word, *cells[3:]] for word in ("red", "green"))
    texts = [toy.write_response(read, "red", box=7) for read in (cells, one_more, same_count)]
    texts.append("no reading at all")
    rows = [{"row": 0, "predict": text, "accuracy": 0.0} for text in texts]
    rows.append({"row": 0, "predict": texts[0], "accuracy": 1.0})
    result = run.measure(task, write_jsonl(tmp_path / "general.jsonl", rows))
    counts = {"accuracy": 0.2, "responses": 5, "wrong": 4, "misread": 2}
    assert result == counts | {"cells_right": pytest.approx((1 + 8 / 9 + 8 / 9 + 0 + 1) / 5)}


def test_changed_code_is_another_idea(tmp_path):
    idea = tmp_path / "my_idea.py"
    text = "import dataclasses\nimport papo\n\n\n@dataclasses.dataclass(frozen=True)\n"
    idea.write_text(text + "class MyIdea(papo.Algo):\n    pass  # 0.1\n")
    first = run.plan_ideas([str(idea), "grpo"], seeds=2)
    assert {seed for variant, seed in run.JOBS if variant == first["grpo"]} == {0, 1}
    idea.write_text(idea.read_text().replace("0.1", "0.2"))
    second = run.plan_ideas([str(idea), "grpo"], seeds=2)
    assert second["grpo"] == first["grpo"] and second[str(idea)] != first[str(idea)]


def test_intervals_and_p_are_those_computed_by_hand():
    # Mean 5, standard deviation sqrt(200), t(7) = 2.365: 2.365 * 14.142 / sqrt(8) = 11.82.
    values = pd.Series([10.0] * 7 + [-30.0])
    # Sign patterns of 7 x 10 and 30 whose sum is at least 40 away from 0: 130 of 256.
    assert report.tested(values) == "+5.0 +- 11.8, 7 of 8, p 0.508"
    adjusted = report.holm({"a": 0.03, "b": 0.01, "c": 0.2})
    assert adjusted == pytest.approx({"a": 0.06, "b": 0.03, "c": 0.2})
    assert report.holm({"a": 0.04, "b": 0.03}) == pytest.approx({"a": 0.06, "b": 0.06})


def ideas(tmp_path, **starts):
    """Two ideas at seed 1 with these start models; new reads three of four answers, base two."""
    for name, start in starts.items():
        right = {"new": 0.75, "base": 0.5}[name]
        final = {"accuracy": right, "responses": 4, "wrong": 4 - 4 * right, "misread": 1}
        final = dict.fromkeys(run.SPLITS, final | {"cells_right": 0.9})
        line = {"variant": f"ideas/{name}", "seed": 1, "start_model": start, "seconds": [2.0, 1.0]}
        run.append(tmp_path / "ideas.jsonl", line | {"curve": {}, "final": final})
    return report.ideas_table({"new": "ideas/new", "base": "ideas/base"}, tmp_path)


def test_ideas_are_shown_beside_the_last_one(tmp_path):
    printed = ideas(tmp_path, new="same", base="same")
    assert "seeds [1]" in printed and "| base | 50.0 |" in printed
    assert "| new (minus base) | 75.0 | +25.0, 1 of 1, p 1.000 |" in printed
    missing = "base, which the others are compared with, has no result"
    assert ideas(tmp_path / "other", new="same") == ideas(tmp_path / "none") == missing
    assert "| base | 50.0 |" in ideas(tmp_path / "alone", base="same")


def test_runs_from_different_start_models_are_not_paired(tmp_path):
    with pytest.raises(ValueError, match="new and base: two start models at seeds .1."):
        ideas(tmp_path, new="new", base="base")


def test_the_report_is_drawn_from_the_committed_results(tmp_path, monkeypatch):
    """So any change of a table, a pairing or a measure shows."""
    (tmp_path / "results").symlink_to(run.RESULTS)
    monkeypatch.setattr(report, "HERE", tmp_path)
    report.main()
    committed = (ROOT / "experiments" / "report.md").read_text()
    assert (tmp_path / "report.md").read_text() == committed


@pytest.mark.parametrize("name", ["README.md", "experiments/README.md"])
def test_every_interval_of_the_readmes_stands_in_the_report(name):
    """Signs aside: prose says that a method loses 2.7 points."""
    reported = set(intervals((ROOT / "experiments" / "report.md").read_text()))
    quoted = intervals((ROOT / name).read_text().replace("±", "+-"))
    assert len(quoted) > 5 and set(quoted) <= reported, set(quoted) - reported


def intervals(text: str) -> list[str]:
    return re.findall(r"\d+\.\d+ \+- \d+\.\d+", " ".join(text.split()))


def test_the_readme_lists_every_variant():
    rows = re.findall(r"^\| \[`(\w+)`\]\(variants/", (ROOT / "README.md").read_text(), re.M)
    assert set(rows) == set(variant_names())
