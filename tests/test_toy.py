"""The toy: images and questions, tokenizer, the start model's folder and (slow) its weights."""

from __future__ import annotations

import hashlib
import json
import random
import re
from collections import Counter
from dataclasses import fields
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file
from transformers import AutoModelForImageTextToText, AutoTokenizer

import train
from experiments import run, start_model
from support import toy
from support.batch import Example
from support.qwen_vl import Encoder

SPLITS = ("train", "general", "vision_dependent")
NOTES_ONLY = toy.Setting(plain_share=0.0)
HARDER = toy.Setting(grid=4, colours=6, most=8, radius=3)
NINE_CELLS = ["red", "none", "blue"] * 3


def make_encoder(folder: Path) -> Encoder:
    pixels = toy.TASK_DEFAULTS["min_pixels"], toy.TASK_DEFAULTS["max_pixels"]
    return Encoder(str(folder), *pixels, toy.SUFFIX)


def number_in(question: str) -> str:
    return re.search(r"^<image>A note says (\d+)\. How many", question)[1]


def nearest_colour(pixel: tuple[int, int, int]) -> str:
    def distance(name: str) -> int:
        return sum((a - b) ** 2 for a, b in zip(pixel, toy.COLOURS[name], strict=True))

    return min(toy.COLOURS, key=distance)


