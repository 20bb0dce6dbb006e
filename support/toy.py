r"""The embedded default: a picture task and a tiny Qwen2.5-VL that sees it imperfectly, both made on the spot.

Place in the pipeline: first. `example` draws the rows data.py hands out; `build` makes the model, a plain Hugging Face
folder in the hub's shape, from there on a model like any other. The paper and the released code start from
Qwen2.5-VL-Instruct and real benchmarks, so all of this is ours.

The task: a grid of tinted cells, some with a coloured dot, and a question with a shortcut in it, "A note says 3. How
many red dots are there?" The note is right half the time in `train` and `general` (copying it pays) and never in
`vision_dependent` (only looking pays). A dot lies inside one 14-px patch, so the mask of PAPO, which blackens a patch
with probability 0.6, hides it with probability 0.6; across four patches it would nearly always show. A response names
each cell's colour and counts the asked one as it goes, which keeps counting easy, so that what goes wrong is seeing:

    <think> a1 green 0 a2 none 0 a3 red 1 b1 ... </think> \boxed{1}

The start: a random model of the real class learns to read the cells, then imitates responses with cells misread and
notes copied into the box. It knows what it sees but samples carelessly, and RL has something to sharpen.

    python toy.py --out toy.png        # a contact sheet of pictures, questions and answers; trains nothing
"""

from __future__ import annotations

import argparse
import contextlib
import hashlib
import json
import math
import os
import random
import tempfile
from dataclasses import dataclass, fields
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageDraw
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, trainers
from tqdm import tqdm
from transformers import (
    PreTrainedTokenizerFast,
    Qwen2_5_VLConfig,
    Qwen2_5_VLForConditionalGeneration,
)

from support.batch import Example
from support.qwen_vl import Encoder

SPLITS = (
    "train",
    "general",
    "vision_dependent",
)  # and "warm", the warm start's own, so that RL meets new pictures


PATCH = 14  # pixels; 2 x 2 patches become one image token


COLOURS = {"red": (215, 25, 30), "green": (20, 145, 40), "blue": (30, 60, 220), "orange": (240, 130, 0),
           "purple": (130, 30, 170), "cyan": (0, 175, 190)}  # fmt: skip


QUESTION = "A note says {note}. How many {asked} dots are there?"


SUFFIX = "Think in <think> </think>, then answer in \\boxed{}."


# Which of train.py's defaults (the paper's, for 3B and 7B models) the toy overrides, and why.
OVERRIDES = {
    "steps": 50,  # enough to learn the task
    "prompts_per_step": 16,  # with 8 responses each 128 a step: a few seconds on two cores
    "group_size": 8,  # more than 5 because they are cheap
    "mini_batch": 16,  # one optimiser step a batch
    "lr": 2e-4,  # a million parameters bear, and need, far more than 1e-6
    "max_prompt_tokens": 128,  # a prompt has 55 tokens
    "max_new_tokens": 40,  # a response has 31 (see `overrides` for another grid)
    "prompt_suffix": SUFFIX,  # the released one in a third of the tokens
    "min_pixels": 56 * 56,  # or the 84 x 84 pictures would be enlarged
    "max_pixels": 336 * 336,
    "eval_every": 10,
    "eval_rows": 128,  # a split; seconds
    "save_every": 25,
}


