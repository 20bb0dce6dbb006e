"""The experiments' bookkeeping: jobs, misread answers, statistics, tables from results alone."""

import dataclasses
import json
import re
from pathlib import Path

import numpy as np
import pytest

import train
from experiments import measures, protocol, report, report_cost, run, tasks
from papo import algo_class, preset
from support import toy
from support.cli import parse_flags, resolve_config
from support.variants import variant_names

ROOT = Path(__file__).parent.parent
DOTS = tasks.Dots()


def test_every_run_is_one_job_and_start_models_come_first():
    jobs = run.list_jobs(list(protocol.EXPERIMENTS), seeds=None)
    assert len(jobs) == len(set(jobs))
    assert {variant for variant, _ in jobs} == set(protocol.VARIANTS)
    is_start = [run.is_start(variant) for variant, _ in jobs]
    assert is_start == sorted(is_start, reverse=True)
    for name in protocol.EXPERIMENTS:  # a seed that chose something is not reported
        chose = {seed for _, seed in run.list_jobs([name], seeds=None)} & {0, 1, 2}
        assert chose == ({0, 1, 2} if "choice" in name else set())
    assert run.list_jobs(["estimator"], seeds=[11, 99]) == [
        ("papo_g", 11),
        ("estimator_paper", 11),
        ("masked_grad", 11),
    ]


def test_a_variant_names_its_task():
    assert run.task_of("grpo").spec == run.task_of("dots/grpo").spec == DOTS.spec
    assert "warm_steps=800," in run.task_of("dots_800/grpo").spec


def test_the_report_shows_every_variant():
    for title, (names, base) in report.EXPERIMENTS.items():
        variants, _ = protocol.EXPERIMENTS[title]
        assert set(names) == set(variants) and base in variants
    assert ["start", *report.TABLE1] == protocol.EXPERIMENTS["table1"][0]


def test_train_accepts_the_flags_of_every_variant(tmp_path):
    for name, flags in protocol.VARIANTS.items():
        objective = algo_class(flags.get("algo", "papo_g"))
        algo_fields = {field.name for field in dataclasses.fields(objective)}
        words = ["--model", DOTS.spec, "--out", str(tmp_path / name)]
        for flag, value in (protocol.TRAINING | flags).items():
            words.append(f"--{flag}" if value is True else f"--{flag}={value}")
        given = parse_flags("A run.", train.Config, objective, argv=words)
        assert flags.items() <= given.items()
        config = resolve_config(train.Config, given)
        assert config.data == DOTS.spec and config.max_new_tokens == 61
        changed = {key: value for key, value in flags.items() if key in algo_fields}
        dataclasses.replace(preset(config.algo), **changed)


def test_a_response_is_misread_where_its_count_is_wrong():
    scene = toy.make_scene("general", 3, setting=DOTS.setting)
    place = next(i for i, colour in enumerate(scene.cells) if colour != scene.asked)
    counted_one_more = [*scene.cells]
    counted_one_more[place] = scene.asked
    same_count = [*scene.cells]
    same_count[place] = next(
        word for word in (*toy.COLOURS, toy.NO_DOT) if word not in (scene.asked, scene.cells[place])
    )

    def judge(cells, box=None):
        response = toy.write_response(cells, scene.asked, box, DOTS.setting)
        assert tasks.read_cells(DOTS, response) == cells
        return (
            tasks.is_misread(DOTS, response, "general", 3),
            tasks.share_of_cells_right(DOTS, response, "general", 3),
        )

    assert judge(scene.cells) == (False, 1)
    assert judge(scene.cells, box=scene.note) == (False, 1)
    assert judge(counted_one_more) == (True, 15 / 16)
    assert judge(same_count) == (False, 15 / 16)
    silent = tasks.is_misread(DOTS, "no reading at all", "general", 3)
    assert silent == (scene.cells.count(scene.asked) > 0)


