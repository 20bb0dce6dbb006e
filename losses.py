r"""Every equation of PAPO (arXiv 2507.06448) as a pure function of tensors.

    minimise   L  =  L_pg  +  beta KL_ref  -  gamma KL_prcp  +  eta1 H  +  eta2 H_mask

Shapes: B = responses, T = response positions, right-padded; N = prompts, G = responses per prompt.
`mask[B, T]` is True on a response's tokens, up to and including its first end token. Padding is
never read: whatever stands there, even NaN, changes no loss, no metric and no gradient.

Where the paper, the released code and this file differ:
1. KL_prcp: the paper prints r - log r - 1 with r = pi / pi_mask, the released code has
   r = pi_mask / pi. Samples come from pi, so the code's form is the unbiased k3 estimate of
   KL(pi || pi_mask) and the paper's is not. Default: the code's form;
   `Algo.kl_prcp_estimator = "paper"` selects the printed one.
2. H and H_mask are minus the mean log-prob of the sampled tokens, not sums over the vocabulary (as
   released), and are always averaged over tokens. H_mask estimates the cross-entropy of pi and
   pi_mask, which is H + KL(pi || pi_mask).
3. The masked log-probs normally carry no gradient (as released). So H_mask changes the value of the
   loss but not its gradient. With `--masked_grad` it changes the gradient too, and that of KL_prcp
   reaches both views.
4. The release averages within each micro-batch, then over micro-batches. Here every mean divides by
   a count over the whole mini-batch on all ranks (`denominator`). So the losses of any split add up
   to the loss of the whole, and every token has the same weight.

Value and gradient differ. "Unbiased" is about values, for samples from pi itself and before the
clamps; training samples with top-p, and later mini-batches are off-policy. The gradient of k3 is
(1 - pi_mask / pi) grad log pi: maximising it makes a token likelier where the masked view finds it
less likely, in expectation as KL(pi_mask || pi) would. The gradient of H is -grad log pi at the
sampled tokens, whose expectation on-policy is 0.

Symbols and fields of papo.Algo: beta = kl_ref_coef, gamma = kl_prcp_coef, eta1 = entropy_coef,
eta2 = masked_entropy_coef.
"""

from __future__ import annotations

from functools import partial
from typing import NamedTuple

import torch
from torch import Tensor

KL_CLAMP = 10.0  # upper bound of k3 per token, so that one token cannot dominate (as released)
LOG_RATIO_CLAMP = 20.0  # keeps exp() of a log-ratio finite in fp32 (as released)


# -------------------------------------------------------------------------------------------- means


class Counts(NamedTuple):
    """Denominators of averages. The counts of a batch's parts add up to the batch's."""

    tokens: float  # response tokens
    sequences: float  # responses
    image_tokens: float  # response tokens whose prompt has an image


def count(mask: Tensor, has_image: Tensor | None = None) -> Counts:
    """Counts of mask[B, T]. has_image[B]: whether a response's prompt has an image (None: all)."""
    lengths = mask.bool().sum(-1)
    with_image = lengths if has_image is None else lengths * has_image
    return Counts(float(lengths.sum()), float(len(mask)), float(with_image.sum()))


def masked_mean(
    values: Tensor, mask: Tensor, denominator: float | None = None, average: str = "token"
) -> Tensor:
    """Scalar mean of values[B, T] where mask[B, T] is True; 0, not NaN, if it is False everywhere.

    average "token": over all tokens (the released configs). "seq": within each response, then over
    responses (the paper's Eq. 2). `denominator` replaces the batch's own number of tokens or
    responses.
    """
    mask = mask.bool()
    values = values.masked_fill(~mask, 0.0)  # not values * mask: padding may hold inf or NaN
    if average == "token":
        total, number = values.sum(), mask.sum()
    elif average == "seq":
        per_response = values.sum(-1) / mask.sum(-1).clamp(min=1)
        total, number = per_response.sum(), len(mask)
    else:
        raise ValueError(f"average={average!r}: choose 'token' or 'seq'")
    divisor = float(number if denominator is None else denominator)
    return total / max(divisor, 1.0)


# --------------------------------------------------------------------------------------- advantages


