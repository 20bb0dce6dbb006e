r"""The default task: counting dots in an image. `example` makes its rows for support/data.py.

The model that starts to learn it is support/toy_model, a Qwen2.5-VL of a million parameters in a
Hugging Face folder like any other. `python -m experiments.start_model` built it and builds others.

The task: an image is a grid of tinted cells, some with a coloured dot. The question offers a
shortcut: "A note says 3. How many red dots are there?" The note is right half the time in `train`
and `general`, where copying it pays, and never in `vision_dependent`, where only looking pays. A
share of the training questions come without a note, so that the model can be asked plainly. Each
dot lies inside one 14-px patch. PAPO's mask blackens a patch with probability 0.6, so it hides a
dot with probability 0.6; a dot across four patches would nearly always stay visible.

A response names each cell's colour and keeps a running count of the colour asked for. That makes
counting easy, so errors come from seeing:

    <think> a1 green 0 a2 none 0 a3 red 1 b1 ... </think> \boxed{1}

The start model first learned to read the cells, then to imitate flawed responses, with cells
misread and notes copied. It knows what it sees but samples carelessly, which leaves RL something to
improve.
"""

from __future__ import annotations

import itertools
import json
import random
from dataclasses import dataclass, fields
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from PIL import Image, ImageDraw
from torch import Tensor

from support.batch import Example
from support.config import Flags, flag

MODEL = Path(__file__).parent / "toy_model"
EVAL_SPLITS = ("general", "vision_dependent")
WARM_SPLIT = "warm"  # rows of the warm start, so that the images of RL are new

RELATIVES = ("images_pos", "images_neg")  # further images that a row may have

PATCH = 14  # pixels per side
CELL = 2 * PATCH  # a cell's 2 x 2 patches become one image token
RADIUS = 6  # of a dot, in pixels: the largest that fits inside a patch
FILLED = 0.6  # chance that a cell without the asked colour holds another one
NOTE_RIGHT = 0.5  # chance, in train and general; at 0.6, RL never stopped copying
COPY_NOTE = 0.4  # chance that the box of a label of the warm start copies the note

COLOURS = {
    "red": (215, 25, 30),
    "green": (20, 145, 40),
    "blue": (30, 60, 220),
    "orange": (240, 130, 0),
    "purple": (130, 30, 170),
    "cyan": (0, 175, 190),
}
NO_DOT = "none"  # the word for a cell without a dot

NOTE = "A note says {note}."
QUESTION = "How many {asked} dots are there?"
SUFFIX = "Think in <think> </think>, then answer in \\boxed{}."

# train.py's defaults are the paper's, for 3B and 7B models. Two sets go over them: one belongs to
# the task, whatever model learns it, the other to the tiny model, whatever it learns.
TASK_DEFAULTS = {
    "steps": 30,  # enough to see it learn; it goes on learning to about 50
    "prompts_per_step": 16,  # x 8 responses = 128 per step, a few seconds on two cores
    "group_size": 8,  # more than the paper's 5, because responses are cheap
    "mini_batch": 16,  # one optimizer step per batch
    "prompt_suffix": SUFFIX,  # says what the released suffix says in a third of the tokens
    "min_pixels": 56 * 56,  # a larger minimum would enlarge the 84 x 84 images
    "max_pixels": 336 * 336,
    "eval_every": 15,
    "eval_rows": 128,  # per split; takes seconds
    "save_every": 15,
}
MODEL_DEFAULTS = {
    "lr": 2e-4,  # a million parameters tolerate, and need, far more than 1e-6
}


# ----------------------------------------------------------------------------------------- settings


@dataclass(frozen=True)
class Setting(Flags):
    """Difficulty of the task, carelessness of the start model. ValueError outside the ranges."""

    grid: int = flag(3, "cells per side", 1, 9)
    colours: int = flag(3, "the first so many of COLOURS", 2, len(COLOURS))
    most: int = flag(5, "the largest answer; 0..most are equally likely", 1)
    plain_share: float = flag(0.25, "chance, in train and warm start, of no note", 0, 1)
    misread: float = flag(0.12, "warm-start labels: chance that a cell's colour is wrong", 0, 1)
    warm_steps: int = flag(250, "a larger grid needs more before the model begins to see")
    split: str = flag("", "of EVAL_SPLITS, the one to evaluate; empty: each")

    def __post_init__(self):
        super().__post_init__()
        if self.most > self.grid**2:
            raise ValueError(f"toy setting most={self.most}: more than {self.grid**2} cells")
        if self.split not in ("", *EVAL_SPLITS):
            choices = ", ".join(EVAL_SPLITS)
            raise ValueError(f"toy setting split={self.split}: choose one of {choices}")


