r"""Every equation of PAPO (arXiv 2507.06448) as a pure function of tensors.

    minimise   L  =  L_pg  +  beta KL_ref  -  gamma KL_prcp  +  eta1 H  +  eta2 H_mask

    beta = kl_ref_coef, gamma = kl_prcp_coef, eta1 = entropy_coef, eta2 = masked_entropy_coef

KL_ref and KL_prcp are means of k3, which estimates KL(pi || pi_other) at a sampled token:

    k3 = exp(d) - d - 1,   d = log pi_other - log pi

with pi_other = pi_ref, the reference, or pi_mask, the policy under the masked image. H and H_mask
are minus the means of log pi and log pi_mask at the sampled tokens. The paper calls -KL_prcp the
Implicit Perception Loss, and eta1 H + eta2 H_mask the Double Entropy Loss.

Shapes: B responses, T response positions, padded on the right. Tensors are [B, T] unless said
otherwise. `response_mask` is True on a response's tokens, up to and including its first end token.
Padding is never read: whatever stands there, even NaN, changes no loss, no metric and no gradient.

What the terms do to the policy:

    gradient of k3 = (1 - exp(d)) grad log pi
    gradient of H  = - mean grad log pi

1. k3 is an unbiased estimate of KL(pi || pi_other) if samples come from pi and nothing is clamped.
2. Autograd differentiates k3, but not the distribution that the samples come from. In expectation
   the first part of the gradient vanishes: E_pi[grad log pi] = 0. The second is a mean under
   pi_other: E_pi[exp(d) grad log pi] = E_pi_other[grad log pi]. So the gradient of k3 is, in
   expectation, that of KL(pi_other || pi), which is - E_pi_other[grad log pi], and not that of
   KL(pi || pi_other).
3. So maximising KL_prcp, ascent along (1 - exp(d)) grad log pi, makes a token likelier where the
   masked view finds it less likely (d < 0), with a weight of at most 1. Where the masked view finds
   it likelier (d > 0), it makes it less likely, with a weight of up to 12.6, at d = 2.61, where
   k3 reaches its clamp of 10. Run too far, this drives pi off all text that is plausible without
   the image: probability spreads, and both entropies grow. The paper reports this collapse and
   penalises both.
4. Descent on H makes every sampled token likelier: here, too, the sampling is not differentiated.
   For samples from pi itself the gradient is 0 on average, as in 2; for samples from pi_old, cut by
   top-p, it is a pull towards what was sampled.
5. H_mask estimates the cross-entropy of pi and pi_mask, which is H + KL(pi || pi_mask).

Where the paper, the released code and this file differ:
a. KL_prcp: the paper prints r - log r - 1 with r = pi / pi_mask. The released code has
   r = pi_mask / pi, which is unbiased (1). So has this file; `kl_prcp_estimator="paper"` selects
   the printed form.
b. H and H_mask are means over sampled tokens (as released), whatever `average` is for the other
   terms. The paper writes entropies.
c. The masked log-probs are recorded before a step's first update, without gradient (as released).
   So H_mask has no gradient, and the pull in 4 is all that the Double Entropy Loss does. With
   `--masked_grad` every update computes them with gradient; H_mask then works against KL_prcp,
   because that KL is a part of it (5).
d. The release averages within each micro-batch, then over micro-batches. Here every mean divides by
   a count over the whole mini-batch on all ranks, so the losses of its parts add up to its own.
"""

from __future__ import annotations

from functools import partial
from typing import NamedTuple

import torch
from torch import Tensor

KL_CLAMP = 10.0  # upper bound of k3 per token, so that one token cannot dominate (as released)
# Keeps exp() of a log-ratio finite in fp32 (as released). Its gradient at a NaN, in padding, is 0.
LOG_RATIO_CLAMP = 20.0


# -------------------------------------------------------------------------------------------- means


class Counts(NamedTuple):
    """Denominators of the means. The counts of a batch's parts add up to the batch's."""

    tokens: float  # response tokens
    responses: float
    image_tokens: float  # response tokens whose prompt has an image


def count(response_mask: Tensor, has_image: Tensor | None = None) -> Counts:
    """Counts of response_mask. has_image[B]: whether a response's prompt has one (None: all)."""
    lengths = response_mask.bool().sum(-1)
    with_image = lengths if has_image is None else lengths * has_image
    return Counts(float(lengths.sum()), float(len(lengths)), float(with_image.sum()))