def group_advantages(rewards: Tensor, group_size: int, eps: float = 1e-6) -> Tensor:
    """A_i = (R_i - mean R) / (std R + eps) within each group.

    rewards[N * G], groups adjacent -> advantages[N * G]. std is unbiased (as released). A group of
    one has nothing to be compared with and gets 0. Computed in float64: in float32 six rewards of
    0.9 can have a std of 7e-8 instead of 0, which eps = 1e-6 turns into advantages of 0.06.
    """
    if rewards.dim() != 1 or group_size < 1 or len(rewards) % group_size:
        shape = tuple(rewards.shape)
        raise ValueError(f"rewards of shape {shape} do not divide into groups of {group_size}")
    if group_size == 1:
        return torch.zeros_like(rewards)
    groups = rewards.double().view(-1, group_size)  # [N, G]
    centred = groups - groups.mean(1, keepdim=True)
    advantages = centred / (groups.std(1, keepdim=True) + eps)
    return advantages.view(-1).to(rewards.dtype)


# -------------------------------------------------------------------------------------------- terms


def kl_k3(log_probs: Tensor, ref_log_probs: Tensor) -> Tensor:
    """Schulman's k3 at each sampled token: exp(d) - d - 1 with d = log pi_ref - log pi; [B, T].

    Never negative; unclamped, its expectation under pi is KL(pi || pi_ref). Clamped as released:
    where the value reaches 10, the gradient is 0.
    """
    d = (ref_log_probs - log_probs).clamp(-LOG_RATIO_CLAMP, LOG_RATIO_CLAMP)
    return (d.exp() - d - 1).clamp(-KL_CLAMP, KL_CLAMP)


