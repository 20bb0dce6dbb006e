"""The paper's benchmarks and table, PAPO-Eval's files, resumption, one question, what an answer owes to its image."""

import json
import os
import re
import subprocess
import sys
from contextlib import redirect_stderr, redirect_stdout
from io import StringIO
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import random_image
from PIL import Image
from test_benchmarks import row, split_rows, write_split
from test_predictions import its_rule, papo_eval_file

import evaluate
from papo import Algo
from rollout import generate
from support import attribution, benchmarks, metrics, plots, toy
from support.batch import Example, seeded
from support.predictions import boxed
from support.qwen_vl import Encoder, Policy

ROOT = Path(__file__).parent.parent
ENV = os.environ | {"OMP_NUM_THREADS": "1"}
SMALL = "--min_pixels 3136 --max_pixels 200704 --max_new_tokens 6 --n 3 --rollout_batch 6".split()


# --------------------------------------------------------------------------------------------------------- Table 1

TABLE_1 = {  # five general benchmarks, their average, four vision-dependent ones, theirs, overall; Delta_rel of each
    "GRPO-3B": "28.72 59.34 58.90 57.24 55.25 51.89  38.14 55.81 25.66 52.26 42.97  47.92",
    "PAPO_G-3B": "30.95 61.38 60.09 57.39 57.14 53.39  38.67 62.56 27.11 53.95 45.57  49.92  3.38 5.60 4.36",
    "GRPO-7B": "40.18 65.48 68.12 72.26 66.51 62.51  45.62 73.94 35.17 61.71 54.11  58.78",
    "PAPO_G-7B": "40.25 69.53 66.79 72.52 68.43 63.50  46.07 89.81 36.63 64.97 59.37  61.66  1.53 7.96 4.39",
    "DAPO-3B": "31.20 60.89 59.95 66.83 56.25 55.02  40.69 74.25 28.42 53.09 49.11  52.40",
    "PAPO_D-3B": "35.65 62.53 62.67 64.09 60.51 57.09  41.67 83.56 28.76 57.72 52.93  55.24  5.00 5.97 5.54",
    "DAPO-7B": "35.92 61.91 58.51 75.93 55.64 57.58  37.05 90.05 29.02 51.04 51.79  55.01",
    "PAPO_D-7B": "44.11 67.53 68.30 80.61 68.58 65.83  46.70 91.38 36.34 64.87 59.82  63.16  15.61 19.09 17.54",
}
# Printed Delta_rel that its own row does not give (both overall ones do agree): (printed, recomputed).
EXCEPTIONS = {
    ("PAPO_D-7B", "vision-dependent"): (19.09, 19.96),
    ("PAPO_D-3B", "vision-dependent"): (5.97, 6.22),
}


def predictions(percent):
    """1,250 questions x 8 responses, so many % of which are right, exactly."""
    right = round(percent * 100)
    return [
        {"id": str(i % 1250), "prompt": "", "label": "1", "accuracy": float(i < right)}
        for i in range(10_000)
    ]


def table_1(name):
    numbers = [float(x) for x in TABLE_1[name].split()]
    scores = dict(zip(benchmarks.BENCHMARKS["all"], numbers[:5] + numbers[6:10], strict=True))
    return numbers, {split: predictions(score) for split, score in scores.items()}


@pytest.mark.parametrize("baseline", ["GRPO-3B", "GRPO-7B", "DAPO-3B", "DAPO-7B"])
def test_table_1(baseline, monkeypatch, capsys):
    monkeypatch.setattr(metrics, "RESAMPLES", 3)
    ours = f"PAPO_{baseline[0]}{baseline[4:]}"
    _, before = table_1(baseline)
    numbers, after = table_1(ours)
    groups = {
        "general": benchmarks.GENERAL,
        "vision-dependent": benchmarks.VISION,
        "overall": benchmarks.BENCHMARKS["all"],
    }
    rows = {row["name"]: row for row in metrics.summarise(after, 8, groups, before)}
    for label, printed, delta in zip(
        groups, (numbers[5], numbers[10], numbers[11]), numbers[12:], strict=True
    ):
        row = rows[f"{label} average"]
        assert row["accuracy"] == pytest.approx(printed, abs=0.02)
        printed, recomputed = EXCEPTIONS.get((ours, label), (delta, delta))
        assert delta == printed and row["delta"] == pytest.approx(recomputed, abs=0.02)
    evaluate.report(evaluate.EvalConfig(), after, before, [])
    lines = capsys.readouterr().out.splitlines()
    cells = [line.split() for line in lines if "average" in line]
    assert [c[0] for c in cells] == ["general", "vision-dependent", "overall"]
    assert all(
        abs(float(c[3]) - numbers[i]) < 0.02 for c, i in zip(cells, (5, 10, 11), strict=True)
    )
    assert any("free-form" in line for line in lines)