def test_the_sign_flip_test_is_exact():
    assert measures.sign_flip_p([1.0] * 8) == 2 / 256
    assert measures.sign_flip_p([1.0, -1.0]) == 1.0
    assert measures.sign_flip_p([3.0, -1.0]) == 1.0
    assert measures.sign_flip_p([3.0, 1.0]) == 0.5


def cost_result(curve, seconds, tokens):
    """A run of two steps, with an evaluation after each."""
    scores = {str(step): dict.fromkeys(tasks.SPLITS, value) for step, value in enumerate(curve)}
    metrics = {"seconds": [seconds] * 2, "tokens_per_second": [tokens / seconds] * 2}
    return {"curve": scores, "metrics": metrics}


def test_methods_are_compared_when_they_have_spent_the_same():
    """A method that takes twice as long is as good after two steps as its baseline after one."""
    found = {
        "slow": {seed: cost_result([0.2, 0.5, 0.8], 4.0, 10) for seed in (1, 2)},
        "base": {seed: cost_result([0.2, 0.4, 0.6], 2.0, 10) for seed in (1, 2)},
    }
    budgets, of_seeds = report_cost.differences(found, "slow", "base", "seconds")
    assert budgets[-1] == 4.0 and of_seeds.shape == (2, 201)
    assert of_seeds[0, [0, 100, 200]] == pytest.approx([0, 35 - 40, 50 - 60])
    budgets, of_seeds = report_cost.differences(found, "slow", "base", "sampled tokens")
    assert budgets[-1] == 20.0
    assert of_seeds[0, [0, 100, 200]] == pytest.approx([0, 10, 20])
    table = report_cost.pay_table(found, [("slow", "base")])
    assert "| slow | seconds | 2.00 | -2.5 +- 0.0 | -5.0 +- 0.0 | -7.5 +- 0.0 |" in table
    assert "| slow | sampled tokens | 1.00 |" in table and "none (none in 100%" in table


def test_the_crossing_is_where_the_sign_changes_last():
    budgets = np.array([0.0, 1.0, 2.0, 3.0, 4.0])
    assert report_cost.crossing(budgets, np.array([1.0, -1, 2, 1, -3])) == 4.0
    assert report_cost.crossing(budgets, np.array([-1.0, -1, 0, 1, 3])) == 2.0
    assert report_cost.crossing(budgets, np.array([0.0, 1, 2, 1, 3])) is None


def fake_result(variant, seed, accuracy):
    final = {
        "accuracy": accuracy,
        "responses": 100,
        "wrong": 40,
        "misread": 30,
        "cells_right": 0.9,
        "unboxed": 0.0,
    }
    result = {
        "variant": variant,
        "seed": seed,
        "commit": "abc1234",
        "final": {"general": final, "vision_dependent": final | {"accuracy": accuracy / 2}},
    }
    if variant != "start":
        result["metrics"] = {name: [0.1, 0.2 + seed / 100] for name in run.METRICS}
        result["curve"] = {
            "0": {"general": 0.1, "vision_dependent": 0.1},
            "2": {"general": 0.5, "vision_dependent": 0.3},
        }
    return result


