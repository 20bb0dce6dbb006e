r"""The two tasks of the experiments: coloured dots, and scans of handwritten digits.

    python -m experiments.tasks      draws figures/tasks.png, examples of both

A task says where a seed's start model and data are, and what a response read in the image. Both
have the splits `general` and `vision_dependent`. At the end they ask the same questions at every
seed; so do the digits during training, while the dots then draw questions of the seed's own.
"""

from __future__ import annotations

import re
from pathlib import Path
from statistics import fmean

from matplotlib.figure import Figure

from experiments import start_model
from support import toy
from support.batch import Example

SPLITS = ("general", "vision_dependent")
HARDER_TOY = "toy:grid=4,colours=4,most=6,warm_steps=400,plain_share=0"


class Dots:
    """The toy, at a setting that GRPO does not solve in 30 steps.

    misread: how often the labels of the warm start misread a cell, if not as the toy has it.
    """

    words = [*toy.COLOURS, toy.NO_DOT]

    def __init__(self, misread: float | None = None):
        self.spec = HARDER_TOY if misread is None else f"{HARDER_TOY},misread={misread}"
        self.setting = toy.setting_of(self.spec)
        self.names = toy.cell_names(self.setting)

    def build(self, seed: int) -> Path:
        """Make a seed's start model, unless it is in the cache; returns its folder."""
        folder = start_model.cache_folder("toy", f"{seed} {self.spec}")
        return start_model.build(seed, folder, self.setting)

    def training(self, seed: int) -> dict:
        """The flags of train.py that name model and data."""
        return {"model": str(self.build(seed))}

    def evaluation(self, seed: int) -> dict:
        """The flags of evaluate.py that name the data."""
        return {"data": self.spec}

    def example(self, split: str, row: int) -> Example:
        """A row of the evaluation."""
        return toy.example(split, row, setting=self.setting)

    def cells(self, split: str, row: int) -> list[str]:
        """What the cells of an evaluation image hold."""
        return toy.make_scene(split, row, setting=self.setting).cells

    def result(self, split: str, row: int, cells: list[str]) -> int:
        """The answer to a question if its image held these cells."""
        return cells.count(toy.make_scene(split, row, setting=self.setting).asked)


class Digits:
    """Files of one's own: see digits.py. misread: as for Dots."""

    def __init__(self, misread: float | None = None):
        from experiments import digits  # needs scikit-learn

        self.digits = digits
        self.misread = digits.MISREAD if misread is None else misread
        self.warm_steps = digits.WARM_STEPS
        self.words = list(digits.WORDS)
        self.names = list(digits.NAMES)

    def folder(self, seed: int) -> Path:
        return self.digits.cache_folder(seed, self.warm_steps, self.misread)

    def build(self, seed: int) -> Path:
        folder = self.digits.build(self.folder(seed), seed, self.warm_steps, self.misread)
        return folder / "model"

    def training(self, seed: int) -> dict:
        folder = self.folder(seed)
        files = {"data": folder / "train.jsonl", "val_data": folder / "held_out"}
        return {"model": folder / "model"} | files | self.digits.SIZES | self.digits.STEP_SIZES

    def evaluation(self, seed: int) -> dict:
        return {"data": self.folder(seed) / "held_out"} | self.digits.SIZES

    def example(self, split: str, row: int) -> Example:
        return self.digits.example_of(self.digits.make_scene(split, row))

    def cells(self, split: str, row: int) -> list[str]:
        scene = self.digits.make_scene(split, row)
        return [self.digits.WORDS[digit] for digit in scene.digits]

    def result(self, split: str, row: int, cells: list[str]) -> int:
        """The answer to a question if its image held these cells; "" holds no digit."""
        digits = [self.words.index(word) if word else None for word in cells]
        return self.digits.make_scene(split, row).question.answer(digits)


def read_cells(task, response: str) -> list[str]:
    """The word that a response names for each cell, "" where it names none."""
    words = "|".join(task.words)
    named = dict(re.findall(rf"\b([a-i][1-9])\s+({words})\b", response))
    return [named.get(name, "") for name in task.names]


def is_misread(task, response: str, split: str, row: int) -> bool:
    """Whether what a response read has another answer than the image."""
    read = task.result(split, row, read_cells(task, response))
    return read != task.result(split, row, task.cells(split, row))


def share_of_cells_right(task, response: str, split: str, row: int) -> float:
    pairs = zip(read_cells(task, response), task.cells(split, row), strict=True)
    return fmean(read == true for read, true in pairs)


def draw_examples(file: Path) -> None:
    """Two rows of each task's `general` split, with question and answer."""
    figure = Figure(figsize=(12, 3.8), layout="constrained")
    shown = [(task, row) for task in (Dots(), Digits()) for row in (0, 3)]
    for ax, (task, row) in zip(figure.subplots(1, len(shown)), shown, strict=True):
        example = task.example("general", row)
        question = example.question.removeprefix("<image>").replace(". ", ".\n")
        ax.set_title(f"{question}\nAnswer: {example.answer}", fontsize=9)
        ax.imshow(example.images[0], interpolation="nearest")
        ax.axis("off")
    figure.savefig(file, dpi=110)


if __name__ == "__main__":
    draw_examples(Path(__file__).resolve().parent / "figures" / "tasks.png")
