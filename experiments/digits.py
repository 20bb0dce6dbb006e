r"""A second task, with real images: questions about handwritten digits.

    python -m experiments.digits FOLDER --seed 0

writes what a user would bring: FOLDER/model, a Hugging Face folder, train.jsonl and, in held_out/,
general.jsonl and vision_dependent.jsonl, all with their images. Training takes them by public flags
alone (`flags` has the others):

    torchrun train.py --model FOLDER/model --data FOLDER/train.jsonl --val_data FOLDER/held_out

An image is a 3 x 3 grid of scans of the digits 0 to 4 (scikit-learn ships 1,797 of them, 8 x 8
pixels each), one image token per cell, as ink on the tints of the toy's cells. A question offers
the toy's shortcut, a note that is right half the time, and never in `vision_dependent`.

The scans come in blocks, one per group of writers. Those from 1157 on, where a block begins, serve
the evaluation alone, so accuracy is about hands that were not seen.
"""

from __future__ import annotations

import argparse
import json
import operator
import random
from collections.abc import Callable
from functools import cache, partial
from itertools import accumulate
from pathlib import Path
from typing import NamedTuple

import numpy as np
from PIL import Image

from experiments import start_model
from support import toy
from support.batch import Example

WORDS = ("zero", "one", "two", "three", "four")  # what a cell holds
NAMES = toy.cell_names()
GRID = 3
FIRST_HELD_OUT = 1157  # where a block of writers begins
WARM_STEPS = 900
ROWS = {"train": 4096, "general": 512, "vision_dependent": 512}
QUESTIONS = {
    "count": [f"How often is there a {word}?" for word in WORDS],
    "sum": [f"What is the sum of row {row}?" for row in "abc"],
    "largest": [f"What is the largest digit of row {row}?" for row in "abc"],
}