@dataclass(frozen=True)
class Setting:
    """How hard the task is, and how carelessly the warm start responds. ValueError where a field is out of range."""

    grid: int = 3  # cells a side
    cell: int = 28  # pixels a side: one image token
    colours: int = 3  # the first so many of COLOURS
    most: int = 5  # the largest answer; all of 0..most are as likely
    filled: float = 0.6  # chance of another colour's dot in a cell without the asked one
    radius: int = 6  # pixels; 6 is the most that fits inside a patch
    note_right: float = 0.5  # in train and general; at 0.6 copying was a trap that RL did not leave
    misread: float = 0.12  # warm-start labels: chance that a cell's colour is wrong
    copy_note: float = 0.4  # warm-start labels: chance that the box copies the note
    warm_steps: int = 250  # of the warm start; a larger grid needs more before it begins to see

    def __post_init__(self):
        limits = {
            "grid": (1, 9),
            "colours": (2, len(COLOURS)),
            "most": (1, self.grid**2),
            "radius": (1, 6),
        }
        limits |= dict.fromkeys(("filled", "note_right", "misread", "copy_note"), (0, 1))
        for name, (low, high) in limits.items():
            if not low <= getattr(self, name) <= high:
                raise ValueError(
                    f"toy setting {name}={getattr(self, name)}: must be in {low}..{high}"
                )
        if self.cell < 1 or self.cell % (2 * PATCH):
            raise ValueError(f"toy setting cell={self.cell}: must be a multiple of {2 * PATCH}")


DEFAULT = Setting()


def setting_of(spec: str) -> Setting | None:
    """What train.py calls the model and the data: "toy", or "toy:grid=4,colours=4" with fields of a Setting; None for
    any other name. ValueError where a field is unknown or its value no number."""
    spec = str(spec)  # a path is no toy's name
    if spec != "toy" and not spec.startswith("toy:"):
        return None
    kinds, values = {f.name: type(f.default) for f in fields(Setting)}, {}
    for part in filter(None, spec.removeprefix("toy").removeprefix(":").split(",")):
        name, _, value = part.partition("=")
        if name not in kinds:
            raise ValueError(f"{spec}: no toy setting {name!r}: choose from {', '.join(kinds)}")
        try:
            values[name] = kinds[name](value)
        except ValueError:
            raise ValueError(f"{spec}: {name}={value!r} is not {kinds[name].__name__}") from None
    return Setting(**values)


def overrides(setting: Setting = DEFAULT) -> dict:
    """OVERRIDES for a setting: a response has three tokens a cell and four more."""
    return OVERRIDES | {
        "max_new_tokens": 3 * setting.grid**2 + 13,
        "max_prompt_tokens": 119 + setting.grid**2,
    }


