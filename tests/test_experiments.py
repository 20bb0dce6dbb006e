"""The experiments' bookkeeping: jobs, misread answers, statistics, tables from results alone."""

import dataclasses
import json
import re

import numpy as np
import pytest
from conftest import ROOT

import train
from experiments import (
    measures,
    protocol,
    report,
    report_confirm,
    report_cost,
    report_difficulty,
    report_tasks,
    run,
    start_model,
    tasks,
)
from papo import algo_class, preset_settings
from support import toy
from support.config import parse_flags
from support.variants import variant_names

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


def test_the_report_shows_every_variant():
    for title, (names, base) in (report.FIRST | report.SECOND).items():
        variants, _ = protocol.EXPERIMENTS[title]
        assert set(names) == set(variants) and base in variants
    assert ["start", *report.TABLE1] == protocol.EXPERIMENTS["table1"][0]


def test_train_accepts_the_flags_of_every_variant():
    for flags in protocol.VARIANTS.values():
        algo = flags.get("algo", "papo_g")
        words = []
        for flag, value in (protocol.TRAINING | flags).items():
            words.append(f"--{flag}" if value is True else f"--{flag}={value}")
        defaults = preset_settings(algo) | toy.task_defaults(DOTS.setting)
        classes = train.Config, algo_class(algo)
        config, objective = parse_flags("A run.", *classes, defaults=defaults, argv=words)
        assert flags.items() <= (vars(config) | vars(objective)).items()
        assert config.max_new_tokens == 61


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


def test_the_sign_flip_test_is_exact_and_holms_correction():
    assert measures.sign_flip_p([1.0] * 8) == 2 / 256
    assert measures.sign_flip_p([1.0, -1.0]) == 1.0
    assert measures.sign_flip_p([3.0, -1.0]) == 1.0
    assert measures.sign_flip_p([3.0, 1.0]) == 0.5
    assert measures.holm([0.03, 0.01, 0.2]) == pytest.approx([0.06, 0.03, 0.2])
    assert measures.holm([0.04, 0.03]) == pytest.approx([0.06, 0.06])


def task_result(variant, seed, curve, tokens=10):
    """A run of two steps of both splits alike, with an evaluation after each."""
    result = fake_result(variant, seed, curve[-1])
    result["start_model"] = f"start {seed}"
    result["final"]["vision_dependent"] = result["final"]["general"]
    scores = [dict.fromkeys(tasks.SPLITS, value) for value in curve]
    result["curve"] = {str(step): score for step, score in enumerate(scores)}
    result["metrics"] = {"seconds": [1.0, 1.0], "tokens_per_second": [float(tokens)] * 2}
    return result


def test_methods_are_compared_when_they_have_spent_the_same():
    """A method that takes twice as long is as good after two steps as its baseline after one."""
    found = {
        "slow": {seed: task_result("slow", seed, [0.2, 0.5, 0.8]) for seed in (1, 2)},
        "base": {seed: task_result("base", seed, [0.2, 0.4, 0.6]) for seed in (1, 2)},
    }
    costs = {"slow": {"seconds": [4.0, 4.0]}, "base": {"seconds": [2.0, 2.0]}}
    budgets, of_seeds = report_cost.differences(found, costs, "slow", "base", "seconds")
    assert budgets[-1] == 4.0 and of_seeds.shape == (2, 201)
    assert of_seeds[0, [0, 100, 200]] == pytest.approx([0, 35 - 40, 50 - 60])
    budgets, of_seeds = report_cost.differences(found, costs, "slow", "base", "sampled tokens")
    assert budgets[-1] == 20.0
    assert of_seeds[0, [0, 100, 200]] == pytest.approx([0, 10, 20])
    table = report_cost.pay_table(found, costs, {"slow": "base"})
    cells = "| -2.5 +- 0.0 | -5.0 +- 0.0 | -7.5 +- 0.0 | -10.0 +- 0.0 | never (never to never) |"
    assert f"| slow, seconds | 4 {cells}" in table
    assert "| slow, sampled tokens | 20 |" in table and "| 0 (0 to 0) |" in table


