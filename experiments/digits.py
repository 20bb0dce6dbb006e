r"""A second task, with real images: questions about handwritten digits.

    python -m experiments.digits FOLDER --seed 0

writes what a user would bring: FOLDER/model, a Hugging Face folder, train.jsonl and, in held_out/,
general.jsonl and vision_dependent.jsonl, all with their images. Training takes them by the public
flags alone (see SIZES for the others):

    torchrun train.py --model FOLDER/model --data FOLDER/train.jsonl --val_data FOLDER/held_out

An image is a 3 x 3 grid of scans of the digits 0 to 4 (scikit-learn ships 1,797 of them, 8 x 8
pixels each), enlarged to one image token per cell and drawn as ink on the tints of the toy's cells.
Three kinds of questions: how often a digit occurs, what a row adds up to, which digit of a row is
the largest. A note in the question offers a shortcut, as in the toy: it is right half the time in
`train` and `general`, and never in `vision_dependent`.

Scans 0 to 1199 serve the warm start and training, the others evaluation. They are in the order of
their writers, so accuracy is about hands that were not seen.
"""

from __future__ import annotations

import argparse
import json
import random
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache, partial
from pathlib import Path

import numpy as np
from PIL import Image
from sklearn.datasets import load_digits

from support import toy
from support.batch import Example

WORDS = ("zero", "one", "two", "three", "four")  # a digit's name
NAMES = toy.cell_names()
GRID, CELL = 3, 28
FIRST_HELD_OUT = 1200
NOTE_RIGHT = 0.5  # in train and general
MISREAD, COPY_NOTE = 0.12, 0.4  # flaws that the warm start teaches, as the toy's
WARM_STEPS = 900
ROWS = {"train": 1024, "general": 512, "vision_dependent": 512}
NOTE = toy.NOTE
# Flags: the defaults are made for photographs and long responses.
SIZES = {
    "min_pixels": 56 * 56,
    "max_pixels": 336 * 336,
    "max_new_tokens": 40,  # a response has 31 tokens
    "prompt_suffix": toy.SUFFIX,
}
STEP_SIZES = {"prompts_per_step": 16, "group_size": 8, "mini_batch": 16}