def test_the_report_needs_results_alone(tmp_path, monkeypatch):
    monkeypatch.setattr(report, "HERE", tmp_path)
    (tmp_path / "results" / "variants").mkdir(parents=True)
    accuracies = {"start": 0.2, "grpo": 0.5, "papo_g": 0.6, "gamma_0.1": 0.4, "mask_1.0": 0.5}
    for variant, accuracy in accuracies.items():
        for seed in (10, 11):
            result = fake_result(variant, seed, accuracy + seed / 1000)
            (tmp_path / "results" / f"{variant}-s{seed}.json").write_text(json.dumps(result))
    methods = {"grpo": 0.5, "dapo": 0.54, "tapo": 0.6, "dvrp": 0.48}
    methods |= {"tapo_x5": 0.6, "tapo_x20": 0.7}
    incomplete = fake_result("variants/tapo_x20", 10, 0.9)
    path = tmp_path / "results" / "variants" / "tapo_x20-s10.json"
    path.write_text(json.dumps(incomplete))
    for name, accuracy in methods.items():
        for seed in (0, 1, 2) if "_x" in name else (10, 11):
            result = fake_result(f"variants/{name}", seed, accuracy)
            path = tmp_path / "results" / "variants" / f"{name}-s{seed}.json"
            path.write_text(json.dumps(result))
    seconds = {"grpo": {"seconds": [2.0, 1.0, 9.0]}, "tapo": {"seconds": [2.5, 2.4, 8.0]}}
    (tmp_path / "cost.json").write_text(json.dumps({"methods": seconds}))
    report.main()
    text = (tmp_path / "report.md").read_text()
    tapo = "| 60.0 +- 0.0 | 30.0 +- 0.0 | 45.0 +- 0.0 | +7.5 +- 0.0 | 0.500 | +4.5 +- 0.0 | 0.500 |"
    assert f"| tapo | 2 {tapo} 1.25 |" in text
    assert "| tapo_x20 |" not in text
    assert "| dvrp | 2 |" in text and "| -1.5 +- 0.0 | 0.500 |  |  |" in text
    assert "| tapo | 45.0 | 52.5 | x20 |" in text
    assert "from 10 results of commit abc1234" in text
    cells = "61.0 +- 0.6 | 30.5 +- 0.3 | 45.8 +- 0.5 | 40.0 +- 0.0 | +19.6 +- "
    assert f"| papo_g | 2 | {cells}" in text
    assert "| gamma 0.1 | 2 | 41.0" in text and "-7.5 +- 0.0 |" in text
    assert "(not run yet)" in text
    figures = {path.stem for path in (tmp_path / "figures").iterdir()}
    # A figure takes two variants.
    assert figures == {"table1", "gamma", "masking", "no_kl_ref", "variants"}
    found = measures.load(tmp_path / "results")
    relative = measures.delta_rel(found["papo_g"][10], found["grpo"][10])
    assert relative == pytest.approx(100 * (0.61 / 0.51 - 1))


def test_the_report_is_drawn_from_the_committed_results(tmp_path, monkeypatch):
    for name in ("results", "cost.json"):
        (tmp_path / name).symlink_to(ROOT / "experiments" / name)
    monkeypatch.setattr(report, "HERE", tmp_path)
    report.main()
    committed = (ROOT / "experiments" / "report.md").read_text()
    assert (tmp_path / "report.md").read_text() == committed


@pytest.mark.parametrize("name", ["README.md", "experiments/README.md"])
def test_the_readmes_quote_the_report(name):
    """Every interval stands in report.md; in a table, in a row of the same name. Signs aside: prose
    says that a method loses 2.7 points."""
    rows_of = {}
    reported = (ROOT / "experiments" / "report.md").read_text()
    for line in reported.splitlines():
        rows_of.setdefault(row_name(line), set()).update(intervals(line))
    everywhere = set(intervals(reported))
    text = (ROOT / name).read_text().replace("±", "+-")
    lines = text.splitlines()
    prose = " ".join(line for line in lines if not line.startswith("|"))
    assert set(intervals(prose)) <= everywhere
    tables = [line for line in lines if line.startswith("|") and intervals(line)]
    assert len(tables) > 4
    for line in tables:
        assert set(intervals(line)) <= rows_of.get(row_name(line), set()), line


def intervals(text: str) -> list[str]:
    return re.findall(r"\d+(?:\.\d+)? \+- \d+(?:\.\d+)?", " ".join(text.split()))


def row_name(line: str) -> str:
    """The first cell of a table's row, without a link or quotes."""
    found = re.match(r"\| \[?`?([^`|\]]+?)`?(?:\].*?)? \|", line)
    return found[1].partition(" minus ")[0] if found else ""


def test_the_readme_lists_every_variant():
    rows = re.findall(r"^\| \[`(\w+)`\].* ± \S+ \|$", (ROOT / "README.md").read_text(), re.M)
    assert set(rows) == set(variant_names())
