"""ToR, "token reweighting" (arXiv 2603.25077): train the tokens that reason and those that see.

    H = entropy of the policy before the update         P = |log pi_old - log pi_black|
    w = 1 at the ceil(0.3 N) tokens of largest H, else 0.5 at those of largest P, else 0
    L = GRPO's, with A_i w_t in place of A_i, still a mean over all N tokens of the mini-batch

Ties, such as P = 0 without an image, go by lot. Source: a third party's code; n = 12, accuracy as
reward. Differences: its H is over the renormalised top-p 0.95 set, ours over the vocabulary; its P
compares with a prompt of text alone, ours with a black image; it ranks within a rollout batch.
"""

import math
from dataclasses import dataclass

import torch

from papo import Algo
from support.batch import seeded
from support.config import flag
from support.distributed import concat_over_ranks


@dataclass(frozen=True)
class ToR(Algo):
    kl_prcp_coef: float = 0.0
    clip_high: float = 0.2
    mask_ratio: float = 1.0  # a black image
    token_share: float = flag(0.3, "share of tokens that reason, and that see", low=0, high=1)
    perception_weight: float = flag(0.5, "weight of tokens that see", low=0, high=1)

    def views(self):
        return ("mask",)

    def weigh(self, groups, policy):
        entropies = policy.per_group(groups, policy.entropies)
        reason = top_of_batch(groups, entropies, self.token_share)
        under_black = [g.view_log_probs.get("mask", g.old_log_probs) for g in groups]  # else P = 0
        gains = [(g.old_log_probs - x).abs() for g, x in zip(groups, under_black, strict=True)]
        see = top_of_batch(groups, gains, self.token_share)
        pairs = zip(reason, see, strict=True)
        return [torch.where(a, 1.0, self.perception_weight * b.float()) for a, b in pairs]


def top_of_batch(groups, values, share):
    """[G, T] bool per group: the ceil(share N) largest values of the tokens on all ranks."""
    pairs = [with_lots(*each) for each in zip(groups, values, strict=True)]
    ranked = sorted(concat_over_ranks(sum(pairs, [])), reverse=True)
    n_kept = math.ceil(share * len(ranked) - 1e-9)  # 0.28 * 25 exceeds 7
    least = ranked[n_kept - 1] if n_kept else (math.inf, math.inf)
    chosen = [torch.zeros_like(group.response_mask) for group in groups]
    for group, is_top, own in zip(groups, chosen, pairs, strict=True):
        is_top[group.response_mask] = torch.tensor([p >= least for p in own], dtype=torch.bool)
    return chosen


def with_lots(group, values):
    """(value, lot) of each token, on any rank and with any padding the same."""
    own = values[group.response_mask]
    lots = torch.rand(len(own), generator=seeded("lot", group.prompt.index))
    return list(zip(own.tolist(), lots.tolist(), strict=True))
