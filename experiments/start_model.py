"""Build start models of the toy: a tiny Qwen2.5-VL that reads the dots imperfectly.

    python -m experiments.start_model toy:grid=4,colours=4 --out runs/start   # settings of toy.py
    torchrun train.py --model runs/start                                      # its task comes along

`--model toy` is support/toy_model: what `python -m experiments.start_model toy` builds, bit for
bit on a CPU with AVX-512; other kinds round differently. Random weights first learn to read the
cells, then to imitate flawed responses, with cells misread and notes copied. All files but the
weights and the tokenizer are copies of the shipped model's, in the layout of the hub's.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import random
import tempfile
from collections.abc import Callable, Iterable
from functools import partial
from pathlib import Path

import torch
import torch.nn.functional as F
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, trainers
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence
from tqdm import tqdm
from transformers import (
    PreTrainedTokenizerFast,
    Qwen2_5_VLConfig,
    Qwen2_5_VLForConditionalGeneration,
)

from support import toy
from support.batch import Example
from support.config import one_line_errors
from support.qwen_vl import Encoder
from support.toy import COLOURS, DEFAULT, NO_DOT, SUFFIX, Setting

WEIGHTS = "model.safetensors"

# ------------------------------------------------------------------------- the files of a hub model


def shipped(name: str) -> dict:
    return json.loads((toy.MODEL / name).read_text())


CHAT_TEMPLATE = (toy.MODEL / "chat_template.jinja").read_text()
PREPROCESSOR = shipped("preprocessor_config.json")

SPECIAL = [token["content"] for token in shipped("tokenizer.json")["added_tokens"]]  # as Qwen's


def hub_config(vocab_size: int, special: int, vision: dict | None = None, **text) -> dict:
    """The tiny model's config.json, with changes. special: the id of SPECIAL[0]."""
    config = shipped("config.json")
    shift = special - config["bos_token_id"]
    ids = {name: i + shift for name, i in config.items() if name.endswith("_token_id")}
    config |= {"vocab_size": vocab_size} | text | ids
    changed = {"out_hidden_size": config["hidden_size"]} | (vision or {})
    return config | {"vision_config": config["vision_config"] | changed}


def random_config(name: str, special: int = 151643) -> Qwen2_5_VLConfig:
    """The config of a published size, for random weights."""
    sizes = {
        "qwen2.5-vl-3b": (2048, 11008, 36, 16, 2, 151936, True),
        "qwen2.5-vl-7b": (3584, 18944, 28, 28, 4, 152064, False),
    }
    fields = "hidden_size intermediate_size num_hidden_layers num_attention_heads"
    fields += " num_key_value_heads vocab_size tie_word_embeddings"
    text = dict(zip(fields.split(), sizes[name], strict=True)) | {"torch_dtype": "bfloat16"}
    text["rope_scaling"] = {"type": "mrope", "mrope_section": [16, 24, 24]}
    vision = {"depth": 32, "hidden_size": 1280, "intermediate_size": 3420, "num_heads": 16}
    vision["fullatt_block_indexes"] = [7, 15, 23, 31]
    return Qwen2_5_VLConfig(**hub_config(special=special, vision=vision, **text))


def make_tokenizer(setting: Setting = DEFAULT) -> PreTrainedTokenizerFast:
    """The tokenizer of the toy."""
    words = [*toy.cell_names(setting), *COLOURS, NO_DOT]
    return tokenizer_of(words, setting.grid**2, [f"{toy.NOTE} {toy.QUESTION}"])


def tokenizer_of(words: list[str], largest: int, questions: list[str]) -> PreTrainedTokenizerFast:
    """Byte-level BPE. The words, the numbers up to the largest and the words of the questions are
    one token each; any other text falls back to bytes."""
    numbers = [text for n in range(largest + 1) for text in (f"{n}", f"\\boxed{{{n}}}")]
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


