"""evaluate.py: avg@n, resumption, --ask, --explain, --grade and --compare."""

import io
import json
import re
import shutil
import sys
from contextlib import redirect_stdout

import mathruler.grader
import pytest
from conftest import (
    ROOT,
    error_line,
    generate,
    on_ranks,
    process_restored,
    random_image,
    write_jsonl,
)
from PIL import Image
from test_predictions import papo_eval_file
from test_tables import row, split_rows, write_split

import evaluate
from support import pages, toy
from support.batch import Example
from support.protocol import configure
from support.qwen_vl import Encoder, Policy
from support.reward import boxed
from support.run_folder import read_log

SMALL = "--min_pixels 3136 --max_pixels 200704 --max_new_tokens 6 --n 3 --rollout_batch 6".split()


# ------------------------------------------------------------------------ evaluation and resumption


@pytest.fixture(scope="module")
def data_flags(tmp_path_factory, varying_reward):
    """Two sets; one has a row whose image is truncated, and a row without its image."""
    folder = tmp_path_factory.mktemp("bench")
    bad_rows = [row("<image>?", "1", "We_Math_images/cut.png"), row("<image>?", "1")]
    write_split(folder, "We_Math", split_rows("We_Math") + bad_rows)
    write_split(folder, "lscpku_LogicVista")
    return ["--data", str(folder), "--prompt_suffix", "Box it.", *SMALL, *varying_reward.split()]


@pytest.fixture(scope="module")
def uninterrupted(folder, data_flags, tmp_path_factory):
    """An evaluation on one rank: its folder and stdout."""
    out, stdout = tmp_path_factory.mktemp("whole") / "out", io.StringIO()
    with redirect_stdout(stdout):
        evaluate.main(["--model", folder, *data_flags, "--out", str(out)])
    return out, stdout.getvalue()


def read_files(out):
    return {file.name: file.read_text() for file in out.iterdir() if file.is_file()}


def test_evaluation(uninterrupted, varying_reward, capsys):
    out, stdout = uninterrupted
    results = {"We_Math.jsonl", "lscpku_LogicVista.jsonl", "table.json", "table.txt"}
    assert set(read_files(out)) == results | {"evaluation.json"}
    records = read_log(out / "We_Math.jsonl")
    assert list(records[0])[:5] == ["idx", "id", "prompt", "predict", "label"]
    numbered = [(record["idx"], record["id"]) for record in records]
    assert numbered == list(enumerate(["0", "1", "2", "own"] * 3))  # loop after loop
    accuracies = [record["accuracy"] for record in records]
    assert accuracies == [len(record["predict"]) % 2 for record in records]
    assert {*accuracies} == {0.0, 1.0}
    assert records[1]["prompt"] == (
        "system\nYou are a helpful assistant.\n"
        "user\nUnd , wie groß ist ∠ABC?\n\nBox it.\nassistant\n"
    )
    assert "We_Math: left out: {'markers': 1, 'broken image': 1}" in stdout
    protocol = "n 3 (CHANGED), temperature 1.0, top_p 1.0, top_k 50, max_new_tokens 6 (CHANGED)"
    assert f"protocol paper: {protocol}" in stdout
    table = stdout.splitlines()[2:]  # after a line per set
    evaluate.main(["--grade", str(out), *varying_reward.split()])  # the files know n
    assert table[:4] == capsys.readouterr().out.splitlines()[:4]


def its_rule(records, n):
    """PAPO-Eval's average accuracy @ n, written down independently: the mean of question means."""
    groups = {}
    for record in records:
        response = re.sub(r"\s*(<|>|/)\s*", r"\1", record["predict"])
        content = mathruler.grader.extract_boxed_content(response)
        correct = float(mathruler.grader.grade_answer(content, record["label"]))
        key = record["id"], record["prompt"], record["label"]
        groups.setdefault(key, []).append(correct)
    assert all(len(group) == n for group in groups.values())
    return 100 * sum(sum(group) / n for group in groups.values()) / len(groups)


def test_grading_follows_papo_evals_rule(tmp_path):
    """Against a baseline; n is what the files hold."""
    ours, theirs, out = tmp_path / "ours", tmp_path / "theirs", tmp_path / "out"
    for folder in (ours, theirs):
        folder.mkdir()
        records = papo_eval_file(folder / "We-Math_We-Math.jsonl", n=4)
    accuracy = its_rule(records, 4)
    for record in records[1::2]:
        record["predict"] = "?"
    write_jsonl(theirs / "We-Math_We-Math.jsonl", records)
    evaluate.main(["--grade", str(ours), "--baseline", str(theirs), "--out", str(out)])
    [line] = json.loads((out / "table.json").read_text())
    assert line["accuracy"] == pytest.approx(accuracy) and 20 < accuracy < 80
    assert (line["name"], line["truncated"]) == ("We_Math", None) and 0 < line["unboxed"] < 50
    assert line["delta"] == pytest.approx(100 * (accuracy / its_rule(records, 4) - 1)) != 0
    table = (out / "table.txt").read_text()
    assert "avg@4 %" in table and "Delta_rel %" in table


