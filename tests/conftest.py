"""Fixtures: a tiny random Qwen2.5-VL as a Hugging Face folder, its encoder, policy and prompts."""

# ruff: noqa: E402  (the environment must be set before the libraries that read it are imported)
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

torch.set_num_threads(min(2, os.cpu_count() or 1))


@pytest.fixture(scope="session")
def folder(tmp_path_factory):
    """The toy's model after two steps of its warm start: real class, real files, nothing learned."""
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
    """Unequal on purpose: one image, two images, none, an oblong one."""
    return [
        Example("<image>How many red dots are there?", "1", [random_image(84, 84)]),
        Example(
            "<image>and <image>: how many green dots?",
            "2",
            [random_image(56, 84, 1), random_image(112, 56, 2)],
        ),
        Example("How many dots?", "3", []),
        Example(
            "A note says 3. <image>How many blue dots are there, all in all?",
            "0",
            [random_image(140, 56)],
        ),
    ]


@pytest.fixture(scope="session")
def prompts(encoder):
    return [encoder.encode(example, index) for index, example in enumerate(examples())]


@pytest.fixture()
def groups(policy, prompts):
    """Four groups of three responses of unequal lengths, cut by hand."""
    groups = generate(policy, prompts, 3, max_new_tokens=12, key=(0, 0), rollout_batch=5)
    for g, group in enumerate(groups):
        lengths = torch.tensor([12, 1 + g, 7 - g])
        group.response_mask &= torch.arange(group.tokens.shape[1])[None] < lengths[:, None]
        group.advantages = torch.tensor([1.0, -0.5, -0.5])
    return groups
