"""DINOv2 attention, for semantic masks."""

from __future__ import annotations

import torch
from PIL import Image
from torch import Tensor


def dino_saliency(model: str = "facebook/dinov2-base"):
    """A saliency function image -> [h, w]: how much a DINOv2's class token attends to each patch, mean over heads.

    `model`: a hub id or a local folder. The transformers class does the work, on the CPU.
    """
    from transformers import AutoModel, BitImageProcessorPil

    processor = BitImageProcessorPil.from_pretrained(model)
    whole = {
        "size": {"height": 224, "width": 224},
        "do_center_crop": False,
    }  # a crop would leave the edges unscored
    dino = AutoModel.from_pretrained(
        model, attn_implementation="eager"
    ).eval()  # only eager returns attentions

    @torch.no_grad()
    def saliency(image: Image.Image) -> Tensor:
        pixels = processor(image.convert("RGB"), return_tensors="pt", **whole)[
            "pixel_values"
        ]  # [1, 3, H, W]
        attention = dino(pixels, output_attentions=True).attentions[-1]  # [1, heads, 1 + n, 1 + n]
        h, w = (side // dino.config.patch_size for side in pixels.shape[-2:])
        return (
            attention[0, :, 0, -h * w :].mean(0).view(h, w)
        )  # the class token's row, patches only

    return saliency
