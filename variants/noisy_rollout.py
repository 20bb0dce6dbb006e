"""NoisyRollout: sample half of the responses under a noised image, train all under the clean one.

    x_k = sqrt(abar_k) x + sqrt(1 - abar_k) eps            noised pixels, x in [0, 1]
    k(t) = int(500 (1 - sigmoid(30 (t - 40) / t_max)))     noise at step t of t_max

The 2n responses to a question form one group; the noised half is off-policy, without correction.

Source: the authors' code, github.com/NUS-TRAIL/NoisyRollout, its values for Geometry3K (for MMK12:
450, 60, 40); n = 6, --freeze_vision. In the PAPO paper's Table 2: --kl_prcp_coef 0.02.
Differences: its entropy bonus is over the whole vocabulary; through sampled tokens it would do
almost nothing, so there is none here. It noises raw 8-bit images; here the resized pixels.
"""

import math
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from papo import Algo
from support.batch import seeded
from support.config import flag


@dataclass(frozen=True)
class NoisyRollout(Algo):
    kl_ref_coef: float = 0.0
    kl_prcp_coef: float = 0.0
    clip_high: float = 0.2
    clip_dual: float = math.inf  # none
    noise_steps: int = flag(500, "diffusion steps of noise at first", low=0, high=999)
    noise_slope: float = flag(30.0, "how steeply the noise falls to 0")
    noise_middle: float = flag(40.0, "training step at which half of the noise is left")

    def at_step(self, step, n_steps):
        past_middle = (step + 1 - self.noise_middle) / n_steps  # t counts from 1
        return replace(self, noise_steps=falling(self.noise_steps, self.noise_slope * past_middle))

    def sample(self, prompts, policy, sample_groups, key):
        groups = sample_groups([x for p in prompts for x in (p, self._noised(p, policy, key))])
        for clean, noised in zip(groups[::2], groups[1::2], strict=True):
            noised.prompt = clean.prompt  # trained under the clean image
        return groups

    def _noised(self, prompt, policy, key):
        if prompt.pixel_values is None:
            return prompt
        generator = seeded("images", *key, prompt.index)
        pixels = add_noise(
            prompt.pixel_values, self.noise_steps, policy.encoder.image_processor, generator
        )
        return replace(prompt, pixel_values=pixels)


def falling(steps: int, x: float) -> int:
    """steps (1 - sigmoid(x)), rounded down."""
    return int(steps / (1 + math.exp(min(x, 700))))  # exp(710) overflows


def add_noise(pixel_values: Tensor, steps: int, processor, generator: torch.Generator) -> Tensor:
    """pixel_values[N_patch, D_patch] after `steps` of the diffusion; processor: the Encoder's."""
    mean = torch.tensor(processor.image_mean)[:, None, None]
    std = torch.tensor(processor.image_std)[:, None, None]
    n, copies = len(pixel_values), processor.temporal_patch_size
    pixels = pixel_values.view(n, 3, copies, -1) * std + mean  # in [0, 1]
    noise = torch.randn(n, 3, 1, pixels.shape[-1], generator=generator)  # copies over time share it
    kept = share_kept(steps)
    noised = (kept.sqrt() * pixels + (1 - kept).sqrt() * noise).clamp(0, 1)
    return ((noised - mean) / std).reshape(n, -1)


def share_kept(steps: int) -> Tensor:
    """abar_k: the share of the image's variance left after so many diffusion steps."""
    betas = torch.linspace(-6, 6, 1000).sigmoid() * (5e-3 - 1e-5) + 1e-5
    return (1 - betas).cumprod(0)[steps]
