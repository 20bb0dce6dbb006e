"""NoisyRollout: sample half of the responses under a noised image, train all under the clean one.

    x_k = sqrt(abar_k) x + sqrt(1 - abar_k) eps                  noised pixels, x in [0, 1]
    k(t) = int(500 (1 - sigmoid(30 (t - 40) / t_max)))           noise at step t of t_max

The 2n responses to a question form one group of GRPO, so the noised half adds wrong and different
readings to compare with. It is off-policy, and no ratio corrects for it.

Source: the authors' code, github.com/NUS-TRAIL/NoisyRollout, its values for Geometry3K (for MMK12:
450, 60, 40). It has n = 6 and freezes the vision tower: --group_size 6 --freeze_vision. With PAPO's
term, as in Table 2 of the PAPO paper: --kl_prcp_coef 0.02.
Differences: it adds noise to the raw image and rounds to 8 bits; here the noise is on the resized
pixels, from a seeded generator. A question without an image is sampled 2n times as it is.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from papo import Algo
from support.batch import seeded
from support.config import check_range, flag

DIFFUSION_STEPS = 1000


@dataclass(frozen=True)
class NoisyRollout(Algo):
    kl_ref_coef: float = 0.0
    kl_prcp_coef: float = 0.0
    entropy_coef: float = -0.001  # a bonus, where PAPO's entropies are penalties
    clip_high: float = 0.2
    noise_steps: int = flag(500, "diffusion steps of noise at first")
    noise_slope: float = flag(30.0, "how steeply the noise falls to 0")
    noise_middle: float = flag(40.0, "training step at which half of the noise is left")

    def __post_init__(self):
        super().__post_init__()
        check_range(self, 0, DIFFUSION_STEPS - 1, "noise_steps")

    def at_step(self, step, last_step):
        fall = self.noise_slope * (step + 1 - self.noise_middle) / last_step  # t counts from 1
        left = 1 - 1 / (1 + math.exp(min(-fall, 700)))  # exp(710) overflows
        return replace(self, noise_steps=int(self.noise_steps * left))

    def sample(self, prompts, policy, generate, key):
        pairs = [(prompt, self._noised(prompt, policy, key)) for prompt in prompts]
        groups = generate([image for pair in pairs for image in pair])
        for clean, noised in zip(groups[::2], groups[1::2], strict=True):
            noised.prompt = clean.prompt  # trained under the clean image
        return groups

    def _noised(self, prompt, policy, key):
        if prompt.pixel_values is None:
            return prompt
        generator = seeded("images", *key, prompt.index)
        pixels = add_noise(prompt.pixel_values, self.noise_steps, policy.encoder.images, generator)
        return replace(prompt, pixel_values=pixels)


def add_noise(pixel_values: Tensor, steps: int, processor, generator: torch.Generator) -> Tensor:
    """pixel_values[N_patch, D_patch] after `steps` of the diffusion; processor: the encoder's.

    The copies of a still image over time share their noise.
    """
    mean = torch.tensor(processor.image_mean)[:, None, None]  # [3, 1, 1]
    std = torch.tensor(processor.image_std)[:, None, None]
    n, copies = len(pixel_values), processor.temporal_patch_size
    pixels = pixel_values.view(n, 3, copies, -1) * std + mean  # in [0, 1]
    noise = torch.randn(n, 3, 1, pixels.shape[-1], generator=generator)
    kept = share_kept(steps)
    noised = (kept.sqrt() * pixels + (1 - kept).sqrt() * noise).clamp(0, 1)
    return ((noised - mean) / std).reshape(n, -1)


def share_kept(steps: int) -> Tensor:
    """abar_k: the share of the image's variance left after so many diffusion steps."""
    betas = torch.linspace(-6, 6, DIFFUSION_STEPS).sigmoid() * (5e-3 - 1e-5) + 1e-5
    return (1 - betas).cumprod(0)[steps]