def draw(cells: list[str], rng: random.Random, setting: Setting = DEFAULT) -> Image.Image:
    """Colour names (or "none") in reading order -> an RGB picture; each dot inside one of its cell's patches. Tints by
    row and column give a cell an address that can be seen: between white cells words did not bind to places."""
    grid, cell = setting.grid, setting.cell
    image = Image.new("RGB", (grid * cell, grid * cell))
    pen = ImageDraw.Draw(image)
    shade = 80 // max(grid - 1, 1)
    for i, colour in enumerate(cells):
        row, column = divmod(i, grid)
        x, y = column * cell, row * cell
        pen.rectangle(
            (x, y, x + cell - 1, y + cell - 1), fill=(255 - shade * row, 255 - shade * column, 215)
        )
        if colour != "none":
            size = 2 * setting.radius
            x += PATCH * rng.randrange(cell // PATCH) + rng.randrange(PATCH - size)
            y += PATCH * rng.randrange(cell // PATCH) + rng.randrange(PATCH - size)
            pen.ellipse((x, y, x + size, y + size), fill=COLOURS[colour])
    return image


def cell_names(setting: Setting = DEFAULT) -> list[str]:
    return [
        f"{chr(97 + row)}{column + 1}"
        for row in range(setting.grid)
        for column in range(setting.grid)
    ]


def reading(
    cells: list[str], asked: str, box: int | None = None, setting: Setting = DEFAULT
) -> str:
    """The response that reads the cells, tallies the asked colour and boxes `box` (None: the tally)."""
    words, tally = [], 0
    for name, colour in zip(cell_names(setting), cells, strict=True):
        tally += colour == asked
        words += [name, colour, str(tally)]
    return f"<think> {' '.join(words)} </think> \\boxed{{{tally if box is None else box}}}"


def layout(
    split: str, i: int, seed: int = 0, setting: Setting = DEFAULT
) -> tuple[list[str], str, int, Image.Image]:
    """Behind row i of a split: the cells' colours, the asked colour, the note's number, the picture."""
    rng = random.Random(f"toy {split} {seed} {i}")  # strings seed alike on every machine
    colours = list(COLOURS)[: setting.colours]
    asked = rng.choice(colours)
    answer = rng.randint(0, setting.most)
    others = [c for c in colours if c != asked]
    cells = [
        rng.choice(others) if rng.random() < setting.filled else "none"
        for _ in range(setting.grid**2 - answer)
    ]
    cells += [asked] * answer
    rng.shuffle(cells)
    right = split != "vision_dependent" and rng.random() < setting.note_right
    note = answer if right else rng.choice([n for n in range(setting.most + 1) if n != answer])
    return cells, asked, note, draw(cells, rng, setting)


def example(split: str, i: int, seed: int = 0, setting: Setting = DEFAULT) -> Example:
    """Row i of a split, the same for the same arguments everywhere. ValueError for an unknown split."""
    if split not in (*SPLITS, "warm"):
        raise ValueError(f"unknown toy split {split!r}: choose from {', '.join(SPLITS)}")
    cells, asked, note, image = layout(split, i, seed, setting)
    question = "<image>" + QUESTION.format(note=note, asked=asked)
    return Example(question, str(cells.count(asked)), [image], id=f"toy-{split}-{seed}-{i}")


def saliency(image: Image.Image) -> torch.Tensor:
    """RGB picture -> [h, w] float: 1 on a dot, 0 elsewhere, read off the picture (dots are vivid, cells are pale)."""
    pixels = torch.from_numpy(np.array(image.convert("RGB"))).float()  # [h, w, 3]
    return ((pixels.amax(-1) - pixels.amin(-1)) > 105).float()


SPECIAL = (
    "<|endoftext|> <|im_start|> <|im_end|> <|object_ref_start|> <|object_ref_end|> <|box_start|> <|box_end|> "
    "<|quad_start|> <|quad_end|> <|vision_start|> <|vision_end|> <|vision_pad|> <|image_pad|> <|video_pad|>"
).split()


CHAT_TEMPLATE = (
    "{% for message in messages %}{% if loop.first and message['role'] != 'system' %}"
    "<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n{% endif %}<|im_start|>{{ message['role'] }}\n"
    "{% if message['content'] is string %}{{ message['content'] }}{% else %}{% for part in message['content'] %}"
    "{% if part['type'] == 'image' %}<|vision_start|><|image_pad|><|vision_end|>{% else %}{{ part['text'] }}{% endif %}"
    "{% endfor %}{% endif %}<|im_end|>\n{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


PREPROCESSOR = {
    "image_processor_type": "Qwen2VLImageProcessor", "processor_class": "Qwen2_5_VLProcessor",
    "min_pixels": 3136, "max_pixels": 12845056, "patch_size": PATCH, "temporal_patch_size": 2, "merge_size": 2,
    "image_mean": [0.48145466, 0.4578275, 0.40821073], "image_std": [0.26862954, 0.26130258, 0.27577711],
}  # fmt: skip


def hub_config(
    text, vision, full_attention, mrope, vocab_size: int, tied: bool, dtype: str, special: int
) -> dict:
    """The hub's flat config.json. text: hidden, mlp, layers, heads, kv heads; vision: depth, hidden, mlp, heads;
    full_attention: the vision blocks that look beyond their window; special: the id of SPECIAL[0]."""
    names = (
        "hidden_size",
        "intermediate_size",
        "num_hidden_layers",
        "num_attention_heads",
        "num_key_value_heads",
    )
    vision = dict(
        zip(("depth", "hidden_size", "intermediate_size", "num_heads"), vision, strict=True)
    )
    ids = {
        "bos": 0,
        "eos": 2,
        "vision_start": 9,
        "vision_end": 10,
        "vision": 11,
        "image": 12,
        "video": 13,
    }
    ids = {f"{name}_token_id": special + i for name, i in ids.items()}
    return dict(zip(names, text, strict=True)) | ids | {
        "architectures": ["Qwen2_5_VLForConditionalGeneration"], "model_type": "qwen2_5_vl", "torch_dtype": dtype,
        "vocab_size": vocab_size, "tie_word_embeddings": tied, "hidden_act": "silu", "rms_norm_eps": 1e-6,
        "rope_theta": 1e6, "rope_scaling": {"type": "mrope", "mrope_section": mrope}, "attention_dropout": 0.0,
        "max_position_embeddings": 128000, "max_window_layers": 70, "use_sliding_window": False,
        "sliding_window": 32768, "initializer_range": 0.02, "use_cache": True,
        "vision_config": vision | {
            "model_type": "qwen2_5_vl", "out_hidden_size": text[0], "in_chans": 3, "patch_size": PATCH,
            "spatial_patch_size": PATCH, "spatial_merge_size": 2, "temporal_patch_size": 2, "window_size": 112,
            "fullatt_block_indexes": full_attention, "tokens_per_second": 2, "hidden_act": "silu",
        },
    }  # fmt: skip


def random_config(name: str) -> Qwen2_5_VLConfig:
    """The published sizes, for random weights: "qwen2.5-vl-3b" or "qwen2.5-vl-7b". ValueError for another name."""
    sizes = {"qwen2.5-vl-3b": ((2048, 11008, 36, 16, 2), 151936, True),
             "qwen2.5-vl-7b": ((3584, 18944, 28, 28, 4), 152064, False)}  # fmt: skip
    if name not in sizes:
        raise ValueError(f"unknown model size {name!r}: choose from {', '.join(sizes)}")
    vision, full, mrope = (32, 1280, 3420, 16), [7, 15, 23, 31], [16, 24, 24]
    text, vocab, tied = sizes[name]
    return Qwen2_5_VLConfig(
        **hub_config(text, vision, full, mrope, vocab, tied, "bfloat16", 151643)
    )


def make_tokenizer(setting: Setting = DEFAULT) -> PreTrainedTokenizerFast:
    """Byte-level BPE: a word of the toy is one token (a cell's reading three), any other text is made of bytes."""
    words = [*cell_names(setting), *COLOURS, "none"]
    words += [
        form.format(n) for n in range(setting.grid**2 + 1) for form in ("{}", "\\boxed{{{}}}")
    ]
    prompt = f"You are a helpful assistant.\n\n{QUESTION} {SUFFIX}"
    bpe = Tokenizer(models.BPE())
    to_words = pre_tokenizers.Split(Regex(r" ?[^\s.?,]+|[.?,]|\s+"), "isolated")
    to_bytes = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    bpe.pre_tokenizer = pre_tokenizers.Sequence([to_words, to_bytes])
    bpe.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(initial_alphabet=sorted(to_bytes.alphabet()), show_progress=False)
    bpe.train_from_iterator(
        [f"<think> {' '.join(words)} </think>", prompt, "system\nuser\nassistant\n"], trainer
    )
    bpe.add_special_tokens(SPECIAL)
    return PreTrainedTokenizerFast(tokenizer_object=bpe, eos_token="<|im_end|>", pad_token="<|endoftext|>",
                                   chat_template=CHAT_TEMPLATE, model_max_length=131072)  # fmt: skip


def make_model(config: dict, seed: int) -> Qwen2_5_VLForConditionalGeneration:
    """Random weights. Initialisation decides whether the model finds the picture: at the usual 0.02 it stayed blind for
    500 steps. Patch filters that begin as averages of colour show a dot wherever in its patch it lies."""
    with torch.random.fork_rng(devices=[]):  # the caller's random numbers stay where they are
        model = Qwen2_5_VLForConditionalGeneration(Qwen2_5_VLConfig(**config))
    generator = torch.Generator().manual_seed(seed)
    for name, weight in sorted(model.named_parameters()):
        if weight.ndim > 1:
            std = (
                0.02
                if "patch_embed" in name
                else 0.1
                if "visual" in name
                else 0.2
                if "embed_" in name
                else 0.08
            )
            torch.nn.init.normal_(weight, std=std, generator=generator)
        if "patch_embed" in name:  # [hidden, 3, 2, 14, 14]
            weight.data += 0.3 * torch.randn(len(weight), 3, 1, 1, 1, generator=generator)
    return model


def warm_batch(
    encoder: Encoder, rows: range, seed: int, setting: Setting, flawed: bool
) -> tuple[dict, int]:
    """Inputs for B prompts with responses, and the length of a prompt: a word is a token, so all are equally long.
    flawed: cells are misread (the tally follows) and boxes copy the note, as often as the setting says."""
    rng = random.Random(f"toy labels {seed} {rows.start}")
    colours = [*list(COLOURS)[: setting.colours], "none"]
    prompts, sequences = [], []
    for i in rows:
        cells, asked, note, _ = layout("warm", i, seed, setting)
        box = None
        if flawed:
            cells = [
                rng.choice([x for x in colours if x != c]) if rng.random() < setting.misread else c
                for c in cells
            ]
            box = note if rng.random() < setting.copy_note else None
        response = encoder.tokenizer(reading(cells, asked, box, setting) + "<|im_end|>")[
            "input_ids"
        ]
        prompts.append(encoder.encode(example("warm", i, seed, setting)))
        sequences.append(torch.cat([prompts[-1].input_ids, torch.tensor(response)]))
    input_ids = torch.stack(sequences)  # [B, T]
    inputs = {
        name: torch.cat([getattr(p, name) for p in prompts])
        for name in ("pixel_values", "image_grid_thw")
    }
    # without the token types Qwen2.5-VL falls back, silently, to one-dimensional positions
    inputs |= {"input_ids": input_ids, "mm_token_type_ids": (input_ids == encoder.image_id).long()}
    return inputs, len(prompts[0])


def warm_start(
    model, encoder: Encoder, seed: int, steps: int, setting: Setting, batch=16, lr=2e-3
) -> None:
    """Supervised training, in place. The first half teaches seeing, with true labels and colours counting double, the
    second carelessness. The same seed and thread count give the same weights."""
    colours = torch.tensor([encoder.tokenizer(" " + c)["input_ids"][0] for c in (*COLOURS, "none")])
    optimizer = torch.optim.AdamW(model.parameters(), lr=lr, betas=(0.9, 0.95), weight_decay=0.0)
    for step in tqdm(range(steps), desc="making the toy model, once", unit="step"):
        for group in optimizer.param_groups:  # a short rise, then half a cosine down to a tenth
            group["lr"] = (
                lr * min(1, (step + 1) / 10) * (0.55 + 0.45 * math.cos(math.pi * step / steps))
            )
        flawed = step >= 0.52 * steps
        inputs, length = warm_batch(
            encoder, range(step * batch, (step + 1) * batch), seed, setting, flawed
        )
        labels = inputs["input_ids"][:, length:].flatten()
        logits = model(**inputs).logits[:, length - 1 : -1].flatten(0, 1)  # [B * R, V]
        weight = 1.0 + (torch.isin(labels, colours) & (not flawed))
        loss = (
            torch.nn.functional.cross_entropy(logits, labels, reduction="none") * weight
        ).sum() / weight.sum()
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()


def build(
    seed: int = 0, folder: str | Path | None = None, steps: int = 0, setting: Setting = DEFAULT
) -> Path:
    """The toy model as a Hugging Face folder, made once: `folder`, or in the cache ($PAPO_CACHE, ~/.cache/papo) under a
    hash of this file and the arguments. It is written aside and renamed when whole, so a killed build leaves no half
    folder, and of two processes that build at once the slower takes the other's."""
    steps = steps or setting.warm_steps
    if folder is None:
        key = hashlib.sha256(
            f"{Path(__file__).read_text()} {seed} {steps} {setting}".encode()
        ).hexdigest()[:12]
        folder = Path(os.environ.get("PAPO_CACHE") or "~/.cache/papo").expanduser() / f"toy-{key}"
    folder, weights = Path(folder), "model.safetensors"
    if (folder / weights).exists():
        return folder
    tokenizer = make_tokenizer(setting)
    pad, end = tokenizer.convert_tokens_to_ids(["<|endoftext|>", "<|im_end|>"])
    text, vision, full, mrope = (
        (128, 384, 4, 4, 2),
        (2, 64, 128, 2),
        [1],
        [4, 6, 6],
    )  # about a million parameters
    config = hub_config(text, vision, full, mrope, len(tokenizer), True, "float32", pad)
    chat = {"bos_token_id": pad, "pad_token_id": pad, "do_sample": True, "eos_token_id": [end, pad],
            "repetition_penalty": 1.05, "temperature": 1e-6}  # fmt: skip  # Qwen's, which no sampler of ours inherits
    files = {
        "config.json": config,
        "generation_config.json": chat,
        "preprocessor_config.json": PREPROCESSOR,
    }
    folder.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(
        dir=folder.parent, prefix=".toy-", ignore_cleanup_errors=True
    ) as aside:
        half, model = Path(aside) / "toy", make_model(config, seed)
        tokenizer.save_pretrained(half)
        for name, content in files.items():
            (half / name).write_text(json.dumps(content, indent=2) + "\n")
        encoder = Encoder(str(half), OVERRIDES["min_pixels"], OVERRIDES["max_pixels"], SUFFIX)
        warm_start(model, encoder, seed, steps, setting)
        model.save_pretrained(
            Path(aside) / "saved"
        )  # beside, because its config.json is of another shape
        os.replace(Path(aside) / "saved" / weights, half / weights)
        with contextlib.suppress(OSError):  # not empty: another process was faster
            os.replace(half, folder)
    if not (folder / weights).exists():
        raise FileExistsError(
            f"{folder} exists and holds no toy model: remove it or choose another folder"
        )
    return folder


def contact_sheet(path: str, seed: int = 0, setting: Setting = DEFAULT) -> None:
    """Four examples of each split, with question, answer and the patch grid, as a picture file."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(12, 12), layout="constrained")
    edge, middles = (
        setting.grid * setting.cell,
        [setting.cell * (k + 0.5) for k in range(setting.grid)],
    )
    for i, axis in enumerate(figure.subplots(len(SPLITS), 4).flat):
        split, item = SPLITS[i // 4], example(SPLITS[i // 4], i % 4, seed, setting)
        axis.imshow(item.images[0], interpolation="nearest", extent=(0, edge, edge, 0))
        axis.set_xticks(middles, range(1, setting.grid + 1))
        axis.set_yticks(middles, [name[0] for name in cell_names(setting)[:: setting.grid]])
        for k in range(PATCH, edge, PATCH):
            axis.axhline(k, color="black", linewidth=0.3)
            axis.axvline(k, color="black", linewidth=0.3)
        question = item.question.removeprefix("<image>").replace(". ", ".\n")
        axis.set_title(f"{split} {i % 4}\n{question}\nAnswer: {item.answer}", fontsize=9)
    figure.savefig(path, dpi=100)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description="Draw a contact sheet of the toy's examples.")
    parser.add_argument("--out", default="toy.png", help="the picture to write")
    contact_sheet(parser.parse_args().out)
