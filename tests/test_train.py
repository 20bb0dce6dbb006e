"""Whole runs, tiny: two ranks give the numbers of one, a resumed run is the run, the export loads, errors are short."""

import io
import itertools
import json
import os
import re
import signal
import subprocess
import sys
import time
from collections import Counter
from contextlib import nullcontext
from pathlib import Path
from types import SimpleNamespace

import pyarrow.parquet
import pytest
import torch
from PIL import Image
from transformers import AutoModelForImageTextToText

import train
from papo import PRESETS
from rollout import generate
from support import checkpoint, data, toy
from support import run as run_module
from support.batch import Group, pad_and_cat
from support.qwen_vl import Encoder, Policy
from support.run import Run
from support.sandbox import Grader
from support.stats import RolloutStats

ROOT = Path(__file__).parent.parent
TINY = (
    "--data toy --val_data toy --prompts_per_step 5 --mini_batch 3 --group_size 3 --max_new_tokens 6 --eval_rows 4 "
    "--eval_every 2 --tokens_per_forward 150 --rollout_batch 6 --lr 1e-3 --save_every 2"
).split()


@pytest.fixture()
def run(folder, tmp_path):
    """run(name, *flags) trains in this process, on one rank, and returns the run's folder."""
    handlers = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}

    def go(name, *flags):
        out = tmp_path / name
        train.main([*TINY, "--model", folder, "--out", str(out), *flags])
        return out

    yield go
    for number, handler in handlers.items():
        signal.signal(number, handler)
    if torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()


def lines(folder):
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def steady(line):
    """A line of metrics without what a clock decides."""
    return {k: v for k, v in line.items() if not k.startswith(("seconds", "tokens_per"))}


def reader(folder, out, *flags):
    """The command of a run as a user starts it, on this Python."""
    return [sys.executable, "-m", "torch.distributed.run", *flags, str(ROOT / "train.py"), *TINY,
            "--model", folder, "--out", str(out)]  # fmt: skip


ENV = os.environ | {"OMP_NUM_THREADS": "1"}


def test_a_run_leaves_what_it_promises(run, folder, monkeypatch, capsys):
    monkeypatch.setattr(run_module, "SHOW_EVERY", 2)
    out = run("a", "--algo", "papo_g", "--steps", "4", "--keep", "1")
    said = capsys.readouterr().out
    assert all(
        name in said
        for name in ("before", "after", "image:", "metrics.jsonl", "curves.png", "model")
    )
    assert len(re.findall(r"^step [24]: <image>", said, re.M)) == 2
    assert len(re.findall(r"^  reward \d\.\d\d: ", said, re.M)) == 4
    config = json.loads((out / "config.json").read_text())
    assert (config["algo"], config["steps"], config["kl_prcp_coef"], config["group_size"]) == (
        "papo_g",
        4,
        0.02,
        3,
    )
    steps = [m for m in lines(out) if "reward" in m]
    evals = [m for m in lines(out) if "eval/general" in m]
    assert [m["step"] for m in steps] == [1, 2, 3, 4] and [m["step"] for m in evals] == [0, 2, 4]
    assert all(
        m["groups_kept"] == 5 and 0 < m["mask_ratio"] < 1 and m["skipped_updates"] == 0
        for m in steps
    )
    assert (out / "curves.png").stat().st_size > 1000 and (out / "sample0.png").exists()
    assert [p.name for p in checkpoint.complete(out)] == ["step_000004"]

    # model/ is a plain folder: it loads with transformers alone, and as --model, and says what the trainer's copy says
    model = AutoModelForImageTextToText.from_pretrained(out / "model")
    encoder = Encoder(str(out / "model"), 3136, 200_704)
    original = AutoModelForImageTextToText.from_pretrained(folder)
    assert any(
        not torch.equal(a, b)
        for a, b in zip(model.parameters(), original.parameters(), strict=True)
    )
    for name in (
        "generation_config.json",
        "preprocessor_config.json",
        "tokenizer.json",
        "chat_template.jinja",
    ):
        assert (out / "model" / name).read_bytes() == (Path(folder) / name).read_bytes()
    prompt = encoder.encode(data.load("toy", "general")[0])
    [group] = generate(Policy(model, encoder), [prompt], 1, max_new_tokens=4)
    assert pad_and_cat([group], "tokens").shape[1] >= 1


