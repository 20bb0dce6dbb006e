"""PGPO (arXiv 2604.01840): weigh each token's advantage by how much it depends on the image.

    S_t = min(k3(d), 10),  d = log pi_black - log pi_old         dependency of a token
    I_t = log(1 + S_t), scaled to [0, 1] within its response
    w_t = I_t / tau                              where I_t < tau
          1 + beta (I_t - tau) / (1 - tau)       elsewhere;  then w sums to the response's length
    L   = DAPO's, with A_i w_t in place of A_i

--form development: the authors' earlier rule. In place of tau stands q, the I of rank floor(tau n)
among a response's n tokens; w_t >= 0.1, and w is not rescaled.

Source: third parties' code and quotation; n = 5. It cuts the attention to the image; here the image
is black. Where no token depends on the image, as without one, all weights are 1.
"""

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from papo import Algo
from support.config import flag
from variants.vppo import visual_dependency


@dataclass(frozen=True)
class PGPO(Algo):
    kl_ref_coef: float = 0.0
    kl_prcp_coef: float = 0.0
    clip_high: float = 0.28
    dynamic_sampling: bool = True
    mask_ratio: float = 1.0  # a black image
    threshold: float = flag(0.4, "tau: dependency, or rank, of weight 1", low=0.01, high=0.99)
    boost: float = flag(2.0, "beta: how much the weight rises from there to the largest dependency")
    form: Literal["paper", "development"] = flag("paper", "the rule of the weights")

    def views(self):
        return ("mask",)

    def weigh(self, groups, policy):
        rule = development_weights if self.form == "development" else token_weights
        settings = (self.threshold, self.boost)
        return [rule(visual_dependency(each), each.response_mask, *settings) for each in groups]


def scaled_dependency(dependency: Tensor, mask: Tensor) -> Tensor:
    """I[G, T] in [0, 1] from dependency[G, T]; 0 at padding and where a response's S are equal."""
    logs = torch.log1p(dependency)
    low = logs.masked_fill(~mask, torch.inf).amin(1, keepdim=True)
    high = logs.masked_fill(~mask, -torch.inf).amax(1, keepdim=True)
    return torch.where(mask & (high - low > 1e-8), (logs - low) / (high - low), 0.0)


def token_weights(dependency: Tensor, mask: Tensor, threshold: float, boost: float) -> Tensor:
    """w[G, T], the paper's form; 0 at padding."""
    scaled = scaled_dependency(dependency, mask)
    raised = 1 + boost * (scaled - threshold) / (1 - threshold)
    weights = torch.where(scaled < threshold, scaled / threshold, raised) * mask
    weights = torch.where(scaled.amax(1, keepdim=True) > 0, weights, mask.float())
    return weights * mask.sum(1, keepdim=True) / weights.sum(1, keepdim=True)


def development_weights(dependency: Tensor, mask: Tensor, threshold: float, boost: float) -> Tensor:
    """w[G, T], the development form; 0 at padding."""
    scaled = scaled_dependency(dependency, mask)
    ascending = scaled.masked_fill(~mask, torch.inf).sort(1).values
    lengths = mask.sum(1, keepdim=True)
    rank = (threshold * lengths.double()).floor().long().minimum(lengths - 1)
    at_rank = ascending.gather(1, rank)
    below = (scaled / (at_rank + 1e-8)).clamp(min=0.1)
    above = 1 + boost * (scaled - at_rank) / (1 - at_rank + 1e-8)
    return torch.where(scaled < at_rank, below, above) * mask
