"""support/predictions.py: Table 1 of the paper, its measures, and files not as they should be."""

import math
from unittest.mock import Mock

import pytest
from conftest import write_jsonl

from support import predictions, tables
from support.protocol import EvalConfig
from support.sandbox import Grader

# Accuracy on the nine sets, their averages over general, vision-dependent and all, and Delta_rel.
GRPO_3B = [28.72, 59.34, 58.90, 57.24, 55.25, 38.14, 55.81, 25.66, 52.26]
PAPO_3B = [30.95, 61.38, 60.09, 57.39, 57.14, 38.67, 62.56, 27.11, 53.95]
GRPO_AVERAGES, PAPO_AVERAGES = [51.89, 42.97, 47.92], [53.39, 45.57, 49.92]
DELTAS = [3.38, 5.60, 4.36]


def questions(percent, n_questions=1250, n=8):
    """Questions with n responses each, exactly `percent` of which are correct."""
    n_correct = round(percent / 100 * n_questions * n)
    correct = [float(i < n_correct) for i in range(n_questions * n)]
    return [[{"accuracy": each} for each in correct[i::n_questions]] for i in range(n_questions)]


def test_table_1(monkeypatch, capsys):
    monkeypatch.setattr(predictions, "RESAMPLES", 3)
    baseline, papo = (
        dict(zip(tables.BENCHMARKS["all"], map(questions, scores), strict=True))
        for scores in (GRPO_3B, PAPO_3B)
    )
    predictions.report(papo, baseline, [], "")
    lines = capsys.readouterr().out.splitlines()
    cells = [line.split() for line in lines if " average" in line]
    assert [line[0] for line in cells] == ["general", "vision-dependent", "overall"]
    assert [float(line[3]) for line in cells] == pytest.approx(PAPO_AVERAGES, abs=0.02)
    assert [float(line[-1]) for line in cells] == pytest.approx(DELTAS, abs=0.02)
    alone = predictions.summarise(baseline)["accuracy"][-3:]
    assert list(alone) == pytest.approx(GRPO_AVERAGES, abs=0.02)


def test_measures_by_hand():
    """Two questions with n = 4: one correct response in all, in the first."""
    of_set = questions(12.5, 2, 4)
    for i, question in enumerate(of_set):
        for loop, record in enumerate(question):
            record |= {"unboxed": i == 1, "truncated": loop == 0}
    row = predictions.summarise({"x": of_set}).loc["x"].dropna().to_dict()
    expected = {"accuracy": 12.5, "pass": 50.0, "unboxed": 50.0, "truncated": 25.0}
    assert row == expected | {"questions": 2, "low": 0.0, "high": 25.0}
    assert predictions.mean_accuracy(of_set) == 0.125


def test_averages_of_incomplete_groups_and_of_unknown_values():
    two = tables.GENERAL[:2]
    baseline = {two[0]: questions(25, 4), two[1]: questions(25, 8)}  # of other questions
    table = predictions.summarise({name: questions(50, 4) for name in two}, baseline)
    assert list(table.index)[2:] == ["general average (2 of 5)", "overall average (2 of 9)"]
    assert table["delta"].tolist() == pytest.approx([100] + [math.nan] * 3, nan_ok=True)


def test_intervals_match_the_known_distribution():
    once, again = (predictions.summarise({"y": questions(20, 1000, 1)}) for _ in range(2))
    half = 196 * (0.2 * 0.8 / 1000) ** 0.5
    [(low, high)] = once[["low", "high"]].to_numpy()
    assert (low, high) == pytest.approx((20 - half, 20 + half), abs=0.5)
    assert once["low"].equals(again["low"])  # the seed is fixed


def papo_eval_file(path, n=8):
    """Write four questions, loop after loop."""
    labels = ["4", "\\frac{1}{2}", "B\n", "90"]
    boxes = ["\\boxed{4}", "<think> 1 < 2 </think> \\boxed{0.5}", "it is B", "\\boxed{ 1 / 2 }"]
    responses = [*boxes, "\\boxed{90", "\\boxed{B}"]
    records = []
    for loop in range(n):
        for i, label in enumerate(labels):
            response = responses[(loop * 3 + i) % len(responses)]
            if i == 3 and loop % 2:
                response += " \\boxed{90}"
            prompt = f"system\nYou are.\nuser\nFrage ß {i}?\nassistant\n"
            record = {"idx": len(records), "id": f"test_{i}", "prompt": prompt}
            records.append(record | {"predict": response, "label": label})
    write_jsonl(path, records)
    return records


def test_files_that_are_not_as_they_should_be(tmp_path):
    file = tmp_path / "a.jsonl"
    records = papo_eval_file(file)
    papo_eval_file(tmp_path / "b.jsonl", n=4)
    question = r"question 'test_3' \('Frage ß 3\? assistant', answer '90'\)"
    with Grader(workers=1) as grader:
        with pytest.raises(ValueError, match="per question differ .*'a': 8, 'b': 4"):
            predictions.grade_files([tmp_path], grader)
        write_jsonl(file, records[:-1])
        with pytest.raises(ValueError, match=f"a: 7 responses to {question}, but 8 to others"):
            predictions.grade_files([file], grader)
    for line in ("rubbish", "[1]", '{"predict": "1"}'):
        file.write_text('{"predict": 1, "label": "\u2028"}\n\n' + line + "\n", encoding="utf-8")
        with pytest.raises(ValueError, match="a.jsonl: not a prediction, with predict and label"):
            predictions.read_predictions(file)
    (tmp_path / "b.jsonl").write_text("")
    grader = Mock(return_value=[])
    assert predictions.grade_files([tmp_path], grader, ["b", "c"]) == {"b": []}
    for paths, names, message in [
        ([tmp_path], ["c", "d"], "no NAME.jsonl of c, d there"),
        ([tmp_path, tmp_path / "b.jsonl"], ["b"], "b.jsonl: set b is given twice"),
    ]:
        with pytest.raises(ValueError, match=message):
            predictions.grade_files(paths, grader, names)


def test_repeated_questions_are_separated():
    """One question that occurs twice per loop: always right first, then always wrong."""
    same = {"id": "", "prompt": "p", "label": "1"}
    records = [same | {"accuracy": float(i % 2 == 0)} for i in range(8)]
    others = [{"id": str(i % 2), "prompt": "p", "label": "1", "accuracy": 0.5} for i in range(8)]
    of_set = predictions.into_questions("x", [*records, *others])
    accuracies = [[record["accuracy"] for record in question] for question in of_set]
    assert accuracies == [[1.0] * 4, [0.0] * 4, [0.5] * 4, [0.5] * 4]


def test_an_output_folder_is_one_evaluations(tmp_path):
    model = tmp_path / "model"
    model.mkdir()
    (model / "weights").write_text("1")

    def start(out="out", **settings):
        predictions.open_output(EvalConfig(str(model), out=str(tmp_path / out), **settings))

    start()
    start()
    with pytest.raises(ValueError, match="out holds results with seed 0: choose another"):
        start(seed=1)
    (model / "weights").write_text("12")
    with pytest.raises(ValueError, match="results with files of model"):
        start()
    (tmp_path / "rows.jsonl").write_text("")
    with pytest.raises(ValueError, match="holds JSON files and no evaluation"):
        start(out=".")
