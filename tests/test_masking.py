"""Masks on the real processor's patches: whole patches, both temporal copies, seeded, the asked share."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from conftest import random_image
from PIL import Image

from masking import mask_patches, mask_prompt, mask_salient, noise_patches, to_patch_order
from papo import preset
from support.batch import Example, seeded
from support.saliency import dino_saliency


@pytest.fixture(scope="module")
def prompt(encoder):
    """Two pictures of different sizes: 16 x 20 and 8 x 12 patches."""
    return encoder.encode(
        Example("<image><image>?", "1", [random_image(280, 224), random_image(168, 112, 1)])
    )


def test_a_masked_patch_is_what_the_processor_makes_of_black(encoder, prompt):
    black_image = encoder.images(images=[Image.new("RGB", (56, 56))], return_tensors="pt")[
        "pixel_values"
    ]
    torch.testing.assert_close(black_image, encoder.black_patch.expand_as(black_image))
    masked, hit = mask_patches(prompt.pixel_values, 0.6, encoder.black_patch, seeded(0))
    torch.testing.assert_close(masked[hit], encoder.black_patch.expand(int(hit.sum()), -1))
    assert torch.equal(masked[~hit], prompt.pixel_values[~hit])
    copies = masked.view(len(masked), 3, 2, -1)
    assert torch.equal(copies[:, :, 0], copies[:, :, 1])


def test_share_seed_and_untouched_input(encoder, prompt):
    before = prompt.pixel_values.clone()
    n = len(before)
    for ratio in (0.0, 0.3, 0.6, 1.0):
        _, hit = mask_patches(prompt.pixel_values, ratio, encoder.black_patch, seeded(1))
        assert abs(hit.float().mean().item() - ratio) <= 4 * (ratio * (1 - ratio) / n) ** 0.5
    once, again, other = (
        mask_patches(prompt.pixel_values, 0.6, encoder.black_patch, seeded(s))[1] for s in (1, 1, 2)
    )
    assert torch.equal(once, again) and not torch.equal(once, other)
    assert torch.equal(prompt.pixel_values, before)


@pytest.mark.parametrize("ratio", [-0.1, 1.1, float("nan")])
def test_a_ratio_outside_0_1_is_an_error(encoder, prompt, ratio):
    for function in (
        lambda: mask_patches(prompt.pixel_values, ratio, encoder.black_patch),
        lambda: noise_patches(prompt.pixel_values, ratio, 1.0),
        lambda: mask_salient(
            prompt.pixel_values, ratio, encoder.black_patch, torch.zeros(len(prompt.pixel_values))
        ),
    ):
        with pytest.raises(ValueError, match="between 0 and 1"):
            function()


def test_unknown_shapes_and_strategies_are_loud(encoder, prompt):
    with pytest.raises(ValueError, match="flattened"):
        mask_patches(torch.zeros(1, 3, 28, 28), 0.5, encoder.black_patch)
    algo = preset("papo_g")
    object.__setattr__(algo, "mask_strategy", "blur")  # past the check in Algo
    with pytest.raises(ValueError, match="'blur'.*random, semantic, noise"):
        mask_prompt(prompt, algo, encoder, seeded(0))
    with pytest.raises(ValueError, match="saliency"):
        mask_prompt(prompt, replace(preset("papo_g"), mask_strategy="semantic"), encoder, seeded(0))


def test_noise_is_on_the_picture(prompt):
    noisy, hit = noise_patches(prompt.pixel_values, 0.5, 0.7, seeded(0))
    assert torch.equal(noisy[~hit], prompt.pixel_values[~hit]) and 0.3 < hit.float().mean() < 0.7
    difference = (noisy - prompt.pixel_values)[hit].view(int(hit.sum()), 3, 2, -1)
    torch.testing.assert_close(difference[:, :, 0], difference[:, :, 1], atol=1e-5, rtol=0)
    assert difference.std().item() == pytest.approx(0.7, rel=0.05)


def test_noise_is_the_same_in_all_temporal_copies():
    patches = torch.zeros(50, 3 * 3 * 14 * 14)  # three copies
    noisy, _ = noise_patches(patches, 1.0, 1.0, seeded(0), copies=3)
    copies = noisy.view(50, 3, 3, -1)
    assert torch.equal(copies[:, :, 0], copies[:, :, 1])
    assert torch.equal(copies[:, :, 0], copies[:, :, 2])


def test_semantic_hides_the_most_salient_patches_of_each_image(encoder):
    """The bright corner of each picture goes first; the patch order is the processor's, checked on its own output."""
    images = []
    for width, height in ((280, 224), (168, 112)):
        pixels = np.zeros((height, width, 3), dtype=np.uint8)
        pixels[: height // 2, : width // 2] = 255
        images.append(Image.fromarray(pixels))
    prompt = encoder.encode(Example("<image><image>?", "1", images))
    algo = replace(preset("papo_g"), mask_strategy="semantic", mask_ratio=0.25)
    brightness = lambda image: torch.tensor(np.asarray(image.convert("L"), dtype=np.float32))  # noqa: E731
    masked, hit = mask_prompt(prompt, algo, encoder, seeded(0), brightness)
    white = (prompt.pixel_values > 1).all(-1)
    assert torch.equal(hit, white) and hit.float().mean() == 0.25
    torch.testing.assert_close(masked, encoder.black_patch.expand_as(masked), atol=1e-5, rtol=0)


def test_semantic_ties_are_broken_at_random(encoder, prompt):
    """A toy image is salient on a few dots only: the rest must not go in reading order."""
    n = len(prompt.pixel_values)
    saliency = torch.zeros(n)
    saliency[-3:] = 1.0
    chosen = []
    for seed in (0, 0, 1):
        args = (prompt.pixel_values, 0.5, encoder.black_patch, saliency)
        chosen.append(mask_salient(*args, seeded(seed))[1])
    assert all(int(mask.sum()) == round(0.5 * n) and mask[-3:].all() for mask in chosen)
    assert torch.equal(chosen[0], chosen[1]) and not torch.equal(chosen[0], chosen[2])
    assert 0.3 < chosen[0][: n // 2].float().mean() < 0.7


def test_patch_order_is_the_processors(encoder):
    """A picture whose every patch has its own grey: reading it off the patches gives the order."""
    h, w = 6, 10
    grey = torch.arange(h * w, dtype=torch.float32).view(h, w) * 4
    pixels = grey.repeat_interleave(14, 0).repeat_interleave(14, 1).to(torch.uint8).numpy()
    out = encoder.images(images=[Image.fromarray(pixels).convert("RGB")], return_tensors="pt")
    assert out["image_grid_thw"].tolist() == [[1, h, w]]
    seen = out["pixel_values"][:, 0]
    assert torch.equal(seen.argsort(), to_patch_order(grey, h, w).argsort())


def test_dino_saliency_of_a_tiny_dino(tmp_path):
    from transformers import BitImageProcessorPil, Dinov2Config, Dinov2Model

    config = Dinov2Config(
        hidden_size=16, num_hidden_layers=2, num_attention_heads=2, image_size=56, patch_size=14
    )
    torch.manual_seed(0)
    Dinov2Model(config).save_pretrained(tmp_path)
    BitImageProcessorPil(
        size={"shortest_edge": 256}, crop_size={"height": 224, "width": 224}
    ).save_pretrained(tmp_path)
    saliency = dino_saliency(str(tmp_path))
    scores = saliency(random_image(300, 100))
    assert scores.shape == (16, 16) and torch.isfinite(scores).all() and (scores > 0).all()
    assert scores.sum() < 1  # the class token attends to itself, too
    assert to_patch_order(scores, 8, 22).shape == (176,)
