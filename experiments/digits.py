r"""A second task, with real images: questions about handwritten digits.

    python -m experiments.digits FOLDER --seed 0

writes what a user would bring: FOLDER/model, a Hugging Face folder, train.jsonl and, in held_out/,
general.jsonl and vision_dependent.jsonl, all with their images. Training takes them by public flags
alone (`flags` has the others):

    torchrun train.py --model FOLDER/model --data FOLDER/train.jsonl --val_data FOLDER/held_out

An image is a 3 x 3 grid of scans of the digits 0 to 4 (scikit-learn ships 1,797 of them, 8 x 8
pixels each), enlarged to one image token per cell and drawn as ink on the tints of the toy's cells.
A question asks how often a digit occurs, what a row adds up to, or which digit of a row is the
largest. Its note offers a shortcut, as in the toy: it is right half the time in `train` and
`general`, and never in `vision_dependent`.

Scans 0 to 1156 serve the warm start and training, the others evaluation. They come in blocks, one
per group of writers, and a block begins at 1157, so accuracy is about hands that were not seen.
"""

from __future__ import annotations

import argparse
import json
import random
from collections.abc import Callable
from functools import cache, partial
from pathlib import Path
from typing import NamedTuple

import numpy as np
from PIL import Image

from experiments import start_model
from support import toy
from support.batch import Example

WORDS = ("zero", "one", "two", "three", "four")  # a digit's name
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

    def results(self, digits: list[int | None]) -> list[int]:
        """The running result after each cell, for these readings of the cells; None: no digit."""
        running, result = [], 0
        for position, digit in enumerate(digits):
            in_row = digit is not None and position // GRID == self.subject
            if self.kind == "count":
                result += digit == self.subject
            elif self.kind == "sum" and in_row:
                result += digit
            elif self.kind == "largest" and in_row:
                result = max(result, digit)
            running.append(result)
        return running

    def answer(self, digits: list[int | None]) -> int:
        return self.results(digits)[-1]


class Scene(NamedTuple):
    """What a row is made of."""

    question: Question
    digits: list[int]  # of the cells, in reading order
    note: int
    image: Image.Image


# --------------------------------------------------------------------------------------------- rows


@cache
def scans(held_out: bool) -> dict[int, np.ndarray]:
    """Digit -> its scans [n, 8, 8], ink from 0 to 1, of one side of the split."""
    from sklearn.datasets import load_digits

    data = load_digits()
    side = slice(FIRST_HELD_OUT, None) if held_out else slice(FIRST_HELD_OUT)
    images, digits = data.images[side] / 16, data.target[side]
    return {digit: images[digits == digit] for digit in range(len(WORDS))}


def make_scene(split: str, row: int, seed: int = 0) -> Scene:
    """The scene of one row. It depends on the arguments alone."""
    rng = random.Random(f"digits {split} {seed} {row}")
    kind = rng.choice(list(QUESTIONS))
    question = Question(kind, rng.randrange(len(QUESTIONS[kind])))
    digits = draw_digits(question, rng)
    note = question.answer(digits)
    if split == "vision_dependent" or rng.random() >= toy.NOTE_RIGHT:
        while note == question.answer(digits):  # take another image's answer
            note = question.answer(draw_digits(question, rng))
    image = render(digits, rng, scans(held_out=split in toy.EVAL_SPLITS))
    return Scene(question, digits, note, image)


def draw_digits(question: Question, rng: random.Random) -> list[int]:
    """The digits of the cells; a digit to count occurs 0 to 4 times, equally likely."""
    if question.kind != "count":
        return [rng.randrange(len(WORDS)) for _ in NAMES]
    others = [digit for digit in range(len(WORDS)) if digit != question.subject]
    times = rng.randrange(5)
    digits = [question.subject] * times + rng.choices(others, k=len(NAMES) - times)
    rng.shuffle(digits)
    return digits


def render(digits: list[int], rng: random.Random, choices: dict[int, np.ndarray]) -> Image.Image:
    """A scan of each digit, as dark ink on its cell's tint."""
    image = toy.render([toy.NO_DOT] * len(NAMES), rng)  # the tints alone
    for position, digit in enumerate(digits):
        row, column = divmod(position, GRID)
        scan = choices[digit][rng.randrange(len(choices[digit]))]
        ink = Image.fromarray((255 * scan).astype(np.uint8))
        ink = ink.resize((toy.CELL, toy.CELL), Image.Resampling.BILINEAR)
        image.paste((0, 0, 0), (column * toy.CELL, row * toy.CELL), ink)
    return image


def example_of(scene: Scene) -> Example:
    text = QUESTIONS[scene.question.kind][scene.question.subject]
    answer = str(scene.question.answer(scene.digits))
    return Example(f"<image>{toy.NOTE.format(note=scene.note)} {text}", answer, [scene.image])


def scene_of(split: str, row: int) -> tuple[list[str], Callable[[list[str]], int]]:
    """The words of an evaluation image's cells, and the answer as a function of the cells."""
    scene = make_scene(split, row)

    def answer(cells: list[str]) -> int:
        digits = [WORDS.index(word) if word in WORDS else None for word in cells]
        return scene.question.answer(digits)

    return [WORDS[digit] for digit in scene.digits], answer


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


# -------------------------------------------------------------------------------------------- model


def write_response(question: Question, digits: list[int], box: int | None = None) -> str:
    """The response that reads these digits and boxes `box`, or its own result if None."""
    words = [WORDS[digit] for digit in digits]
    return toy.spell_out(NAMES, words, question.results(digits), box)


def make_lessons(rows: range, flawed: bool, seed: int, misread: float) -> list[start_model.Lesson]:
    """flawed: some digits are misread, with chance `misread`, and the result follows; some boxes
    copy the note."""
    rng = random.Random(f"digits labels {seed} {rows.start}")
    choices, lessons = range(len(WORDS)), []
    for row in rows:
        scene = make_scene("warm", row, seed)
        digits, box = scene.digits, None
        if flawed:
            digits = [start_model.misread(digit, choices, misread, rng) for digit in digits]
            box = scene.note if rng.random() < toy.COPY_NOTE else None
        response = write_response(scene.question, digits, box)
        lessons.append(start_model.Lesson(example_of(scene), response))
    return lessons


def build(
    folder: Path, seed: int, steps: int = WARM_STEPS, misread: float = toy.DEFAULT.misread
) -> None:
    """Write the model and its data. Held-out rows are those of seed 0.

    steps: of the warm start. misread: how often its labels misread a digit. The model comes last.
    """
    write_rows(folder / "train.jsonl", "train", seed)
    for split in toy.EVAL_SPLITS:
        write_rows(folder / "held_out" / f"{split}.jsonl", split, seed=0)
    texts = [text for of_kind in QUESTIONS.values() for text in of_kind]
    largest_sum = GRID * (len(WORDS) - 1)
    tokenizer = start_model.tokenizer_of([*NAMES, *WORDS], largest_sum, [toy.NOTE, *texts])
    lessons = partial(make_lessons, seed=seed, misread=misread)
    start_model.train_model(folder / "model", tokenizer, seed, steps, lessons, list(WORDS))


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
    parser.add_argument(
        "--misread", type=float, default=toy.DEFAULT.misread, help="chance per label"
    )
    args = parser.parse_args()
    if (args.folder / "model" / start_model.WEIGHTS).exists():
        parser.error(f"{args.folder} exists: choose another folder")
    build(args.folder, args.seed, misread=args.misread)


if __name__ == "__main__":
    main()
