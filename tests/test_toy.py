"""The toy: images and questions, tokenizer, model folder and (slow) the start model."""

from __future__ import annotations

import hashlib
import json
import os
import random
import re
from collections import Counter
from dataclasses import fields, replace
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from transformers import AutoModelForImageTextToText, AutoTokenizer

import train
from experiments import tasks
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
    return toy.make_tokenizer()


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    return toy.build(3, tmp_path_factory.mktemp("toy") / "model", steps=2)


# ------------------------------------------------------------------------------------- settings


def test_a_setting_that_cannot_be_drawn_is_refused():
    for bad in ({"radius": 7}, {"cell": 30}, {"colours": 7}, {"most": 10}, {"grid": 0}):
        with pytest.raises(ValueError, match=next(iter(bad))):
            toy.Setting(**bad)


def test_a_spec_names_a_setting():
    assert toy.setting_of("toy") == toy.DEFAULT
    assert toy.setting_of("toys") is None
    assert toy.setting_of("Qwen/toy:3B") is None
    harder = toy.setting_of("toy:grid=4,colours=4,misread=0.2,warm_steps=400")
    assert harder == toy.Setting(grid=4, colours=4, misread=0.2, warm_steps=400)


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


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        ("toy:size=4", "no toy setting 'size': choose from grid"),
        ("toy:grid=four", "grid='four' is not int"),
        ("toy:grid=4.5", "grid='4.5' is not int"),
        ("toy:grid", "grid='' is not int"),
        ("toy:grid=10", "grid=10: must be in 1..9"),
        ("toy:misread=2", "misread=2.0: must be in 0..1"),
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


def test_note_right_decides_how_often_notes_are_right():
    always = replace(toy.DEFAULT, note_right=1.0)
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
            item = toy.example(split, i, 10, tasks.Dots().setting)
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
    ids = [tokenizer(token)["input_ids"] for token in toy.SPECIAL]
    assert ids == [[len(tokenizer) - len(toy.SPECIAL) + i] for i in range(len(toy.SPECIAL))]
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
    names = {path.name for path in folder.iterdir()}
    assert {"config.json", "generation_config.json", "preprocessor_config.json"} <= names
    assert {"tokenizer.json", "tokenizer_config.json", "chat_template.jinja"} <= names
    assert "model.safetensors" in names
    files = ("config", "generation_config", "preprocessor_config")
    config, chat, images = (json.loads((folder / f"{name}.json").read_text()) for name in files)
    assert config["model_type"] == "qwen2_5_vl"
    assert "text_config" not in config and "hidden_size" in config  # flat, as on the hub
    assert chat["eos_token_id"] == [config["eos_token_id"], chat["pad_token_id"]]
    assert chat["repetition_penalty"] == 1.05
    assert images["image_processor_type"] == "Qwen2VLImageProcessor"
    assert json.loads((folder / "task.json").read_text()) == {"data": "toy"}
    assert os.listdir(folder.parent) == [folder.name], "something was left beside the folder"


def test_the_folder_loads_with_the_auto_classes(folder):
    model, report = AutoModelForImageTextToText.from_pretrained(folder, output_loading_info=True)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    assert type(model).__name__ == "Qwen2_5_VLForConditionalGeneration"
    assert not any(report.values()), report
    assert model.lm_head.weight is model.get_input_embeddings().weight
    assert 0.5e6 < sum(p.numel() for p in model.parameters()) < 2e6
    assert model.config.image_token_id == tokenizer.convert_tokens_to_ids("<|image_pad|>")
    assert model.config.text_config.vocab_size == len(tokenizer)
    text = toy.write_response(NINE_CELLS, "red")
    assert tokenizer.decode(tokenizer(text)["input_ids"]) == text


def test_a_prompt_has_one_image_token_per_cell(folder):
    prompt = make_encoder(folder).encode(toy.example("train", 0))
    assert prompt.image_grid_thw.tolist() == [[1, 6, 6]]
    assert prompt.is_image_token.sum() == 9


@pytest.mark.parametrize("grid", [1, 3, 4, 7])
def test_the_folder_names_its_task_whose_default_lengths_fit(tmp_path, grid):
    setting = toy.Setting(grid=grid, most=1)
    folder = toy.build(0, tmp_path / "model", steps=1, setting=setting)
    task = json.loads((folder / "task.json").read_text())
    assert toy.setting_of(task["data"]) == setting
    encoder = make_encoder(folder)
    limits = toy.task_defaults(setting)
    prompt = encoder.encode(toy.example("train", 0, setting=setting))
    assert len(prompt) <= limits["max_prompt_tokens"]
    response = toy.write_response(["red"] * grid**2, "red", setting=setting) + "<|im_end|>"
    assert len(encoder.tokenizer(response)["input_ids"]) <= limits["max_new_tokens"]


def test_defaults_of_the_task_and_of_the_model_are_separate_flags_of_train():
    """A large model on the toy must not get the tiny one's learning rate, nor the reverse."""
    flags = {field.name for field in fields(train.Config)}
    assert toy.task_defaults() == toy.TASK_DEFAULTS
    assert set(toy.MODEL_DEFAULTS) == {"lr"}
    assert not set(toy.TASK_DEFAULTS) & set(toy.MODEL_DEFAULTS)
    assert set(toy.TASK_DEFAULTS) | set(toy.MODEL_DEFAULTS) <= flags


# ------------------------------------------------------------------------------------ the weights