def test_baselines_averages_too(monkeypatch):
    monkeypatch.setattr(metrics, "RESAMPLES", 3)
    for name in ("GRPO-3B", "GRPO-7B", "DAPO-3B", "DAPO-7B"):
        numbers, results = table_1(name)
        groups = {
            "general": benchmarks.GENERAL,
            "vision-dependent": benchmarks.VISION,
            "overall": benchmarks.BENCHMARKS["all"],
        }
        rows = metrics.summarise(results, 8, groups)[-3:]
        assert [row["accuracy"] for row in rows] == pytest.approx(
            [numbers[5], numbers[10], numbers[11]], abs=0.02
        )


def test_part_of_a_group_is_said():
    groups = {"general": benchmarks.GENERAL, "overall": benchmarks.BENCHMARKS["all"][:5]}
    rows = metrics.summarise({name: predictions(50) for name in benchmarks.GENERAL[:2]}, 8, groups)
    assert [row["name"] for row in rows] == [*benchmarks.GENERAL[:2], "general average (2 of 5)"]


def test_measures():
    """Two questions, n = 4: by hand, and the interval against the known distribution of a mean of two."""
    right = [[1, 0, 0, 0], [0, 0, 0, 0]]
    records = [
        {"id": q, "prompt": "p", "label": "l", "accuracy": float(right[q][i]), "unboxed": q == 1, "truncated": i == 0}
        for i in range(4) for q in range(2)
    ]  # fmt: skip
    [line] = metrics.summarise({"x": records}, 4, {})
    assert line == {
        "name": "x", "questions": 2, "accuracy": 12.5, "pass": 50.0, "unboxed": 50.0, "truncated": 25.0,
        "delta": pytest.approx(float("nan"), nan_ok=True), "low": 0.0, "high": 25.0,
    }  # fmt: skip
    wide = [
        {"id": i, "prompt": "", "label": "", "accuracy": float(i % 5 == 0)} for i in range(1000)
    ]
    [line] = metrics.summarise({"y": wide}, 1, {})
    half = 196 * (0.2 * 0.8 / 1000) ** 0.5
    assert (line["low"], line["high"]) == pytest.approx((20 - half, 20 + half), abs=0.5)
    assert metrics.summarise({"y": wide}, 1, {})[0]["low"] == line["low"]  # a fixed seed
    text = metrics.table([line], 1)
    assert text.splitlines()[1].split() == [
        "y", "1000", "20.00", f"{line['low']:.2f}", "to", f"{line['high']:.2f}", "20.00", "-", "-"]  # fmt: skip


# ---------------------------------------------------------------------------------------------- PAPO-Eval's files


def test_grade_is_its_rule(tmp_path, capsys):
    records = papo_eval_file(tmp_path / "We-Math_We-Math.jsonl")
    evaluate.main(
        ["--grade", str(tmp_path / "We-Math_We-Math.jsonl"), "--out", str(tmp_path / "out")]
    )
    [found] = json.loads((tmp_path / "out" / "table.json").read_text())
    assert found["name"] == "We_Math" and found["questions"] == 5
    assert found["accuracy"] == pytest.approx(its_rule(records, 8)) and 20 < found["accuracy"] < 80
    assert found["truncated"] is None and 0 < found["unboxed"] < 50
    assert (tmp_path / "out" / "table.txt").read_text() == capsys.readouterr().out


