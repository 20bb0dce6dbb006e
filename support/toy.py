r"""The default task and model: counting dots in an image, and a tiny Qwen2.5-VL.

Place in the pipeline: first. `example` makes the rows that support/data.py hands out. `build` makes
the model, a Hugging Face folder in the hub's layout, which everything downstream treats like any
other. The paper starts from Qwen2.5-VL-Instruct and real benchmarks; nothing here comes from it.

The task: an image is a grid of tinted cells, some with a coloured dot. The question offers a
shortcut: "A note says 3. How many red dots are there?" The note is right half the time in `train`
and `general`, where copying it pays, and never in `vision_dependent`, where only looking pays. A
share of the training questions come without a note, so that the model can be asked plainly. Each
dot lies inside one 14-px patch. PAPO's mask blackens a patch with probability 0.6, so it hides a
dot with probability 0.6; a dot across four patches would nearly always stay visible.

A response names each cell's colour and keeps a running count of the colour asked for. That makes
counting easy, so errors come from seeing:

    <think> a1 green 0 a2 none 0 a3 red 1 b1 ... </think> \boxed{1}

The model: random weights first learn to read the cells, then to imitate flawed responses, with
cells misread and notes copied. The result knows what it sees but samples carelessly, which leaves
RL something to improve.

    python -m support.toy --out toy.png     # draws some examples; builds and trains nothing
"""

from __future__ import annotations

import argparse
import contextlib
import errno
import hashlib
import json
import math
import os
import random
import tempfile
from collections.abc import Callable
from dataclasses import dataclass, fields
from functools import partial
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image, ImageDraw
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, trainers
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence
from tqdm import tqdm
from transformers import (
    PreTrainedTokenizerFast,
    Qwen2_5_VLConfig,
    Qwen2_5_VLForConditionalGeneration,
)

from support.batch import Example
from support.qwen_vl import Encoder

SPLITS = ("train", "general", "vision_dependent")
WARM_SPLIT = "warm"  # rows of the warm start, so that the images of RL are new

RELATIVES = ("images_pos", "images_neg")  # further images that a row may have

PATCH = 14  # pixels per side; 2 x 2 patches become one image token

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
    "steps": 50,  # enough to learn the task
    "prompts_per_step": 16,  # x 8 responses = 128 per step, a few seconds on two cores
    "group_size": 8,  # more than the paper's 5, because responses are cheap
    "mini_batch": 16,  # one optimizer step per batch
    "max_prompt_tokens": 128,  # a prompt has 55 tokens
    "max_new_tokens": 40,  # a response has 31; `task_defaults` fits both to the grid
    "prompt_suffix": SUFFIX,  # says what the released suffix says in a third of the tokens
    "min_pixels": 56 * 56,  # a larger minimum would enlarge the 84 x 84 images
    "max_pixels": 336 * 336,
    "eval_every": 10,
    "eval_rows": 128,  # per split; takes seconds
    "save_every": 25,
}
MODEL_DEFAULTS = {
    "lr": 2e-4,  # a million parameters tolerate, and need, far more than 1e-6
}


# ----------------------------------------------------------------------------------------- settings


@dataclass(frozen=True)
class Setting:
    """Difficulty of the task, carelessness of the start model. ValueError outside the ranges."""

    grid: int = 3  # cells per side
    cell: int = 28  # pixels per side of a cell: one image token
    colours: int = 3  # the first so many of COLOURS
    most: int = 5  # the largest answer; 0..most are equally likely
    filled: float = 0.6  # chance that a cell without the asked colour holds another one
    radius: int = 6  # of a dot, in pixels; 6 is the largest that fits inside a patch
    note_right: float = 0.5  # in train and general; at 0.6, RL never stopped copying
    plain_share: float = 0.25  # chance, in train and warm start, that a question has no note
    misread: float = 0.12  # warm-start labels: chance that a cell's colour is wrong
    copy_note: float = 0.4  # warm-start labels: chance that the box copies the note
    warm_steps: int = 250  # a larger grid needs more before the model begins to see

    def __post_init__(self):
        limits = {
            "grid": (1, 9),
            "colours": (2, len(COLOURS)),
            "most": (1, self.grid**2),
            "radius": (1, 6),
            "filled": (0, 1),
            "note_right": (0, 1),
            "plain_share": (0, 1),
            "misread": (0, 1),
            "copy_note": (0, 1),
        }
        for name, (low, high) in limits.items():
            value = getattr(self, name)
            if not low <= value <= high:
                raise ValueError(f"toy setting {name}={value}: must be in {low}..{high}")
        if self.cell < 1 or self.cell % (2 * PATCH):
            raise ValueError(f"toy setting cell={self.cell}: must be a multiple of {2 * PATCH}")


