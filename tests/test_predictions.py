"""support/predictions.py: graded by PAPO-Eval's rule, and resumed after a kill."""

import json
import re

import mathruler.grader
import pytest

from support import data, predictions
from support.predictions import boxed


def its_rule(records, n):
    """PAPO-Eval's average accuracy @ n, written down independently: the mean of question means."""
    groups = {}
    for record in records:
        response = re.sub(r"\s*(<|>|/)\s*", r"\1", record["predict"])
        content = mathruler.grader.extract_boxed_content(response)
        correct = float(mathruler.grader.grade_answer(content, record["label"]))
        key = record["id"], record["prompt"], record["label"]
        groups.setdefault(key, []).append(correct)
    means = []
    for group in groups.values():
        assert len(group) % n == 0
        means += [sum(group) / len(group)] * (len(group) // n)
    return 100 * sum(means) / len(means)


def papo_eval_file(path, n=8, repeated=True):
    """Write five questions, loop after loop; the last two are the same question if `repeated`."""
    labels = ["4", "\\frac{1}{2}", "B\n", "90", "90" if repeated else "91"]
    responses = [
        "\\boxed{4}",
        "<think> 1 < 2 </think> \\boxed{0.5}",
        "it is B",
        "\\boxed{ 1 / 2 }",
        "\\boxed{90",
        "\\boxed{B}",
    ]
    records = []
    for loop in range(n):
        for i, label in enumerate(labels):
            question = min(i, 3)
            response = responses[(loop * 3 + i) % len(responses)]
            if i > 2 and loop % 2:
                response += " \\boxed{90}"
            records.append(
                {
                    "idx": len(records),
                    "id": f"test_{question}",
                    "prompt": f"system\nYou are.\nuser\nFrage ß {question}?\nassistant\n",
                    "predict": response,
                    "label": label,
                }
            )
    lines = [json.dumps(record, ensure_ascii=False) + "\n" for record in records]
    path.write_text("".join(lines), encoding="utf-8")
    return records


def test_boxed():
    assert boxed("<think> 1 </think> \\boxed{a \\frac{1} / {2}} x") == "a \\frac{1}/{2}"
    assert boxed("\\boxed{1") is None
    assert boxed("1") is None


def test_which_files_are_meant(tmp_path):
    for name in ("a", "b"):
        (tmp_path / f"{name}.jsonl").write_text("")
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "a.jsonl").write_text("")
    find = predictions.find_predictions
    assert list(find([tmp_path], [])) == ["a", "b"]
    assert find([tmp_path], ["b"]) == {"b": tmp_path / "b.jsonl"}
    with pytest.raises(ValueError, match="one NAME.jsonl for c, a expected, found a.jsonl, b.json"):
        find([tmp_path], ["c", "a"])
    with pytest.raises(ValueError, match="found a.jsonl, b.jsonl, a.jsonl"):
        find([tmp_path, tmp_path / "other"], [])
    with pytest.raises(ValueError, match="for a set expected, found none"):
        find([], [])


@pytest.mark.parametrize("line", ["rubbish", "[1]", '{"predict": "1"}'])
def test_a_line_that_is_not_a_prediction_is_named(tmp_path, line):
    file = tmp_path / "a.jsonl"
    file.write_text('{"predict": 1, "label": "\u2028"}\n\n' + line + "\n", encoding="utf-8")
    with pytest.raises(data.DataError, match="a.jsonl: line 3 is not a prediction"):
        predictions.read_predictions(file)


def test_an_output_folder_is_one_evaluations(tmp_path):
    model = tmp_path / "model"
    model.mkdir()
    (model / "weights").write_text("1")
    out = tmp_path / "out"
    settings = {"seed": 0, "n": 8, "model": str(model), "data": "hub/id", "benchmarks": "hub/id"}
    predictions.open_output(out, settings)
    predictions.open_output(out, settings)
    with pytest.raises(ValueError, match=f"--out {out} holds an evaluation with seed 0: choose"):
        predictions.open_output(out, settings | {"seed": 1})
    (model / "weights").write_text("12")
    with pytest.raises(ValueError, match="holds an evaluation with files of model "):
        predictions.open_output(out, settings)
    (tmp_path / "rows.jsonl").write_text("")
    with pytest.raises(ValueError, match="holds rows.jsonl and no evaluation: choose another"):
        predictions.open_output(tmp_path, settings)


def test_partial_records_survive_a_kill(tmp_path):
    """Only questions with all n responses count, whatever line a killed rank leaves incomplete."""

    def record(row, loop):
        return {"idx": 0, "row": row, "loop": loop, "predict": "größe\u2028"}

    def load():
        return sorted(predictions.load_partial(tmp_path, "a", 2), key=key)

    def key(record):
        return record["loop"], record["row"]

    complete = sorted([record(row, loop) for row in range(3) for loop in range(2)], key=key)
    assert load() == []
    predictions.append_partial(tmp_path, "a", 0, [record(0, 0), record(0, 1)])
    predictions.append_partial(tmp_path, "a", 1, [record(1, 0), record(1, 1)])
    part = tmp_path / "partial" / "a" / "1.jsonl"
    part.write_text(part.read_text(encoding="utf-8")[:-5], encoding="utf-8")
    assert load() == [record(0, 0), record(0, 1)]
    predictions.append_partial(tmp_path, "a", 1, [record(2, 0), record(2, 1)])
    predictions.append_partial(tmp_path, "a", 0, [record(1, 0), record(1, 1)])
    assert load() == complete

    predictions.write_predictions(tmp_path, "a", complete)
    assert not part.exists()
    assert load() == [record | {"idx": i} for i, record in enumerate(complete)]
    text = (tmp_path / "a.jsonl").read_text(encoding="utf-8")
    assert len(text.splitlines()) == len(complete)  # Python also splits at "\u2028"
    assert list(tmp_path.glob(".*")) == []
