"""The corrupted view I_mask: what the policy is shown beside the image, so that KL_prcp can ask what the image gave.

It acts on the image processor's flattened patches, after resizing and normalisation, before the vision tower:
pixel_values[N_patch, D_patch], one row a patch of patch_size x patch_size pixels, D_patch = (channel, temporal copy, y,
x). A masked row is black in all channels and in both temporal copies (a still image is fed as two equal frames).

The released code draws 14-px tiles on the raw image, before resizing and RGB conversion, from an unseeded global
generator, so a tile rarely is a patch of the model. Here tiles are patches and the generator is handed in: one mask a
prompt, shared by its group.

A new corruption is one function (pixel_values, ratio, ...) -> (masked, hit) and one line in `mask_prompt`.
"""

from __future__ import annotations

import math

import torch
from PIL import Image
from torch import Tensor

STRATEGIES = ("random", "semantic", "noise")


def _check_ratio(ratio: float) -> None:
    if not 0.0 <= ratio <= 1.0:
        raise ValueError(f"mask_ratio={ratio}: choose a share of patches between 0 and 1")


def _check_patches(pixel_values: Tensor) -> None:
    if pixel_values.dim() != 2:
        raise ValueError(f"pixel_values of shape {tuple(pixel_values.shape)}: expected flattened [N_patch, D_patch]")