def write_configs(folder: Path, tokenizer: PreTrainedTokenizerFast, task: dict | None) -> dict:
    """Write every file of the tiny model but its weights. Returns the content of config.json."""
    pad, end = tokenizer.pad_token_id, tokenizer.eos_token_id
    files = {
        "config.json": hub_config(len(tokenizer), special=pad),
        "generation_config.json": shipped("generation_config.json")
        | {"bos_token_id": pad, "pad_token_id": pad, "eos_token_id": [end, pad]},
        "preprocessor_config.json": PREPROCESSOR,
        **({"task.json": task} if task else {}),
    }
    tokenizer.save_pretrained(folder)
    for name, content in files.items():
        (folder / name).write_text(json.dumps(content, indent=2) + "\n")
    return files["config.json"]


# -------------------------------------------------------------------------------------- the weights


def make_model(config: dict, seed: int) -> Qwen2_5_VLForConditionalGeneration:
    """A model with random weights that depend on `seed` alone.

    Initialisation decides whether the model finds the image: with the usual 0.02 everywhere it was
    still blind after 500 steps.
    """
    model = Qwen2_5_VLForConditionalGeneration(Qwen2_5_VLConfig(**config))
    generator = torch.Generator().manual_seed(seed)
    stds = {"patch_embed": 0.02, "visual": 0.1, "embed_": 0.2, "": 0.08}  # the first that fits
    for name, weight in sorted(model.named_parameters()):
        if weight.ndim > 1:
            std = next(std for part, std in stds.items() if part in name)
            torch.nn.init.normal_(weight, std=std, generator=generator)
        if "patch_embed" in name:  # [hidden, 3, 2, 14, 14]
            # Filters that begin as colour averages show a dot wherever in its patch it lies.
            weight.data += 0.3 * torch.randn(len(weight), 3, 1, 1, 1, generator=generator)
    return model


Lesson = tuple[Example, str]  # and the response to imitate


def make_lessons(rows: range, flawed: bool, seed: int, setting: Setting) -> list[Lesson]:
    """flawed: some cells are misread, and the count follows; some boxes copy the note."""
    rng = random.Random(f"toy labels {seed} {rows.start}")
    words = [*toy.colours_of(setting), NO_DOT]
    lessons = []
    for row in rows:
        scene = toy.make_scene(toy.WARM_SPLIT, row, seed, setting)
        cells, box = scene.cells, None
        if flawed:
            cells = [misread(cell, words, setting.misread, rng) for cell in cells]
            box = scene.note if rng.random() < toy.COPY_NOTE else None
        response = toy.write_response(cells, scene.asked, box, setting)
        lessons.append((toy.example(toy.WARM_SPLIT, row, seed, setting), response))
    return lessons


def misread(true: str, words: Iterable[str], chance: float, rng: random.Random) -> str:
    """What a label gives for a cell: one of the other words with probability `chance`."""
    if rng.random() >= chance:
        return true
    return rng.choice([word for word in words if word != true])


def warm_batch(encoder: Encoder, lessons: list[Lesson]) -> tuple[dict, Tensor]:
    """The model's inputs for B lessons, and which tokens are responses, [B, T] bool."""
    prompts = [encoder.encode(example) for example, _ in lessons]
    sequences, is_response = [], []
    for prompt, (_, response) in zip(prompts, lessons, strict=True):
        tokens = torch.tensor(encoder.tokenizer(response + "<|im_end|>")["input_ids"])
        sequences.append(torch.cat([prompt.input_ids, tokens]))
        is_response.append(torch.arange(len(sequences[-1])) >= len(prompt))
    # Causal attention never looks at padding on the right, so no attention mask is needed.
    pad = encoder.tokenizer.pad_token_id
    input_ids = pad_sequence(sequences, batch_first=True, padding_value=pad)
    inputs = {
        "input_ids": input_ids,
        # Without token types Qwen2.5-VL silently falls back to one-dimensional positions.
        "mm_token_type_ids": (input_ids == encoder.image_id).long(),
        "pixel_values": torch.cat([prompt.pixel_values for prompt in prompts]),
        "image_grid_thw": torch.cat([prompt.image_grid_thw for prompt in prompts]),
    }
    return inputs, pad_sequence(is_response, batch_first=True)


