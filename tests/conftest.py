"""A tiny Qwen2.5-VL with its encoder, policy, prompts and groups, and small training runs of it."""

# ruff: noqa: E402  (libraries read the environment when they are imported)
import copy
import io
import json
import os
import re
import resource
import signal
import subprocess
import sys
from contextlib import contextmanager
from pathlib import Path
from unittest.mock import create_autospec

os.environ.setdefault("HF_HUB_OFFLINE", "1")  # no test may touch a network
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
os.environ.setdefault("OMP_NUM_THREADS", "1")  # not as many as are idle: the same numbers each time

import pyarrow
import pyarrow.parquet
import pytest
import torch
import torch.distributed as dist
from PIL import Image
from pretend_device import PretendDevice

import rollout
import train
from experiments import start_model
from rollout import Sampling
from support import distributed
from support.batch import Example
from support.qwen_vl import Encoder, Policy
from support.run_folder import read_log

torch.set_num_threads(1)  # a tiny model is fastest on one thread


@pytest.fixture(scope="session")
def folder(tmp_path_factory):
    """The toy's model after two warm-up steps: real class, real files, nothing learned."""
    return str(start_model.build(0, tmp_path_factory.mktemp("toy") / "model", steps=2))


@pytest.fixture(scope="session")
def encoder(folder):
    return Encoder(folder, min_pixels=3136, max_pixels=200_704, suffix="Box it.")


def generate(policy, prompts, group_size, key=(0, 0), stop=lambda: False, **sampling):
    """rollout.generate, with the fields of Sampling as keywords."""
    sampling = {"temperature": policy.temperature} | sampling
    return rollout.generate(policy, prompts, group_size, Sampling(**sampling), key=key, stop=stop)


@pytest.fixture()
def policy(folder, encoder):
    return Policy.load(folder, encoder)


@pytest.fixture()
def varied_policy(policy):
    """A policy that does not repeat itself, as small random weights do.

    A larger head makes tokens varied and lengths unequal.
    """
    torch.manual_seed(3)
    with torch.no_grad():
        policy.model.lm_head.weight.add_(0.3 * torch.randn_like(policy.model.lm_head.weight))
    return policy


def random_image(width, height, seed=0):
    generator = torch.Generator().manual_seed(seed)
    pixels = torch.randint(0, 256, (height, width, 3), generator=generator, dtype=torch.uint8)
    return Image.fromarray(pixels.numpy())


def image_bytes(image, form="PNG", **options):
    """An image as the content of a file."""
    buffer = io.BytesIO()
    image.save(buffer, form, **options)
    return buffer.getvalue()


def examples():
    """Questions with one image, with two, with none, and with an oblong one."""
    two = [random_image(56, 84, 1), random_image(112, 56, 2)]
    oblong = "A note says 3. <image>How many blue dots are there in total?"
    return [
        Example("<image>How many red dots are there?", "1", [random_image(84, 84)]),
        Example("<image>and <image>: how many green dots?", "2", two),
        Example("How many dots?", "3", []),
        Example(oblong, "0", [random_image(140, 56)]),
    ]


@pytest.fixture(scope="session")
def prompts(encoder):
    return [encoder.encode(example, index) for index, example in enumerate(examples())]


@pytest.fixture(scope="session")
def sampled_groups(folder, encoder, prompts):
    """Four groups of three responses, truncated to unequal lengths."""
    policy = Policy.load(folder, encoder)
    groups = generate(policy, prompts, 3, max_new_tokens=12, key=(0, 0), rollout_batch=5)
    truncate(groups)
    for group in groups:
        group.advantages = torch.tensor([1.0, -0.5, -0.5])
    return groups


@pytest.fixture()
def groups(sampled_groups):
    """A copy for each test, which may write to it."""
    return copy.deepcopy(sampled_groups)


def truncate(groups):
    """Cut groups of three responses of at most 12 tokens to unequal lengths."""
    for i, group in enumerate(groups):
        lengths = torch.tensor([12, 1 + i, 7 - i])
        group.response_mask &= torch.arange(group.tokens.shape[1])[None] < lengths[:, None]


def gradient_of(policy, loss):
    parameters = [*policy.model.parameters()]
    gradients = torch.autograd.grad(loss, parameters, materialize_grads=True)
    return torch.cat([gradient.flatten() for gradient in gradients])


@pytest.fixture()
def device(monkeypatch):
    """A pretend CUDA device, to be entered with `with device:`."""
    device = PretendDevice()
    device.install(monkeypatch)
    return device


@pytest.fixture()
def record_calls(monkeypatch):
    """record_calls(owner, name) wraps a function, and returns the list its arguments go to."""

    def wrap(owner, name):
        original = getattr(owner, name)
        recorded = create_autospec(original, side_effect=original)
        monkeypatch.setattr(owner, name, recorded)
        return recorded.call_args_list

    return wrap