def test_a_character_that_stdout_lacks_ends_nothing(folder, tmp_path, images, monkeypatch):
    stdout = io.TextIOWrapper(io.BytesIO(), encoding="latin-1")
    monkeypatch.setattr(sys, "stdout", stdout)
    explain = ["--explain", "--ask", "√?", "--image", images[0], "--out", str(tmp_path / "out")]
    evaluate.main(["--model", folder, *explain, "--max_new_tokens", "2"])
    stdout.flush()
    assert b"question: \\u221a" in stdout.buffer.getvalue()


def test_resumption(folder, data_flags, uninterrupted, tmp_path, monkeypatch, capsys):
    """Interrupted in the second batch, with a torn last line, and in the third: no question is
    answered twice."""
    original, batches, limit = evaluate.generate, [], 1

    def interrupted(policy, prompts, *args, **kwargs):
        if len(batches) == limit:
            raise KeyboardInterrupt
        batches.append([prompt.index for prompt in prompts])
        return original(policy, prompts, *args, **kwargs)

    monkeypatch.setattr(evaluate, "generate", interrupted)
    out = tmp_path / "out"
    command = ["--model", folder, *data_flags, "--out", str(out)]
    for expected in ([0, 1], [1, 2]):
        batches.clear()
        with pytest.raises(SystemExit, match="2"):
            evaluate.main(command)
        assert f"interrupted; --out {out} resumes it" in capsys.readouterr().err
        assert batches == [expected]
        if expected == [0, 1]:  # torn as after SIGKILL: question 1's
            partial = out / "We_Math.partial"
            partial.write_text(partial.read_text()[:-30])
    limit = None
    for expected in ([[3], [0, 1], [2, 3]], []):
        batches.clear()
        evaluate.main(command)
        assert [batch for batch in batches if batch] == expected
        assert read_files(out) == read_files(uninterrupted[0])


def test_two_ranks_write_the_files_of_one(folder, data_flags, uninterrupted, tmp_path):
    out = tmp_path / "out"
    command = [str(ROOT / "evaluate.py"), "--model", folder, *data_flags, "--out", str(out)]
    done = on_ranks(2, *command, script="--")  # else torchrun would take --n for its own
    assert done.returncode == 0, done.stderr[-2000:]
    assert done.stdout.strip() == uninterrupted[1].strip()
    assert read_files(out) == read_files(uninterrupted[0])


def configured(flags):
    return configure("A test.", flags.split())


def test_a_toy_model_needs_no_flags(folder, tmp_path):
    """Its folder supplies the toy's data, sizes and suffix; a split is that of its own data."""
    mine = shutil.copytree(folder, tmp_path / "mine")
    (mine / "task.json").write_text(json.dumps({"data": "toy:grid=2,most=3"}))
    ask = configured(f"--model {mine} --ask ?")
    assert (ask.prompt_suffix, ask.temperature, ask.eval_rows) == (toy.SUFFIX, 0, 0)
    for split in toy.EVAL_SPLITS:
        config = configured(f"--model {mine} --data {split}")
        assert toy.setting_of(config.data) == toy.Setting(grid=2, most=3, split=split)
        assert config.protocol == "training"
        assert configured(f"--model some/hub-id --data {split}").protocol == "paper"


def test_protocols():
    """The paper's for benchmarks; it goes over the toy's defaults."""
    paper = configured("--model some/hub-id")
    assert (paper.data, paper.protocol, paper.n) == ("all", "paper", 8)
    assert (paper.temperature, paper.top_p, paper.top_k) == (1.0, 1.0, 50)
    assert (paper.min_pixels, paper.max_pixels, paper.max_new_tokens) == (1024, 589_824, 2048)
    assert configured("--model some/hub-id --data We_Math").protocol == "paper"
    toys = configured("--model toy"), configured("--model toy --protocol paper")
    assert [(x.protocol, x.max_new_tokens) for x in toys] == [("training", 40), ("paper", 2048)]


# -------------------------------------------------------------------- one example: --ask, --explain


@pytest.fixture()
def images(tmp_path):
    paths = []
    for i in range(2):
        path = tmp_path / f"{i}.png"
        toy.example("general", i).images[0].save(path)
        paths.append(str(path))
    return paths