def test_resuming_is_the_run(run, folder, capsys):
    """2 + 2 steps from a checkpoint equal 4 exactly, in metrics and weights, AdamW's moments offloaded in the second half
    included."""
    whole = run("whole", "--steps", "4")
    half = run("half", "--steps", "2")
    train.main(["--resume", str(half), "--steps", "4", "--offload_optimizer"])
    assert [steady(m) for m in lines(whole)] == [steady(m) for m in lines(half)]
    a, b = (
        AutoModelForImageTextToText.from_pretrained(p / "model").state_dict() for p in (whole, half)
    )
    assert all(torch.equal(a[k], b[k]) for k in a)
    with pytest.raises(SystemExit):
        train.main(["--resume", str(half), "--steps", "6", "--lr", "0.5"])
    assert re.search(r"--lr 0.5 contradicts the run's 0.001", capsys.readouterr().err)


def test_two_ranks_give_the_numbers_of_one(run, folder, tmp_path):
    """Loss terms, metrics and evaluations of the first steps, with 5 prompts over 2 ranks and mini-batches of 3."""
    one = run("one", "--steps", "2", "--algo", "papo_d", "--top_p", "1.0")
    two = tmp_path / "two"
    command = (
        reader(folder, two, "--nproc_per_node", "2") + "--steps 2 --algo papo_d --top_p 1.0".split()
    )
    done = subprocess.run(command, env=ENV, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-3000:]
    for a, b in zip(lines(one), lines(two), strict=True):
        a, b = steady(a), steady(b)
        assert a.keys() == b.keys()
        for key in a:
            assert a[key] == pytest.approx(b[key], rel=1e-4, abs=2e-6), key


@pytest.mark.slow
@pytest.mark.parametrize("algo", PRESETS)
def test_every_preset_on_one_two_and_four_ranks(run, folder, tmp_path, algo):
    """Prompts and rounds that do not divide, a rank without prompts (mini-batches of 3 on 4 ranks), dropped groups.

    The reward varies, because AdamW turns a gradient that is nothing but rounding into full steps.
    """
    reward = tmp_path / "lengths.py"
    reward.write_text(
        "def score(response, answer):\n"
        "    return {'overall': len(response) % 7 / 7, 'format': 1.0, 'accuracy': float(len(response) % 2)}\n"
    )
    flags = f"--algo {algo} --steps 2 --reward {reward}:score".split()
    results = [run("1", *flags)]
    for world in (2, 4):
        out = tmp_path / str(world)
        command = reader(folder, out, "--nproc_per_node", str(world)) + flags
        done = subprocess.run(command, env=ENV, capture_output=True, text=True, timeout=600)
        assert done.returncode == 0, done.stderr[-3000:]
        results.append(out)
    for other in results[1:]:
        for a, b in zip(lines(results[0]), lines(other), strict=True):
            for key, value in steady(a).items():
                assert value == pytest.approx(b[key], rel=1e-3, abs=1e-5), key


def test_sigterm_leaves_a_checkpoint_and_exits_cleanly(folder, tmp_path):
    out = tmp_path / "killed"
    command = [
        sys.executable,
        str(ROOT / "train.py"),
        *reader(folder, out)[4:],
        "--steps",
        "500",
        "--eval_every",
        "0",
    ]
    process = subprocess.Popen(
        command, env=ENV, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True
    )
    for _ in range(1200):
        if (out / "metrics.jsonl").exists() or process.poll() is not None:
            break
        time.sleep(0.1)
    process.send_signal(signal.SIGTERM)
    _, errors = process.communicate(timeout=120)
    assert process.returncode == 0, errors[-3000:]
    newest = checkpoint.complete(out)[-1]
    steps = [m["step"] for m in lines(out)]
    assert (
        steps == list(range(1, len(steps) + 1))
        and newest.name == f"step_{steps[-1]:06d}"
        and steps[-1] < 500
    )


def training_lines(folder):
    return [line for line in lines(folder) if "reward" in line]


def wrong(responses):
    return [dict.fromkeys(("overall", "accuracy", "format"), 0.0) for _ in responses]


