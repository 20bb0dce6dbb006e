"""The masked image I_mask, the corrupted view in KL_prcp.

Masking acts on the image processor's output, after resizing and normalisation and before the
vision tower: pixel_values[N_patch, D_patch], one row per patch, whose D_patch values are ordered
(channel, temporal copy, y, x). The processor repeats a still image temporal_patch_size times; these
are the temporal copies.

The release blacks out 14-px tiles of the raw image, before it is resized, so tiles rarely line up
with the model's patches; its generator is global and unseeded. Here a tile is a patch, and the
caller's generator draws one mask per prompt, shared by its group. Semantic masks need a
saliency map: DINOv2's attention (support/saliency.py), or the toy's dots.

To add a corruption, write a function of patches, add its name to STRATEGIES and a branch to
`mask_prompt`; its parameters are fields of papo.Algo. Or override Algo.view in a variant.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

STRATEGIES = ("random", "semantic", "noise")


def mask_patches(
    pixel_values: Tensor, ratio: float, black: Tensor, generator: torch.Generator | None = None
) -> tuple[Tensor, Tensor]:
    """Random masking, the paper's default: each patch turns black with probability `ratio`.

    pixel_values[N_patch, D_patch], left untouched; black[D_patch], a black patch after
    normalisation. Returns masked[N_patch, D_patch] and patch_mask[N_patch], True where masked.
    """
    _check(pixel_values, ratio)
    patch_mask = torch.rand(len(pixel_values), generator=generator) < ratio
    return _replace(pixel_values, patch_mask, black), patch_mask


def mask_salient(
    pixel_values: Tensor,
    ratio: float,
    black: Tensor,
    saliency: Tensor,
    generator: torch.Generator | None = None,
) -> Tensor:
    """Semantic masking: the round(ratio * N_patch) most salient patches turn black.

    saliency[N_patch], in patch order (see to_patch_order). Other arguments: see mask_patches.
    Returns the masked pixels.
    """
    _check(pixel_values, ratio)
    n = len(pixel_values)
    if saliency.shape != (n,):
        raise ValueError(f"saliency of shape {tuple(saliency.shape)} for {n} patches")
    # Ties are broken at random: by position, they would mask the same corner of every image.
    shuffled = torch.randperm(n, generator=generator)
    by_saliency = saliency.float()[shuffled].argsort(descending=True, stable=True)
    order = shuffled[by_saliency]
    patch_mask = torch.zeros(n, dtype=torch.bool)
    patch_mask[order[: round(ratio * n)]] = True
    return _replace(pixel_values, patch_mask, black)


def noise_patches(
    pixel_values: Tensor,
    ratio: float,
    sigma: float,
    generator: torch.Generator | None = None,
    copies: int = 2,
) -> Tensor:
    """Noise: each patch gets Gaussian noise with probability `ratio`.

    sigma: standard deviation in normalised pixel units. copies: temporal_patch_size. Copies share
    their noise, since they show one image. Other arguments: see mask_patches. Returns the pixels.
    """
    _check(pixel_values, ratio)
    channels = 3
    n, d_patch = pixel_values.shape
    patch_mask = torch.rand(n, generator=generator) < ratio
    # (patch, channel, copy, y x)
    noise = torch.randn(n, channels, 1, d_patch // channels // copies, generator=generator) * sigma
    noise = noise.expand(-1, -1, copies, -1).reshape(n, d_patch).to(pixel_values)
    return _replace(pixel_values, patch_mask, pixel_values + noise)


def _replace(pixel_values: Tensor, patch_mask: Tensor, replacement: Tensor) -> Tensor:
    where = patch_mask[:, None].to(pixel_values.device)
    return torch.where(where, replacement.to(pixel_values), pixel_values)


def _check(pixel_values: Tensor, ratio: float) -> None:
    if not 0 <= ratio <= 1:
        raise ValueError(f"mask_ratio={ratio}: choose a share of patches between 0 and 1")
    if pixel_values.dim() != 2:
        shape = tuple(pixel_values.shape)
        raise ValueError(f"pixel_values of shape {shape}: expected flattened [N_patch, D_patch]")


# ------------------------------------------------------------------------------------ whole prompts


def mask_each_image(prompt, mask_image: Callable) -> Tensor:
    """Call mask_image on each image of a prompt and join the pixels that it returns.

    mask_image(patches, grid, image): its patches, (rows, columns) of patches, and the PIL image.
    """
    grids = prompt.image_grid_thw  # [n_images, 3]: time, rows, columns
    patches_per_image = prompt.pixel_values.split(grids.prod(-1).tolist())
    images = zip(patches_per_image, grids.tolist(), prompt.example.images, strict=True)
    return torch.cat([mask_image(patches, grid[1:], image) for patches, grid, image in images])


def mask_prompt(
    prompt, algo, encoder, generator: torch.Generator, saliency: Callable | None = None
) -> Tensor:
    """The pixels of a prompt's masked view, [N_patch, D_patch].

    algo: papo.Algo, whose mask_strategy, mask_ratio and mask_sigma say how. "semantic" needs
    `saliency`, a function image -> [h, w]. Where the data has a column images_aug of images masked
    beforehand, they are used as they are, whatever the strategy.
    """
    if "images_aug" in prompt.more_pixel_values:
        return prompt.more_pixel_values["images_aug"]
    ratio, black = algo.mask_ratio, encoder.black_patch

    def mask_image(patches: Tensor, grid: tuple[int, int], image) -> Tensor:
        if algo.mask_strategy == "random":
            masked, _ = mask_patches(patches, ratio, black, generator)
            return masked
        if algo.mask_strategy == "noise":
            copies = encoder.image_processor.temporal_patch_size
            return noise_patches(patches, ratio, algo.mask_sigma, generator, copies)
        if algo.mask_strategy == "semantic":
            if saliency is None:
                raise ValueError("mask_strategy=semantic needs a saliency function image -> [h, w]")
            scores = to_patch_order(saliency(image), *grid, encoder.image_processor.merge_size)
            return mask_salient(patches, ratio, black, scores, generator)
        choices = ", ".join(STRATEGIES)
        raise ValueError(f"mask_strategy={algo.mask_strategy!r}: choose one of {choices}")

    return mask_each_image(prompt, mask_image)


def to_patch_order(values: Tensor, rows: int, columns: int, merge: int = 2) -> Tensor:
    """Resample a map [h, w] of values to the patch grid, in the processor's order: [N_patch].

    The processor walks the grid in blocks of merge x merge patches, because the model merges
    each block into one image token.
    """
    size = (rows, columns)
    grid = torch.nn.functional.interpolate(values.float()[None, None], size, mode="area")[0, 0]
    blocks = grid.view(rows // merge, merge, columns // merge, merge)
    return blocks.permute(0, 2, 1, 3).reshape(-1)