def test_a_method_is_ahead_from_where_it_stays_ahead():
    budgets = np.array([0.0, 1.0, 2.0, 3.0, 4.0])
    assert report_cost.ahead_from(budgets, np.array([0, 1.0, -1, 2, 1])) == 3.0
    assert report_cost.ahead_from(budgets, np.array([0, 1.0, 2, 1, 3])) == 1.0
    assert report_cost.ahead_from(budgets, np.array([0, 1.0, 2, 1, 0])) == np.inf


def test_the_report_on_both_tasks_takes_the_reported_seeds_alone(tmp_path):
    found = {}
    accuracies = {"grpo": 0.5, "papo_g": 0.6, report_tasks.PRIMARY: 0.7, "dapo": 0.5, "papo_d": 0.4}
    for task in protocol.TASKS:
        for method, final in accuracies.items():
            name = f"{task}/{method}"
            curve = [0.2, final, final]
            found[name] = {seed: task_result(name, seed, curve) for seed in protocol.NEW_SEEDS}
            found[name][1] = task_result(name, 1, [0.2, 0.9, 0.9])  # of the choices
    del found["digits/papo_d"][23]
    text = "\n".join(report_tasks.sections(found, {}, tmp_path))
    dots, digits = text.partition("## dots")[2].split("## digits", maxsplit=1)
    assert f"{report_tasks.PRIMARY} minus grpo" in text
    assert "| how far | +20.0 +- 0.0 | 16 of 16 | 0.00003 | 0.00006 |" in text
    assert "| papo_g | 8 | 60.0 +- 0.0 |" in dots and "| +10.0 +- 0.0 | 0.008 |" in dots
    assert "| papo_d | 8 | 40.0 +- 0.0 |" in dots and "| papo_d |" not in digits
    assert {path.stem for path in tmp_path.iterdir()} == {"both_tasks", "cost"}
    found["dots/grpo"][20]["start_model"] = "another"
    with pytest.raises(ValueError, match="dots/papo_g.*two start models at seed 20"):
        report_tasks.sections(found, {}, tmp_path)


def test_runs_that_end_below_their_start_model_are_counted():
    finals = {"dots/start": 0.3, "dots/base": 0.5, "dots/other": 0.6}
    found = {
        name: {seed: task_result(name, seed, [0.2, final]) for seed in protocol.NEW_SEEDS}
        for name, final in finals.items()
    }
    found["dots/other"][24] = task_result("dots/other", 24, [0.2, 0.2])
    found["dots/other"][24]["metrics"] = {
        name: [0.1] * 7 + [after] * 7 + [None]  # the last step trained on nothing
        for name, after in {"kl_prcp": 9.0, "entropy": 5.0, "clip_frac": 0.9}.items()
    }
    table = report.tested_table(found, {"dots/base": "base", "dots/other": "other"}, "dots/base")
    base, other = table.splitlines()[2:]
    assert base.startswith("| base | 50.0 +- 0.0 |") and base.endswith("|  |  | 0 of 8 |  | 0 |")
    # Seven seeds gain 10 points, one loses 30: mean 5, standard deviation sqrt(200), t(7) = 2.365;
    # 130 of the 256 sign patterns have a mean at least as far from 0. One collapse more: p is 1.
    assert other.endswith("| +5.0 +- 11.8 | 7 of 8 | 0.508 | 0.508 | 1 of 8 | 1.000 | 1 |")


def test_the_table_of_seeds_shows_baselines_then_differences():
    finals = {"dots/grpo": 0.5, "dots/papo_g": 0.6, "digits/grpo": 0.7}
    found = {
        name: {seed: task_result(name, seed, [0.2, final]) for seed in protocol.NEW_SEEDS}
        for name, final in finals.items()
    }
    found["dots/papo_g"][27] = task_result("dots/papo_g", 27, [0.2, 0.4])
    rows = report.seeds_table(
        found, protocol.NEW_SEEDS, measures.accuracy, measures.accuracy_gain
    ).splitlines()[2:]
    seven = " | +10.0" * 7
    assert rows == [
        "| dots/grpo" + " | 50.0" * 8 + " |",
        f"| dots/papo_g minus dots/grpo{seven} | -10.0 |",
    ]