def warm_batch(encoder, rows, flawed, setting=toy.DEFAULT):
    return toy.warm_batch(encoder, toy.make_lessons(rows, flawed, seed=0, setting=setting))


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
        losses.append(toy.warm_loss(model, inputs, is_response, None).item())
    assert len(lengths) == 2
    batch = warm_batch(encoder, range(8), False, setting)
    assert toy.warm_loss(model, *batch, None).item() == pytest.approx(sum(losses) / 8)


def test_a_build_is_reproducible_and_leaves_the_callers_generator_alone(folder, tmp_path):
    state = torch.random.get_rng_state()
    again = toy.build(3, tmp_path / "again", steps=2)
    assert torch.equal(state, torch.random.get_rng_state())
    assert (again / toy.WEIGHTS).read_bytes() == (folder / toy.WEIGHTS).read_bytes()
    other = toy.build(4, tmp_path / "other", steps=2)
    assert (other / toy.WEIGHTS).read_bytes() != (folder / toy.WEIGHTS).read_bytes()


def test_a_build_does_not_depend_on_the_number_of_threads(folder, tmp_path):
    before = torch.get_num_threads()
    try:
        for threads in (1, 4):
            torch.set_num_threads(threads)
            again = toy.build(3, tmp_path / f"threads{threads}", steps=2)
            assert torch.get_num_threads() == threads
            assert (again / toy.WEIGHTS).read_bytes() == (folder / toy.WEIGHTS).read_bytes()
    finally:
        torch.set_num_threads(before)


def test_a_build_is_made_once_and_cached_under_its_arguments(tmp_path, monkeypatch):
    monkeypatch.setenv("PAPO_CACHE", str(tmp_path / "cache"))
    first = toy.build(0, steps=1)
    assert first.parent == tmp_path / "cache"
    modified = (first / toy.WEIGHTS).stat().st_mtime_ns
    assert toy.build(0, steps=1) == first
    assert (first / toy.WEIGHTS).stat().st_mtime_ns == modified
    other_seed = toy.build(1, steps=1)
    other_setting = toy.build(0, steps=1, setting=toy.Setting(misread=0.2))
    assert len({first, other_seed, other_setting}) == 3
    assert {first, other_seed, other_setting} == set((tmp_path / "cache").iterdir())


def test_a_build_that_dies_leaves_no_folder(tmp_path, monkeypatch):
    def die(*args):
        raise KeyboardInterrupt

    monkeypatch.setattr(toy, "warm_start", die)
    with pytest.raises(KeyboardInterrupt):
        toy.build(0, tmp_path / "model", steps=1)
    assert list(tmp_path.iterdir()) == []


def test_of_two_builds_at_once_the_slower_takes_the_others(tmp_path, monkeypatch):
    def finish_another_build(*args):
        (tmp_path / "model").mkdir()
        (tmp_path / "model" / toy.WEIGHTS).write_bytes(b"the other's")

    monkeypatch.setattr(toy, "warm_start", finish_another_build)
    assert toy.build(0, tmp_path / "model", steps=1) == tmp_path / "model"
    assert (tmp_path / "model" / toy.WEIGHTS).read_bytes() == b"the other's"
    assert [path.name for path in tmp_path.iterdir()] == ["model"]


def test_a_folder_of_something_else_is_not_overwritten(tmp_path):
    (tmp_path / "notes.txt").write_text("mine")
    with pytest.raises(FileExistsError, match="without model.safetensors"):
        toy.build(0, tmp_path, steps=1)
    assert [path.name for path in tmp_path.iterdir()] == ["notes.txt"]


@pytest.mark.parametrize(("name", "billions"), [("qwen2.5-vl-3b", 3.75), ("qwen2.5-vl-7b", 8.29)])
def test_published_sizes_have_the_published_number_of_parameters(name, billions):
    config = toy.random_config(name)
    with torch.device("meta"):
        model = AutoModelForImageTextToText.from_config(config)
    parameters = sum(p.numel() for p in model.parameters())
    vision_parameters = sum(p.numel() for p in model.model.visual.parameters())
    assert parameters / 1e9 == pytest.approx(billions, abs=0.01)
    assert vision_parameters / 1e9 == pytest.approx(0.67, abs=0.01)
    assert (config.image_token_id, config.text_config.eos_token_id) == (151655, 151645)


def test_an_unknown_size_is_named_with_the_choices():
    with pytest.raises(ValueError, match="'qwen2.5-vl-1b'.*qwen2.5-vl-3b, qwen2.5-vl-7b"):
        toy.random_config("qwen2.5-vl-1b")


def test_the_contact_sheet_is_written(tmp_path):
    toy.contact_sheet(str(tmp_path / "toy.png"))
    assert Image.open(tmp_path / "toy.png").size == (1200, 1200)


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
@pytest.mark.parametrize("seed", [0, 1, 2])
def test_the_warm_start_sees_imperfectly(seed):
    """Better than blind (1/6 where notes lie), with room for 20 points on both splits."""
    folder = toy.build(seed)
    sampling = {"do_sample": True, "temperature": 1.0, "top_k": 0}
    for split, low, high in (("general", 0.4, 0.7), ("vision_dependent", 0.25, 0.6)):
        items = [toy.example(split, i) for i in range(256)]
        assert low < accuracy(folder, items, **sampling) < high


@pytest.mark.slow
def test_the_start_model_answers_greedily_without_a_note():
    everything_plain = toy.Setting(plain_share=1.0)
    items = [toy.example("train", 10_000 + i, setting=everything_plain) for i in range(64)]
    assert accuracy(toy.build(0), items, do_sample=False) > 0.9