def test_repeated_questions_are_told_apart():
    """Loop after loop, a question that is there twice: the first of each pair is right, the second wrong."""
    records = [
        {"id": "", "prompt": "p", "label": "1", "accuracy": float(i % 2 == 0)} for i in range(8)
    ]
    assert [[r["accuracy"] for r in q] for q in metrics.in_questions("x", records, 4)] == [
        [1.0] * 4,
        [0.0] * 4,
    ]


def test_a_count_that_does_not_divide_names_the_question(tmp_path, capsys):
    records = papo_eval_file(tmp_path / "a.jsonl", repeated=False)
    (tmp_path / "a.jsonl").write_text("".join(json.dumps(r) + "\n" for r in records[:-2]))
    with pytest.raises(SystemExit, match="2"):
        evaluate.main(["--grade", str(tmp_path / "a.jsonl")])
    [line] = capsys.readouterr().err.splitlines()
    assert (
        "a: 7 responses to question 'test_3' ('Frage ß 3? assistant', answer '90') are not a multiple of n=8"
        in line
    )


def test_baseline(tmp_path, capsys):
    for name in ("ours", "theirs"):
        (tmp_path / name).mkdir()
        papo_eval_file(tmp_path / name / "PAPO_MMK12.jsonl")
    file = tmp_path / "theirs" / "PAPO_MMK12.jsonl"
    worse = [r | ({"predict": "?"} if r["idx"] % 2 else {}) for r in papo_eval_file(file)]
    file.write_text("".join(json.dumps(r) + "\n" for r in worse))
    args = [
        "--grade",
        str(tmp_path / "ours"),
        "--out",
        str(tmp_path / "out"),
        "--baseline",
        str(tmp_path / "theirs"),
    ]
    evaluate.main(args)
    [found] = json.loads((tmp_path / "out" / "table.json").read_text())
    assert (
        found["delta"] == pytest.approx(100 * (found["accuracy"] / its_rule(worse, 8) - 1))
        and found["delta"] > 10
    )
    assert "Delta_rel %" in capsys.readouterr().out
    file.rename(tmp_path / "theirs" / "We_Math.jsonl")
    with pytest.raises(SystemExit, match="2"):
        evaluate.main(args)
    assert "one NAME.jsonl for PAPO_MMK12 expected, found We_Math.jsonl" in capsys.readouterr().err


# -------------------------------------------------------------------------------------- evaluation, and its survival


@pytest.fixture(scope="module")
def bench(tmp_path_factory):
    """Two splits; in one a picture is cut short, which only decoding finds, and a row is mismatched."""
    place = tmp_path_factory.mktemp("bench")
    rows = split_rows("We_Math") + [
        row("<image>?", "1", "We_Math_images/cut.png"),
        row("<image>?", "1"),
    ]
    write_split(place, "We_Math", rows)
    write_split(place, "lscpku_LogicVista")
    return ["--data", str(place), "--prompt_suffix", "Box it.", *SMALL]


@pytest.fixture(scope="module")
def whole(folder, bench, tmp_path_factory):
    """An evaluation in one go, on one rank: (its folder, what it printed, what it complained of)."""
    out, said, told = tmp_path_factory.mktemp("whole") / "out", StringIO(), StringIO()
    with redirect_stdout(said), redirect_stderr(told):
        evaluate.main(["--model", folder, *bench, "--out", str(out)])
    return out, said.getvalue(), told.getvalue()


def read(out):
    return {file.name: file.read_text() for file in sorted(out.iterdir()) if file.is_file()}


