"""Build start models of the toy: a tiny Qwen2.5-VL that reads the dots imperfectly.

    python -m experiments.start_model toy:grid=4,colours=4 --out runs/start   # settings of toy.py
    torchrun train.py --model runs/start                                      # its task comes along

`--model toy` is support/toy_model: what `python -m experiments.start_model toy` builds, bit for
bit on a CPU with AVX-512; other kinds round differently. The folder has the layout of the hub's, so
everything treats it like any other model. Random weights first learn to read the cells, then to
imitate flawed responses, with cells misread and notes copied.
"""

from __future__ import annotations

import argparse
import contextlib
import hashlib
import json
import math
import os
import random
import shutil
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import NamedTuple

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
from support.toy import (
    COLOURS,
    DEFAULT,
    NO_DOT,
    NOTE,
    PATCH,
    QUESTION,
    SUFFIX,
    TASK_DEFAULTS,
    WARM_SPLIT,
    Scene,
    Setting,
    cell_names,
    colours_of,
    example,
    make_scene,
    setting_of,
    spec_of,
    write_response,
)

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


def build(seed: int, folder: Path, setting: Setting = DEFAULT, steps: int = 0) -> Path:
    """Make a start model as a Hugging Face folder, unless it exists. Returns the folder.

    It is written beside `folder` and renamed when complete, so a killed build leaves no half model.
    task.json names the task, so that a command given the model alone can find its data. The weights
    do not depend on the number of cores.
    """
    lessons = partial(make_lessons, seed=seed, setting=setting)
    words = [*COLOURS, NO_DOT]
    steps = steps or setting.warm_steps
    task = {"data": spec_of(setting)}
    return train_model(folder, make_tokenizer(setting), seed, steps, lessons, words, task)


def train_model(
    folder: Path,
    tokenizer: PreTrainedTokenizerFast,
    seed: int,
    steps: int,
    make_lessons: Callable[[range, bool], list[Lesson]],
    seen_words: list[str],
    task: dict | None = None,
) -> Path:
    """Make a tiny model and train it on lessons (see warm_start), unless `folder` has it."""
    folder = Path(folder)
    if (folder / WEIGHTS).exists():
        return folder
    partial_dir = folder.with_name(f".{folder.name}-{os.getpid()}")
    saved = partial_dir / "saved"
    config = write_configs(partial_dir, tokenizer)
    model = make_model(config, seed)
    sizes = TASK_DEFAULTS["min_pixels"], TASK_DEFAULTS["max_pixels"]
    encoder = Encoder(str(partial_dir), *sizes, SUFFIX)
    with one_thread():
        warm_start(model, encoder, steps, make_lessons, seen_words)
    model.save_pretrained(saved)  # elsewhere, because its config.json is not in the hub's shape
    os.replace(saved / WEIGHTS, partial_dir / WEIGHTS)
    shutil.rmtree(saved)
    if task:
        (partial_dir / "task.json").write_text(json.dumps(task, indent=2) + "\n")
    publish(partial_dir, folder, WEIGHTS)
    return folder


def publish(complete: Path, folder: Path, proof: str) -> None:
    """Give a complete folder its name. Where another process was faster, its folder stays.

    proof: a file that a complete folder holds. OSError if `folder` holds something else.
    """
    try:
        os.replace(complete, folder)
    except OSError:
        if not (folder / proof).exists():
            raise
        shutil.rmtree(complete)


def cache_folder(name: str, arguments: str, *sources: str) -> Path:
    """A folder of $PAPO_CACHE or ~/.cache/papo, named after a hash of the arguments and of the
    source files that decide what it holds."""
    digest = hashlib.sha256(arguments.encode())
    for source in (__file__, toy.__file__, *sources):
        digest.update(Path(source).read_bytes())
    cache = Path(os.environ.get("PAPO_CACHE") or "~/.cache/papo").expanduser()
    return cache / f"{name}-{digest.hexdigest()[:12]}"


@contextlib.contextmanager
def one_thread():
    """Limit torch to one thread: the order in which threads add up decides the last digits."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)


def main(argv=None) -> None:
    parser = argparse.ArgumentParser(description="Build a start model of the toy.")
    parser.add_argument("spec", help="toy, or toy:grid=4,... (the fields of support.toy.Setting)")
    parser.add_argument("--out", required=True, type=Path, help="the folder to write")
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args(argv)
    with one_line_errors():
        setting = setting_of(args.spec)
        if setting is None:
            raise ValueError(f"{args.spec}: give toy or toy:grid=4,...")
        if args.out.exists():
            raise ValueError(f"--out {args.out} exists: choose another folder")
        build(args.seed, args.out, setting)
    print(f"torchrun train.py --algo papo_g --model {args.out}")


if __name__ == "__main__":
    main()
