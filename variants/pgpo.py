"""PGPO (arXiv 2604.01840): weigh each token's advantage by how much it depends on the image.

    S_t = min(k3(d), 10),  d = log pi_blind - log pi_old         dependency of a token
    I_t = log(1 + S_t), scaled to [0, 1] within its response
    w_t = I_t / tau                                  where I_t < tau
          1 + beta (I_t - tau) / (1 - tau)           elsewhere
    L   = DAPO's, with A_i w_t n / sum(w) in place of A_i

A response's weights sum to its number of tokens n, so they move credit between its tokens.

Source: a third-party re-implementation; the authors' repository holds no code. It samples n = 5
responses.
Differences: its blind pass cuts the attention to the image tokens. Here the image is black, the
nearest equivalent that a view of the pixels allows. Responses that do not depend on the image, and
those without one, keep weight 1.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from papo import Algo
from support.config import check_range, flag
from variants.vppo import visual_dependency


@dataclass(frozen=True)
class PGPO(Algo):
    kl_ref_coef: float = 0.0
    kl_prcp_coef: float = 0.0
    clip_high: float = 0.28
    dynamic_sampling: bool = True
    threshold: float = flag(0.4, "tau: scaled dependency at which a token's weight is 1")
    boost: float = flag(2.0, "beta: how much the weight rises from tau to the largest dependency")

    def __post_init__(self):
        super().__post_init__()
        check_range(self, 0.01, 0.99, "threshold")

    def views(self):
        return ("mask",)

    def view(self, name, prompt, policy, generator):
        black = policy.encoder.black_patch.expand_as(prompt.pixel_values)
        return black, torch.ones(len(black), dtype=torch.bool)

    def weigh(self, groups, policy):
        return [
            token_weights(visual_dependency(group), group.response_mask, self.threshold, self.boost)
            for group in groups
        ]


def token_weights(dependency: Tensor, mask: Tensor, threshold: float, boost: float) -> Tensor:
    """w[G, T] from dependency[G, T]; 0 at padding."""
    scaled = torch.log1p(dependency)
    low = scaled.masked_fill(~mask, torch.inf).amin(1, keepdim=True)
    high = scaled.masked_fill(~mask, -torch.inf).amax(1, keepdim=True)
    scaled = (scaled - low) / (high - low)
    raised = 1 + boost * (scaled - threshold) / (1 - threshold)
    weights = torch.where(scaled < threshold, scaled / threshold, raised)
    weights = torch.where(high > low, weights, 1.0) * mask
    return weights * mask.sum(1, keepdim=True) / weights.sum(1, keepdim=True)