def test_dynamic_sampling_drops_groups_and_samples_on(run, monkeypatch):
    """Every second group is all wrong and dropped; rounds go on to their limit."""
    monkeypatch.setattr(train, "MAX_ROUNDS", 3)
    numbers = itertools.count()

    def one_right_in_every_second_group(self, responses, answers):
        scores = wrong(responses)
        for score in scores:
            group, sample = divmod(next(numbers), 3)
            if group % 2 == 0 and sample == 0:
                score["overall"] = score["accuracy"] = 1.0
        return scores

    monkeypatch.setattr(Grader, "__call__", one_right_in_every_second_group)
    [step] = training_lines(run("dapo", "--algo", "papo_d", "--steps", "1", "--eval_every", "0"))
    assert (step["rounds"], step["groups_kept"], step["zero_advantage_groups"]) == (3, 5, 4)


def test_a_step_without_groups_is_skipped_with_one_warning(run, monkeypatch, capsys):
    monkeypatch.setattr(train, "MAX_ROUNDS", 3)
    monkeypatch.setattr(Grader, "__call__", lambda self, responses, answers, budget=None: wrong(responses))
    steps = training_lines(run("none", "--algo", "papo_d", "--steps", "2", "--eval_every", "0"))
    warnings = [line for line in capsys.readouterr().err.splitlines() if "warning:" in line]
    assert len(steps) == 2 and len(warnings) == 1
    assert "no group to train on after 3 rounds" in warnings[0]
    assert "mean reward 0.000" in warnings[0]
    for step in steps:
        assert step["groups_kept"] == 0 and step["rounds"] == 3 and "pg_loss" not in step


@pytest.mark.parametrize("dynamic", [False, True])
def test_groups_that_cannot_be_compared_teach_nothing(prompts, dynamic):
    """Equal rewards (float64 leaves a residue), and a 0 that only means the grader had no time."""
    good = {"overall": 1.0, "format": 0.0, "accuracy": 1.0}
    bad = {"overall": 0.0, "format": 0.0, "accuracy": 0.0}
    formatted = {"overall": 0.1, "format": 1.0, "accuracy": 0.0}
    scores = [formatted] * 3 + [good, bad, bad | {"unscored": 1.0}] + [good, bad, bad]
    tokens, mask = torch.ones(3, 2, dtype=torch.long), torch.ones(3, 2, dtype=torch.bool)
    groups = [
        Group(prompts[0], tokens, mask, mask[:, 0] & False, torch.zeros(3, 2), ["x"] * 3)
        for _ in range(3)
    ]

    def grader(responses, answers):
        return scores

    grader.timeouts = grader.errors = grader.unscored = 0
    run = SimpleNamespace(
        grader=grader,
        config=SimpleNamespace(group_size=3),
        algo=SimpleNamespace(dynamic_sampling=dynamic),
    )
    stats = RolloutStats()
    kept = train.grade(run, groups, stats)
    assert stats.zero_advantage_groups == 2 and stats.responses == 9
    assert groups[0].advantages.abs().max() < 1e-6 and groups[1].advantages.eq(0).all()
    assert groups[2].advantages.tolist() == pytest.approx([1.1547, -0.5774, -0.5774], abs=1e-3)
    expected = groups[2:] if dynamic else groups
    assert [id(group) for group in kept] == [id(group) for group in expected]


def test_ranks_that_read_different_rows_stop(monkeypatch):
    rows = data.Rows("mine", lambda i: None, [0, 1, 5])
    for other, fails in (([0, 1, 4], True), ([0, 1, 5], False)):
        theirs = [(3, hash(tuple(other)))]
        monkeypatch.setattr(
            run_module, "gather_over_ranks", lambda mine, theirs=theirs: [mine, theirs]
        )
        with pytest.raises(ValueError, match="different rows of mine") if fails else nullcontext():
            run_module.check_same_rows(rows)


def test_a_users_reward(run, tmp_path):
    path = tmp_path / "mine.py"
    path.write_text(
        "def longer(response, answer):\n"
        "    return {'overall': len(response) / 100, 'format': 1.0, 'accuracy': 0.0}\n"
    )
    steps = [
        m for m in lines(run("mine", "--steps", "1", "--reward", f"{path}:longer")) if "reward" in m
    ]
    assert steps[0]["reward"] > 0 and steps[0]["accuracy"] == 0 and steps[0]["format"] == 1