# --------------------------------------------------------------------------------------------- runs

ROOT = Path(__file__).parent.parent
# Standalone: on a free port, since tests may run side by side.
TORCHRUN = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
SMALL_RUN = (
    "--data toy --val_data toy --prompts_per_step 5 --mini_batch 3 --group_size 3 "
    "--max_new_tokens 6 --eval_rows 4 --eval_every 2 --tokens_per_forward 150 --rollout_batch 6 "
    "--lr 1e-3 --save_every 2"
)
FINISHED = "--algo papo_g --kl_ref_coef 0.01 --steps 3 --save_every 3 --keep 1"


@contextmanager
def process_restored():
    """After training in this process, its signal handlers and process group are gone."""
    handlers = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield
    finally:
        for number, handler in handlers.items():
            signal.signal(number, handler)
        if dist.is_initialized():
            dist.destroy_process_group()


@pytest.fixture()
def one_rank():
    """This process as the only rank."""
    with process_restored():
        distributed.init_distributed()
        yield


@pytest.fixture()
def run(folder, tmp_path):
    """run(name, flags) trains in this process, on one rank, and returns the run's folder."""

    def train_once(name, flags):
        out = tmp_path / name
        train.main(run_flags(folder, out, flags))
        return out

    with process_restored():
        yield train_once


@pytest.fixture(scope="session")
def finished(folder, tmp_path_factory):
    """A run that nothing has interrupted: three steps, evaluated and saved after the last."""
    out = tmp_path_factory.mktemp("runs") / "finished"
    with process_restored():
        train.main(run_flags(folder, out, FINISHED))
    return out


@pytest.fixture(scope="session")
def varying_reward(tmp_path_factory):
    """--reward for a function that an untrained model gets unequal rewards from.

    With equal rewards dynamic sampling would drop every group, and AdamW would turn a gradient of
    mere rounding errors into full steps.
    """
    file = tmp_path_factory.mktemp("reward") / "lengths.py"
    file.write_text(
        "def score(response, answer):\n"
        "    n = len(response)\n"
        "    return {'overall': n % 7 / 7, 'format': 1.0, 'accuracy': float(n % 2)}\n"
    )
    return f"--reward {file}:score"


def run_flags(folder, out, flags):
    """What follows train.py on the command line of a small run."""
    return [*SMALL_RUN.split(), "--model", str(folder), "--out", str(out), *flags.split()]


def on_ranks(n, *args, script=ROOT / "train.py", **environment):
    """Run train.py, or another script, under torchrun; returns the finished process."""
    return subprocess.run(
        [*TORCHRUN, "--nproc_per_node", str(n), str(script), *args],
        env=os.environ | environment,
        capture_output=True,
        text=True,
        timeout=600,
    )


def metric_lines(run_folder):
    return read_log(run_folder / "metrics.jsonl")


def check_same_metrics(run_folder, other, **tolerance):
    """Both runs logged the same numbers: exactly, or within pytest.approx's tolerance."""
    for ours, theirs in zip(metric_lines(run_folder), metric_lines(other), strict=True):
        assert ours.keys() == theirs.keys()
        for key in ours:
            if key.startswith(("seconds", "tokens_per")):  # a clock decides
                continue
            expected = pytest.approx(theirs[key], **tolerance) if tolerance else theirs[key]
            assert ours[key] == expected, (ours["step"], key)


def check_same_weights(run_folder, other):
    """Both runs exported the same weights, to the last bit."""
    files = [each / "model" / "model.safetensors" for each in (run_folder, other)]
    assert files[0].read_bytes() == files[1].read_bytes()


@contextmanager
def full_disk(limit):
    """No file may grow past `limit` bytes: writing fails as it does on a full disk."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (limit, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


def checkpoint_names(run_folder):
    return sorted(path.name for path in run_folder.glob("checkpoints/*"))


def lines_with(text, word):
    return [line for line in text.splitlines() if word in line]


def error_line(capsys):
    """The one error line a command printed, without argparse's usage."""
    text = capsys.readouterr().err
    assert "usage:" not in text
    [line] = lines_with(text, "error: ")
    return line


def readme_example(word):
    """The block of Python in the README that holds the word."""
    blocks = re.findall(r"```python\n(.*?)```", (ROOT / "README.md").read_text(), re.S)
    [block] = [block for block in blocks if word in block]
    return block


# --------------------------------------------------------------------------------------------- data


def write_jsonl(path, rows):
    path.parent.mkdir(parents=True, exist_ok=True)
    lines = [json.dumps(row, ensure_ascii=False) + "\n" for row in rows]
    path.write_text("".join(lines), encoding="utf-8")
    return path


def write_parquet(path, rows):
    path.parent.mkdir(parents=True, exist_ok=True)
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), path)
    return path


def answers(rows):
    return [example.answer for example in rows]
