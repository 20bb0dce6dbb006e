"""VPPO: train on the tokens that depend on the image, more in responses that depend on it more.

    S_t = min(k3(d), 10),  d = log pi_mask - log pi_old       dependency of a token
    L   = DAPO's, with A_i w_i m_t in place of A_i,  + 0.06 H

m_t is 1 at the ceil(0.4 n) of a response's n tokens whose S is largest, else 0. x_i is the
response's mean S, min-max scaled over the mini-batch; w_i = 0.9 + 0.1 x_i / mean(x) has mean 1.

Source: the authors' code, github.com/huaixuheqing/VPPO-RL; n = 8, reward accuracy alone.
Differences: it masks per response, in 14-px tiles, and scales over one device's share; here a
prompt has one mask, of the model's patches, and all ranks scale. Without an image the weight is 1.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from losses import kl_k3
from papo import Algo
from support.config import flag
from support.distributed import concat_over_ranks


@dataclass(frozen=True)
class VPPO(Algo):
    kl_ref_coef: float = 0.0
    kl_prcp_coef: float = 0.0
    entropy_coef: float = 0.06
    clip_high: float = 0.28
    dynamic_sampling: bool = True
    mask_ratio: float = 0.5
    token_share: float = flag(0.4, "share of a response's tokens that are trained", low=0, high=1)
    least_weight: float = flag(0.9, "weight of the response that depends least", low=0, high=1)

    def views(self):
        return ("mask",)

    def weigh(self, groups, policy):
        means = [response_dependency(group).tolist() for group in groups if group.has_image]
        all_means = torch.tensor(concat_over_ranks(sum(means, [])))
        return [self._weights(group, all_means) for group in groups]

    def _weights(self, group, all_means):
        if not group.has_image:
            return torch.ones(len(group.tokens), 1)
        kept = top_tokens(visual_dependency(group), group.response_mask, self.token_share)
        factors = response_weights(response_dependency(group), all_means, self.least_weight)
        return factors[:, None] * kept


def visual_dependency(group) -> Tensor:
    """S[G, T] of each token; 0 at padding, and everywhere for a prompt without an image."""
    masked = group.masked_log_probs if group.has_image else group.old_log_probs
    return kl_k3(group.old_log_probs, masked)


def response_dependency(group) -> Tensor:
    """The mean S[G] of each response."""
    return visual_dependency(group).sum(1) / group.response_mask.sum(1).clamp(min=1)


def response_weights(means: Tensor, all_means: Tensor, least: float) -> Tensor:
    """w of responses with these mean dependencies, among those of the whole mini-batch."""
    low, spread = all_means.min(), all_means.max() - all_means.min()
    if spread <= 1e-6:
        return torch.ones_like(means)
    return least + (1 - least) * (means - low) / (all_means - low).mean()


def top_tokens(dependency: Tensor, mask: Tensor, share: float) -> Tensor:
    """1.0 at the ceil(share * n) tokens of each response with the largest dependency, else 0.0."""
    order = dependency.masked_fill(~mask, -1.0).argsort(dim=1, descending=True, stable=True)
    n_kept = (share * mask.sum(1, keepdim=True).double() - 1e-9).ceil()  # 0.28 * 25 exceeds 7
    return ((order.argsort(dim=1) < n_kept) & mask).float()