def test_evaluation(whole, capsys):
    out, text, told = whole
    records = [json.loads(line) for line in (out / "We_Math.jsonl").read_text().splitlines()]
    assert list(records[0])[:5] == ["idx", "id", "prompt", "predict", "label"]
    assert [r["idx"] for r in records] == list(range(12))
    assert [r["id"] for r in records] == ["0", "1", "2", "own"] * 3  # loop after loop
    assert records[1]["prompt"] == (
        "system\nYou are a helpful assistant.\nuser\nUnd , wie groß ist ∠ABC?\n\nBox it.\nassistant\n"
    )
    assert "We_Math: 2 rows left out (broken image 1, markers 1)" in text
    assert (
        "We_Math: row 4 is left out: broken image" in told
        and "We_Math: row 5 is skipped, markers" in told
    )
    assert (
        "protocol paper: n 3 (CHANGED), temperature 1.0, top_p 1.0, top_k 50, max_new_tokens 6 (CHANGED)"
        in text
    )
    assert [line.split()[0] for line in text.splitlines()[1:4]] == [
        "We_Math",
        "lscpku_LogicVista",
        "overall",
    ]
    assert {
        "We_Math.jsonl",
        "evaluation.json",
        "lscpku_LogicVista.jsonl",
        "table.json",
        "table.txt",
    } == set(read(out))
    evaluate.main(
        ["--grade", str(out), "--n", "3"]
    )  # what we write is what --grade and PAPO-Eval read
    assert text.splitlines()[:4] == capsys.readouterr().out.splitlines()[:4]
    for name in ("We_Math", "lscpku_LogicVista"):
        rows = [json.loads(line) for line in (out / f"{name}.jsonl").read_text().splitlines()]
        assert its_rule(rows, 3) == pytest.approx(100 * np.mean([r["accuracy"] for r in rows]))


def test_it_goes_on(folder, bench, whole, tmp_path, monkeypatch, capsys):
    """Interrupted in the third batch, its last line torn: nothing is asked twice, and the files are the same."""
    sample, batches = evaluate.generate, []

    def counted(policy, prompts, *args, **kwargs):
        if len(batches) == 2:
            raise KeyboardInterrupt
        batches.append([p.index for p in prompts])
        return sample(policy, prompts, *args, **kwargs)

    out = tmp_path / "out"
    command = ["--model", folder, *bench, "--out", str(out)]
    monkeypatch.setattr(evaluate, "generate", counted)
    with pytest.raises(SystemExit, match="2"):
        evaluate.main(command)
    assert f"interrupted; --out {out} resumes it" in capsys.readouterr().err
    assert batches == [[0, 1], [2, 3]] and not (out / "table.txt").exists()
    part = out / "partial" / "We_Math" / "0.jsonl"
    part.write_text(
        part.read_text()[:-30]
    )  # as a killed process leaves it: question 3 lacks a response
    batches[:] = []
    listed = lambda *a, **k: (batches.append([p.index for p in a[1]]), sample(*a, **k))[1]  # noqa: E731
    monkeypatch.setattr(evaluate, "generate", listed)
    evaluate.main(command)
    assert batches[0] == [3] and sum(batches[1:], []) == [0, 1, 2, 3]
    assert read(out) == read(whole[0])
    assert list((out / "partial").rglob("*.jsonl")) == []
    batches[:] = []
    evaluate.main(command)
    assert sum(batches, []) == [] and read(out) == read(whole[0])
    with pytest.raises(SystemExit, match="2"):
        evaluate.main([*command, "--seed", "1"])
    assert (
        f"--out {out} holds an evaluation with seed 0: choose another folder"
        in capsys.readouterr().err
    )


def test_two_ranks_are_one(folder, bench, whole, tmp_path):
    command = [
        sys.executable,
        "-m",
        "torch.distributed.run",
        "--nproc_per_node",
        "2",
        "--standalone",
        "--",
    ]
    command += [
        str(ROOT / "evaluate.py"),
        "--model",
        folder,
        *bench,
        "--out",
        str(tmp_path / "out"),
    ]
    done = subprocess.run(
        command, env=ENV, cwd=tmp_path, capture_output=True, text=True, timeout=240
    )
    assert done.returncode == 0, done.stderr[-2000:]
    assert done.stdout.strip() == whole[1].strip()
    assert read(tmp_path / "out") == read(whole[0])


