"""evaluate.py: the paper's table, avg@n, resumption, --ask, --explain, --grade and --compare."""

import json
import re
from contextlib import redirect_stderr, redirect_stdout
from io import StringIO
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pytest
import torch
from conftest import ROOT, generate, on_ranks, process_restored, random_image
from PIL import Image
from test_benchmarks import row, split_rows, write_split
from test_predictions import its_rule, papo_eval_file

import evaluate
from masking import mask_prompt
from papo import Algo
from rollout import Sampling
from support import attribution, attribution_figures, benchmarks, data, metrics, pages, toy
from support.batch import Example, seeded
from support.predictions import boxed
from support.protocol import configure
from support.qwen_vl import Encoder, Policy

SMALL = "--min_pixels 3136 --max_pixels 200704 --max_new_tokens 6 --n 3 --rollout_batch 6".split()


def read_jsonl(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


def write_jsonl(path, records):
    path.write_text("".join(json.dumps(record) + "\n" for record in records))


def error_line(capsys):
    """The one error line a command printed."""
    [line] = [line for line in capsys.readouterr().err.splitlines() if ": error: " in line]
    return line


# ------------------------------------------------------------------------------------------ Table 1

GROUPS = {
    "general": benchmarks.GENERAL,
    "vision-dependent": benchmarks.VISION,
    "overall": benchmarks.BENCHMARKS["all"],
}


class TableRow(NamedTuple):
    general: list[float]  # accuracy on each of the five sets
    vision: list[float]  # of the four
    averages: list[float]  # of each group in GROUPS
    deltas: list[float]  # Delta_rel of each group over the baseline


def table_row(general, vision, averages, deltas=""):
    columns = (general, vision, averages, deltas)
    return TableRow(*([float(number) for number in text.split()] for text in columns))


TABLE_1 = {
    "GRPO-3B": table_row(
        "28.72 59.34 58.90 57.24 55.25", "38.14 55.81 25.66 52.26", "51.89 42.97 47.92"
    ),
    "PAPO_G-3B": table_row(
        "30.95 61.38 60.09 57.39 57.14",
        "38.67 62.56 27.11 53.95",
        "53.39 45.57 49.92",
        "3.38 5.60 4.36",
    ),
    "GRPO-7B": table_row(
        "40.18 65.48 68.12 72.26 66.51", "45.62 73.94 35.17 61.71", "62.51 54.11 58.78"
    ),
    "PAPO_G-7B": table_row(
        "40.25 69.53 66.79 72.52 68.43",
        "46.07 89.81 36.63 64.97",
        "63.50 59.37 61.66",
        "1.53 7.96 4.39",
    ),
    "DAPO-3B": table_row(
        "31.20 60.89 59.95 66.83 56.25", "40.69 74.25 28.42 53.09", "55.02 49.11 52.40"
    ),
    "PAPO_D-3B": table_row(
        "35.65 62.53 62.67 64.09 60.51",
        "41.67 83.56 28.76 57.72",
        "57.09 52.93 55.24",
        "5.00 5.97 5.54",
    ),
    "DAPO-7B": table_row(
        "35.92 61.91 58.51 75.93 55.64", "37.05 90.05 29.02 51.04", "57.58 51.79 55.01"
    ),
    "PAPO_D-7B": table_row(
        "44.11 67.53 68.30 80.61 68.58",
        "46.70 91.38 36.34 64.87",
        "65.83 59.82 63.16",
        "15.61 19.09 17.54",
    ),
}
# Two printed Delta_rel differ from what their own rows give: (printed, recomputed).
EXCEPTIONS = {
    ("PAPO_D-7B", "vision-dependent"): (19.09, 19.96),
    ("PAPO_D-3B", "vision-dependent"): (5.97, 6.22),
}


def make_predictions(percent):
    """1,250 questions x 8 responses, exactly `percent` of which are correct."""
    n_correct = round(percent * 100)
    return [
        {"id": str(i % 1250), "prompt": "", "label": "1", "accuracy": float(i < n_correct)}
        for i in range(10_000)
    ]


def predictions_of(name):
    scores = TABLE_1[name].general + TABLE_1[name].vision
    splits = benchmarks.BENCHMARKS["all"]
    return {split: make_predictions(score) for split, score in zip(splits, scores, strict=True)}


@pytest.mark.parametrize("baseline", ["GRPO-3B", "GRPO-7B", "DAPO-3B", "DAPO-7B"])
def test_table_1(baseline, monkeypatch, capsys):
    monkeypatch.setattr(metrics, "RESAMPLES", 3)
    papo = f"PAPO_{baseline[0]}{baseline[4:]}"
    printed, before, after = TABLE_1[papo], predictions_of(baseline), predictions_of(papo)
    rows = metrics.summarise(after, 8, GROUPS, before)[-3:]
    assert [line["name"] for line in rows] == [f"{group} average" for group in GROUPS]
    columns = zip(GROUPS, rows, printed.averages, printed.deltas, strict=True)
    for group, line, average, delta in columns:
        assert line["accuracy"] == pytest.approx(average, abs=0.02)
        in_paper, recomputed = EXCEPTIONS.get((papo, group), (delta, delta))
        assert delta == in_paper
        assert line["delta"] == pytest.approx(recomputed, abs=0.02)

    averages = [line["accuracy"] for line in metrics.summarise(before, 8, GROUPS)[-3:]]
    assert averages == pytest.approx(TABLE_1[baseline].averages, abs=0.02)

    evaluate.report(evaluate.EvalConfig(), after, before, [])
    text = capsys.readouterr().out
    cells = [line.split() for line in text.splitlines() if "average" in line]
    assert [c[0] for c in cells] == list(GROUPS)
    assert [float(c[3]) for c in cells] == pytest.approx(printed.averages, abs=0.02)
    assert "free-form" in text


def test_an_average_over_part_of_a_group_says_so():
    groups = {"general": benchmarks.GENERAL, "overall": benchmarks.BENCHMARKS["all"][:5]}
    results = {name: make_predictions(50) for name in benchmarks.GENERAL[:2]}
    rows = metrics.summarise(results, 8, groups)
    assert [line["name"] for line in rows] == [*benchmarks.GENERAL[:2], "general average (2 of 5)"]


def test_measures_by_hand():
    """Two questions with n = 4: one correct response in all."""
    records = [
        {
            "id": question,
            "prompt": "p",
            "label": "l",
            "accuracy": float((question, i) == (0, 0)),
            "unboxed": question == 1,
            "truncated": i == 0,
        }
        for i in range(4)
        for question in range(2)
    ]
    [line] = metrics.summarise({"x": records}, 4, {})
    assert line == {
        "name": "x",
        "questions": 2,
        "accuracy": 12.5,
        "pass": 50.0,
        "unboxed": 50.0,
        "truncated": 25.0,
        "delta": pytest.approx(float("nan"), nan_ok=True),
        "low": 0.0,
        "high": 25.0,
    }


def test_intervals_match_the_known_distribution():
    records = [
        {"id": i, "prompt": "", "label": "", "accuracy": float(i % 5 == 0)} for i in range(1000)
    ]
    [line] = metrics.summarise({"y": records}, 1, {})
    half = 196 * (0.2 * 0.8 / 1000) ** 0.5
    assert (line["low"], line["high"]) == pytest.approx((20 - half, 20 + half), abs=0.5)
    [again] = metrics.summarise({"y": records}, 1, {})
    assert again["low"] == line["low"]  # the seed is fixed
    interval = [f"{line['low']:.2f}", "to", f"{line['high']:.2f}"]
    cells = metrics.table([line], 1).splitlines()[1].split()
    assert cells == ["y", "1000", "20.00", *interval, "20.00", "-", "-"]


# ---------------------------------------------------------------------------------- PAPO-Eval files


def test_grading_follows_papo_evals_rule(tmp_path, capsys):
    file, out = tmp_path / "We-Math_We-Math.jsonl", tmp_path / "out"
    records = papo_eval_file(file)
    evaluate.main(["--grade", str(file), "--out", str(out)])
    [line] = json.loads((out / "table.json").read_text())
    assert line["name"] == "We_Math"
    assert line["questions"] == 5
    assert line["accuracy"] == pytest.approx(its_rule(records, 8))
    assert 20 < line["accuracy"] < 80
    assert line["truncated"] is None
    assert 0 < line["unboxed"] < 50
    assert (out / "table.txt").read_text() == capsys.readouterr().out


def test_repeated_questions_are_separated():
    """One question that occurs twice per loop: always right first, then always wrong."""
    records = [
        {"id": "", "prompt": "p", "label": "1", "accuracy": float(i % 2 == 0)} for i in range(8)
    ]
    questions = metrics.in_questions("x", records, 4)
    accuracies = [[record["accuracy"] for record in question] for question in questions]
    assert accuracies == [[1.0] * 4, [0.0] * 4]


def test_missing_responses_are_an_error_that_names_the_question(tmp_path, capsys):
    file = tmp_path / "a.jsonl"
    write_jsonl(file, papo_eval_file(file, repeated=False)[:-2])
    with pytest.raises(SystemExit, match="2"):
        evaluate.main(["--grade", str(file)])
    [line] = capsys.readouterr().err.splitlines()
    question = "question 'test_3' ('Frage ß 3? assistant', answer '90')"
    assert f"a: 7 responses to {question} are not a multiple of n=8" in line


def test_baseline(tmp_path, capsys):
    ours, theirs, out = tmp_path / "ours", tmp_path / "theirs", tmp_path / "out"
    ours.mkdir()
    theirs.mkdir()
    papo_eval_file(ours / "PAPO_MMK12.jsonl")
    file = theirs / "PAPO_MMK12.jsonl"
    worse = papo_eval_file(file)
    for record in worse[1::2]:
        record["predict"] = "?"
    write_jsonl(file, worse)
    command = ["--grade", str(ours), "--baseline", str(theirs), "--out", str(out)]
    evaluate.main(command)
    [line] = json.loads((out / "table.json").read_text())
    assert line["delta"] == pytest.approx(100 * (line["accuracy"] / its_rule(worse, 8) - 1))
    assert line["delta"] > 10
    assert "Delta_rel %" in capsys.readouterr().out

    write_jsonl(file, [record for record in worse if record["label"] != "4"])
    evaluate.main(["--grade", str(ours), "--baseline", str(theirs), "--out", str(tmp_path / "few")])
    assert "PAPO_MMK12: no Delta_rel, the baseline has " in capsys.readouterr().err
    file.rename(theirs / "We_Math.jsonl")
    with pytest.raises(SystemExit, match="2"):
        evaluate.main(command)
    assert "one NAME.jsonl for PAPO_MMK12 expected, found We_Math.jsonl" in error_line(capsys)


# ------------------------------------------------------------------------ evaluation and resumption


@pytest.fixture(scope="module")
def data_flags(tmp_path_factory):
    """Two sets; one has a row whose image is truncated, and a row without its image."""
    folder = tmp_path_factory.mktemp("bench")
    bad_rows = [row("<image>?", "1", "We_Math_images/cut.png"), row("<image>?", "1")]
    write_split(folder, "We_Math", split_rows("We_Math") + bad_rows)
    write_split(folder, "lscpku_LogicVista")
    return ["--data", str(folder), "--prompt_suffix", "Box it.", *SMALL]


class Evaluation(NamedTuple):
    out: Path
    stdout: str
    stderr: str


@pytest.fixture(scope="module")
def uninterrupted(folder, data_flags, tmp_path_factory):
    """An uninterrupted evaluation on one rank."""
    out, stdout, stderr = tmp_path_factory.mktemp("whole") / "out", StringIO(), StringIO()
    with redirect_stdout(stdout), redirect_stderr(stderr):
        evaluate.main(["--model", folder, *data_flags, "--out", str(out)])
    return Evaluation(out, stdout.getvalue(), stderr.getvalue())


def read_files(out):
    return {file.name: file.read_text() for file in out.iterdir() if file.is_file()}


def test_evaluation(uninterrupted, capsys):
    out, stdout, stderr = uninterrupted
    results = {"We_Math.jsonl", "lscpku_LogicVista.jsonl", "table.json", "table.txt"}
    assert set(read_files(out)) == results | {"evaluation.json"}
    records = read_jsonl(out / "We_Math.jsonl")
    assert list(records[0])[:5] == ["idx", "id", "prompt", "predict", "label"]
    assert [record["idx"] for record in records] == list(range(12))
    assert [record["id"] for record in records] == ["0", "1", "2", "own"] * 3  # loop after loop
    assert records[1]["prompt"] == (
        "system\nYou are a helpful assistant.\n"
        "user\nUnd , wie groß ist ∠ABC?\n\nBox it.\nassistant\n"
    )
    assert "We_Math: 2 rows left out (broken image 1, markers 1)" in stdout
    assert "We_Math: row 4 is left out: broken image" in stderr
    assert "We_Math: row 5 is skipped, markers" in stderr
    protocol = "n 3 (CHANGED), temperature 1.0, top_p 1.0, top_k 50, max_new_tokens 6 (CHANGED)"
    assert f"protocol paper: {protocol}" in stdout
    names = [line.split()[0] for line in stdout.splitlines()[1:4]]
    assert names == ["We_Math", "lscpku_LogicVista", "overall"]

    evaluate.main(["--grade", str(out), "--n", "3"])
    assert stdout.splitlines()[:4] == capsys.readouterr().out.splitlines()[:4]
    for name in ("We_Math", "lscpku_LogicVista"):
        records = read_jsonl(out / f"{name}.jsonl")
        accuracy = 100 * np.mean([record["accuracy"] for record in records])
        assert its_rule(records, 3) == pytest.approx(accuracy)


def test_scoring_is_bounded(policy):
    """By what every response may take, so that other ranks know how long to wait."""
    calls = []

    def grader(responses, answers, budget):
        calls.append((len(responses), budget))
        return [{"accuracy": 0.0, "format": 0.0} for _ in responses]

    grader.deadline = 5.0
    rows, sampling = data.load("toy", "general", limit=3), Sampling(2, rollout_batch=8)
    assert len(list(evaluate.predict(policy, rows, grader, 4, sampling))) == 2
    assert calls == [(8, 60 + 2 * 5 * 8), (4, 60 + 2 * 5 * 4)]


@pytest.mark.parametrize(
    "error, words",
    [
        (OSError("No space left on device"), "No space left on device"),
        (torch.OutOfMemoryError("20 GiB"), "out of memory: lower --rollout_batch"),
    ],
)
def test_failures_while_evaluating_are_one_line(
    folder, data_flags, monkeypatch, capsys, error, words
):
    def fail(*args, **kwargs):
        raise error

    monkeypatch.setattr(evaluate, "generate", fail)
    with pytest.raises(SystemExit, match="2"):
        evaluate.main(["--model", folder, *data_flags])
    assert words in error_line(capsys)


def test_resumption(folder, data_flags, uninterrupted, tmp_path, monkeypatch, capsys):
    """Interrupted in the third batch, with a torn last line: no question is answered twice."""
    original, batches, limit = evaluate.generate, [], 2

    def interrupted(policy, prompts, *args, **kwargs):
        if len(batches) == limit:
            raise KeyboardInterrupt
        batches.append([prompt.index for prompt in prompts])
        return original(policy, prompts, *args, **kwargs)

    monkeypatch.setattr(evaluate, "generate", interrupted)
    out = tmp_path / "out"
    command = ["--model", folder, *data_flags, "--out", str(out)]
    with pytest.raises(SystemExit, match="2"):
        evaluate.main(command)
    assert f"interrupted; --out {out} resumes it" in capsys.readouterr().err
    assert batches == [[0, 1], [2, 3]]
    assert not (out / "table.txt").exists()

    partial_file = out / "partial" / "We_Math" / "0.jsonl"
    text = partial_file.read_text()
    partial_file.write_text(text[:-30])  # question 3 lacks a response, as after SIGKILL
    limit = None
    batches.clear()
    evaluate.main(command)
    assert batches[0] == [3]
    assert sum(batches[1:], []) == [0, 1, 2, 3]
    assert read_files(out) == read_files(uninterrupted.out)
    assert list((out / "partial").rglob("*.jsonl")) == []

    batches.clear()
    evaluate.main(command)
    assert sum(batches, []) == []
    assert read_files(out) == read_files(uninterrupted.out)

    capsys.readouterr()
    with pytest.raises(SystemExit, match="2"):
        evaluate.main([*command, "--seed", "1"])
    message = f"--out {out} holds an evaluation with seed 0: choose another folder"
    assert message in capsys.readouterr().err


def test_two_ranks_write_the_files_of_one(folder, data_flags, uninterrupted, tmp_path):
    out = tmp_path / "out"
    command = [str(ROOT / "evaluate.py"), "--model", folder, *data_flags, "--out", str(out)]
    done = on_ranks(2, *command, script="--")  # else torchrun would take --n for its own
    assert done.returncode == 0, done.stderr[-2000:]
    assert done.stdout.strip() == uninterrupted.stdout.strip()
    assert read_files(out) == read_files(uninterrupted.out)


def test_a_toy_model_needs_no_flags(folder, capsys):
    """Its folder supplies the toy's data, sizes and suffix."""
    evaluate.main(["--model", folder, "--eval_rows", "2", "--n", "2", "--max_new_tokens", "5"])
    text = capsys.readouterr().out
    names = [line.split()[0] for line in text.splitlines()[1:4]]
    assert names == ["general", "vision_dependent", "overall"]
    assert "protocol training: n 2, temperature 1.0, top_p 1.0, top_k 0, max_new_tokens 5" in text
    config = configured(f"--model {folder} --ask ?")
    assert config.prompt_suffix == toy.SUFFIX
    assert config.temperature == 0
    assert config.eval_rows == 0


def configured(flags):
    return configure("A test.", flags.split())


def test_protocols():
    """The paper's for benchmarks; flags go over it, and it goes over the toy's defaults."""
    paper = configured("--model some/hub-id")
    assert (paper.data, paper.protocol, paper.n) == ("all", "paper", 8)
    assert (paper.temperature, paper.top_p, paper.top_k) == (1.0, 1.0, 50)
    assert (paper.min_pixels, paper.max_pixels, paper.max_new_tokens) == (1024, 589_824, 2048)
    changed = configured("--model some/hub-id --data We_Math --top_k 7 --temperature 0.5")
    assert (changed.protocol, changed.top_k, changed.temperature) == ("paper", 7, 0.5)
    assert configured("--model a/b --data We_Math --protocol training").top_k == 0
    toys = configured("--model toy"), configured("--model toy --protocol paper")
    assert [config.protocol for config in toys] == ["training", "paper"]
    assert [config.max_new_tokens for config in toys] == [40, 2048]


# -------------------------------------------------------------------- one example: --ask, --explain


@pytest.fixture()
def images(tmp_path):
    paths = []
    for i in range(2):
        path = tmp_path / f"{i}.png"
        toy.example("general", i).images[0].save(path)
        paths.append(str(path))
    return paths


def toy_policy(folder):
    sizes = (toy.TASK_DEFAULTS["min_pixels"], toy.TASK_DEFAULTS["max_pixels"])
    return Policy.load(folder, Encoder(folder, *sizes, toy.SUFFIX))


@pytest.mark.parametrize(
    "question, n_images", [("How many red dots?", 1), ("And <image> or <image>?", 2), ("Why?", 0)]
)
def test_ask(folder, images, capsys, question, n_images):
    """The streamed response, from transformers' own loop, equals ours."""
    images = images[:n_images]
    flags = ["--image", *images] if images else []
    evaluate.main(["--model", folder, "--ask", question, *flags, "--max_new_tokens", "12"])
    text = capsys.readouterr().out
    marked = question if "<image>" in question else "<image>" * n_images + question
    policy = toy_policy(folder)
    example = Example(marked, "", [Image.open(path).convert("RGB") for path in images])
    prompt = policy.encoder.encode(example)
    [group] = generate(policy, [prompt], 1, temperature=0.0, max_new_tokens=12)
    [response] = group.responses
    assert text.startswith(response)
    answer = boxed(response) or "nothing, the response has no \\boxed{...}"
    assert text.splitlines()[-1] == f"boxed: {answer}"


@torch.no_grad()
def test_explain_draws_the_policys_log_probs(folder, tmp_path, record_calls, capsys):
    """Gains are from a mean over masks, the heat map from one black image token at a time."""
    draws = record_calls(attribution_figures, "perception_gain")
    heat_calls = record_calls(attribution_figures, "heat_map")
    pages_written = record_calls(pages, "explanation")
    out = tmp_path / "out"
    flags = "--explain --row vision_dependent:1 --max_new_tokens 7 --masks 3".split()
    evaluate.main(["--model", folder, *flags, "--out", str(out)])
    text = capsys.readouterr().out
    for name in ("perception_gain.png", "explanation.html", "heat_map0.png"):
        assert str(out / name) in text
        assert (out / name).stat().st_size > 1000
    example = toy.example("vision_dependent", 1)
    assert f"question: {example.question.removeprefix('<image>')}\n" in text

    policy = toy_policy(folder)
    encoder, prompt = policy.encoder, policy.encoder.encode(example)
    [group] = generate(policy, [prompt], 1, temperature=0.0, max_new_tokens=7)

    def masked_log_probs(view):
        group.view_pixel_values["mask"] = view
        return policy.log_probs([group], "mask")[0]

    [((drawn, *_), _)] = draws
    clean = policy.log_probs([group])[0]
    assert drawn.tokens == [encoder.tokenizer.decode([t]) for t in group.tokens[0].tolist()]
    np.testing.assert_allclose(drawn.clean, clean, atol=1e-6)
    masks = [mask_prompt(prompt, Algo(), encoder, seeded("explain", 0, i)) for i in range(3)]
    expected = torch.stack([masked_log_probs(view) for view, _ in masks]).mean(0)
    np.testing.assert_allclose(drawn.masked, expected, atol=1e-6)

    [((_, heat, *_), _)] = heat_calls
    assert heat.shape == (3, 3)
    view = prompt.pixel_values.clone()
    view[4 * 5 : 4 * 6] = encoder.black_patch  # the four patches of the token in row 1, column 2
    drops = clean - masked_log_probs(view)
    np.testing.assert_allclose(heat[1, 2], drops.sum(), atol=1e-5)
    [((_, [cells], _), _)] = pages_written
    np.testing.assert_allclose(cells.drops[1, 2], drops, atol=1e-6)

    # The masked image that is drawn is the one the model gets.
    view, patch_mask = masks[0]
    [masked_image] = drawn.masked_images
    pixel_values = encoder.images(images=[masked_image], return_tensors="pt")["pixel_values"]
    torch.testing.assert_close(pixel_values, view)
    assert 0 < patch_mask.float().mean() < 1


def test_explain_bounds_its_forwards_and_masks_as_in_training(
    folder, tmp_path, record_calls, capsys
):
    """A full-size image has over a thousand image tokens, so heat-map cells hold several."""
    run_folder = tmp_path / "run"
    run_folder.mkdir()
    (run_folder / "model").symlink_to(folder)
    (run_folder / "config.json").write_text('{"mask_ratio": 1.0, "mask_strategy": "random"}')
    image = tmp_path / "image.png"
    random_image(28 * 8, 28 * 6).save(image)  # 48 image tokens
    draws, forwards = record_calls(attribution, "draw"), record_calls(Policy, "log_probs")
    question = ["--explain", "--ask", "How many?", "--image", str(image)]
    flags = "--max_new_tokens 5 --masks 2 --heat_patches 12 --max_pixels 200704".split()
    out = ["--out", str(tmp_path / "out")]
    evaluate.main(["--model", str(run_folder / "model"), *question, *flags, *out])
    [((_, _, patch_mask, clean, masked, [cells], _), _)] = draws
    assert cells.drops.shape == (3, 4, 5)
    assert "one cell of 2 x 2 image tokens" in capsys.readouterr().out
    assert patch_mask.all()  # the run's mask_ratio, not 0.6
    assert not torch.equal(clean, masked)
    assert len(forwards) == 3  # clean, two masked views, twelve cells


def test_explain_a_question_with_several_images(folder, tmp_path, images, capsys):
    flags = ["--max_new_tokens", "4", "--masks", "1", "--out", str(tmp_path / "out")]
    question = ["--explain", "--ask", "How many?", "--image", *images]
    evaluate.main(["--model", folder, *question, *flags])
    assert (tmp_path / "out" / "heat_map1.png").exists()
    assert "response: " in capsys.readouterr().out


@pytest.mark.slow
def test_tokens_read_off_the_image_depend_on_it():
    """A trained toy's colour words depend on the image more than the words of its template."""
    policy = toy_policy(str(toy.MODEL))
    encoder = policy.encoder
    colours, template = [], []
    for i in range(8):
        prompt = encoder.encode(toy.example("vision_dependent", i), i)
        [group] = generate(policy, [prompt], 1, temperature=0.0, max_new_tokens=40)
        group.view_pixel_values["mask"], _ = mask_prompt(prompt, Algo(), encoder, seeded(i))
        with torch.no_grad():
            gains = (policy.log_probs([group]) - policy.log_probs([group], "mask"))[0]
        for token, gain in zip(group.tokens[0].tolist(), gains.tolist(), strict=True):
            word = encoder.tokenizer.decode([token]).strip()
            is_colour = word in (*toy.COLOURS, "none")
            (colours if is_colour else template).append(gain)
    assert np.mean(colours) > 0.3
    assert np.mean(colours) > 5 * abs(np.mean(template))


# -------------------------------------------------------------------------------- --compare, errors


def test_compare(tmp_path, capsys):
    for name, base in (("a", 0.2), ("b", 0.4)):
        run_folder = tmp_path / name
        run_folder.mkdir()
        lines = [{"step": s, "eval/general": base + s / 10, "kl_prcp": 0.1} for s in (0, 1, 2)]
        write_jsonl(run_folder / "metrics.jsonl", lines)
        (run_folder / "config.json").write_text(json.dumps({"algo": "papo_g", "seed": base}))
    runs, out = [str(tmp_path / "a"), str(tmp_path / "b")], tmp_path / "out"
    evaluate.main(["--compare", *runs, "--out", str(out)])
    text = capsys.readouterr().out
    assert re.search(r"papo_g +eval/general +2 +0\.300 \+- 1\.271 +0 +0\.500 \+- 1\.271 +2", text)
    assert text.splitlines()[-1] == str(out / "compare.png")
    assert (out / "compare.png").exists()


def test_predictions_never_overwrite_data(folder, tmp_path, capsys):
    """With --out in the data's folder, NAME.jsonl would replace the rows it was made from."""
    toy.example("train", 0).images[0].save(tmp_path / "a.png")
    data = tmp_path / "mine.jsonl"
    write_jsonl(data, [{"problem": "<image>How many?", "answer": "1", "images": ["a.png"]}])
    before = data.read_text()
    flags = "--n 1 --max_new_tokens 2 --min_pixels 3136".split()
    with pytest.raises(SystemExit, match="2"):
        evaluate.main(["--model", folder, "--data", str(data), *flags, "--out", str(tmp_path)])
    message = f"--out {tmp_path} holds mine.jsonl and no evaluation: choose another folder"
    assert message in capsys.readouterr().err
    assert data.read_text() == before


@pytest.mark.parametrize(
    "flags, message",
    [
        ("--protocol papers", "--protocol papers: choose one of paper, training"),
        ("--grad x", "unknown flag --grad: the flags are ask baseline"),
        (
            "--data We_Math --benchmarks .",
            "no benchmark We_Math in .: its We_Math.json is expected there",
        ),
        ("--data nowhere.json", "data 'nowhere.json': no such file or folder: choose 'toy'"),
        ("--ask ? --image nowhere.png", "broken image: nowhere.png: "),
        ("--ask <image>?", "1 <image> markers for 0 images"),
        ("--explain --ask Why?", "--explain: the example has no image"),
        (
            "--explain --row general:999",
            "choose one of general:0 to general:255, vision_dependent:0 to",
        ),
        ("--grade nowhere.jsonl", "No such file or directory: 'nowhere.jsonl'"),
        (
            "--baseline tests",
            "tests: one NAME.jsonl for general, vision_dependent expected, found none",
        ),
        ("--compare nowhere", "no metrics file at nowhere"),
        ("--model tests", ""),
    ],
)
def test_errors_are_one_line(folder, capsys, monkeypatch, flags, message):
    monkeypatch.chdir(ROOT)
    with process_restored(), pytest.raises(SystemExit, match="2"):
        evaluate.main(["--model", folder, *flags.split()])
    assert message in error_line(capsys)