def warm_start(model, encoder: Encoder, steps: int, lessons_of: Callable, words: Iterable) -> None:
    """Supervised training, in place: the first half teaches seeing, the second half carelessness.

    lessons_of: rows, whether they are flawed -> lessons. words: those that name what is seen count
    twice in the first half. The weights' last digits depend on the number of torch threads.
    """
    batch, peak = 16, 2e-3
    seen_ids = torch.tensor([encoder.tokenizer(f" {word}")["input_ids"][0] for word in words])
    optimizer = torch.optim.AdamW(model.parameters(), betas=(0.9, 0.95), weight_decay=0.0)
    for step in tqdm(range(steps), desc="making the toy model, once", unit="step"):
        # A linear rise over 10 steps, times half a cosine from 1 down to a tenth.
        rise, decay = min(1, (step + 1) / 10), 0.55 + 0.45 * math.cos(math.pi * step / steps)
        optimizer.param_groups[0]["lr"] = peak * rise * decay
        flawed = step >= 0.52 * steps
        rows = range(step * batch, (step + 1) * batch)
        inputs, is_response = warm_batch(encoder, lessons_of(rows, flawed))
        loss = warm_loss(model, inputs, is_response, None if flawed else seen_ids)
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()


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


def build(seed: int, folder: Path, spec: str = "toy", steps: int = 0) -> Path:
    """Make the start model of a toy as a Hugging Face folder. Returns the folder.

    task.json names the task, so that a command given the model alone can find its data.
    """
    setting = toy.setting_of(spec)
    lessons_of = partial(make_lessons, seed=seed, setting=setting)
    words, steps = [*COLOURS, NO_DOT], steps or setting.warm_steps
    tokenizer, task = make_tokenizer(setting), {"data": spec}
    return train_model(folder, tokenizer, seed, steps, lessons_of, words, task)


def train_model(
    folder: Path,
    tokenizer: PreTrainedTokenizerFast,
    seed: int,
    steps: int,
    lessons_of: Callable[[range, bool], list[Lesson]],
    words: Iterable[str],
    task: dict | None = None,
) -> Path:
    """Make a tiny model and train it on lessons (see warm_start).

    The folder appears at the end, whole: a killed build leaves none.
    """
    folder.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=folder.parent, prefix=".") as scratch:
        made = Path(scratch, folder.name)
        config = write_configs(made, tokenizer, task)
        model = make_model(config, seed)
        sizes = toy.TASK_DEFAULTS["min_pixels"], toy.TASK_DEFAULTS["max_pixels"]
        encoder = Encoder(made, *sizes, SUFFIX)
        torch.set_num_threads(1)  # the order in which threads add up decides the last digits
        warm_start(model, encoder, steps, lessons_of, words)
        model.save_pretrained(made)
        write_configs(made, tokenizer, task)  # again: save_pretrained's are not in hub's shape
        os.replace(made, folder)
    return folder


def main(argv=None) -> None:
    parser = argparse.ArgumentParser(description="Build a start model of the toy.")
    parser.add_argument("spec", help="toy, or toy:grid=4,... (the fields of support.toy.Setting)")
    parser.add_argument("--out", required=True, type=Path, help="the folder to write")
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args(argv)
    with one_line_errors():
        if toy.setting_of(args.spec) is None:
            raise ValueError(f"{args.spec}: give toy or toy:grid=4,...")
        if args.out.exists():
            raise ValueError(f"--out {args.out} exists: choose another folder")
        build(args.seed, args.out, args.spec)
    print(f"torchrun train.py --algo papo_g --model {args.out}")


if __name__ == "__main__":
    main()