def find_dots(image: Image.Image) -> list[tuple[int, int, str]]:
    """(patch row, patch column, colour) of every patch with a pixel of a dot."""
    found = set()
    for y, x in toy.saliency(image).nonzero().tolist():
        found.add((y // toy.PATCH, x // toy.PATCH, nearest_colour(image.getpixel((x, y)))))
    return sorted(found)


@pytest.fixture(scope="module")
def tokenizer():
    return start_model.make_tokenizer()


# ------------------------------------------------------------------------------------- settings


@pytest.mark.parametrize(
    ("setting", "spec"),
    [
        (toy.DEFAULT, "toy"),
        (toy.Setting(grid=4, colours=4), "toy:grid=4,colours=4"),
        (toy.Setting(misread=1, filled=0.1 + 0.2), "toy:filled=0.30000000000000004,misread=1.0"),
    ],
)
def test_a_setting_has_one_spec_which_names_it(setting, spec):
    assert toy.spec_of(setting) == spec
    assert toy.setting_of(spec) == setting
    assert toy.setting_of("toys") is toy.setting_of("Qwen/toy:3B") is None


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        ("toy:size=4", "no toy setting 'size': choose from grid"),
        ("toy:grid=4.5", "grid='4.5' is not int"),
        ("toy:grid", "grid='' is not int"),
        ("toy:grid=10", "grid=10: must be in 1..9"),
        ("toy:most=10", "most=10: must be in 1..9"),
        ("toy:misread=2", "misread=2.0: must be in 0..1"),
        ("toy:cell=30", "cell=30: must be a multiple of 28"),
    ],
)
def test_a_wrong_spec_is_one_clear_error(spec, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        toy.setting_of(spec)


# ----------------------------------------------------------------------------------------- rows


@pytest.mark.parametrize("split", SPLITS)
def test_examples_are_reproducible_and_all_different(split):
    first, again = toy.example(split, 5, seed=1), toy.example(split, 5, seed=1)
    assert (first.question, first.answer, first.id) == (again.question, again.answer, again.id)
    assert first.images[0].tobytes() == again.images[0].tobytes()
    others = [toy.example(split, 6, seed=1), toy.example(split, 5, seed=2)]
    others += [toy.example(other, 5, seed=1) for other in (*SPLITS, "warm") if other != split]
    assert all(first.images[0].tobytes() != other.images[0].tobytes() for other in others)
    assert len({item.id for item in [first, *others]}) == 6


def test_an_example_neither_reads_nor_moves_the_global_generator():
    random.seed(0)
    question, after = toy.example("train", 0).question, random.random()
    random.seed(0)
    assert after == random.random()
    random.seed(1)
    assert toy.example("train", 0).question == question


@pytest.mark.parametrize(
    "setting", [toy.DEFAULT, HARDER, toy.Setting(cell=56)], ids=["default", "harder", "wide"]
)
def test_the_image_alone_gives_the_answer(setting):
    """Counting patches of the asked colour gives the answer, so no dot crosses its patch's edge."""
    side = setting.grid * setting.cell
    for i in range(30):
        item = toy.example("general", i, setting=setting)
        [image] = item.images
        assert (image.size, image.mode) == ((side, side), "RGB")
        asked = item.question.split("many ")[1].split()[0]
        counts = Counter(colour for *_, colour in find_dots(image))
        assert counts[asked] == int(item.answer) <= setting.most


def test_every_dot_is_in_its_cell():
    scene = toy.make_scene("train", 0)
    expected = [(i, colour) for i, colour in enumerate(scene.cells) if colour != "none"]
    dots = find_dots(scene.image)
    assert sorted((row // 2 * 3 + column // 2, colour) for row, column, colour in dots) == expected


def test_dots_fall_on_all_patches_of_a_cell_and_all_answers_occur():
    places, answers = set(), Counter()
    for i in range(200):
        item = toy.example("train", i)
        answers[item.answer] += 1
        places |= {(row % 2, column % 2) for row, column, _ in find_dots(item.images[0])}
    assert len(places) == 4
    assert set(answers) == set("012345") and min(answers.values()) > 15


def test_notes_are_right_half_the_time_and_never_in_vision_dependent():
    right = {}
    for split in SPLITS:
        items = [toy.example(split, i, setting=NOTES_ONLY) for i in range(400)]
        right[split] = sum(number_in(item.question) == item.answer for item in items) / len(items)
    assert right["vision_dependent"] == 0
    assert 0.42 < right["train"] < 0.58 and 0.42 < right["general"] < 0.58
    always = toy.Setting(note_right=1.0)
    items = [toy.example("general", i, setting=always) for i in range(20)]
    assert all(number_in(item.question) == item.answer for item in items)


def test_a_share_of_training_questions_carries_no_note():
    """Plain questions keep image and answer. The evaluation splits keep their notes."""
    plain = Counter()
    for split in (*SPLITS, "warm"):
        for i in range(200):
            item, noted = toy.example(split, i), toy.example(split, i, setting=NOTES_ONLY)
            assert item.images[0].tobytes() == noted.images[0].tobytes()
            assert item.answer == noted.answer
            if item.question != noted.question:
                assert item.question == "<image>" + noted.question.partition(". ")[2]
                plain[split] += 1
    assert set(plain) == {"train", "warm"}
    share = toy.DEFAULT.plain_share
    assert all(abs(count / 200 - share) < 0.1 for count in plain.values())


def test_the_rows_of_the_experiments_are_what_they_were():
    """Committed results were measured on these rows, before questions without a note existed."""
    digest = hashlib.sha256()
    for split in (*SPLITS, "warm"):
        for i in range(50):
            item = toy.example(split, i, 10, run.SETTING)
            digest.update(f"{item.question} {item.answer} {item.id}\n".encode())
    assert digest.hexdigest()[:16] == "d059cf165034fb7b"


def test_an_unknown_split_is_named_with_the_choices():
    with pytest.raises(ValueError, match="'test'.*train, general, vision_dependent"):
        toy.example("test", 0)


def test_saliency_is_one_on_dots_and_zero_on_every_tint():
    rng = random.Random(0)
    for grid in (3, 9):
        setting = toy.Setting(grid=grid, colours=6)
        blank = toy.render(["none"] * grid**2, rng, setting)
        assert toy.saliency(blank).shape == (blank.height, blank.width)
        assert toy.saliency(blank).max() == 0
        for colour, rgb in toy.COLOURS.items():
            image = toy.render(["none"] * (grid**2 - 1) + [colour], rng, setting)
            dot = (torch.tensor(np.array(image)) == torch.tensor(rgb)).all(-1)
            assert torch.equal(toy.saliency(image), dot.float())
            assert dot.sum() > 80


def test_a_response_keeps_a_running_count():
    cells = ["red", "none", "green", "red", "blue", "none", "none", "red", "green"]
    rows = (
        "a1 red 1 a2 none 1 a3 green 1",
        "b1 red 2 b2 blue 2 b3 none 2",
        "c1 none 2 c2 red 3 c3 green 3",
    )
    think = f"<think> {' '.join(rows)} </think>"
    assert toy.write_response(cells, "red") == f"{think} \\boxed{{3}}"
    assert toy.write_response(cells, "red", box=5) == f"{think} \\boxed{{5}}"


# ------------------------------------------------------------------------------------ tokenizer


@pytest.mark.parametrize(
    "text",
    [
        toy.write_response(NINE_CELLS, "red"),
        f"{toy.NOTE.format(note=3)} {toy.QUESTION.format(asked='blue')}",
        toy.QUESTION.format(asked="blue"),
        toy.SUFFIX,
        "ü → 日本 🙂\t\\frac{1}{2}\r\n  two  spaces \x00",
        "",
    ],
)
def test_any_text_survives_the_tokenizer(tokenizer, text):
    assert tokenizer.decode(tokenizer(text)["input_ids"]) == text


def test_a_response_takes_three_tokens_per_cell(tokenizer):
    tokens = tokenizer(toy.write_response(NINE_CELLS, "red"))["input_ids"]
    assert len(tokens) == 9 * 3 + 3
    assert len(tokens) + 1 <= toy.TASK_DEFAULTS["max_new_tokens"]


def test_special_tokens_are_single_and_in_qwens_order(tokenizer):
    ids = [tokenizer(token)["input_ids"] for token in start_model.SPECIAL]
    assert ids == [
        [len(tokenizer) - len(start_model.SPECIAL) + i] for i in range(len(start_model.SPECIAL))
    ]
    assert (tokenizer.eos_token, tokenizer.pad_token) == ("<|im_end|>", "<|endoftext|>")
    assert not set(sum(ids, [])) & set(tokenizer(toy.SUFFIX)["input_ids"])


def test_the_chat_template_does_what_qwens_does(tokenizer):
    def apply(messages, **kwargs):
        return tokenizer.apply_chat_template(messages, tokenize=False, **kwargs)

    content = [{"type": "text", "text": "a "}, {"type": "image"}, {"type": "text", "text": "b"}]
    user = {"role": "user", "content": content}
    default = "<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n"
    turn = "<|im_start|>user\na <|vision_start|><|image_pad|><|vision_end|>b<|im_end|>\n"
    assert apply([user]) == default + turn
    assert apply([user], add_generation_prompt=True) == default + turn + "<|im_start|>assistant\n"
    system = {"role": "system", "content": "Be brief."}
    assert apply([system, user, {"role": "assistant", "content": "c"}]) == (
        "<|im_start|>system\nBe brief.<|im_end|>\n" + turn + "<|im_start|>assistant\nc<|im_end|>\n"
    )


# ------------------------------------------------------------------------------------ the folder


def test_the_folder_has_the_hubs_files(folder):
    names = "chat_template.jinja config.json generation_config.json model.safetensors "
    names += "preprocessor_config.json task.json tokenizer.json tokenizer_config.json"
    assert sorted(path.name for path in Path(folder).iterdir()) == names.split()
    config, chat, images, task = (
        json.loads((Path(folder) / f"{name}.json").read_text())
        for name in ("config", "generation_config", "preprocessor_config", "task")
    )
    assert config["model_type"] == "qwen2_5_vl"
    assert "text_config" not in config and "hidden_size" in config  # flat, as on the hub
    assert chat["eos_token_id"] == [config["eos_token_id"], chat["pad_token_id"]]
    assert chat["repetition_penalty"] == 1.05
    assert images["image_processor_type"] == "Qwen2VLImageProcessor"
    assert task == {"data": "toy"}


@pytest.mark.parametrize("name", ["shipped", "built"])
def test_the_folder_loads_with_the_auto_classes(folder, name):
    path = toy.MODEL if name == "shipped" else folder
    model, report = AutoModelForImageTextToText.from_pretrained(path, output_loading_info=True)
    tokenizer = AutoTokenizer.from_pretrained(path)
    assert type(model).__name__ == "Qwen2_5_VLForConditionalGeneration"
    assert not any(report.values()), report
    assert model.lm_head.weight is model.get_input_embeddings().weight
    assert 0.5e6 < sum(p.numel() for p in model.parameters()) < 2e6
    assert model.config.image_token_id == tokenizer.convert_tokens_to_ids("<|image_pad|>")
    assert model.config.text_config.vocab_size == len(tokenizer)
    text = toy.write_response(NINE_CELLS, "red")
    assert tokenizer.decode(tokenizer(text)["input_ids"]) == text


@pytest.mark.parametrize("grid", [1, 3, 7])
def test_the_folder_names_its_task_whose_default_lengths_fit(tmp_path, grid):
    setting = toy.Setting(grid=grid, most=1)
    folder = start_model.build(0, tmp_path / "model", setting, steps=1)
    limits = toy.defaults(str(folder), "")
    assert toy.setting_of(limits["data"]) == setting and limits["val_data"] == limits["data"]
    encoder = make_encoder(folder)
    prompt = encoder.encode(toy.example("train", 0, setting=setting))
    assert prompt.is_image_token.sum() == max(grid, 2) ** 2  # one per cell; 1 x 1 is enlarged
    assert len(prompt) <= limits["max_prompt_tokens"]
    response = toy.write_response(["red"] * grid**2, "red", setting=setting) + "<|im_end|>"
    assert len(encoder.tokenizer(response)["input_ids"]) <= limits["max_new_tokens"]


def test_all_defaults_are_flags_of_train():
    """Else the parser would pass over them."""
    flags = {field.name for field in fields(train.Config)}
    assert toy.task_defaults() == toy.TASK_DEFAULTS
    assert toy.defaults(str(toy.MODEL), "").keys() <= flags


# ------------------------------------------------------------------------------------ the weights


def warm_batch(encoder, rows, flawed, setting=toy.DEFAULT):
    lessons = start_model.make_lessons(rows, flawed, seed=0, setting=setting)
    return start_model.warm_batch(encoder, lessons)


def test_warm_batches_hold_the_trainers_prompt_and_a_response(folder):
    """Responses are flawless at first, and later flawed as often as the setting says."""
    encoder = make_encoder(folder)
    wrong = Counter()
    for flawed in (False, True):
        inputs, is_response = warm_batch(encoder, range(64), flawed)
        for i, (ids, mask) in enumerate(zip(inputs["input_ids"], is_response, strict=True)):
            prompt = encoder.encode(toy.example("warm", i)).input_ids
            assert torch.equal(ids[: len(prompt)], prompt)
            assert mask.nonzero().flatten().tolist() == list(range(len(prompt), len(prompt) + 31))
            scene = toy.make_scene("warm", i)
            words = encoder.tokenizer.decode(ids[mask]).split()
            cells, counts = words[2:-2:3], words[3:-2:3]
            assert counts == [str(cells[: k + 1].count(scene.asked)) for k in range(9)]
            assert words[-1].endswith("<|im_end|>")
            box = re.search(r"boxed{(\d)}", words[-1])[1]
            assert box in (counts[-1], str(scene.note))  # the note is None in a plain question
            wrong[flawed, "cells"] += sum(a != b for a, b in zip(cells, scene.cells, strict=True))
            wrong[flawed, "boxes"] += box != counts[-1]
    assert wrong[False, "cells"] == wrong[False, "boxes"] == 0
    assert 0.08 < wrong[True, "cells"] / (64 * 9) < 0.16
    assert 0.05 < wrong[True, "boxes"] / 64 < 0.45  # a copied note may agree with the count


@torch.no_grad()
def test_padding_does_not_change_the_loss_of_a_warm_batch(folder):
    """Prompts with and without a note differ in length, so a batch of both is padded."""
    encoder = make_encoder(folder)
    model = AutoModelForImageTextToText.from_pretrained(folder)
    setting = toy.Setting(plain_share=0.5)
    lengths, losses = set(), []
    for row in range(8):
        inputs, is_response = warm_batch(encoder, range(row, row + 1), False, setting)
        lengths.add(inputs["input_ids"].shape[1])
        losses.append(start_model.warm_loss(model, inputs, is_response, None).item())
    assert len(lengths) == 2
    batch = warm_batch(encoder, range(8), False, setting)
    loss = start_model.warm_loss(model, *batch, None).item()
    assert loss == pytest.approx(sum(losses) / 8)


def test_a_build_depends_on_its_arguments_alone(folder, tmp_path):
    """Not on the number of threads; and it leaves the caller's generator as it was."""
    state, threads = torch.random.get_rng_state(), torch.get_num_threads()
    torch.set_num_threads(4)
    try:
        again = start_model.build(0, tmp_path / "again", steps=2)
        assert torch.get_num_threads() == 4
    finally:
        torch.set_num_threads(threads)
    assert torch.equal(state, torch.random.get_rng_state())
    other = start_model.build(1, tmp_path / "other", steps=2)
    weights = [(Path(each) / start_model.WEIGHTS).read_bytes() for each in (folder, again, other)]
    assert weights[0] == weights[1] != weights[2]


def test_a_build_that_dies_leaves_no_half_model(tmp_path, monkeypatch):
    def die(*args):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(start_model, "warm_start", die)
        start_model.build(0, tmp_path / "model", steps=1)
    assert not (tmp_path / "model").exists()
    folder = start_model.build(0, tmp_path / "model", steps=1)
    modified = (folder / start_model.WEIGHTS).stat().st_mtime_ns
    assert start_model.build(0, folder, steps=1) == folder  # nothing is made twice
    assert (folder / start_model.WEIGHTS).stat().st_mtime_ns == modified
    assert list(tmp_path.iterdir()) == [folder]


def test_the_command_builds_a_model_that_trains_without_further_flags(tmp_path, capsys):
    out, spec = tmp_path / "start", "toy:grid=2,most=4,warm_steps=1"
    start_model.main([spec, "--out", str(out)])
    assert capsys.readouterr().out == f"torchrun train.py --algo papo_g --model {out}\n"
    assert toy.defaults(str(out), "")["data"] == spec
    for words, message in (
        ([spec, "--out", str(out)], f"--out {out} exists: choose another folder"),
        (["toys", "--out", "x"], "toys: give toy or toy:grid=4,..."),
        (["toy:size=3", "--out", "x"], "no toy setting 'size'"),
    ):
        with pytest.raises(SystemExit, match="2"):
            start_model.main(words)
        assert message in capsys.readouterr().err


@pytest.mark.parametrize(("name", "billions"), [("qwen2.5-vl-3b", 3.75), ("qwen2.5-vl-7b", 8.29)])
def test_published_sizes_have_the_published_number_of_parameters(name, billions):
    config = start_model.random_config(name)
    with torch.device("meta"):
        model = AutoModelForImageTextToText.from_config(config)
    parameters = sum(p.numel() for p in model.parameters())
    vision_parameters = sum(p.numel() for p in model.model.visual.parameters())
    assert parameters / 1e9 == pytest.approx(billions, abs=0.01)
    assert vision_parameters / 1e9 == pytest.approx(0.67, abs=0.01)
    assert (config.image_token_id, config.text_config.eos_token_id) == (151655, 151645)
    with pytest.raises(ValueError, match="'1b'.*qwen2.5-vl-3b, qwen2.5-vl-7b"):
        start_model.random_config("1b")


@torch.no_grad()
def accuracy(folder: Path, items: list[Example], **sampling) -> float:
    """Share of right boxes, one response per question, by stock generate."""
    model = AutoModelForImageTextToText.from_pretrained(folder)
    encoder = make_encoder(folder)
    prompts = [encoder.encode(item) for item in items]  # all with a note or none: equally long
    input_ids = torch.stack([prompt.input_ids for prompt in prompts])
    torch.manual_seed(0)
    tokens = model.generate(
        input_ids=input_ids,
        attention_mask=torch.ones_like(input_ids),
        mm_token_type_ids=(input_ids == encoder.image_id).long(),
        pixel_values=torch.cat([prompt.pixel_values for prompt in prompts]),
        image_grid_thw=torch.cat([prompt.image_grid_thw for prompt in prompts]),
        repetition_penalty=1.0,
        max_new_tokens=40,
        **sampling,
    )
    responses = tokens[:, input_ids.shape[1] :]
    texts = encoder.tokenizer.batch_decode(responses, skip_special_tokens=True)
    pairs = zip(texts, items, strict=True)
    return sum(text.endswith(f"\\boxed{{{item.answer}}}") for text, item in pairs) / len(items)


@pytest.mark.slow
def test_the_shipped_model_is_what_start_model_builds(tmp_path):
    """The weights equal to the last bit on a CPU of the same kind, else within rounding: the root
    mean square difference was up to 4e-4 without AVX-512, and 3e-3 after one step more or less."""
    built = start_model.build(0, tmp_path / "model")
    files = {path.name for path in built.iterdir()}
    assert files == {path.name for path in toy.MODEL.iterdir()}
    for name in files - {start_model.WEIGHTS}:
        assert (built / name).read_bytes() == (toy.MODEL / name).read_bytes(), name
    ours, shipped = (load_file(each / start_model.WEIGHTS) for each in (built, toy.MODEL))
    assert ours.keys() == shipped.keys()
    differences = torch.cat([(ours[name] - shipped[name]).flatten() for name in ours])
    assert differences.square().mean().sqrt() < 1e-3


@pytest.mark.slow
def test_the_shipped_model_sees_imperfectly():
    """Better than blind (1/6 where notes lie), with room for 20 points on both splits."""
    sampling = {"do_sample": True, "temperature": 1.0, "top_k": 0}
    for split, low, high in (("general", 0.4, 0.7), ("vision_dependent", 0.25, 0.6)):
        items = [toy.example(split, i) for i in range(256)]
        assert low < accuracy(toy.MODEL, items, **sampling) < high
    everything_plain = toy.Setting(plain_share=1.0)
    items = [toy.example("train", 10_000 + i, setting=everything_plain) for i in range(64)]
    assert accuracy(toy.MODEL, items, do_sample=False) > 0.9
