"""toy.py: the drawn task, its tokenizer, the folder a build leaves, and (slow) what the warm start has learned."""

from __future__ import annotations

import json
import os
import random
import re
from collections import Counter
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import AutoModelForImageTextToText, AutoTokenizer

from support import toy
from support.qwen_vl import Encoder

SPLITS = ("train", "general", "vision_dependent")
HARDER = toy.Setting(grid=4, colours=6, most=8, radius=3)


def number_in(question: str) -> str:
    return re.search(r"says (\d+)", question)[1]


def dots(image) -> list[tuple[int, int, str]]:
    """(patch row, patch column, colour) of every patch that holds a pixel of a dot, read off the pixels."""
    found = set()
    vivid = toy.saliency(image).bool()
    for y, x in vivid.nonzero().tolist():
        pixel = image.getpixel((x, y))
        nearest = min(
            toy.COLOURS,
            key=lambda c: sum((a - b) ** 2 for a, b in zip(pixel, toy.COLOURS[c], strict=True)),
        )
        found.add((y // toy.PATCH, x // toy.PATCH, nearest))
    return sorted(found)


@pytest.fixture(scope="module")
def tokenizer():
    return toy.make_tokenizer()


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    return toy.build(3, tmp_path_factory.mktemp("toy") / "model", steps=2)


# ----------------------------------------------------------------------------------------------------------- the task


@pytest.mark.parametrize("split", SPLITS)
def test_examples_are_reproducible_and_all_different(split):
    first, again = toy.example(split, 5, seed=1), toy.example(split, 5, seed=1)
    assert (first.question, first.answer, first.id) == (again.question, again.answer, again.id)
    assert first.images[0].tobytes() == again.images[0].tobytes()
    others = [toy.example(split, 6, seed=1), toy.example(split, 5, seed=2)]
    others += [toy.example(other, 5, seed=1) for other in (*SPLITS, "warm") if other != split]
    assert all(first.images[0].tobytes() != other.images[0].tobytes() for other in others)
    assert len({item.id for item in [first, *others]}) == 6


def test_an_example_does_not_depend_on_or_move_the_global_generator():
    random.seed(0)
    first, after = toy.example("train", 0).question, random.random()
    random.seed(0)
    assert after == random.random()
    random.seed(1)
    assert toy.example("train", 0).question == first


@pytest.mark.parametrize(
    "setting", [toy.DEFAULT, HARDER, toy.Setting(cell=56)], ids=["default", "harder", "wide"]
)
def test_the_picture_alone_gives_the_answer(setting):
    """The count of the asked colour, recomputed from the pixels: one patch a dot, so no dot reaches over its patch."""
    for i in range(30):
        item = toy.example("general", i, setting=setting)
        asked = item.question.split("many ")[1].split()[0]
        assert (
            item.images[0].size == (setting.grid * setting.cell,) * 2
            and item.images[0].mode == "RGB"
        )
        assert (
            Counter(colour for *_, colour in dots(item.images[0]))[asked]
            == int(item.answer)
            <= setting.most
        )


def test_every_dot_is_in_its_cell_and_in_one_patch():
    cells, *_, image = toy.layout("train", 0)
    found = dots(image)
    by_cell = sorted((row // 2 * 3 + column // 2, colour) for row, column, colour in found)
    assert by_cell == [(i, colour) for i, colour in enumerate(cells) if colour != "none"]


def test_all_four_patches_of_a_cell_get_dots_and_all_answers_come_up():
    places, answers = set(), Counter()
    for i in range(200):
        item = toy.example("train", i)
        answers[item.answer] += 1
        places |= {(row % 2, column % 2) for row, column, _ in dots(item.images[0])}
    assert len(places) == 4
    assert set(answers) == set("012345") and min(answers.values()) > 15


def test_notes_are_right_half_the_time_and_never_where_vision_decides():
    right = {}
    for split in SPLITS:
        items = [toy.example(split, i) for i in range(400)]
        right[split] = sum(number_in(item.question) == item.answer for item in items) / len(items)
    assert right["vision_dependent"] == 0
    assert 0.42 < right["train"] < 0.58 and 0.42 < right["general"] < 0.58


def test_the_setting_moves_the_notes_and_refuses_what_cannot_be_drawn():
    always = replace(toy.DEFAULT, note_right=1.0)
    items = [toy.example("general", i, setting=always) for i in range(20)]
    assert all(number_in(item.question) == item.answer for item in items)
    for bad in ({"radius": 7}, {"cell": 30}, {"colours": 7}, {"most": 10}, {"grid": 0}):
        with pytest.raises(ValueError, match=next(iter(bad))):
            toy.Setting(**bad)


def test_a_name_says_the_setting():
    assert (
        toy.setting_of("toy") == toy.DEFAULT
        and toy.setting_of("toys") is toy.setting_of("Qwen/toy:3B") is None
    )
    harder = toy.setting_of("toy:grid=4,colours=4,misread=0.2,warm_steps=400")
    assert harder == toy.Setting(grid=4, colours=4, misread=0.2, warm_steps=400)
    for spec, words in {
        "toy:size=4": "no toy setting 'size': choose from grid", "toy:grid=four": "grid='four' is not int",
        "toy:grid=4.5": "grid='4.5' is not int", "toy:grid=10": "grid=10: must be in 1..9",
        "toy:misread=2": "misread=2.0: must be in 0..1", "toy:grid": "grid='' is not int",
    }.items():  # fmt: skip
        with pytest.raises(ValueError, match=re.escape(words)):
            toy.setting_of(spec)


@pytest.mark.parametrize("grid", [1, 3, 4, 7])
def test_the_defaults_leave_room_for_prompts_and_responses(tmp_path, grid):
    setting = toy.Setting(grid=grid, most=1)
    encoder = Encoder(
        str(toy.build(0, tmp_path / "model", steps=1, setting=setting)), 3136, 336 * 336, toy.SUFFIX
    )
    assert toy.overrides() == toy.OVERRIDES
    room, item = toy.overrides(setting), toy.example("train", 0, setting=setting)
    assert len(encoder.encode(item)) <= room["max_prompt_tokens"]
    response = toy.reading(["red"] * grid**2, "red", setting=setting) + "<|im_end|>"
    assert len(encoder.tokenizer(response)["input_ids"]) <= room["max_new_tokens"]


def test_an_unknown_split_is_named_with_the_choices():
    with pytest.raises(ValueError, match="'test'.*train, general, vision_dependent"):
        toy.example("test", 0)


def test_saliency_is_one_on_dots_and_zero_on_every_tint():
    rng = random.Random(0)
    for grid in (3, 9):
        setting = toy.Setting(grid=grid, colours=6)
        blank = toy.draw(["none"] * grid**2, rng, setting)
        assert (
            toy.saliency(blank).shape == (blank.height, blank.width)
            and toy.saliency(blank).max() == 0
        )
        for colour, rgb in toy.COLOURS.items():
            image = toy.draw(["none"] * (grid**2 - 1) + [colour], rng, setting)
            inside = (torch.tensor(np.array(image)) == torch.tensor(rgb)).all(-1).sum()
            assert toy.saliency(image).sum() == inside > 80


def test_readings_count_as_they_go():
    cells = ["red", "none", "green", "red", "blue", "none", "none", "red", "green"]
    think = (
        "a1 red 1 a2 none 1 a3 green 1 b1 red 2 b2 blue 2 b3 none 2 c1 none 2 c2 red 3 c3 green 3"
    )
    assert toy.reading(cells, "red") == f"<think> {think} </think> \\boxed{{3}}"
    assert toy.reading(cells, "red", box=5) == f"<think> {think} </think> \\boxed{{5}}"


# ---------------------------------------------------------------------------------------------------------- the model


@pytest.mark.parametrize("text", [
    toy.reading(["red", "none", "blue"] * 3, "red"), toy.QUESTION.format(note=3, asked="blue"), toy.SUFFIX,
    "ü → 日本 🙂\t\\frac{1}{2}\r\n  two  spaces \x00", "",
])  # fmt: skip
def test_any_text_survives_the_tokenizer(tokenizer, text):
    assert tokenizer.decode(tokenizer(text)["input_ids"]) == text


def test_a_response_takes_three_tokens_a_cell(tokenizer):
    tokens = tokenizer(toy.reading(["red", "none", "blue"] * 3, "red"))["input_ids"]
    assert len(tokens) == 9 * 3 + 3
    assert len(tokens) + 1 <= toy.OVERRIDES["max_new_tokens"]


def test_special_tokens_are_single_and_in_qwens_order(tokenizer):
    ids = [tokenizer(token)["input_ids"] for token in toy.SPECIAL]
    assert ids == [[len(tokenizer) - len(toy.SPECIAL) + i] for i in range(len(toy.SPECIAL))]
    assert (tokenizer.eos_token, tokenizer.pad_token) == ("<|im_end|>", "<|endoftext|>")
    assert not set(sum(ids, [])) & set(tokenizer(toy.SUFFIX)["input_ids"])


def test_chat_template_does_what_qwens_does(tokenizer):
    def render(messages, **kwargs):
        return tokenizer.apply_chat_template(messages, tokenize=False, **kwargs)

    content = [{"type": "text", "text": "a "}, {"type": "image"}, {"type": "text", "text": "b"}]
    user = {"role": "user", "content": content}
    default = "<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n"
    turn = "<|im_start|>user\na <|vision_start|><|image_pad|><|vision_end|>b<|im_end|>\n"
    assert render([user]) == default + turn
    assert render([user], add_generation_prompt=True) == default + turn + "<|im_start|>assistant\n"
    own = {"role": "system", "content": "Be brief."}
    assert render([own, user, {"role": "assistant", "content": "c"}]) == (
        "<|im_start|>system\nBe brief.<|im_end|>\n" + turn + "<|im_start|>assistant\nc<|im_end|>\n"
    )


def test_the_folder_has_the_hubs_files(folder):
    names = {path.name for path in folder.iterdir()}
    assert {
        "config.json",
        "generation_config.json",
        "preprocessor_config.json",
        "model.safetensors",
    } <= names
    assert {"tokenizer.json", "tokenizer_config.json", "chat_template.jinja"} <= names
    files = ("config", "generation_config", "preprocessor_config")
    config, chat, images = (json.loads((folder / f"{name}.json").read_text()) for name in files)
    assert (
        config["model_type"] == "qwen2_5_vl"
        and "text_config" not in config
        and "hidden_size" in config
    )
    assert (
        chat["eos_token_id"] == [config["eos_token_id"], chat["pad_token_id"]]
        and chat["repetition_penalty"] == 1.05
    )
    assert images["image_processor_type"] == "Qwen2VLImageProcessor"
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
    text = toy.reading(["red", "none", "blue"] * 3, "red")
    assert tokenizer.decode(tokenizer(text)["input_ids"]) == text


def test_a_prompt_has_one_image_token_a_cell_and_fits(folder):
    overrides = toy.OVERRIDES
    encoder = Encoder(
        str(folder), overrides["min_pixels"], overrides["max_pixels"], overrides["prompt_suffix"]
    )
    prompt = encoder.encode(toy.example("train", 0))
    assert prompt.image_grid_thw.tolist() == [[1, 6, 6]]
    assert prompt.is_image_token.sum() == 9 and len(prompt) <= overrides["max_prompt_tokens"]


def test_warm_batches_hold_the_prompt_and_a_response(folder):
    """What the warm start trains on: the trainer's own prompt, then a reading, flawed as often as it should be."""
    encoder = Encoder(
        str(folder), toy.OVERRIDES["min_pixels"], toy.OVERRIDES["max_pixels"], toy.SUFFIX
    )
    wrong = Counter()
    for flawed in (False, True):
        inputs, length = toy.warm_batch(encoder, range(64), 0, toy.DEFAULT, flawed)
        for i, row in enumerate(inputs["input_ids"]):
            assert torch.equal(row[:length], encoder.encode(toy.example("warm", i)).input_ids)
            cells, asked, note, _ = toy.layout("warm", i)
            words = encoder.tokenizer.decode(row[length:]).split()
            seen = words[2:-2:3]
            tallies = [str(seen[: k + 1].count(asked)) for k in range(9)]
            assert words[3:-2:3] == tallies and words[-1].endswith("<|im_end|>")
            box = re.search(r"boxed{(\d)}", words[-1])[1]
            assert box in (tallies[-1], str(note))
            wrong[flawed, "cells"] += sum(a != b for a, b in zip(seen, cells, strict=True))
            wrong[flawed, "boxes"] += box != tallies[-1]
    assert wrong[False, "cells"] == wrong[False, "boxes"] == 0
    assert 0.08 < wrong[True, "cells"] / (64 * 9) < 0.16
    assert (
        0.1 < wrong[True, "boxes"] / 64 < 0.45
    )  # copied notes, less those that agree with the tally


def test_a_build_is_reproducible_and_leaves_the_callers_generator_alone(folder, tmp_path):
    state = torch.random.get_rng_state()
    again = toy.build(3, tmp_path / "again", steps=2)
    assert torch.equal(state, torch.random.get_rng_state())
    assert (again / "model.safetensors").read_bytes() == (folder / "model.safetensors").read_bytes()
    other = toy.build(4, tmp_path / "other", steps=2)
    assert (other / "model.safetensors").read_bytes() != (folder / "model.safetensors").read_bytes()


def test_a_build_is_made_once_and_cached_under_its_arguments(tmp_path, monkeypatch):
    monkeypatch.setenv("PAPO_CACHE", str(tmp_path / "cache"))
    first = toy.build(0, steps=1)
    assert first.parent == tmp_path / "cache"
    stamp = (first / "model.safetensors").stat().st_mtime_ns
    assert (
        toy.build(0, steps=1) == first and (first / "model.safetensors").stat().st_mtime_ns == stamp
    )
    names = {
        first.name,
        toy.build(1, steps=1).name,
        toy.build(0, steps=1, setting=toy.Setting(misread=0.2)).name,
    }
    assert len(names) == 3 == len(list((tmp_path / "cache").iterdir()))


def test_a_build_that_dies_leaves_no_folder(tmp_path, monkeypatch):
    def die(*args):
        raise KeyboardInterrupt

    monkeypatch.setattr(toy, "warm_start", die)
    with pytest.raises(KeyboardInterrupt):
        toy.build(0, tmp_path / "model", steps=1)
    assert list(tmp_path.iterdir()) == []


def test_of_two_builds_at_once_the_slower_takes_the_others(tmp_path, monkeypatch, folder):
    def slow(*args):  # the other process finishes meanwhile
        (tmp_path / "model").mkdir()
        (tmp_path / "model" / "model.safetensors").write_bytes(b"the other's")

    monkeypatch.setattr(toy, "warm_start", slow)
    assert toy.build(0, tmp_path / "model", steps=1) == tmp_path / "model"
    assert (tmp_path / "model" / "model.safetensors").read_bytes() == b"the other's"
    assert [path.name for path in tmp_path.iterdir()] == ["model"]


def test_a_folder_of_something_else_is_not_overwritten(tmp_path):
    (tmp_path / "notes.txt").write_text("mine")
    with pytest.raises(FileExistsError, match="holds no toy model"):
        toy.build(0, tmp_path, steps=1)
    assert [path.name for path in tmp_path.iterdir()] == ["notes.txt"]


@pytest.mark.parametrize(("name", "billions"), [("qwen2.5-vl-3b", 3.75), ("qwen2.5-vl-7b", 8.29)])
def test_published_sizes_have_the_published_number_of_parameters(name, billions):
    config = toy.random_config(name)
    with torch.device("meta"):
        model = AutoModelForImageTextToText.from_config(config)
    assert sum(p.numel() for p in model.parameters()) / 1e9 == pytest.approx(billions, abs=0.01)
    assert sum(p.numel() for p in model.model.visual.parameters()) / 1e9 == pytest.approx(
        0.67, abs=0.01
    )
    assert (config.image_token_id, config.text_config.eos_token_id) == (151655, 151645)


def test_an_unknown_size_is_named_with_the_choices():
    with pytest.raises(ValueError, match="'qwen2.5-vl-1b'.*qwen2.5-vl-3b, qwen2.5-vl-7b"):
        toy.random_config("qwen2.5-vl-1b")


def test_contact_sheet(tmp_path):
    from PIL import Image

    toy.contact_sheet(str(tmp_path / "toy.png"))
    assert Image.open(tmp_path / "toy.png").size == (1200, 1200)


@torch.no_grad()
def accuracy(folder: Path, split: str, n: int = 256) -> float:
    """Share of right boxes, one sample a question at temperature 1, by plain generate."""
    model, tokenizer = (
        AutoModelForImageTextToText.from_pretrained(folder),
        AutoTokenizer.from_pretrained(folder),
    )
    encoder = Encoder(
        str(folder), toy.OVERRIDES["min_pixels"], toy.OVERRIDES["max_pixels"], toy.SUFFIX
    )
    items = [toy.example(split, i) for i in range(n)]
    prompts = [encoder.encode(item) for item in items]  # all equally long
    input_ids = torch.stack([prompt.input_ids for prompt in prompts])
    torch.manual_seed(0)
    responses = model.generate(
        input_ids=input_ids, attention_mask=torch.ones_like(input_ids),
        mm_token_type_ids=(input_ids == encoder.image_id).long(),
        pixel_values=torch.cat([prompt.pixel_values for prompt in prompts]),
        image_grid_thw=torch.cat([prompt.image_grid_thw for prompt in prompts]),
        do_sample=True, temperature=1.0, top_k=0, repetition_penalty=1.0, max_new_tokens=40,
    )  # fmt: skip
    texts = tokenizer.batch_decode(responses[:, input_ids.shape[1] :], skip_special_tokens=True)
    return (
        sum(
            text.endswith(f"\\boxed{{{item.answer}}}")
            for text, item in zip(texts, items, strict=True)
        )
        / n
    )


@pytest.mark.slow
@pytest.mark.parametrize("seed", [0, 1, 2])
def test_the_warm_start_sees_imperfectly(seed):
    """Above blind (1/6 where notes lie), with room for 20 points on both splits."""
    folder = toy.build(seed)
    assert 0.4 < accuracy(folder, "general") < 0.7
    assert 0.25 < accuracy(folder, "vision_dependent") < 0.6