@pytest.mark.parametrize("question, n_images", [("And <image> or <image>?", 2), ("Why?", 0)])
def test_ask(folder, images, capsys, question, n_images):
    """The streamed response, from transformers' own loop, equals ours."""
    images = images[:n_images]
    flags = ["--image", *images] if images else []
    evaluate.main(["--model", folder, "--ask", question, *flags, "--max_new_tokens", "12"])
    text = capsys.readouterr().out
    sizes = (toy.TASK_DEFAULTS["min_pixels"], toy.TASK_DEFAULTS["max_pixels"])
    policy = Policy.load(folder, Encoder(folder, *sizes, toy.SUFFIX))
    example = Example(question, "", [Image.open(path).convert("RGB") for path in images])
    prompt = policy.encoder.encode(example)
    [group] = generate(policy, [prompt], 1, temperature=0.0, max_new_tokens=12)
    [response] = group.responses
    assert text.startswith(response)
    answer = boxed(response) or "nothing, the response has no \\boxed{...}"
    assert text.splitlines()[-1] == f"boxed: {answer}"


NOTHING_MASKED = """
from dataclasses import dataclass
from papo import Algo

@dataclass(frozen=True)
class Mine(Algo):
    def view(self, name, prompt, *_):
        return 0 * prompt.pixel_values
"""


def test_explain_masks_as_in_training_and_bounds_its_forwards(
    folder, images, tmp_path, record_calls, capsys
):
    """A full-size image has over a thousand image tokens, so a part of it holds several."""
    run_folder, out = tmp_path / "run", tmp_path / "out"
    run_folder.mkdir()
    (run_folder / "model").symlink_to(folder)
    (run_folder / "config.json").write_text('{"mask_ratio": 1.0, "mask_strategy": "random"}')
    image = tmp_path / "image.png"
    random_image(28 * 8, 28 * 6).save(image)  # 48 image tokens
    pages_written, forwards = record_calls(pages, "explain"), record_calls(Policy, "log_probs")
    question = ["--explain", "--ask", "How many?", "--image", str(image), images[0]]
    flags = "--max_new_tokens 5 --masks 2 --heat_patches 15 --max_pixels 200704".split()
    model = ["--model", str(run_folder / "model"), "--out", str(out)]
    evaluate.main([*model, *question, *flags])
    [((_, _, [view], *_), _)] = pages_written  # both were the same
    assert (view == view[0]).all()  # ratio 1, not 0.6
    assert len(forwards) == 3  # clean, masked, 12 + 2 x 2 parts
    text = capsys.readouterr().out
    assert "question: How many?" in text and text.endswith(f"{out / 'explanation.html'}\n")
    # The run's own method: the file as the run keeps it.
    (run_folder / "config.json").write_text('{"algo": "elsewhere/mine.py"}')
    (run_folder / "mine.py").write_text(NOTHING_MASKED)
    evaluate.main([*model, *"--explain --row vision_dependent:1 --masks 1".split()])
    [_, ((_, _, [pixels], *_), _)] = pages_written
    assert (pixels == 0).all()
    example = toy.example("vision_dependent", 1)
    assert example.question.removeprefix("<image>") in capsys.readouterr().out


def test_compare(finished, tmp_path, capsys):
    evaluate.main(["--compare", str(finished), "--out", str(tmp_path)])
    text = capsys.readouterr().out
    assert re.search(r"papo_g +eval/general +1 ", text)
    assert text.splitlines()[-1] == str(tmp_path / "compare.png")
    assert (tmp_path / "compare.png").exists()


def test_errors_are_one_line(folder, capsys, monkeypatch):
    monkeypatch.chdir(ROOT)
    for flags, message in [
        ("--protocol papers", "--protocol papers: choose one of paper, training"),
        ("--grad x", "unknown flag --grad: the flags are ask baseline"),
        ("--n three", "argument --n: invalid int value: 'three'"),
        ("--ask ? --image nowhere.png", "broken image: nowhere.png: "),
        ("--explain --ask Why?", "--explain: the example has no image"),
        ("--explain --row general:999", "choose one of general:0 to general:255, vision_dep"),
        ("--grade nowhere.jsonl", "No such file or directory: 'nowhere.jsonl'"),
        ("--reward no.py:f", "reward 'no.py:f': expected path/file.py:function"),
        ("--model tests", ""),
    ]:
        with process_restored(), pytest.raises(SystemExit, match="2"):
            evaluate.main(["--model", folder, *flags.split()])
        assert message in error_line(capsys)