def policy_loss(  # noqa: PLR0913  (one argument per symbol of the equation)
    log_probs: Tensor,
    old_log_probs: Tensor,
    advantages: Tensor,
    mask: Tensor,
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

    All tensors are [B, T], except advantages, which are [B], or [B, T] where a variant weights
    tokens. `denominator`: as in papo_loss. Metrics: pg_loss; ppo_kl (mean log pi_old - log pi);
    clip_frac (share of tokens where the clipped term is the larger); clip_frac_dual (share of
    tokens where the dual clip decides).
    """
    counts = count(mask) if denominator is None else denominator
    log_probs = _zero_padding(log_probs, mask)
    old_log_probs = _zero_padding(old_log_probs, mask)
    advantages = advantages.to(log_probs.dtype)
    if advantages.dim() == 1:
        advantages = advantages.unsqueeze(-1)  # [B, 1]: the same for every token of a response

    log_ratio = (log_probs - old_log_probs).clamp(-LOG_RATIO_CLAMP, LOG_RATIO_CLAMP)
    ratio = log_ratio.exp()  # [B, T]
    unclipped = -advantages * ratio
    clipped = -advantages * ratio.clamp(1 - clip_low, 1 + clip_high)
    ppo = torch.maximum(unclipped, clipped)
    bound = -advantages * clip_dual
    dual = (advantages < 0) & (ppo > bound)
    per_token = torch.where(dual, bound, ppo)

    token_mean = partial(masked_mean, mask=mask, denominator=counts.tokens)
    loss = masked_mean(per_token, mask, _denominator(counts, average), average)
    metrics = {
        "pg_loss": loss.detach(),
        "clip_frac": token_mean((clipped > unclipped).to(ratio.dtype)).detach(),
        "clip_frac_dual": token_mean(dual.to(ratio.dtype)).detach(),
        "ppo_kl": token_mean(-log_ratio).detach(),
    }
    return loss, metrics


# ---------------------------------------------------------------------------------------- objective


def papo_loss(  # noqa: PLR0913  (one argument per symbol of the equation)
    log_probs: Tensor,
    old_log_probs: Tensor,
    advantages: Tensor,
    mask: Tensor,
    algo,
    ref_log_probs: Tensor | None = None,
    masked_log_probs: Tensor | None = None,
    denominator: Counts | None = None,
    has_image: Tensor | None = None,
    views: dict[str, tuple[float, Tensor]] | None = None,
) -> tuple[Tensor, dict[str, Tensor]]:
    """The objective L of the header: a scalar, and each term's value as a metric.

    Log-probs and mask are [B, T], advantages [B] or [B, T]; algo: papo.Algo. ValueError if a term
    has a coefficient but not its log-probs. Log-probs without a coefficient only become metrics.
    Responses whose has_image[B] is False have no masked view: their KL_prcp is 0 in value and
    gradient, and masked_entropy leaves them out. `denominator`: Counts of the full mini-batch over
    all ranks; default: of this batch. `views`: a variant's further views, name -> (coefficient,
    log-probs[B, T]); each adds coefficient * KL(pi || pi_view).
    """
    _check_inputs(algo, ref_log_probs, masked_log_probs)
    counts = count(mask, has_image) if denominator is None else denominator
    average = algo.average
    mean = partial(
        masked_mean, mask=mask, denominator=_denominator(counts, average), average=average
    )
    pg, metrics = policy_loss(
        log_probs,
        old_log_probs,
        advantages,
        mask,
        clip_low=algo.clip_low,
        clip_high=algo.clip_high,
        clip_dual=algo.clip_dual,
        average=average,
        denominator=counts,
    )
    log_probs = _zero_padding(log_probs, mask)
    kl_ref = kl_prcp = masked_entropy = log_probs.new_zeros(())
    has_view = mask.bool()  # [B, T], tokens whose prompt has an image
    if has_image is not None:
        has_view = has_view & has_image.bool()[:, None]
    if ref_log_probs is not None:
        kl_ref = mean(kl_k3(log_probs, _zero_padding(ref_log_probs, mask)))
        metrics["kl_ref"] = kl_ref.detach()
    if masked_log_probs is not None:
        masked_log_probs = _only_with_image(masked_log_probs, log_probs, has_view)
        kl_prcp = mean(_kl_prcp(log_probs, masked_log_probs, algo))
        masked_entropy = masked_mean(-masked_log_probs, has_view, counts.image_tokens)
        metrics["kl_prcp"] = kl_prcp.detach()
        metrics["masked_entropy"] = masked_entropy.detach()
    entropy = masked_mean(-log_probs, mask, counts.tokens)
    metrics["entropy"] = entropy.detach()

    loss = (
        pg
        + _weighted(algo.kl_ref_coef, kl_ref)
        - _weighted(algo.kl_prcp_coef, kl_prcp)  # maximised
        + _weighted(algo.entropy_coef, entropy)
        + _weighted(algo.masked_entropy_coef, masked_entropy)
    )
    for name, (coefficient, view_log_probs) in (views or {}).items():
        view_log_probs = _only_with_image(view_log_probs, log_probs, has_view)
        kl_view = mean(kl_k3(log_probs, view_log_probs))
        metrics[f"kl_{name}"] = kl_view.detach()
        loss = loss + _weighted(coefficient, kl_view)
    return loss, metrics


def _weighted(coefficient: float, term: Tensor) -> Tensor | float:
    """coefficient * term; at coefficient 0 the term adds nothing to the graph."""
    return coefficient * term if coefficient else 0.0


def _only_with_image(view_log_probs: Tensor, log_probs: Tensor, has_view: Tensor) -> Tensor:
    """A view's log-probs; without an image, pi's own without gradient, so that the KL is 0."""
    return torch.where(has_view, view_log_probs, log_probs.detach())


def _kl_prcp(log_probs: Tensor, masked_log_probs: Tensor, algo) -> Tensor:
    """The Implicit Perception Loss at each token, [B, T]: k3 against the masked view."""
    if algo.kl_prcp_estimator == "k3":
        kl = kl_k3(log_probs, masked_log_probs)
    elif algo.kl_prcp_estimator == "paper":  # r - log r - 1, r = pi / pi_mask: the roles swap
        kl = kl_k3(masked_log_probs, log_probs)
    else:
        raise ValueError(f"kl_prcp_estimator={algo.kl_prcp_estimator!r}: choose 'k3' or 'paper'")
    return kl.clamp(max=algo.kl_prcp_clip) if algo.kl_prcp_clip else kl


def _check_inputs(algo, ref_log_probs: Tensor | None, masked_log_probs: Tensor | None) -> None:
    if algo.kl_ref_coef and ref_log_probs is None:
        raise ValueError(f"kl_ref_coef={algo.kl_ref_coef} needs ref_log_probs")
    if masked_log_probs is None and (algo.kl_prcp_coef or algo.masked_entropy_coef):
        given = f"kl_prcp_coef={algo.kl_prcp_coef}, masked_entropy_coef={algo.masked_entropy_coef}"
        raise ValueError(f"{given} need masked_log_probs")


def _zero_padding(log_probs: Tensor, mask: Tensor) -> Tensor:
    """0 at padding, before any arithmetic: exp(NaN) * 0 is NaN, in the gradient too."""
    return log_probs.masked_fill(~mask.bool(), 0.0)


def _denominator(counts: Counts, average: str) -> float:
    return counts.sequences if average == "seq" else counts.tokens
