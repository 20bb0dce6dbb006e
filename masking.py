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

import torch
from torch import Tensor

STRATEGIES = ("random", "semantic", "noise")


def _check_ratio(ratio: float) -> None:
    if not 0.0 <= ratio <= 1.0:
        raise ValueError(f"mask_ratio={ratio}: choose a share of patches between 0 and 1")


def _check_patches(pixel_values: Tensor) -> None:
    if pixel_values.dim() != 2:
        raise ValueError(
            f"pixel_values of shape {tuple(pixel_values.shape)}: expected flattened [N_patch, D_patch]"
        )


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


def mask_salient(
    pixel_values: Tensor, ratio: float, black: Tensor, saliency: Tensor
) -> tuple[Tensor, Tensor]:
    """Semantic masking: the round(ratio * N) most salient patches turn black; saliency[N_patch] in patch order."""
    _check_ratio(ratio)
    _check_patches(pixel_values)
    if saliency.shape != (len(pixel_values),):
        raise ValueError(
            f"saliency of shape {tuple(saliency.shape)} for {len(pixel_values)} patches"
        )
    order = saliency.float().argsort(descending=True, stable=True)
    hit = torch.zeros(len(pixel_values), dtype=torch.bool)
    hit[order[: round(ratio * len(pixel_values))]] = True
    return _blacken(pixel_values, hit, black), hit


def noise_patches(
    pixel_values: Tensor,
    ratio: float,
    sigma: float,
    generator: torch.Generator | None = None,
    channels: int = 3,
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
    return torch.where(
        hit[:, None].to(pixel_values.device), pixel_values + noise, pixel_values
    ), hit


def mask_prompt(
    prompt, algo, encoder, generator: torch.Generator, saliency=None
) -> tuple[Tensor, Tensor]:
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
            views.append(mask_patches(patches, algo.mask_ratio, encoder.black_patch, generator))
        elif algo.mask_strategy == "noise":
            views.append(noise_patches(patches, algo.mask_ratio, algo.mask_sigma, generator))
        elif algo.mask_strategy == "semantic":
            if saliency is None:
                raise ValueError(
                    "mask_strategy=semantic needs a saliency function, image -> [h, w]"
                )
            order = to_patch_order(saliency(image), h, w, encoder.images.merge_size)
            views.append(mask_salient(patches, algo.mask_ratio, encoder.black_patch, order))
        else:
            raise ValueError(
                f"mask_strategy={algo.mask_strategy!r}: choose one of {', '.join(STRATEGIES)}"
            )
    return torch.cat([masked for masked, _ in views]), torch.cat([hit for _, hit in views])


def to_patch_order(saliency: Tensor, grid_h: int, grid_w: int, merge: int = 2) -> Tensor:
    """A saliency map [h, w] of any size -> [grid_h * grid_w], resampled to the patch grid, in the processor's order.

    The processor walks the grid in blocks of merge x merge patches, because the merger joins each block to one token.
    """
    grid = torch.nn.functional.interpolate(
        saliency.float()[None, None], (grid_h, grid_w), mode="area"
    )[0, 0]
    blocks = grid.view(grid_h // merge, merge, grid_w // merge, merge)
    return blocks.permute(0, 2, 1, 3).reshape(-1)


def _blacken(pixel_values: Tensor, hit: Tensor, black: Tensor) -> Tensor:
    return torch.where(hit[:, None].to(pixel_values.device), black.to(pixel_values), pixel_values)