def test_the_confirmation_takes_its_own_seeds_alone(tmp_path):
    found = {}
    for name, final in {report_confirm.BASE: 0.5, report_confirm.METHOD: 0.6}.items():
        seeds = protocol.CONFIRMING_SEEDS
        curve = [0.2] * 20 + [final]  # an evaluation after each of 20 steps
        found[name] = {seed: task_result(name, seed, curve) for seed in seeds}
        for result in found[name].values():
            result["metrics"] = {"seconds": [1.0] * 20, "tokens_per_second": [10.0] * 20}
            result["final"]["general"]["wrong"] = round(100 * (1 - final))
        others = {seed: task_result(name, seed, [0.2, 0.2]) for seed in protocol.NEW_SEEDS}
        found[name] |= others
    costs = {name: {"seconds": [1.0] * 20} for name in found}
    text = "\n".join(report_confirm.sections(found, costs, tmp_path))
    assert "| how far | +10.0 +- 0.0 | 8 of 8 | 0.00781 | 0.01562 |" in text
    assert "| overall after step 20, points | +10.0 +- 0.0 | 8 of 8 |" in text
    assert "| Delta_rel % | +20.0 +- 0.0 | 8 of 8 |" in text
    assert "| wrong answers, relative to baseline % | -20.0 +- 0.0 | 0 of 8 |" in text
    assert "| semantic_0.17, seconds | 20 |" in text
    assert [path.stem for path in tmp_path.iterdir()] == ["confirm"]
    del found[report_confirm.BASE][30]
    assert report_confirm.sections(found, costs, tmp_path)[1] == "(not complete)"


def test_the_report_on_difficulty_compares_the_gains_of_a_seed(tmp_path):
    found = {}
    gains = {"easy": 0.05, "middle": 0.1, "hard": 0.3}
    for task in protocol.TASKS:
        for level, gain in gains.items():
            name = report_difficulty.name_at(task, level)
            finals = {"start": 0.2, "grpo": 0.5, report_tasks.PRIMARY: 0.5 + gain}
            for method, final in finals.items():
                variant = f"{name}/{method}"
                curve = [0.2, final - 0.1, final]
                found[variant] = {s: task_result(variant, s, curve) for s in protocol.NEW_SEEDS}
    text = "\n".join(report_difficulty.sections(found, tmp_path))
    assert "| how far | +25.0 +- 0.0 | 16 of 16 | 0.00003 | 0.00006 |" in text
    assert "| how far | +25.0 +- 0.0 | +25.0 +- 0.0 |" in text
    assert "| 50.0 +- 0.0 | +30.0 +- 0.0 | +30.0 +- 0.0 | +60.0 +- 0.0 |" in text
    assert "| digits, hard | 20.0 +- 0.0 |" in text
    assert "| digits_hard/grpo | +30.0 +- 0.0 | +10.0 +- 0.0 |" in text
    assert "| digits, hard | +30.0 +- 0.0 | +30.0 +- 0.0 | +30.0 +- 0.0 |" in text
    assert [path.stem for path in tmp_path.iterdir()] == ["difficulty"]
    del found["digits_hard/grpo"][27]
    assert report_difficulty.sections(found, tmp_path)[1] == "(not complete)"


@pytest.mark.parametrize(
    "variant, changes",
    [
        ("gamma_0.1", {}),
        ("dots/grpo", {}),
        ("dots_easy/grpo", {"misread": 0.04}),
        ("dots_hard/start", {"misread": 0.2}),
    ],
)
def test_a_level_of_difficulty_changes_the_start_model_alone(variant, changes, monkeypatch):
    monkeypatch.setattr(start_model, "build", lambda *args: args)
    task = run.task_of(variant)
    seed, folder, setting = task.build(20)
    assert (seed, setting) == (20, dataclasses.replace(DOTS.setting, **changes))
    assert (folder == DOTS.build(20)[1]) == (not changes)
    row = task.example("general", 3)
    assert row.question == DOTS.example("general", 3).question
    assert row.images[0].tobytes() == DOTS.example("general", 3).images[0].tobytes()


