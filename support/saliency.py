"""DINOv2 attention as image saliency, for masking.py's strategy "semantic".

The most salient patches turn black. The paper reports that random masks work better.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from PIL import Image
from torch import Tensor

from support import toy


def dino_saliency(model: str = "facebook/dinov2-base"):
    """Load a DINOv2 (hub id or local folder) on the CPU; returns a function image -> [h, w].

    Its values say how much the class token attends to each patch in the last layer, averaged over
    heads.
    """
    from transformers import AutoModel, BitImageProcessorPil

    processor = BitImageProcessorPil.from_pretrained(model)
    # Only eager attention returns its weights.
    dino = AutoModel.from_pretrained(model, attn_implementation="eager").eval()

    @torch.no_grad()
    def saliency(image: Image.Image) -> Tensor:
        inputs = processor(
            image.convert("RGB"),
            size={"height": 224, "width": 224},
            do_center_crop=False,  # a crop would leave the edges without a score
            return_tensors="pt",
        )
        pixels = inputs["pixel_values"]  # [1, 3, H, W]
        attention = dino(pixels, output_attentions=True).attentions[-1]  # [1, heads, 1 + n, 1 + n]
        h, w = (side // dino.config.patch_size for side in pixels.shape[-2:])
        class_to_patches = attention[0, :, 0, -h * w :]  # [heads, h * w]
        return class_to_patches.mean(0).view(h, w)

    return saliency


def saliency_for(strategy: str, data: str) -> Callable | None:
    """The saliency function of semantic masks on this data; None for other masks."""
    if strategy != "semantic":
        return None
    return toy.saliency if toy.setting_of(data) else dino_saliency()