def test_toy_defaults(folder, capsys):
    """A folder made by a toy run needs no flags: the toy's data, its sizes, its suffix."""
    evaluate.main(["--model", folder, "--eval_rows", "2", "--n", "2", "--max_new_tokens", "5"])
    text = capsys.readouterr().out
    assert [line.split()[0] for line in text.splitlines()[1:4]] == [
        "general",
        "vision_dependent",
        "overall",
    ]
    assert "protocol training: n 2, temperature 1.0, top_p 1.0, top_k 0, max_new_tokens 5" in text
    config = evaluate.configure({"model": folder, "ask": "?"})
    assert config.prompt_suffix == toy.SUFFIX and config.temperature == 0 and config.eval_rows == 0
    assert evaluate.configure({"model": "some/hub-id"}).data == "all"
    paper = evaluate.configure({"model": "some/hub-id", "data": "We_Math"})
    assert (paper.protocol, paper.n, paper.temperature, paper.top_p, paper.top_k) == (
        "paper",
        8,
        1.0,
        1.0,
        50,
    )
    assert (paper.min_pixels, paper.max_pixels, paper.max_new_tokens) == (1024, 589_824, 2048)
    assert (
        evaluate.configure({"model": "a/b", "data": "We_Math", "protocol": "training"}).top_k == 0
    )


# --------------------------------------------------------------------------------------------- one example, looked at


@pytest.fixture()
def images(tmp_path):
    paths = []
    for i in range(2):
        toy.example("general", i).images[0].save(tmp_path / f"{i}.png")
        paths.append(str(tmp_path / f"{i}.png"))
    return paths


@pytest.mark.parametrize(
    "question, count", [("How many red dots?", 1), ("And <image> or <image>?", 2), ("Why?", 0)]
)
def test_ask(folder, images, capsys, question, count):
    flags = ["--image", *images[:count]] if count else []
    evaluate.main(["--model", folder, "--ask", question, *flags, "--max_new_tokens", "12"])
    text = capsys.readouterr().out
    encoder = Encoder(
        folder, toy.TASK_DEFAULTS["min_pixels"], toy.TASK_DEFAULTS["max_pixels"], toy.SUFFIX
    )
    full = question if "<image>" in question else "<image>" * count + question
    prompt = encoder.encode(
        Example(full, "", [Image.open(p).convert("RGB") for p in images[:count]])
    )
    [group] = generate(
        Policy.load(folder, encoder), [prompt], 1, temperature=0.0, max_new_tokens=12
    )
    assert text.startswith(group.responses[0])  # transformers' own loop and ours say the same
    found = boxed(group.responses[0]) or "nothing, the response has no \\boxed{...}"
    assert text.splitlines()[-1] == f"boxed: {found}"


def test_explain(folder, tmp_path, monkeypatch, capsys):
    """The numbers drawn are the policy's: gains from a mean over masks, heat from one merged patch blackened."""
    drawn = {}
    gain, heat_map = plots.perception_gain, plots.heat_map
    monkeypatch.setattr(
        plots, "perception_gain", lambda *a, **k: (drawn.update(gain=a), gain(*a, **k))[1]
    )
    monkeypatch.setattr(plots, "heat_map", lambda *a: (drawn.update(heat=a), heat_map(*a))[1])
    out = tmp_path / "out"
    sizes = ["--max_new_tokens", "7", "--masks", "3"]
    evaluate.main(
        ["--model", folder, "--explain", "--row", "vision_dependent:1", "--out", str(out), *sizes]
    )
    text = capsys.readouterr().out
    files = [
        out / name for name in ("perception_gain.png", "perception_gain.html", "heat_map0.png")
    ]
    assert all(str(file) in text and file.stat().st_size > 1000 for file in files)
    example = toy.example("vision_dependent", 1)
    assert f"question: {example.question.removeprefix('<image>')}\n" in text
    encoder = Encoder(
        folder, toy.TASK_DEFAULTS["min_pixels"], toy.TASK_DEFAULTS["max_pixels"], toy.SUFFIX
    )
    policy, prompt = Policy.load(folder, encoder), encoder.encode(example)
    [group] = generate(policy, [prompt], 1, temperature=0.0, max_new_tokens=7)
    _, pictures, tokens, clean, masked = drawn["gain"][:5]
    assert tokens == [encoder.tokenizer.decode([t]) for t in group.tokens[0].tolist()]
    means = torch.zeros(len(tokens))
    with torch.no_grad():
        torch.testing.assert_close(clean, policy.log_probs([group])[0])
        for number in range(3):
            generator = seeded("explain", 0, number)
            group.masked_pixel_values, hit = evaluate.masking.mask_prompt(
                prompt, Algo(), encoder, generator
            )
            means += policy.log_probs([group], masked=True)[0] / 3
        group.masked_pixel_values = prompt.pixel_values.clone()
        group.masked_pixel_values[4 * 5 : 4 * 6] = (
            encoder.black_patch
        )  # the merged patch in row 1, column 2 of 3 x 3
        drop = (clean - policy.log_probs([group], masked=True)[0]).sum()
    torch.testing.assert_close(masked, means)
    assert drawn["heat"][1].shape == (3, 3)
    torch.testing.assert_close(drawn["heat"][1][1, 2], drop)
    # the masked picture is what the model is shown: encoded, the blackened image is the view
    generator = seeded("explain", 0, 0)
    view, hit = evaluate.masking.mask_prompt(prompt, Algo(), encoder, generator)
    shown = encoder.images(images=[pictures[0]], return_tensors="pt")["pixel_values"]
    torch.testing.assert_close(shown, view)
    assert 0 < hit.float().mean() < 1


