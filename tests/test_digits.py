"""The digits task: its rows, its split of the scans, and training on it with public flags alone."""

import numpy as np
import pytest
from conftest import metric_lines, process_restored

import train
from support import data, toy

pytest.importorskip("sklearn", reason="the digits experiment needs scikit-learn")

from experiments import digits, run, tasks  # noqa: E402  (imports scikit-learn)


@pytest.mark.parametrize(
    "kind, subject, results",
    [
        ("count", 1, [1, 1, 1, 1, 1, 1, 2, 3, 3]),
        ("sum", 1, [0, 0, 0, 4, 4, 8, 8, 8, 8]),
        ("largest", 0, [1, 2, 3, 3, 3, 3, 3, 3, 3]),
    ],
)
def test_the_running_result(kind, subject, results):
    question, cells = digits.Question(kind, subject), [1, 2, 3, 4, 0, 4, 1, 1, 2]
    assert question.results(cells) == results
    response = digits.write_response(question, cells)
    assert response.startswith(f"<think> a1 one {results[0]} a2 two {results[1]} ")
    assert response.endswith(f"c3 two {results[-1]} </think> \\boxed{{{results[-1]}}}")


def test_notes_are_wrong_where_vision_decides_and_right_half_the_time_elsewhere():
    right = {split: 0 for split in digits.ROWS}
    for split in right:
        for row in range(200):
            made = digits.make_scene(split, row, seed=0)
            right[split] += made.note == made.question.answer(made.digits)
    assert right["vision_dependent"] == 0
    assert 80 < right["general"] < 120 and 80 < right["train"] < 120


def test_no_scan_of_the_evaluation_is_seen_in_training():
    trained_on, held_out = digits.scans(held_out=False), digits.scans(held_out=True)
    for digit in range(len(digits.WORDS)):
        seen = {scan.tobytes() for scan in trained_on[digit]}
        new = {scan.tobytes() for scan in held_out[digit]}
        assert len(seen) > 100 and len(new) > 50
        assert not seen & new


def test_an_image_shows_the_scans_on_the_tints():
    choices = {digit: np.full((1, 8, 8), digit / 8) for digit in range(5)}
    rng = digits.random.Random(0)
    image = np.asarray(digits.render([0, 1, 2, 3, 4, 0, 0, 0, 0], rng, choices), dtype=float)
    plain = np.asarray(toy.render([toy.NO_DOT] * 9, rng), dtype=float)
    assert image.shape == (84, 84, 3)
    for position, digit in enumerate([0, 1, 2, 3, 4]):
        row, column = divmod(position, 3)
        cell = np.s_[28 * row : 28 * row + 28, 28 * column : 28 * column + 28]
        np.testing.assert_allclose(image[cell], plain[cell] * (1 - digit / 8), atol=1.5)


def test_the_labels_of_the_warm_start_misread_as_often_as_asked():
    rows = range(400)
    right = [digits.make_scene("warm", row, 0).digits for row in rows]
    for chance in (0.04, 0.2):
        lessons = digits.make_lessons(rows, flawed=True, seed=0, misread=chance)
        read = [tasks.read_cells(tasks.Digits(), lesson.response) for lesson in lessons]
        pairs = zip(sum(read, []), sum(right, []), strict=True)
        wrong = [word != digits.WORDS[digit] for word, digit in pairs]
        assert abs(np.mean(wrong) - chance) < 0.02  # three standard errors of 3,600 cells
    levels = [run.task_of(name).folder(20) for name in ("digits/grpo", "digits_hard/grpo")]
    assert levels[0] != levels[1]


def test_the_task_trains_with_public_flags(tmp_path, monkeypatch):
    monkeypatch.setattr(digits, "ROWS", {"train": 16, "general": 4, "vision_dependent": 4})
    monkeypatch.setenv("PAPO_CACHE", str(tmp_path))
    task = tasks.Digits()
    task.warm_steps = 2
    folder = digits.build(task.folder(3), seed=3, steps=2)
    assert task.build(3) == folder / "model"  # nothing is made twice
    assert len(list((folder / "held_out" / "images").iterdir())) == 8
    rows = data.load(str(folder / "train.jsonl"), "train")
    assert len(rows) == 16
    assert rows[0].question == digits.example_of(digits.make_scene("train", 0, seed=3)).question
    flags = task.training(3) | {"out": tmp_path / "run", "steps": 1, "prompts_per_step": 4}
    with process_restored():
        train.main([f"--{name}={value}" for name, value in flags.items()])
    lines = metric_lines(tmp_path / "run")
    assert [line["step"] for line in lines] == [0, 1, 1]
    assert {"eval/general", "eval/vision_dependent"} <= lines[0].keys()


def test_a_response_is_misread_where_its_result_is_wrong():
    task = tasks.Digits()
    scene = digits.make_scene("general", 0)
    assert scene.question == ("sum", 0)
    right = digits.write_response(scene.question, scene.digits, box=scene.note)
    other_row = [*scene.digits[:8], (scene.digits[8] + 1) % 5]
    same_row = [(scene.digits[0] + 1) % 5, *scene.digits[1:]]
    assert not tasks.is_misread(task, right, "general", 0)
    assert not tasks.is_misread(
        task, digits.write_response(scene.question, other_row), "general", 0
    )
    assert tasks.is_misread(task, digits.write_response(scene.question, same_row), "general", 0)
    assert tasks.is_misread(task, "no reading at all", "general", 0)
    cut = digits.write_response(scene.question, scene.digits).partition(" b1 ")[0]
    assert not tasks.is_misread(task, cut, "general", 0)  # the row that is asked about was read
    response = digits.write_response(scene.question, other_row)
    assert tasks.share_of_cells_right(task, response, "general", 0) == pytest.approx(8 / 9)


@pytest.mark.parametrize("task", [tasks.Dots(), tasks.Digits()])
def test_an_image_read_correctly_gives_the_answer(task):
    for split in tasks.SPLITS:
        for row in range(20):
            answer = task.example(split, row).answer
            assert str(task.result(split, row, task.cells(split, row))) == answer


def test_the_figure_of_the_tasks(tmp_path):
    tasks.draw_examples(tmp_path / "tasks.png")
    assert (tmp_path / "tasks.png").stat().st_size > 10_000