DEFAULT = Setting()


def setting_of(spec: str | Path) -> Setting | None:
    """Parse the name of a model or data set: "toy" or "toy:grid=4,colours=4"; None for other names.

    ValueError for a field that Setting does not have or a value that does not fit it.
    """
    name, _, assignments = str(spec).partition(":")
    if name != "toy":
        return None
    kinds = {field.name: type(field.default) for field in fields(Setting)}
    values = dict(each.partition("=")[::2] for each in filter(None, assignments.split(",")))
    if unknown := ", ".join(name for name in values if name not in kinds):
        raise ValueError(f"{spec}: no toy setting {unknown}: choose from {', '.join(kinds)}")
    try:
        return Setting(**{name: kinds[name](text) for name, text in values.items()})
    except ValueError as error:
        raise ValueError(f"{spec}: {error}") from None


def task_defaults(setting: Setting = DEFAULT) -> dict:
    """TASK_DEFAULTS with lengths that fit the grid: a response has three tokens per cell.

    The default's prompts have 55 tokens, its responses 31.
    """
    cells = setting.grid**2
    return TASK_DEFAULTS | {"max_new_tokens": 3 * cells + 13, "max_prompt_tokens": cells + 119}


def model_folder(name: str) -> str:
    """The folder or hub id that --model names; "toy" is the start model that is shipped."""
    if name.startswith("toy:"):
        build = f"python -m experiments.start_model {name} --out FOLDER"
        raise ValueError(f"--model {name}: build it with `{build}`, then give --model FOLDER")
    if (Path(name) / "model" / "config.json").is_file():
        raise ValueError(f"--model {name} is the folder of a run: its model is {name}/model")
    return str(MODEL) if name == "toy" else name


def task_of(model: str) -> dict:
    """The task that a toy's model brings along, also as an exported folder; {} for other models."""
    task_file = Path(model) / "task.json"
    return json.loads(task_file.read_text()) if task_file.is_file() else {}


def data_of(model: str, data: str) -> str:
    """What --data means beside a model: a toy's has data of its own, and splits of it by name."""
    task_data = task_of(model).get("data", "")
    if task_data and data in EVAL_SPLITS:
        return f"{task_data}{',' if ':' in task_data else ':'}split={data}"
    return data or task_data


def defaults(model: str, data: str) -> dict:
    """Flags that fit a toy task, and the learning rate of a toy model. {} where there is none."""
    task, data = task_of(model), data_of(model, data)
    setting = setting_of(data)
    of_task = task_defaults(setting) | {"data": data, "val_data": data} if setting else {}
    return of_task | MODEL_DEFAULTS if task else of_task


# --------------------------------------------------------------------------------------------- rows


class Scene(NamedTuple):
    """What a row is made of."""

    cells: list[str]  # a colour or NO_DOT per cell, in reading order
    asked: str  # the colour to count
    note: int | None  # the number the note claims; None without a note
    image: Image.Image


def make_scene(split: str, row: int, seed: int = 0, setting: Setting = DEFAULT) -> Scene:
    """The scene of one row. It depends on the arguments alone."""
    rng = random.Random(f"toy {split} {seed} {row}")  # strings seed alike on every machine
    asked = rng.choice(colours_of(setting))
    answer = rng.randint(0, setting.most)
    cells = place_dots(asked, answer, rng, setting)
    note = answer
    if split == "vision_dependent" or rng.random() >= NOTE_RIGHT:
        note = rng.choice([n for n in range(setting.most + 1) if n != answer])
    plain_rng = random.Random(f"toy plain {split} {seed} {row}")  # apart: the rest of the row stays
    if split not in EVAL_SPLITS and plain_rng.random() < setting.plain_share:
        note = None
    return Scene(cells, asked, note, render(cells, rng, setting))


def colours_of(setting: Setting) -> list[str]:
    return list(COLOURS)[: setting.colours]