def test_explain_is_bounded_batched_and_masks_as_the_run_did(folder, tmp_path, monkeypatch, capsys):
    """A full-size image has over a thousand image tokens: cells of several tokens, few forwards."""
    run_folder = tmp_path / "run"
    run_folder.mkdir()
    (run_folder / "model").symlink_to(folder)
    (run_folder / "config.json").write_text('{"mask_ratio": 1.0, "mask_strategy": "random"}')
    shown, forwards = {}, []
    draw, log_probs = attribution.draw, Policy.log_probs
    monkeypatch.setattr(
        attribution, "draw", lambda *args: (shown.update(draw=args), draw(*args))[1]
    )
    monkeypatch.setattr(
        Policy, "log_probs", lambda *args, **how: forwards.append(1) or log_probs(*args, **how)
    )
    image = random_image(28 * 8, 28 * 6)  # 48 image tokens
    image.save(tmp_path / "image.png")
    flags = "--max_new_tokens 5 --masks 2 --heat_patches 12 --max_pixels 200704".split()
    question = ["--ask", "How many?", "--image", str(tmp_path / "image.png")]
    out = ["--out", str(tmp_path / "out")]
    model = str(run_folder / "model")
    evaluate.main(["--model", model, "--explain", *question, *flags, *out])
    _, _, patch_mask, clean, masked, [heat], _ = shown["draw"]
    assert heat.shape == (3, 4) and "12 cells of 2 x 2 image tokens" in capsys.readouterr().out
    assert patch_mask.all() and not torch.equal(clean, masked)  # the run's mask_ratio, not 0.6
    assert len(forwards) == 3  # clean; two masked views; twelve cells


def test_explain_a_question_of_ones_own(folder, tmp_path, images, capsys):
    flags = ["--max_new_tokens", "4", "--masks", "1", "--out", str(tmp_path / "out")]
    evaluate.main(
        ["--model", folder, "--explain", "--ask", "How many?", "--image", *images, *flags]
    )
    assert (tmp_path / "out" / "heat_map1.png").exists() and "response: " in capsys.readouterr().out


def test_predictions_never_overwrite_data(folder, tmp_path, capsys):
    """--out is the folder of the data: NAME.jsonl would be written over the rows it was made from."""
    toy.example("train", 0).images[0].save(tmp_path / "a.png")
    row = json.dumps({"problem": "<image>How many?", "answer": "1", "images": ["a.png"]}) + "\n"
    (tmp_path / "mine.jsonl").write_text(row)
    flags = [
        "--data",
        str(tmp_path / "mine.jsonl"),
        "--n",
        "1",
        "--max_new_tokens",
        "2",
        "--min_pixels",
        "3136",
    ]
    with pytest.raises(SystemExit, match="2"):
        evaluate.main(["--model", folder, *flags, "--out", str(tmp_path)])
    assert (
        f"--out {tmp_path} holds mine.jsonl and no evaluation: choose another folder"
        in capsys.readouterr().err
    )
    assert (tmp_path / "mine.jsonl").read_text() == row