def response_mean(
    values: Tensor,
    response_mask: Tensor,
    denominator: Counts | None = None,
    average: str = "token",
) -> Tensor:
    """Scalar mean of values where response_mask is True; 0, not NaN, if it is False everywhere.

    average "token": over all tokens (the released configs). "seq": within each response, then over
    responses (the paper's Eq. 2). denominator: what to divide by; None: the batch's own counts.
    """
    response_mask = response_mask.bool()
    denominator = count(response_mask) if denominator is None else denominator
    # Filled and not multiplied, since NaN * 0 is NaN, in the gradient too.
    values = values.masked_fill(~response_mask, 0.0)
    if average == "token":
        return values.sum() / max(denominator.tokens, 1.0)
    if average == "seq":
        per_response = values.sum(-1) / response_mask.sum(-1).clamp(min=1)
        return per_response.sum() / max(denominator.responses, 1.0)
    raise ValueError(f"average={average!r}: choose 'token' or 'seq'")


# --------------------------------------------------------------------------------------- advantages


def group_advantages(rewards: Tensor, index: Tensor, eps: float = 1e-6) -> Tensor:
    """A_i = (R_i - mean R) / (std R + eps) within each group; rewards[B] -> advantages[B].

    index[B]: integers; responses with equal ones, those to the same prompt, form a group. std is
    unbiased (as released). A response without another to be compared with gets 0.
    """
    if rewards.dim() != 1 or rewards.shape != index.shape:
        shapes = f"{tuple(rewards.shape)} and {tuple(index.shape)}"
        raise ValueError(f"rewards and index of shapes {shapes}: both must be [B]")
    advantages = torch.zeros_like(rewards)
    for i in index.unique():
        group = index == i
        # float64: in float32 six rewards of 0.9 can have a std of 7e-8 instead of 0, which
        # eps = 1e-6 turns into advantages of 0.06.
        own = rewards[group].double()
        if len(own) > 1:
            advantages[group] = ((own - own.mean()) / (own.std() + eps)).to(rewards.dtype)
    return advantages


# -------------------------------------------------------------------------------------------- terms


def kl_k3(log_probs: Tensor, ref_log_probs: Tensor) -> Tensor:
    """Schulman's k3 at each sampled token. ref_log_probs: log pi_other, the reference's or not.

    Clamped as released: where the value reaches 10, the gradient is 0.
    """
    d = (ref_log_probs - log_probs).clamp(-LOG_RATIO_CLAMP, LOG_RATIO_CLAMP)
    return (d.exp() - d - 1).clamp(max=KL_CLAMP)


def policy_loss(  # noqa: PLR0913  (one argument per symbol of the equation)
    log_probs: Tensor,
    old_log_probs: Tensor,
    advantages: Tensor,
    response_mask: Tensor,
    clip_low: float,
    clip_high: float,
    clip_dual: float = 3.0,
    average: str = "token",
    denominator: Counts | None = None,
) -> tuple[Tensor, dict[str, Tensor]]:
    """L_pg: the clipped policy gradient of GRPO and DAPO with the dual clip. Scalar and metrics.

    Per token, with the ratio r = pi / pi_old:

        l = max(-A r, -A clip(r, 1 - clip_low, 1 + clip_high))
        l = min(l, -A clip_dual)    where A < 0

    advantages: [B], or [B, T] where a variant weights tokens. denominator: as in papo_loss.
    Metrics: pg_loss; ppo_kl, the mean of log pi_old - log pi; clip_frac, the share of tokens whose
    clipped term is the larger; clip_frac_dual, the share where the dual clip decides.
    """
    advantages = advantages.to(log_probs.dtype)
    if advantages.dim() == 1:
        advantages = advantages.unsqueeze(-1)  # [B, 1]: the same for every token of a response

    log_ratio = (log_probs - old_log_probs).masked_fill(~response_mask.bool(), 0.0)
    log_ratio = log_ratio.clamp(-LOG_RATIO_CLAMP, LOG_RATIO_CLAMP)
    ratio = log_ratio.exp()
    unclipped = -advantages * ratio
    clipped = -advantages * ratio.clamp(1 - clip_low, 1 + clip_high)
    ppo = torch.maximum(unclipped, clipped)
    bound = -advantages * clip_dual
    dual = (advantages < 0) & (ppo > bound)
    per_token = torch.where(dual, bound, ppo)

    mean = partial(response_mean, response_mask=response_mask, denominator=denominator)
    loss = mean(per_token, average=average)
    metrics = {
        "pg_loss": loss.detach(),
        "clip_frac": mean((clipped > unclipped).to(ratio.dtype)).detach(),
        "clip_frac_dual": mean(dual.to(ratio.dtype)).detach(),
        "ppo_kl": mean(-log_ratio).detach(),
    }
    return loss, metrics


