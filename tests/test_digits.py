"""The digits task: its rows, its split of the scans, and training on it with public flags alone."""

import numpy as np
import pytest
from conftest import metric_lines, process_restored

import train
from support import data

pytest.importorskip("sklearn", reason="the digits are scikit-learn's")

from experiments import digits, run  # noqa: E402


def test_the_running_result():
    """To which a cell that is not named adds nothing."""
    cells = ["four", "", "none", "one", "", "two", "two", "", "four"]
    for question, expected in {
        ("count", 2): [0, 0, 0, 0, 0, 1, 2, 2, 2],
        ("count", 0): [0, 0, 0, 0, 0, 0, 0, 0, 0],
        ("sum", 1): [0, 0, 0, 1, 1, 3, 3, 3, 3],
        ("largest", 1): [0, 0, 0, 1, 1, 2, 2, 2, 2],
    }.items():
        assert digits.Question(*question).results(cells) == expected


def test_the_labels_of_the_warm_start_misread_as_often_as_asked():
    rows = range(400)
    right = sum((digits.make_scene("warm", row).cells for row in rows), [])
    for chance in (0.04, 0.2):
        lessons = digits.make_lessons(rows, flawed=True, seed=0, misread=chance)
        read = sum((run.read_cells(response, 9) for _, response in lessons), [])
        wrong = [a != b for a, b in zip(read, right, strict=True)]
        assert abs(np.mean(wrong) - chance) < 0.02  # three standard errors of 3,600 cells


def test_the_task_trains_with_public_flags(tmp_path, monkeypatch):
    monkeypatch.setattr(digits, "ROWS", {"train": 16, "general": 4, "vision_dependent": 4})
    monkeypatch.setattr(digits, "WARM_STEPS", 2)
    digits.build(tmp_path / "task", seed=3, misread=0.2)
    rows = data.load(str(tmp_path / "task" / "train.jsonl"))
    assert rows[0].question == digits.example_of(digits.make_scene("train", 0, seed=3)).question
    flags, _ = digits.flags(tmp_path / "task")
    flags |= {"model": tmp_path / "task" / "model", "out": tmp_path / "run"}
    flags |= {"steps": 1, "prompts_per_step": 4}
    with process_restored():
        train.main(run.words_of(flags))
    assert {"eval/general", "eval/vision_dependent"} <= metric_lines(tmp_path / "run")[0].keys()


def test_notes_scans_and_images_that_are_read_correctly(monkeypatch):
    """Notes are wrong where vision decides; no scan of the evaluation is seen in training."""
    right = dict.fromkeys(run.SPLITS, 0)
    for split in right:
        for row in range(100):
            made = digits.make_scene(split, row)
            cells, answer = digits.scene_of(split, row)
            assert str(answer(cells)) == digits.example_of(made).answer
            assert run.read_cells(digits.write_response(made.question, cells), 9) == made.cells
            right[split] += made.note == answer(cells)
    assert right["vision_dependent"] == 0 and 35 < right["general"] < 65
    trained, held_out = digits.scans(held_out=False), digits.scans(held_out=True)
    for digit in trained:
        seen, new = ({scan.tobytes() for scan in side[digit]} for side in (trained, held_out))
        assert len(seen) > 100 and len(new) > 50 and not seen & new
    sides = []
    monkeypatch.setattr(digits, "scans", lambda held_out: sides.append(held_out) or trained)
    for split in ("warm", "train", *run.SPLITS):
        digits.make_scene(split, 0)
    assert sides == [False, False, True, True]


def test_a_start_model_of_a_level_is_built_by_its_command(tmp_path, monkeypatch):
    monkeypatch.setattr(run, "WORK", tmp_path)
    commands = []
    monkeypatch.setattr(run, "run_python", lambda words, *rest: commands.append(words))
    for task in ("digits_hard", "dots"):
        run.build_start(task, seed=3)
    folders = [tmp_path / "start" / name for name in ("digits_hard-s3", "dots-s3")]
    assert commands[0][1:] == ["experiments.digits", f"{folders[0]}", "--misread=0.2", "--seed=3"]
    spec = f"{run.SPEC},misread=0.12"
    assert commands[1][2:] == [spec, f"--out={folders[1]}/model", "--seed=3"]