@pytest.mark.slow
def test_reading_tokens_light_up():
    """On a toy that sees: colour words owe more to the image than the words of the template."""
    name = str(toy.build(0))
    encoder = Encoder(
        name, toy.TASK_DEFAULTS["min_pixels"], toy.TASK_DEFAULTS["max_pixels"], toy.SUFFIX
    )
    policy, reading, template = Policy.load(name, encoder), [], []
    for i in range(8):
        prompt = encoder.encode(toy.example("vision_dependent", i), i)
        [group] = generate(policy, [prompt], 1, temperature=0.0, max_new_tokens=40)
        group.masked_pixel_values, _ = evaluate.masking.mask_prompt(
            prompt, Algo(), encoder, seeded(i)
        )
        with torch.no_grad():
            gains = (policy.log_probs([group]) - policy.log_probs([group], masked=True))[0]
        for token, value in zip(group.tokens[0].tolist(), gains.tolist(), strict=True):
            word = encoder.tokenizer.decode([token]).strip()
            (reading if word in (*toy.COLOURS, "none") else template).append(value)
    assert np.mean(reading) > 0.3 and np.mean(reading) > 5 * abs(np.mean(template))


def test_compare(tmp_path, capsys):
    for name, base in (("a", 0.2), ("b", 0.4)):
        (tmp_path / name).mkdir()
        lines = [{"step": s, "eval/general": base + s / 10, "kl_prcp": 0.1} for s in (0, 1, 2)]
        (tmp_path / name / "metrics.jsonl").write_text(
            "".join(json.dumps(line) + "\n" for line in lines)
        )
        (tmp_path / name / "config.json").write_text(json.dumps({"algo": "papo_g", "seed": base}))
    evaluate.main(
        ["--compare", str(tmp_path / "a"), str(tmp_path / "b"), "--out", str(tmp_path / "out")]
    )
    text = capsys.readouterr().out
    assert re.search(r"papo_g +eval/general +2 +0\.300 \+- 1\.271 +0 +0\.500 \+- 1\.271 +2", text)
    picture = tmp_path / "out" / "compare.png"
    assert text.splitlines()[-1] == str(picture) and picture.exists()


@pytest.mark.parametrize(
    "flags, message",
    [
        (["--protocol", "papers"], "--protocol papers: choose one of paper, training"),
        (["--grad", "x"], "unknown flag --grad: did you mean --grade?"),
        (["--n", "0"], "n=0: must be at least 1"),
        (
            ["--data", "We_Math", "--benchmarks", "."],
            "no benchmark We_Math in .: its We_Math.json is expected there",
        ),
        (["--data", "nowhere.json"], "data 'nowhere.json': no such file or folder: choose 'toy'"),
        (["--ask", "?", "--image", "nowhere.png"], "broken image: nowhere.png: "),
        (["--ask", "<image>?"], "1 <image> markers for 0 images"),
        (["--explain", "--ask", "Why?"], "--explain: the example has no image"),
        (
            ["--explain", "--row", "general:999"],
            "choose one of general:0 to general:255, vision_dependent:0 to",
        ),
        (["--explain", "--row", "x:1"], "--row x:1: choose one of general:0"),
        (["--grade", "nowhere.jsonl"], "No such file or directory: 'nowhere.jsonl'"),
        (["--grade", "README.md"], "README.md: line 1 is not a prediction (JSONDecodeError"),
        (["--grade", "tests"], "tests: one NAME.jsonl for a set expected, found none"),
        (
            ["--baseline", "tests"],
            "tests: one NAME.jsonl for general, vision_dependent expected, found none",
        ),
        (["--compare", "nowhere"], "no metrics file at nowhere"),
        (["--model", "tests"], ""),
    ],
)
def test_errors_are_one_line(folder, capsys, monkeypatch, flags, message):
    monkeypatch.chdir(ROOT)
    with pytest.raises(SystemExit, match="2"):
        evaluate.main(["--model", folder, *flags])
    [line] = [line for line in capsys.readouterr().err.splitlines() if ": error: " in line]
    assert message in line