def place_dots(asked: str, answer: int, rng: random.Random, setting: Setting) -> list[str]:
    """Cells with `answer` dots of the asked colour and some of other colours, shuffled."""
    others = [colour for colour in colours_of(setting) if colour != asked]
    cells = []
    for _ in range(setting.grid**2 - answer):
        cells.append(rng.choice(others) if rng.random() < FILLED else NO_DOT)
    cells += [asked] * answer
    rng.shuffle(cells)
    return cells


def render(cells: list[str], rng: random.Random, setting: Setting = DEFAULT) -> Image.Image:
    """Draw the cells as an RGB image, each dot at a random place inside one patch of its cell.

    Tints by row and column show a cell's address. Between white cells the warm start did not learn
    which cell a name like "b2" means.
    """
    grid, size = setting.grid, CELL
    image = Image.new("RGB", (grid * size, grid * size))
    pen = ImageDraw.Draw(image)
    shade = 80 // max(grid - 1, 1)
    for i, colour in enumerate(cells):
        row, column = divmod(i, grid)
        left, top = column * size, row * size
        tint = (255 - shade * row, 255 - shade * column, 215)
        pen.rectangle((left, top, left + size - 1, top + size - 1), fill=tint)
        if colour != NO_DOT:
            x = left + dot_offset(rng)
            y = top + dot_offset(rng)
            width = 2 * RADIUS
            pen.ellipse((x, y, x + width, y + width), fill=COLOURS[colour])
    return image


def dot_offset(rng: random.Random) -> int:
    """Pixels along one axis from a cell's edge to its dot: a random patch, a random place in it."""
    patch = rng.randrange(CELL // PATCH)
    return PATCH * patch + rng.randrange(PATCH - 2 * RADIUS)


def cell_names(setting: Setting = DEFAULT) -> list[str]:
    """a1 a2 a3 b1 ...: a letter per row, a number per column, in reading order."""
    rows = "abcdefghi"[: setting.grid]
    return [f"{row}{column + 1}" for row in rows for column in range(setting.grid)]


def write_response(
    cells: list[str], asked: str, box: int | None = None, setting: Setting = DEFAULT
) -> str:
    """The response that reads `cells`, counting `asked`, and boxes `box`, or its count if None."""
    counts = itertools.accumulate(int(colour == asked) for colour in cells)
    return spell_out(cell_names(setting), cells, [*counts], box)


def spell_out(names: list[str], cells: list[str], results: list[int], box: int | None) -> str:
    """A response: per cell its name, content and the result so far; boxes the last, or `box`."""
    words = [f"{name} {cell} {n}" for name, cell, n in zip(names, cells, results, strict=True)]
    boxed = results[-1] if box is None else box
    return f"<think> {' '.join(words)} </think> \\boxed{{{boxed}}}"


def make_relative(
    column: str, split: str, row: int, seed: int = 0, setting: Setting = DEFAULT
) -> Scene:
    """A row's scene with other dots and the same question.

    column: images_pos, with the row's answer, or images_neg, with another one.
    """
    scene = make_scene(split, row, seed, setting)
    answer = scene.cells.count(scene.asked)
    rng = random.Random(f"toy {column} {split} {seed} {row}")
    if column == "images_neg":
        answer = rng.choice([n for n in range(setting.most + 1) if n != answer])
    cells = place_dots(scene.asked, answer, rng, setting)
    return Scene(cells, scene.asked, scene.note, render(cells, rng, setting))


def example(
    split: str, row: int, seed: int = 0, setting: Setting = DEFAULT, columns: tuple[str, ...] = ()
) -> Example:
    """One row of a split, with these of RELATIVES. It depends on the arguments alone."""
    cells, asked, note, image = make_scene(split, row, seed, setting)
    question = QUESTION.format(asked=asked)
    if note is not None:
        question = f"{NOTE.format(note=note)} {question}"
    answer = str(cells.count(asked))
    more_images = {
        column: [make_relative(column, split, row, seed, setting).image] for column in columns
    }
    row_id = f"toy-{split}-{seed}-{row}"
    return Example("<image>" + question, answer, [image], row_id, more_images)


def saliency(image: Image.Image) -> Tensor:
    """Image -> [h, w] float: 1 on dots, which are vivid, and 0 on the pale cells around them."""
    pixels = torch.from_numpy(np.array(image.convert("RGB"))).float()  # [h, w, 3]
    vividness = pixels.amax(-1) - pixels.amin(-1)
    return (vividness > 105).float()