def test_a_result_made_with_other_flags_is_refused(tmp_path, monkeypatch):
    monkeypatch.setattr(run, "RESULTS", tmp_path)
    result = {"config": protocol.TRAINING | {"algo": "grpo", "steps": 31}}
    (tmp_path / "grpo-s10.json").write_text(json.dumps(result))
    with pytest.raises(ValueError, match=r"grpo-s10.json was made with steps=31, .* has 30"):
        run.has_result("grpo", 10)
    result["config"]["steps"] = 30
    (tmp_path / "grpo-s10.json").write_text(json.dumps(result))
    assert run.has_result("grpo", 10) and not run.has_result("grpo", 11)


def test_a_continued_run_keeps_its_origin(tmp_path, monkeypatch):
    (tmp_path / start_model.WEIGHTS).write_text("weights")
    file = tmp_path / "grpo.origin"
    first = run.origin("grpo", 10, tmp_path, file)
    monkeypatch.setattr(run, "current_commit", lambda: "later")
    assert run.origin("grpo", 10, tmp_path, file) == first
    assert first["machine"]["threads"] == 1 and first["commit"] != "later"
    (tmp_path / start_model.WEIGHTS).write_text("others")
    with pytest.raises(RuntimeError, match="the start model has changed"):
        run.origin("grpo", 10, tmp_path, file)


def test_a_step_that_trained_on_nothing_has_no_metrics_of_the_update(tmp_path):
    steps = [
        {"step": 1, "reward": 0.9, "seconds": 2.0, "kl_prcp": 0.123456},
        {"step": 2, "reward": 1.0, "seconds": 1.0},
        {"step": 2, "eval/general": 0.75},
    ]
    (tmp_path / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in steps))
    (tmp_path / "config.json").write_text("{}")
    (tmp_path / "samples.jsonl").write_text("")
    record = run.training_record(tmp_path)
    assert record["metrics"] == {
        "reward": [0.9, 1.0],
        "kl_prcp": [0.12346, None],
        "seconds": [2.0, 1.0],
    }
    assert record["curve"] == {2: {"general": 0.75}}
    assert report.series(record, "kl_prcp") == {1: 0.12346}


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
    seconds = {
        "variants/grpo": {"seconds": [2.0, 1.0, 9.0]},
        "variants/tapo": {"seconds": [2.5, 2.4, 8.0]},
    }
    (tmp_path / "cost.json").write_text(json.dumps({"methods": seconds}))
    report.main()
    text = (tmp_path / "report.md").read_text()
    tapo = "| 60.0 +- 0.0 | 30.0 +- 0.0 | 45.0 +- 0.0 | +7.5 +- 0.0 | 0.500 | +4.5 +- 0.0 | 0.500 |"
    assert f"| tapo | 2 {tapo} 1.25 |" in text
    assert "| tapo_x20 |" not in text
    assert "| dvrp | 2 |" in text and "| -1.5 +- 0.0 | 0.500 |  |  |" in text
    assert "| tapo | 45.0 | 52.5 | x20 |" in text
    assert "| abc1234 | not recorded |" in text
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
        rows_of.setdefault(row_name(line), set()).update(numbers(line))
    everywhere = set(intervals(reported))
    text = (ROOT / name).read_text().replace("±", "+-")
    lines = text.splitlines()
    prose = " ".join(line for line in lines if not line.startswith("|"))
    assert set(intervals(prose)) <= everywhere
    tables = [line for line in lines if line.startswith("|") and intervals(line)]
    assert len(tables) > 4
    for line in tables:
        assert set(numbers(line)) <= rows_of.get(row_name(line), set()), line


def intervals(text: str) -> list[str]:
    return re.findall(r"\d+(?:\.\d+)? \+- \d+(?:\.\d+)?", " ".join(text.split()))


def numbers(row: str) -> list[str]:
    """A row's intervals and its cells that are decimal numbers, such as a p or a cost."""
    return intervals(row) + re.findall(r"(?<=\| )\d+\.\d+(?= \|)", row)


def row_name(line: str) -> str:
    """The first cell of a table's row, without a link or quotes."""
    found = re.match(r"\| \[?`?([^`|\]]+?)`?(?:\].*?)? \|", line)
    return found[1].partition(" minus ")[0] if found else ""


def test_the_readme_lists_every_variant():
    rows = re.findall(r"^\| \[`(\w+)`\].* ± \S+ \|$", (ROOT / "README.md").read_text(), re.M)
    assert set(rows) == set(variant_names())