DEFAULT = Setting()


def setting_of(spec: str | Path) -> Setting | None:
    """Parse the name of a model or data set: "toy" or "toy:grid=4,colours=4"; None for other names.

    ValueError for a field that Setting does not have or a value of the wrong type.
    """
    name, _, assignments = str(spec).partition(":")
    if name != "toy":
        return None
    kinds = {field.name: type(field.default) for field in fields(Setting)}
    values = {}
    for assignment in filter(None, assignments.split(",")):
        name, _, text = assignment.partition("=")
        if name not in kinds:
            raise ValueError(f"{spec}: no toy setting {name!r}: choose from {', '.join(kinds)}")
        try:
            values[name] = kinds[name](text)
        except ValueError:
            raise ValueError(f"{spec}: {name}={text!r} is not {kinds[name].__name__}") from None
    return Setting(**values)


def spec_of(setting: Setting) -> str:
    """The shortest spec that setting_of turns into `setting`; "toy" for the default."""
    assignments = []
    for field in fields(Setting):
        kind = type(field.default)
        value = kind(getattr(setting, field.name))  # 0 becomes 0.0, as setting_of reads it
        if value != field.default:
            assignments.append(f"{field.name}={value}")
    if not assignments:
        return "toy"
    return "toy:" + ",".join(assignments)


def task_defaults(setting: Setting = DEFAULT) -> dict:
    """TASK_DEFAULTS with lengths that fit the grid: a response has three tokens per cell."""
    cells = setting.grid**2
    return TASK_DEFAULTS | {"max_new_tokens": 3 * cells + 13, "max_prompt_tokens": cells + 119}


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
    if split == "vision_dependent" or rng.random() >= setting.note_right:
        note = rng.choice([n for n in range(setting.most + 1) if n != answer])
    if is_plain(split, row, seed, setting):
        note = None
    return Scene(cells, asked, note, render(cells, rng, setting))


def is_plain(split: str, row: int, seed: int, setting: Setting) -> bool:
    """Whether a row's question carries no note; never in the evaluation splits."""
    if split not in ("train", WARM_SPLIT):
        return False
    rng = random.Random(f"toy plain {split} {seed} {row}")  # apart: the rest of the row stays
    return rng.random() < setting.plain_share


def colours_of(setting: Setting) -> list[str]:
    return list(COLOURS)[: setting.colours]


def place_dots(asked: str, answer: int, rng: random.Random, setting: Setting) -> list[str]:
    """Cells with `answer` dots of the asked colour and some of other colours, shuffled."""
    others = [colour for colour in colours_of(setting) if colour != asked]
    cells = []
    for _ in range(setting.grid**2 - answer):
        cells.append(rng.choice(others) if rng.random() < setting.filled else NO_DOT)
    cells += [asked] * answer
    rng.shuffle(cells)
    return cells


def render(cells: list[str], rng: random.Random, setting: Setting = DEFAULT) -> Image.Image:
    """Draw the cells as an RGB image, each dot at a random place inside one patch of its cell.

    Tints by row and column show a cell's address. Between white cells the warm start did not learn
    which cell a name like "b2" means.
    """
    grid, size = setting.grid, setting.cell
    image = Image.new("RGB", (grid * size, grid * size))
    pen = ImageDraw.Draw(image)
    shade = 80 // max(grid - 1, 1)
    for i, colour in enumerate(cells):
        row, column = divmod(i, grid)
        left, top = column * size, row * size
        tint = (255 - shade * row, 255 - shade * column, 215)
        pen.rectangle((left, top, left + size - 1, top + size - 1), fill=tint)
        if colour != NO_DOT:
            x = left + dot_offset(rng, setting)
            y = top + dot_offset(rng, setting)
            width = 2 * setting.radius
            pen.ellipse((x, y, x + width, y + width), fill=COLOURS[colour])
    return image