def _kl_prcp(log_probs: Tensor, masked_log_probs: Tensor, estimator: str) -> Tensor:
    """KL_prcp at each token: k3 against the masked view."""
    if estimator == "k3":
        return kl_k3(log_probs, masked_log_probs)
    if estimator == "paper":  # r - log r - 1, r = pi / pi_mask: the roles swap
        return kl_k3(masked_log_probs, log_probs)
    raise ValueError(f"kl_prcp_estimator={estimator!r}: choose 'k3' or 'paper'")


# ---------------------------------------------------------------------------------------- objective


def papo_loss(  # noqa: PLR0913
    log_probs: Tensor,
    old_log_probs: Tensor,
    advantages: Tensor,
    response_mask: Tensor,
    algo,
    ref_log_probs: Tensor | None = None,
    masked_log_probs: Tensor | None = None,
    denominator: Counts | None = None,
    has_image: Tensor | None = None,
    further_views: dict[str, tuple[float, Tensor]] | None = None,
) -> tuple[Tensor, dict[str, Tensor]]:
    """The objective L of the header: a scalar, and each term's value as a metric.

    algo: papo.Algo, whose coefficients and clips are used.
    ref_log_probs, masked_log_probs: ValueError if their coefficient is not 0 and they are missing.
        Without a coefficient they only become metrics.
    denominator: Counts of the whole mini-batch over all ranks; None: of this batch.
    has_image[B]: whether a response's prompt has an image; None: all have. A response without one
        counts in the mean of KL_prcp, with 0, and not in that of H_mask.
    further_views: of a variant, name -> (coefficient, log-probs). Each adds
        coefficient * KL(pi || pi_view): a negative coefficient maximises it.
    """
    if algo.kl_ref_coef and ref_log_probs is None:
        raise ValueError(f"kl_ref_coef={algo.kl_ref_coef} needs ref_log_probs")
    if (algo.kl_prcp_coef or algo.masked_entropy_coef) and masked_log_probs is None:
        raise ValueError("kl_prcp_coef and masked_entropy_coef need masked_log_probs")
    if denominator is None:
        denominator = count(response_mask, has_image)
    mean = partial(response_mean, response_mask=response_mask, denominator=denominator)
    pg, metrics = policy_loss(
        log_probs,
        old_log_probs,
        advantages,
        response_mask,
        clip_low=algo.clip_low,
        clip_high=algo.clip_high,
        clip_dual=algo.clip_dual,
        average=algo.average,
        denominator=denominator,
    )
    entropy = mean(-log_probs, average="token")
    metrics["entropy"] = entropy.detach()
    kl_ref = kl_prcp = masked_entropy = kl_views = 0.0
    if ref_log_probs is not None:
        kl_ref = mean(kl_k3(log_probs, ref_log_probs), average=algo.average)
        metrics["kl_ref"] = kl_ref.detach()

    has_view = response_mask.bool()
    if has_image is not None:
        has_view = has_view & has_image.bool()[:, None]

    def fill_without_view(under_view: Tensor) -> Tensor:
        """Put log pi itself where there is no view: d = 0, so k3 and its gradient are 0."""
        return torch.where(has_view, under_view, log_probs.detach())

    if masked_log_probs is not None:
        masked_log_probs = fill_without_view(masked_log_probs)
        kl_per_token = _kl_prcp(log_probs, masked_log_probs, algo.kl_prcp_estimator)
        kl_prcp = mean(kl_per_token, average=algo.average)
        sum_with_view = masked_log_probs.masked_fill(~has_view, 0.0).sum()
        masked_entropy = -sum_with_view / max(denominator.image_tokens, 1.0)
        metrics["kl_prcp"] = kl_prcp.detach()
        metrics["masked_entropy"] = masked_entropy.detach()
    for name, (coefficient, view_log_probs) in (further_views or {}).items():
        kl_view = mean(kl_k3(log_probs, fill_without_view(view_log_probs)), average=algo.average)
        kl_views = kl_views + coefficient * kl_view
        metrics[f"kl_{name}"] = kl_view.detach()

    loss = (
        pg
        + algo.kl_ref_coef * kl_ref
        - algo.kl_prcp_coef * kl_prcp
        + algo.entropy_coef * entropy
        + algo.masked_entropy_coef * masked_entropy
        + kl_views
    )
    return loss, metrics