@dataclass
class Scene:
    """What a row is made of."""

    digits: list[int]  # of the cells, in reading order
    kind: str  # of KINDS
    subject: int  # the digit to count, or the row to look at
    note: int
    image: Image.Image

    @property
    def question(self) -> str:
        text, _ = KINDS[self.kind]
        return f"{NOTE.format(note=self.note)} {text(self.subject)}"

    def tally(self, digits: list[int]) -> list[int]:
        """The running result after each cell, for these readings of the cells."""
        _, update = KINDS[self.kind]
        values, value = [], 0
        for position, digit in enumerate(digits):
            value = update(value, digit, position // GRID, self.subject)
            values.append(value)
        return values


def count(value: int, digit: int, row: int, subject: int) -> int:
    return value + (digit == subject)


def add(value: int, digit: int, row: int, subject: int) -> int:
    return value + digit if row == subject else value


def largest(value: int, digit: int, row: int, subject: int) -> int:
    return max(value, digit) if row == subject else value


# Kind of question -> its text for a subject, and how a cell changes the running result.
KINDS: dict[str, tuple[Callable[[int], str], Callable]] = {
    "count": (lambda digit: f"How often is there a {WORDS[digit]}?", count),
    "sum": (lambda row: f"What is the sum of row {'abc'[row]}?", add),
    "largest": (lambda row: f"What is the largest digit of row {'abc'[row]}?", largest),
}


# --------------------------------------------------------------------------------------------- rows


@cache
def scans(held_out: bool) -> dict[int, np.ndarray]:
    """Digit -> its scans [n, 8, 8], ink from 0 to 1, of one side of the split."""
    data = load_digits()
    side = slice(FIRST_HELD_OUT, None) if held_out else slice(FIRST_HELD_OUT)
    images, digits = data.images[side] / 16, data.target[side]
    return {digit: images[digits == digit] for digit in range(len(WORDS))}


def make_scene(split: str, row: int, seed: int = 0) -> Scene:
    """The scene of one row. It depends on the arguments alone."""
    rng = random.Random(f"digits {split} {seed} {row}")
    kind = rng.choice(list(KINDS))
    subject = rng.randrange(len(WORDS) if kind == "count" else GRID)
    scene = Scene(draw_digits(kind, subject, rng), kind, subject, 0, None)
    scene.note = answer = scene.tally(scene.digits)[-1]
    if split == "vision_dependent" or rng.random() >= NOTE_RIGHT:
        while scene.note == answer:  # the answer of another image to the same question
            scene.note = scene.tally(draw_digits(kind, subject, rng))[-1]
    held_out = split in ("general", "vision_dependent")
    scene.image = render(scene.digits, rng, scans(held_out))
    return scene


def draw_digits(kind: str, subject: int, rng: random.Random) -> list[int]:
    """The digits of the cells; a digit to count occurs 0 to 4 times, equally likely."""
    if kind != "count":
        return [rng.randrange(len(WORDS)) for _ in NAMES]
    others = [digit for digit in range(len(WORDS)) if digit != subject]
    times = rng.randrange(5)
    digits = [subject] * times + rng.choices(others, k=len(NAMES) - times)
    rng.shuffle(digits)
    return digits


def render(digits: list[int], rng: random.Random, choices: dict[int, np.ndarray]) -> Image.Image:
    """A scan of each digit, as dark ink on its cell's tint."""
    image = toy.render([toy.NO_DOT] * len(NAMES), rng)  # the tints alone
    for position, digit in enumerate(digits):
        row, column = divmod(position, GRID)
        scan = choices[digit][rng.randrange(len(choices[digit]))]
        ink = Image.fromarray((255 * scan).astype(np.uint8))
        ink = ink.resize((CELL, CELL), Image.Resampling.BILINEAR)
        image.paste((0, 0, 0), (column * CELL, row * CELL), ink)
    return image


def write_response(scene: Scene, digits: list[int], box: int | None = None) -> str:
    """The response that reads these digits and boxes `box`, or its own result if None."""
    tally = scene.tally(digits)
    cells = [f"{name} {WORDS[d]} {n}" for name, d, n in zip(NAMES, digits, tally, strict=True)]
    boxed = tally[-1] if box is None else box
    return f"<think> {' '.join(cells)} </think> \\boxed{{{boxed}}}"


def example_of(scene: Scene) -> Example:
    answer = str(scene.tally(scene.digits)[-1])
    return Example("<image>" + scene.question, answer, [scene.image])


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
        line |= {"images": [image], "kind": scene.kind, "cells": [WORDS[d] for d in scene.digits]}
        lines.append(json.dumps(line) + "\n")
    path.write_text("".join(lines))


# -------------------------------------------------------------------------------------------- model


def make_lessons(rows: range, flawed: bool, seed: int) -> list[toy.Lesson]:
    """flawed: some digits are misread, and the result follows; some boxes copy the note."""
    rng = random.Random(f"digits labels {seed} {rows.start}")
    lessons = []
    for row in rows:
        scene = make_scene("warm", row, seed)
        digits, box = scene.digits, None
        if flawed:
            digits = [misread(digit, rng) for digit in digits]
            box = scene.note if rng.random() < COPY_NOTE else None
        lessons.append(toy.Lesson(example_of(scene), write_response(scene, digits, box)))
    return lessons


def misread(digit: int, rng: random.Random) -> int:
    if rng.random() >= MISREAD:
        return digit
    return rng.choice([other for other in range(len(WORDS)) if other != digit])


def build_model(folder: Path, seed: int, steps: int = WARM_STEPS) -> Path:
    questions = [text(subject) for text, _ in KINDS.values() for subject in range(GRID)]
    questions += [KINDS["count"][0](digit) for digit in range(GRID, len(WORDS))]
    largest_number = GRID * (len(WORDS) - 1)
    tokenizer = toy.tokenizer_of([*NAMES, *WORDS], largest_number, [NOTE, *questions])
    lessons = partial(make_lessons, seed=seed)
    with tempfile.TemporaryDirectory(dir=folder.parent) as scratch:
        made = toy.train_model(Path(scratch), tokenizer, seed, steps, lessons, list(WORDS))
        made.rename(folder)
    return folder


def build(folder: Path, seed: int, steps: int = WARM_STEPS) -> Path:
    """Write the model and all splits; what exists is kept. The held-out rows are those of seed 0,
    whatever the seed."""
    for split in ROWS:
        path = folder / "held_out" / f"{split}.jsonl"
        if split == "train":
            path = folder / "train.jsonl"
        if not path.exists():
            write_rows(path, split, seed if split == "train" else 0)
    if not (folder / "model").exists():
        build_model(folder / "model", seed, steps)
    return folder


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description="Write the digits task and its start model.")
    parser.add_argument("folder", type=Path)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--steps", type=int, default=WARM_STEPS, help="of the warm start")
    args = parser.parse_args()
    print(build(args.folder, args.seed, args.steps))