def black_patch(image_mean: list[float], image_std: list[float], d_patch: int) -> Tensor:
    """What a black patch is after normalisation, [D_patch]: (0 - mean) / std in each channel; 0 would be mean grey."""
    if d_patch % len(image_mean):
        raise ValueError(f"D_patch={d_patch} does not divide into {len(image_mean)} channels")
    black = -torch.tensor(image_mean) / torch.tensor(image_std)
    return black.repeat_interleave(d_patch // len(image_mean))  # the channel is the slowest axis of a patch


def mask_patches(
    pixel_values: Tensor, ratio: float, black: Tensor, generator: torch.Generator | None = None
) -> tuple[Tensor, Tensor]:
    """Random masking (the paper's default): every patch is blackened independently with probability `ratio`.

    pixel_values[N_patch, D_patch] (untouched), black[D_patch] -> masked[N_patch, D_patch], hit[N_patch] bool.
    """
    _check_ratio(ratio)
    _check_patches(pixel_values)
    hit = torch.rand(len(pixel_values), generator=generator) < ratio
    return _blacken(pixel_values, hit, black), hit


def mask_salient(pixel_values: Tensor, ratio: float, black: Tensor, saliency: Tensor) -> tuple[Tensor, Tensor]:
    """Semantic masking: the round(ratio * N) most salient patches turn black; saliency[N_patch] in patch order."""
    _check_ratio(ratio)
    _check_patches(pixel_values)
    if saliency.shape != (len(pixel_values),):
        raise ValueError(f"saliency of shape {tuple(saliency.shape)} for {len(pixel_values)} patches")
    order = saliency.float().argsort(descending=True, stable=True)
    hit = torch.zeros(len(pixel_values), dtype=torch.bool)
    hit[order[: round(ratio * len(pixel_values))]] = True
    return _blacken(pixel_values, hit, black), hit


def noise_patches(
    pixel_values: Tensor, ratio: float, sigma: float, generator: torch.Generator | None = None, channels: int = 3
) -> tuple[Tensor, Tensor]:
    """Noise: a share `ratio` of the patches gets Gaussian noise of `sigma`, in units of normalised pixels.

    The noise of a pixel is the same in both temporal copies: it is noise on the picture, not on the model's input.
    """
    _check_ratio(ratio)
    _check_patches(pixel_values)
    n, d = pixel_values.shape
    hit = torch.rand(n, generator=generator) < ratio
    noise = torch.randn(n, channels, 1, d // channels // 2, generator=generator) * sigma
    noise = noise.expand(-1, -1, 2, -1).reshape(n, d).to(pixel_values)
    return torch.where(hit[:, None].to(pixel_values.device), pixel_values + noise, pixel_values), hit


def mask_prompt(prompt, algo, encoder, generator: torch.Generator, saliency=None) -> tuple[Tensor, Tensor]:
    """The masked view of a papo.Prompt, image after image: (masked[N_patch, D_patch], hit[N_patch] bool).

    The strategy is algo.mask_strategy; `saliency` is a function image -> [h, w], for "semantic". A prompt that brings
    pre-masked images (column images_aug) has them for its view.
    """
    pixels = prompt.pixel_values
    if prompt.aug_pixel_values is not None:
        return prompt.aug_pixel_values, (prompt.aug_pixel_values != pixels).any(-1)
    views = []
    sizes = prompt.image_grid_thw.prod(-1).tolist()
    for image, patches, (_, h, w) in zip(
        prompt.example.images, pixels.split(sizes), prompt.image_grid_thw.tolist(), strict=True
    ):
        if algo.mask_strategy == "random":
            views.append(mask_patches(patches, algo.mask_ratio, encoder.black, generator))
        elif algo.mask_strategy == "noise":
            views.append(noise_patches(patches, algo.mask_ratio, algo.mask_sigma, generator))
        elif algo.mask_strategy == "semantic":
            if saliency is None:
                raise ValueError("mask_strategy=semantic needs a saliency function, image -> [h, w]")
            order = to_patch_order(saliency(image), h, w, encoder.images.merge_size)
            views.append(mask_salient(patches, algo.mask_ratio, encoder.black, order))
        else:
            raise ValueError(f"mask_strategy={algo.mask_strategy!r}: choose one of {', '.join(STRATEGIES)}")
    return torch.cat([masked for masked, _ in views]), torch.cat([hit for _, hit in views])


def to_patch_order(saliency: Tensor, grid_h: int, grid_w: int, merge: int = 2) -> Tensor:
    """A saliency map [h, w] of any size -> [grid_h * grid_w], resampled to the patch grid, in the processor's order.

    The processor walks the grid in blocks of merge x merge patches, because the merger joins each block to one token.
    """
    grid = torch.nn.functional.interpolate(saliency.float()[None, None], (grid_h, grid_w), mode="area")[0, 0]
    blocks = grid.view(grid_h // merge, merge, grid_w // merge, merge)
    return blocks.permute(0, 2, 1, 3).reshape(-1)


def dino_saliency(model: str = "facebook/dinov2-base"):
    """A saliency function image -> [h, w]: how much a DINOv2's class token attends to each patch, mean over heads.

    `model`: a hub id or a local folder. The transformers class does the work, on the CPU.
    """
    from transformers import AutoModel, BitImageProcessorPil

    processor = BitImageProcessorPil.from_pretrained(model)
    whole = {"size": {"height": 224, "width": 224}, "do_center_crop": False}  # a crop would leave the edges unscored
    dino = AutoModel.from_pretrained(model, attn_implementation="eager").eval()  # only eager returns attentions

    @torch.no_grad()
    def saliency(image: Image.Image) -> Tensor:
        pixels = processor(image.convert("RGB"), return_tensors="pt", **whole)["pixel_values"]  # [1, 3, H, W]
        attention = dino(pixels, output_attentions=True).attentions[-1]  # [1, heads, 1 + n, 1 + n]
        h, w = (side // dino.config.patch_size for side in pixels.shape[-2:])
        return attention[0, :, 0, -h * w :].mean(0).view(h, w)  # the class token's row, patches only

    return saliency


def mask_image(
    image: Image.Image, ratio: float = 0.6, patch_size: int = 14, generator: torch.Generator | None = None
) -> Image.Image:
    """The random mask on a picture, for people to look at; the same grid as the model's if it has the model's size."""
    _check_ratio(ratio)
    masked = image.convert("RGB")
    masked = masked.copy() if masked is image else masked
    rows, columns = math.ceil(image.height / patch_size), math.ceil(image.width / patch_size)
    hit = torch.rand(rows, columns, generator=generator) < ratio
    for y, x in hit.nonzero().tolist():
        corner = (x * patch_size, y * patch_size)
        masked.paste((0, 0, 0), (*corner, corner[0] + patch_size, corner[1] + patch_size))
    return masked


def _blacken(pixel_values: Tensor, hit: Tensor, black: Tensor) -> Tensor:
    return torch.where(hit[:, None].to(pixel_values.device), black.to(pixel_values), pixel_values)
