"""masking.py on the real processor's patches: which are masked, with what, and by which seed."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from conftest import random_image
from PIL import Image
from transformers import BitImageProcessorPil, Dinov2Config, Dinov2Model

from masking import mask_patches, mask_prompt, mask_salient, noise_patches, to_patch_order
from papo import preset
from support.batch import Example, seeded
from support.saliency import dino_saliency


@pytest.fixture(scope="module")
def prompt(encoder):
    """Two images of different sizes: 16 x 20 and 8 x 12 patches."""
    images = [random_image(280, 224), random_image(168, 112, 1)]
    return encoder.encode(Example("<image><image>?", "1", images))


def test_a_masked_patch_is_what_the_processor_makes_of_black(encoder, prompt):
    image = Image.new("RGB", (56, 56))
    black = encoder.image_processor(images=[image], return_tensors="pt")["pixel_values"]
    torch.testing.assert_close(black, encoder.black_patch.expand_as(black))
    masked, patch_mask = mask_patches(prompt.pixel_values, 0.6, encoder.black_patch, seeded(0))
    n_masked = int(patch_mask.sum())
    torch.testing.assert_close(masked[patch_mask], encoder.black_patch.expand(n_masked, -1))
    assert torch.equal(masked[~patch_mask], prompt.pixel_values[~patch_mask])
    copies = masked.view(len(masked), 3, 2, -1)
    assert torch.equal(copies[:, :, 0], copies[:, :, 1])


def test_random_masks_have_the_ratio_and_the_seed(encoder, prompt):
    before = prompt.pixel_values.clone()

    def patch_mask(ratio, seed):
        return mask_patches(prompt.pixel_values, ratio, encoder.black_patch, seeded(seed))[1]

    for ratio in (0.0, 0.3, 0.6, 1.0):
        deviation = (ratio * (1 - ratio) / len(before)) ** 0.5
        share = patch_mask(ratio, seed=1).float().mean().item()
        assert abs(share - ratio) <= 4 * deviation
    assert torch.equal(patch_mask(0.6, seed=1), patch_mask(0.6, seed=1))
    assert not torch.equal(patch_mask(0.6, seed=1), patch_mask(0.6, seed=2))
    assert torch.equal(prompt.pixel_values, before)


def test_noise_has_its_sigma_and_spares_the_other_patches(prompt):
    noisy = noise_patches(prompt.pixel_values, 0.5, 0.7, seeded(0))
    assert torch.equal(noisy, noise_patches(prompt.pixel_values, 0.5, 0.7, seeded(0)))
    patch_mask = (noisy != prompt.pixel_values).any(-1)
    assert 0.3 < patch_mask.float().mean() < 0.7
    noise = (noisy - prompt.pixel_values)[patch_mask].view(int(patch_mask.sum()), 3, 2, -1)
    torch.testing.assert_close(noise[:, :, 0], noise[:, :, 1], atol=1e-5, rtol=0)  # over time
    assert noise.std().item() == pytest.approx(0.7, rel=0.05)


def test_semantic_masks_the_most_salient_patches_of_each_image(encoder):
    """In each image the bright quarter goes first."""
    images = []
    for width, height in ((280, 224), (168, 112)):
        images.append(Image.new("RGB", (width, height)))
        images[-1].paste((255, 255, 255), (0, 0, width // 2, height // 2))
    prompt = encoder.encode(Example("<image><image>?", "1", images))
    algo = replace(preset("papo_g"), mask_strategy="semantic", mask_ratio=0.25)

    def brightness(image):
        return torch.tensor(np.asarray(image.convert("L"), dtype=np.float32))

    masked = mask_prompt(prompt, algo, encoder, seeded(0), brightness)
    is_bright = (prompt.pixel_values > 1).all(-1)
    assert torch.equal((masked != prompt.pixel_values).any(-1), is_bright)  # a quarter
    torch.testing.assert_close(masked, encoder.black_patch.expand_as(masked), atol=1e-5, rtol=0)


def test_semantic_ties_are_broken_at_random(encoder, prompt):
    """Few patches of a toy image are salient; the rest must not be masked in reading order."""
    n = len(prompt.pixel_values)
    saliency = torch.zeros(n)
    saliency[-3:] = 1.0
    args = (prompt.pixel_values, 0.5, encoder.black_patch, saliency)
    masked = [mask_salient(*args, seeded(seed)) for seed in (0, 0, 1)]
    first, again, other = ((x != prompt.pixel_values).any(-1) for x in masked)
    for patch_mask in (first, other):
        assert int(patch_mask.sum()) == round(0.5 * n)
        assert patch_mask[-3:].all()
    assert torch.equal(first, again)
    assert not torch.equal(first, other)
    assert 0.3 < first[: n // 2].float().mean() < 0.7


def test_patch_order_is_the_processors(encoder):
    """Each patch of an image has its own grey, so the processor's output shows the order."""
    h, w = 6, 10
    grey = torch.arange(h * w, dtype=torch.float32).view(h, w) * 4
    pixels = grey.repeat_interleave(14, 0).repeat_interleave(14, 1).to(torch.uint8).numpy()
    image = Image.fromarray(pixels).convert("RGB")
    out = encoder.image_processor(images=[image], return_tensors="pt")
    assert out["image_grid_thw"].tolist() == [[1, h, w]]
    first_values = out["pixel_values"][:, 0]
    assert torch.equal(first_values.argsort(), to_patch_order(grey, h, w).argsort())


def test_dino_saliency_of_a_tiny_dino(tmp_path):
    torch.manual_seed(0)
    size = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "image_size": 56}
    Dinov2Model(Dinov2Config(**size, patch_size=14)).save_pretrained(tmp_path)
    sizes = {"size": {"shortest_edge": 256}, "crop_size": {"height": 224, "width": 224}}
    BitImageProcessorPil(**sizes).save_pretrained(tmp_path)
    scores = dino_saliency(str(tmp_path))(random_image(300, 100))
    assert scores.shape == (16, 16)
    assert (scores > 0).all()
    assert scores.sum() < 1  # the class token attends to itself, too


def test_wrong_ratios_shapes_and_strategies_are_errors(encoder, prompt):
    pixel_values, black = prompt.pixel_values, encoder.black_patch
    with pytest.raises(ValueError, match="between 0 and 1"):
        mask_patches(pixel_values, 1.1, black)
    with pytest.raises(ValueError, match="flattened"):
        mask_patches(torch.zeros(1, 3, 28, 28), 0.5, black)
    with pytest.raises(ValueError, match="saliency"):
        mask_prompt(prompt, replace(preset("papo_g"), mask_strategy="semantic"), encoder, seeded(0))