@pytest.mark.parametrize(
    "body, words",
    [
        ("import time; time.sleep(60)", "--reward_deadline"),
        ("raise KeyError('no such answer')", "no such answer"),
        ("return 1.0", "overall, format, accuracy"),
    ],
    ids=["slow", "raises", "nonsense"],
)
def test_a_reward_that_never_works_ends_the_run_with_one_line(run, tmp_path, capsys, body, words):
    path = tmp_path / "mine.py"
    path.write_text(f"def score(response, answer):\n    {body}\n")
    flags = ["--reward", f"{path}:score", "--reward_deadline", "0.2", "--eval_every", "0"]
    with pytest.raises(SystemExit) as stop:
        run("never", "--steps", "1", *flags)
    said = [line for line in capsys.readouterr().err.splitlines() if "error:" in line]
    assert stop.value.code == 2 and len(said) == 1 and words in said[0], said


@pytest.mark.parametrize(
    "flags, words",
    [
        (["--algo", "ppo"], "'ppo': choose one of grpo, dapo, papo_g"),
        (["--mask_ratio", "1.5"], "mask_ratio=1.5"),
        (["--mask_strategy", "blur"], "random, semantic, noise"),
        (["--grup_size", "4"], "unknown flag --grup_size: did you mean --group_size"),
        (["--lr", "fast"], "--lr: invalid float value: 'fast'"),
        (["--temperature", "0"], "temperature=0.0: must be above 0"),
        (["--mini_batch", "0"], "mini_batch=0: must be at least 1"),
        (["--model", "/no/such/folder"], "/no/such/folder"),
        (["--data", "/no/such/file.parquet"], "/no/such/file.parquet"),
        (["--reward", "nothing"], "reward 'nothing'"),
        (["--resume", "/no/such/run"], "no config.json there"),
    ],
)
def test_errors_are_one_line(run, folder, capsys, flags, words):
    with pytest.raises(SystemExit) as stop:
        train.main(
            [
                *TINY,
                *(["--model", folder] if "--model" not in flags else []),
                "--steps",
                "1",
                *flags,
            ]
        )
    error = capsys.readouterr().err
    said = [line for line in error.splitlines() if "error:" in line]
    assert stop.value.code == 2 and len(said) == 1 and words in said[0], error


def test_an_existing_folder_is_not_overwritten(run, tmp_path, capsys):
    (tmp_path / "there").mkdir()
    with pytest.raises(SystemExit):
        run("there")
    assert "exists: choose another folder, or --resume it" in capsys.readouterr().err


def test_metrics_and_glossary_agree(run):
    """Every key a run logs has its line in the README's glossary, and every line its key, over all presets."""
    glossary = (ROOT / "README.md").read_text().split("## Metrics")[1].split("\n## ")[0]
    listed = set(re.findall(r"^\| `([^`]+)`", glossary, re.MULTILINE))
    out = run("keys", "--steps", "1", "--algo", "papo_g", "--kl_ref_coef", "0.01")
    logged = {key for line in lines(out) for key in line}
    assert {re.sub("eval/.*", "eval/SPLIT", key) for key in logged} == listed


# ------------------------------------------------------------------------------------- bad rows, hostile responses

# way -> the kind it is counted under; "": odd, but usable. A truncated JPEG is found when its pixels are read.
WAYS = {"truncated JPEG": "broken image", "zero bytes": "broken image", "CMYK": "", "palette with alpha": "",
        "1 x 5000": "aspect ratio", "20 megapixels": "", "no image": "markers", "too many images": "markers",
        "empty answer": "empty answer", "no answer": "empty answer"}  # fmt: skip


def stored(image, kind="PNG", end=None):
    file = io.BytesIO()
    image.save(file, kind)
    return {"bytes": file.getvalue()[:end], "path": None}


def odd_row(way, image):
    """Images and answer of a row that is broken or odd in one of WAYS."""
    images = {
        "truncated JPEG": lambda: [stored(image, "JPEG", -300)],
        "zero bytes": lambda: [{"bytes": b"", "path": None}],
        "CMYK": lambda: [stored(image.convert("CMYK"), "JPEG")],
        "palette with alpha": lambda: [stored(image.convert("RGBA").quantize(16))],
        "1 x 5000": lambda: [stored(Image.new("RGB", (1, 5000)))],
        "20 megapixels": lambda: [stored(Image.new("RGB", (5000, 4000), "red"))],
        "no image": lambda: [],
        "too many images": lambda: 2 * [stored(image)],
    }.get(way, lambda: [stored(image)])()
    return images, {"empty answer": "  ", "no answer": None}.get(way, "1")


