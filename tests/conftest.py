"""Fixtures: a tiny Qwen2.5-VL as a Hugging Face folder, its encoder, policy, prompts and groups."""

# ruff: noqa: E402  (libraries read the environment when they are imported)
import copy
import os

os.environ.setdefault("HF_HUB_OFFLINE", "1")  # no test may touch a network
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

import pytest
import torch
from PIL import Image

from rollout import generate
from support import toy
from support.batch import Example
from support.qwen_vl import Encoder, Policy

torch.set_num_threads(1)  # a tiny model is fastest on one thread


@pytest.fixture(scope="session")
def folder(tmp_path_factory):
    """The toy's model after two warm-up steps: real class, real files, nothing learned."""
    return str(toy.build(seed=0, folder=tmp_path_factory.mktemp("toy") / "model", steps=2))


@pytest.fixture(scope="session")
def encoder(folder):
    return Encoder(folder, min_pixels=3136, max_pixels=200_704, suffix="Box it.")


@pytest.fixture()
def policy(folder, encoder):
    return Policy.load(folder, encoder)


def random_image(width, height, seed=0):
    generator = torch.Generator().manual_seed(seed)
    pixels = torch.randint(0, 256, (height, width, 3), generator=generator, dtype=torch.uint8)
    return Image.fromarray(pixels.numpy())


def examples():
    """Questions with one image, with two, with none, and with an oblong one."""
    return [
        Example("<image>How many red dots are there?", "1", [random_image(84, 84)]),
        Example(
            "<image>and <image>: how many green dots?",
            "2",
            [random_image(56, 84, 1), random_image(112, 56, 2)],
        ),
        Example("How many dots?", "3", []),
        Example(
            "A note says 3. <image>How many blue dots are there in total?",
            "0",
            [random_image(140, 56)],
        ),
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


@pytest.fixture()
def record_calls(monkeypatch):
    """record_calls(owner, name) wraps a function, and returns the list its arguments go to."""

    def wrap(owner, name):
        original, calls = getattr(owner, name), []

        def recorded(*args, **kwargs):
            calls.append((args, kwargs))
            return original(*args, **kwargs)

        monkeypatch.setattr(owner, name, recorded)
        return calls

    return wrap