class Question(NamedTuple):
    kind: str  # of QUESTIONS
    subject: int  # the digit to count, or the row to look at

    def results(self, cells: list[str]) -> list[int]:
        """The running result after each cell; one that holds none of WORDS adds nothing."""
        if self.kind == "count":
            return [*accumulate(int(word == WORDS[self.subject]) for word in cells)]
        digits = [WORDS.index(word) if word in WORDS else 0 for word in cells]
        in_row = [n if i // GRID == self.subject else 0 for i, n in enumerate(digits)]
        return [*accumulate(in_row, max if self.kind == "largest" else operator.add)]

    def answer(self, cells: list[str]) -> int:
        return self.results(cells)[-1]


class Scene(NamedTuple):
    """What a row is made of."""

    question: Question
    cells: list[str]  # in reading order
    note: int
    image: Image.Image


@cache
def scans(held_out: bool) -> dict[str, np.ndarray]:
    """Word -> scans of its digit [n, 8, 8], ink from 0 to 1, of one side of the split."""
    from sklearn.datasets import load_digits

    data = load_digits()
    side = slice(FIRST_HELD_OUT, None) if held_out else slice(FIRST_HELD_OUT)
    images, digits = data.images[side] / 16, data.target[side]
    return {word: images[digits == digit] for digit, word in enumerate(WORDS)}


def make_scene(split: str, row: int, seed: int = 0) -> Scene:
    """The scene of one row. It depends on the arguments alone."""
    rng = random.Random(f"digits {split} {seed} {row}")
    kind = rng.choice(list(QUESTIONS))
    question = Question(kind, rng.randrange(len(QUESTIONS[kind])))
    cells = draw_cells(question, rng)
    note = question.answer(cells)
    if split == "vision_dependent" or rng.random() >= toy.NOTE_RIGHT:
        while note == question.answer(cells):  # take another image's answer
            note = question.answer(draw_cells(question, rng))
    image = render(cells, rng, scans(held_out=split in toy.EVAL_SPLITS))
    return Scene(question, cells, note, image)


def draw_cells(question: Question, rng: random.Random) -> list[str]:
    """Digits for the cells; one to count occurs 0 to 4 times, equally likely."""
    if question.kind != "count":
        return [rng.choice(WORDS) for _ in NAMES]
    counted = WORDS[question.subject]
    times = rng.randrange(5)
    others = [word for word in WORDS if word != counted]
    cells = [counted] * times + rng.choices(others, k=len(NAMES) - times)
    rng.shuffle(cells)
    return cells


def render(cells: list[str], rng: random.Random, choices: dict[str, np.ndarray]) -> Image.Image:
    """A scan of each digit, as dark ink on its cell's tint."""
    image = toy.render([toy.NO_DOT] * len(NAMES), rng)  # the tints alone
    for position, word in enumerate(cells):
        row, column = divmod(position, GRID)
        scan = choices[word][rng.randrange(len(choices[word]))]
        ink = Image.fromarray((255 * scan).astype(np.uint8))
        ink = ink.resize((toy.CELL, toy.CELL), Image.Resampling.BILINEAR)
        image.paste((0, 0, 0), (column * toy.CELL, row * toy.CELL), ink)
    return image


def example_of(scene: Scene) -> Example:
    text = QUESTIONS[scene.question.kind][scene.question.subject]
    answer = str(scene.question.answer(scene.cells))
    return Example(f"<image>{toy.NOTE.format(note=scene.note)} {text}", answer, [scene.image])


def scene_of(split: str, row: int) -> tuple[list[str], Callable[[list[str]], int]]:
    """What the cells of an evaluation image hold, and the answer as a function of the cells."""
    scene = make_scene(split, row)
    return scene.cells, scene.question.answer


def write_rows(path: Path, split: str, seed: int) -> None:
    """Write a split's JSONL file, and its images beside it."""
    (path.parent / "images").mkdir(parents=True, exist_ok=True)
    lines = []
    for row in range(ROWS[split]):
        scene = make_scene(split, row, seed)
        example = example_of(scene)
        image = f"images/{split}{row}.png"
        scene.image.save(path.parent / image)
        line = {"id": f"{split}-{row}", "problem": example.question, "answer": example.answer}
        lines.append(json.dumps(line | {"images": [image], "kind": scene.question.kind}) + "\n")
    path.write_text("".join(lines))


def write_response(question: Question, cells: list[str], box: int | None = None) -> str:
    """The response that reads these digits and boxes `box`, or its own result if None."""
    return toy.spell_out(NAMES, cells, question.results(cells), box)


def make_lessons(rows: range, flawed: bool, seed: int, misread: float) -> list[start_model.Lesson]:
    """flawed: some digits are misread, with chance `misread`, and some boxes copy the note."""
    rng = random.Random(f"digits labels {seed} {rows.start}")
    lessons = []
    for row in rows:
        scene = make_scene("warm", row, seed)
        cells, box = scene.cells, None
        if flawed:
            cells = [start_model.misread(cell, WORDS, misread, rng) for cell in cells]
            box = scene.note if rng.random() < toy.COPY_NOTE else None
        lessons.append((example_of(scene), write_response(scene.question, cells, box)))
    return lessons


def build(folder: Path, seed: int, misread: float) -> None:
    """Write the data, then the model. Held-out rows are those of seed 0.

    misread: how often the labels of the warm start misread a digit.
    """
    write_rows(folder / "train.jsonl", "train", seed)
    for split in toy.EVAL_SPLITS:
        write_rows(folder / "held_out" / f"{split}.jsonl", split, seed=0)
    texts = [text for of_kind in QUESTIONS.values() for text in of_kind]
    largest_sum = GRID * (len(WORDS) - 1)
    tokenizer = start_model.tokenizer_of([*NAMES, *WORDS], largest_sum, [toy.NOTE, *texts])
    lessons = partial(make_lessons, seed=seed, misread=misread)
    start_model.train_model(folder / "model", tokenizer, seed, WARM_STEPS, lessons, WORDS)


def flags(folder: Path) -> tuple[dict, dict]:
    """Of train.py and evaluate.py, whose defaults are made for photographs and long responses."""
    sizes = {"min_pixels": 56 * 56, "max_pixels": 336 * 336, "max_new_tokens": 40}
    shared = {"prompt_suffix": toy.SUFFIX} | sizes
    data = {"data": folder / "train.jsonl", "val_data": folder / "held_out"}
    steps = {"prompts_per_step": 16, "group_size": 8, "mini_batch": 16}
    return shared | data | steps, shared | {"data": folder / "held_out"}


def main() -> None:
    parser = argparse.ArgumentParser(description="Write the digits task and its start model.")
    parser.add_argument("folder", type=Path)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--misread", type=float, default=0.12, help="chance per label")
    args = parser.parse_args()
    if (args.folder / "model" / start_model.WEIGHTS).exists():
        parser.error(f"{args.folder} exists: choose another folder")
    build(args.folder, args.seed, args.misread)


if __name__ == "__main__":
    main()