def write_rows(path, n, every):
    """n rows in a parquet file, one in `every` odd, the ways in turn; how many of each way."""
    rows, ways = [], Counter()
    for i in range(n):
        example = toy.example("train", i % 64)
        images, answer = [stored(example.images[0])], example.answer
        if i % every == 0:
            way = list(WAYS)[i // every % len(WAYS)]
            ways[way] += 1
            images, answer = odd_row(way, example.images[0])
        rows.append({"problem": example.question, "answer": answer, "images": images})
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), path)
    return ways


@pytest.mark.parametrize(
    "n, every, steps",
    [(60, 3, 6), pytest.param(2000, 20, 200, marks=pytest.mark.slow)],
    ids=["short", "long"],
)
def test_broken_rows_train_through(run, tmp_path, monkeypatch, capsys, n, every, steps):
    """Rows broken in ten ways: counted, the first of each kind named, all others used; memory stays flat."""
    ways = write_rows(tmp_path / "rows.parquet", n, every)
    log, memory = Run.log, []

    def measured(self, metrics):
        log(self, metrics)
        memory.append(int(Path("/proc/self/statm").read_text().split()[1]) * 4096 / 2**20)

    monkeypatch.setattr(Run, "log", measured)
    flags = "--min_pixels 3136 --max_pixels 20000 --max_prompt_tokens 256 --eval_every 0 --save_every 0".split()
    out = run("rows", "--data", str(tmp_path / "rows.parquet"), "--val_data", "none", "--steps", str(steps), *flags,
              "--prompts_per_step", "10", "--mini_batch", "10", "--group_size", "2")  # fmt: skip
    said, steps_seen = capsys.readouterr(), lines(out)
    late = ways["truncated JPEG"]
    early = sum(count for way, count in ways.items() if WAYS[way]) - late
    assert all(m["unusable_rows"] == early for m in steps_seen) and len(steps_seen) == steps
    passes = steps * 10 / (n - early)
    assert (
        int(passes) * late <= sum(m["skipped_rows"] for m in steps_seen) <= (int(passes) + 1) * late
    )
    assert sum(m["groups_kept"] + m["skipped_rows"] for m in steps_seen) == steps * 10
    for kind in set(WAYS.values()) - {""}:
        assert len(re.findall(f"row \\d+ is skipped, {kind}:", said.err)) == (
            2 if kind == "broken image" else 1
        )
    assert f"left out: {{'broken image': {ways['zero bytes']}" in said.out
    print(
        f"MiB at steps 1, 1/4, 1/2, last: {[round(memory[i]) for i in (0, steps // 4, steps // 2, -1)]}"
    )
    if n >= 2000:  # several 20-megapixel pictures in each part
        assert max(memory[steps // 2 :]) < max(memory[: steps // 2]) + 100


@pytest.mark.slow
def test_hostile_responses(run, monkeypatch):
    """Every response is meant to hang the rule: a step costs the deadlines, nothing is rewarded, no process is left."""
    hostile = ["99999999!", "9**9**9", "1e999999999", "2**(10**10)", "(x+y)**999", "(" * 3000 + "1" + ")" * 3000,
               "frac('\\137\\137')", "\\frac" * 2000, "x" * 10**6]  # fmt: skip
    sample, running = (
        train.generate,
        Path(f"/proc/self/task/{os.getpid()}/children").read_text().split(),
    )

    def attack(*args, **kwargs):
        groups = sample(*args, **kwargs)
        texts = itertools.cycle(f"<think> </think> \\boxed{{{text}}}" for text in hostile)
        for group in groups:
            group.responses = [next(texts) for _ in group.responses]
            group.prompt.example.answer = "x + 1"  # not a plain integer: the rule parses
        return groups

    monkeypatch.setattr(train, "generate", attack)
    start = time.time()
    out = run("hostile", "--steps", "1", "--eval_every", "0", "--save_every", "0")
    [step] = lines(out)
    assert step["accuracy"] == 0 and step["reward_timeouts"] >= 3 and step["skipped_updates"] == 0
    assert (
        step["seconds_rollout"] < 60 + 30 and time.time() - start < 300
    )  # the budget, and a slow machine's start-up
    assert Path(f"/proc/self/task/{os.getpid()}/children").read_text().split() == running