def dot_offset(rng: random.Random, setting: Setting) -> int:
    """Pixels along one axis from a cell's edge to its dot: a random patch, a random place in it."""
    patch = rng.randrange(setting.cell // PATCH)
    return PATCH * patch + rng.randrange(PATCH - 2 * setting.radius)


def cell_names(setting: Setting = DEFAULT) -> list[str]:
    """a1 a2 a3 b1 ...: a letter per row, a number per column, in reading order."""
    rows = "abcdefghi"[: setting.grid]
    return [f"{row}{column + 1}" for row in rows for column in range(setting.grid)]


def write_response(
    cells: list[str], asked: str, box: int | None = None, setting: Setting = DEFAULT
) -> str:
    """The response that reads `cells`, counting `asked`, and boxes `box`, or its count if None."""
    words, count = [], 0
    for name, colour in zip(cell_names(setting), cells, strict=True):
        count += colour == asked
        words += [name, colour, str(count)]
    boxed = count if box is None else box
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
    """One row of a split, with these of RELATIVES. It depends on the arguments alone.

    ValueError for an unknown split.
    """
    if split not in (*SPLITS, WARM_SPLIT):
        raise ValueError(f"unknown toy split {split!r}: choose from {', '.join(SPLITS)}")
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


# ------------------------------------------------------------------------- the files of a hub model

# Qwen's special tokens in Qwen's order.
SPECIAL = (
    "<|endoftext|> <|im_start|> <|im_end|> <|object_ref_start|> <|object_ref_end|> "
    "<|box_start|> <|box_end|> <|quad_start|> <|quad_end|> "
    "<|vision_start|> <|vision_end|> <|vision_pad|> <|image_pad|> <|video_pad|>"
).split()

CHAT_TEMPLATE = (
    "{% for message in messages %}{% if loop.first and message['role'] != 'system' %}"
    "<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n{% endif %}"
    "<|im_start|>{{ message['role'] }}\n"
    "{% if message['content'] is string %}{{ message['content'] }}{% else %}"
    "{% for part in message['content'] %}"
    "{% if part['type'] == 'image' %}<|vision_start|><|image_pad|><|vision_end|>"
    "{% else %}{{ part['text'] }}{% endif %}{% endfor %}{% endif %}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)

PREPROCESSOR = {
    "image_processor_type": "Qwen2VLImageProcessor",
    "processor_class": "Qwen2_5_VLProcessor",
    "min_pixels": 3136,
    "max_pixels": 12845056,
    "patch_size": PATCH,
    "temporal_patch_size": 2,
    "merge_size": 2,
    "image_mean": [0.48145466, 0.4578275, 0.40821073],
    "image_std": [0.26862954, 0.26130258, 0.27577711],
}

WEIGHTS = "model.safetensors"

# The tiny model, about a million parameters: hub_config's text, vision, full_attention and mrope.
TINY = ((128, 384, 4, 4, 2), (2, 64, 128, 2), [1], [4, 6, 6])


def hub_config(
    text: tuple,
    vision: tuple,
    full_attention: list[int],
    mrope: list[int],
    vocab_size: int,
    tied: bool,
    dtype: str,
    special: int,
) -> dict:
    """The content of config.json in the hub's flat shape.

    text: hidden size, MLP size, layers, heads, key-value heads; vision: depth, hidden size, MLP
    size, heads; full_attention: the vision blocks that attend beyond their window; mrope: sections
    for time, height and width; tied: input and output embeddings; special: the id of SPECIAL[0].
    """
    hidden_size, mlp_size, layers, heads, key_value_heads = text
    depth, vision_hidden_size, vision_mlp_size, vision_heads = vision
    vision_config = {
        "model_type": "qwen2_5_vl",
        "depth": depth,
        "hidden_size": vision_hidden_size,
        "intermediate_size": vision_mlp_size,
        "num_heads": vision_heads,
        "out_hidden_size": hidden_size,
        "in_chans": 3,
        "patch_size": PATCH,
        "spatial_patch_size": PATCH,
        "spatial_merge_size": 2,
        "temporal_patch_size": 2,
        "window_size": 112,
        "fullatt_block_indexes": full_attention,
        "tokens_per_second": 2,
        "hidden_act": "silu",
    }
    return {
        "architectures": ["Qwen2_5_VLForConditionalGeneration"],
        "model_type": "qwen2_5_vl",
        "torch_dtype": dtype,
        "vocab_size": vocab_size,
        "tie_word_embeddings": tied,
        "hidden_size": hidden_size,
        "intermediate_size": mlp_size,
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "num_key_value_heads": key_value_heads,
        "hidden_act": "silu",
        "rms_norm_eps": 1e-6,
        "initializer_range": 0.02,
        "attention_dropout": 0.0,
        "rope_theta": 1e6,
        "rope_scaling": {"type": "mrope", "mrope_section": mrope},
        "max_position_embeddings": 128000,
        "max_window_layers": 70,
        "use_sliding_window": False,
        "sliding_window": 32768,
        "use_cache": True,
        "bos_token_id": special + SPECIAL.index("<|endoftext|>"),
        "eos_token_id": special + SPECIAL.index("<|im_end|>"),
        "vision_start_token_id": special + SPECIAL.index("<|vision_start|>"),
        "vision_end_token_id": special + SPECIAL.index("<|vision_end|>"),
        "vision_token_id": special + SPECIAL.index("<|vision_pad|>"),
        "image_token_id": special + SPECIAL.index("<|image_pad|>"),
        "video_token_id": special + SPECIAL.index("<|video_pad|>"),
        "vision_config": vision_config,
    }


def random_config(name: str) -> Qwen2_5_VLConfig:
    """The config of a published size, for random weights. ValueError for an unknown name."""
    sizes = {
        "qwen2.5-vl-3b": ((2048, 11008, 36, 16, 2), 151936, True),
        "qwen2.5-vl-7b": ((3584, 18944, 28, 28, 4), 152064, False),
    }
    if name not in sizes:
        raise ValueError(f"unknown model size {name!r}: choose from {', '.join(sizes)}")
    text, vocab_size, tied = sizes[name]
    config = hub_config(
        text,
        vision=(32, 1280, 3420, 16),
        full_attention=[7, 15, 23, 31],
        mrope=[16, 24, 24],
        vocab_size=vocab_size,
        tied=tied,
        dtype="bfloat16",
        special=151643,
    )
    return Qwen2_5_VLConfig(**config)


def make_tokenizer(setting: Setting = DEFAULT) -> PreTrainedTokenizerFast:
    """The tokenizer of the toy."""
    words = [*cell_names(setting), *COLOURS, NO_DOT]
    return tokenizer_of(words, setting.grid**2, [f"{NOTE} {QUESTION}"])


def tokenizer_of(words: list[str], largest: int, questions: list[str]) -> PreTrainedTokenizerFast:
    """Byte-level BPE. The words, the numbers up to the largest and the words of the questions are
    one token each; any other text falls back to bytes."""
    numbers = []
    for n in range(largest + 1):
        numbers += [f"{n}", f"\\boxed{{{n}}}"]
    texts = [
        f"<think> {' '.join([*words, *numbers])} </think>",
        f"You are a helpful assistant.\n\n{' '.join(questions)} {SUFFIX}",
        "system\nuser\nassistant\n",
    ]
    split_words = pre_tokenizers.Split(Regex(r" ?[^\s.?,]+|[.?,]|\s+"), "isolated")
    to_bytes = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.Sequence([split_words, to_bytes])
    bpe.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(initial_alphabet=sorted(to_bytes.alphabet()), show_progress=False)
    bpe.train_from_iterator(texts, trainer)
    bpe.add_special_tokens(SPECIAL)
    return PreTrainedTokenizerFast(
        tokenizer_object=bpe,
        eos_token="<|im_end|>",
        pad_token="<|endoftext|>",
        chat_template=CHAT_TEMPLATE,
        model_max_length=131072,
    )


def write_configs(folder: Path, tokenizer: PreTrainedTokenizerFast) -> dict:
    """Write every file of the tiny model but its weights. Returns the content of config.json."""
    pad, end = tokenizer.pad_token_id, tokenizer.eos_token_id
    config = hub_config(*TINY, vocab_size=len(tokenizer), tied=True, dtype="float32", special=pad)
    chat_defaults = {  # Qwen's own, so that tests meet them; our samplers must not inherit them
        "bos_token_id": pad,
        "pad_token_id": pad,
        "eos_token_id": [end, pad],
        "do_sample": True,
        "repetition_penalty": 1.05,
        "temperature": 1e-6,
    }
    files = {
        "config.json": config,
        "generation_config.json": chat_defaults,
        "preprocessor_config.json": PREPROCESSOR,
    }
    tokenizer.save_pretrained(folder)
    for name, content in files.items():
        (folder / name).write_text(json.dumps(content, indent=2) + "\n")
    return config


# -------------------------------------------------------------------------------------- the weights


def make_model(config: dict, seed: int) -> Qwen2_5_VLForConditionalGeneration:
    """A model with random weights that depend on `seed` alone.

    Initialisation decides whether the model finds the image: with the usual 0.02 everywhere it was
    still blind after 500 steps.
    """
    with torch.random.fork_rng(devices=[]):  # leaves the caller's random state as it was
        model = Qwen2_5_VLForConditionalGeneration(Qwen2_5_VLConfig(**config))
    generator = torch.Generator().manual_seed(seed)
    for name, weight in sorted(model.named_parameters()):
        if weight.ndim > 1:
            torch.nn.init.normal_(weight, std=initial_std(name), generator=generator)
        if "patch_embed" in name:  # [hidden, 3, 2, 14, 14]
            # Filters that begin as colour averages show a dot wherever in its patch it lies.
            colour = torch.randn(len(weight), 3, 1, 1, 1, generator=generator)
            weight.data += 0.3 * colour
    return model


def initial_std(name: str) -> float:
    if "patch_embed" in name:
        return 0.02
    if "visual" in name:
        return 0.1
    if "embed_" in name:
        return 0.2
    return 0.08


def flaw(scene: Scene, rng: random.Random, setting: Setting) -> tuple[list[str], int | None]:
    """What a careless response reads in the cells, and the note if it copies that into the box."""
    words = [*colours_of(setting), NO_DOT]
    cells = []
    for cell in scene.cells:
        misread = rng.random() < setting.misread
        cells.append(rng.choice([word for word in words if word != cell]) if misread else cell)
    copies = rng.random() < setting.copy_note
    return cells, scene.note if copies else None


class Lesson(NamedTuple):
    """What the warm start imitates."""

    example: Example
    response: str


def make_lessons(rows: range, flawed: bool, seed: int, setting: Setting) -> list[Lesson]:
    """flawed: some cells are misread, and the count follows; some boxes copy the note."""
    rng = random.Random(f"toy labels {seed} {rows.start}")
    lessons = []
    for row in rows:
        scene = make_scene(WARM_SPLIT, row, seed, setting)
        cells, box = flaw(scene, rng, setting) if flawed else (scene.cells, None)
        response = write_response(cells, scene.asked, box, setting)
        lessons.append(Lesson(example(WARM_SPLIT, row, seed, setting), response))
    return lessons


def warm_batch(encoder: Encoder, lessons: list[Lesson]) -> tuple[dict, Tensor]:
    """The model's inputs for B lessons, and which tokens are responses, [B, T] bool."""
    prompts, sequences, is_response = [], [], []
    for lesson in lessons:
        response = torch.tensor(encoder.tokenizer(lesson.response + "<|im_end|>")["input_ids"])
        prompt = encoder.encode(lesson.example)
        prompts.append(prompt)
        sequences.append(torch.cat([prompt.input_ids, response]))
        is_response.append(torch.arange(len(sequences[-1])) >= len(prompt))
    # Causal attention never looks at padding on the right, so no attention mask is needed.
    input_ids = pad_sequence(
        sequences, batch_first=True, padding_value=encoder.tokenizer.pad_token_id
    )
    inputs = {
        "input_ids": input_ids,
        # Without token types Qwen2.5-VL silently falls back to one-dimensional positions.
        "mm_token_type_ids": (input_ids == encoder.image_id).long(),
        "pixel_values": torch.cat([prompt.pixel_values for prompt in prompts]),
        "image_grid_thw": torch.cat([prompt.image_grid_thw for prompt in prompts]),
    }
    return inputs, pad_sequence(is_response, batch_first=True)


def warm_start(
    model,
    encoder: Encoder,
    steps: int,
    make_lessons: Callable[[range, bool], list[Lesson]],
    seen_words: list[str],
    batch=16,
    lr=2e-3,
) -> None:
    """Supervised training, in place: the first half teaches seeing, the second half carelessness.

    make_lessons: rows, whether they are flawed -> lessons. seen_words: those that name what is seen
    count twice in the first half. The weights depend, in their last digits, on the number of torch
    threads.
    """
    seen_ids = torch.tensor([encoder.tokenizer(f" {word}")["input_ids"][0] for word in seen_words])
    optimizer = torch.optim.AdamW(model.parameters(), lr=lr, betas=(0.9, 0.95), weight_decay=0.0)
    for step in tqdm(range(steps), desc="making the toy model, once", unit="step"):
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(step, steps, lr)
        flawed = step >= 0.52 * steps
        rows = range(step * batch, (step + 1) * batch)
        inputs, is_response = warm_batch(encoder, make_lessons(rows, flawed))
        loss = warm_loss(model, inputs, is_response, None if flawed else seen_ids)
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()


def learning_rate(step: int, steps: int, peak: float) -> float:
    """A linear rise over 10 steps, times half a cosine from 1 down to a tenth."""
    rise = min(1, (step + 1) / 10)
    decay = 0.55 + 0.45 * math.cos(math.pi * step / steps)
    return peak * rise * decay


def warm_loss(model, inputs: dict, is_response: Tensor, doubled: Tensor | None) -> Tensor:
    """Mean cross-entropy of the response tokens; the token ids in `doubled` count twice."""
    labels = inputs["input_ids"][is_response]
    predicts_response = is_response.roll(-1, dims=1)  # the position before each response token
    logits = model(**inputs).logits[predicts_response]
    loss = F.cross_entropy(logits, labels, reduction="none")
    weight = torch.ones_like(loss)
    if doubled is not None:
        weight += torch.isin(labels, doubled)
    return (loss * weight).sum() / weight.sum()


def build(
    seed: int = 0, folder: str | Path | None = None, steps: int = 0, setting: Setting = DEFAULT
) -> Path:
    """Make the toy model, once, as a Hugging Face folder. Returns the folder.

    `folder` defaults to one in the cache, named after a hash of this file and the arguments. The
    model is written beside it and renamed when complete. So a build that is killed leaves nothing,
    and of two processes that build at once the slower one takes the other's. The weights do not
    depend on the number of cores. FileExistsError if `folder` holds something else.
    """
    steps = steps or setting.warm_steps
    folder = Path(folder or cache_folder(seed, steps, setting))
    return make_once(folder, WEIGHTS, lambda scratch: build_in(scratch, seed, steps, setting))


def make_once(folder: Path, proof: str, make: Callable[[Path], Path]) -> Path:
    """Make a folder unless it exists; see `build` for what happens to killed and rival processes.

    proof: a file that a complete folder holds. make: an empty folder -> the one made in it.
    """
    if (folder / proof).exists():
        return folder
    folder.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(
        dir=folder.parent, prefix=".toy-", ignore_cleanup_errors=True
    ) as scratch:
        complete = make(Path(scratch))
        try:
            os.replace(complete, folder)
        except OSError as error:
            if error.errno not in (errno.ENOTEMPTY, errno.EEXIST, errno.ENOTDIR):
                raise
            # Another process was faster, or it is a folder of the user's.
    if not (folder / proof).exists():
        raise FileExistsError(f"{folder} exists without {proof}: remove it or choose another")
    return folder


def cache_folder(seed: int, steps: int, setting: Setting) -> Path:
    """$PAPO_CACHE or ~/.cache/papo, and a name that hashes the arguments and this file."""
    return cached("toy", f"{seed} {steps} {spec_of(setting)}")


def cached(name: str, arguments: str, *sources: str) -> Path:
    """A folder of the cache, named after a hash of arguments, this file and other source files."""
    digest = hashlib.sha256()
    for source in (__file__, *sources):
        digest.update(Path(source).read_bytes())
    digest.update(arguments.encode())
    cache = Path(os.environ.get("PAPO_CACHE") or "~/.cache/papo").expanduser()
    return cache / f"{name}-{digest.hexdigest()[:12]}"


def build_in(scratch: Path, seed: int, steps: int, setting: Setting) -> Path:
    """Make the model in an empty folder; returns the subfolder that holds it.

    task.json names the task, so that a command given the model alone can find its data.
    """
    lessons = partial(make_lessons, seed=seed, setting=setting)
    words = [*COLOURS, NO_DOT]
    folder = train_model(scratch, make_tokenizer(setting), seed, steps, lessons, words)
    (folder / "task.json").write_text(json.dumps({"data": spec_of(setting)}, indent=2) + "\n")
    return folder


def train_model(
    scratch: Path,
    tokenizer: PreTrainedTokenizerFast,
    seed: int,
    steps: int,
    make_lessons: Callable[[range, bool], list[Lesson]],
    seen_words: list[str],
) -> Path:
    """Make a tiny model in an empty folder and train it on lessons (see warm_start).

    Returns the subfolder that holds it.
    """
    folder, saved = scratch / "toy", scratch / "saved"
    config = write_configs(folder, tokenizer)
    model = make_model(config, seed)
    encoder = Encoder(str(folder), TASK_DEFAULTS["min_pixels"], TASK_DEFAULTS["max_pixels"], SUFFIX)
    with one_thread():
        warm_start(model, encoder, steps, make_lessons, seen_words)
    model.save_pretrained(saved)  # elsewhere, because its config.json is not in the hub's shape
    os.replace(saved / WEIGHTS, folder / WEIGHTS)
    return folder


@contextlib.contextmanager
def one_thread():
    """Limit torch to one thread: the order in which threads add up decides the last digits."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)


# -------------------------------------------------------------------------------- the contact sheet


def contact_sheet(path: str, seed: int = 0, setting: Setting = DEFAULT) -> None:
    """Write an image of four examples per split with their questions and answers."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(12, 12), layout="constrained")
    axes = figure.subplots(len(SPLITS), 4)
    for split, row_of_axes in zip(SPLITS, axes, strict=True):
        for row, axis in enumerate(row_of_axes):
            item = example(split, row, seed, setting)
            question = item.question.removeprefix("<image>").replace(". ", ".\n")
            axis.set_title(f"{split} {row}\n{question}\nAnswer: {item.answer}", fontsize=9)
            show_image(axis, item.images[0], setting)
    figure.savefig(path, dpi=100)


def show_image(axis, image: Image.Image, setting: Setting) -> None:
    """Show an image on matplotlib axes, with the names of rows and columns and the patch grid."""
    side = setting.grid * setting.cell
    axis.imshow(image, interpolation="nearest", extent=(0, side, side, 0))
    middles = [setting.cell * (k + 0.5) for k in range(setting.grid)]
    axis.set_xticks(middles, range(1, setting.grid + 1))
    axis.set_yticks(middles, [name[0] for name in cell_names(setting)[:: setting.grid]])
    for k in range(PATCH, side, PATCH):
        axis.axhline(k, color="black", linewidth=0.3)
        axis.axvline(k, color="black", linewidth=0.3)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description="Draw examples of the toy, with their answers.")
    parser.add_argument("--out", default="toy.png", help="the image file to write")
    contact_sheet(parser.parse_args().out)
