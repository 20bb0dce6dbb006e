r"""Every equation of PAPO (arXiv 2507.06448) as a pure function of tensors.

    minimise   L  =  L_pg  +  beta KL_ref  -  gamma KL_prcp  +  eta1 H  +  eta2 H_mask

Shapes: B = responses, T = response positions, right-padded; P = prompts, G = responses per prompt.
`mask[B, T]` is True on a response's tokens, up to and including its first end token. Padding is
never read: whatever stands there, even NaN, changes no loss, no metric and no gradient.

Where the paper, the released code and this file differ:
1. KL_prcp: the paper writes r - log r - 1 with r = pi / pi_mask, the released code has
   r = pi_mask / pi. Samples come from pi, so the code's form is the unbiased k3 estimate of
   KL(pi || pi_mask) and the paper's is not. Default: the code's form;
   `Algo.kl_prcp_estimator = "paper"` takes the literal one.
2. H and H_mask are minus the mean log-prob of the sampled tokens, not entropies over the
   vocabulary (as released).
3. The masked log-probs normally carry no gradient, so H_mask is a constant: it changes the loss and
   no weight (as released). With `--masked_grad` they carry one, H_mask becomes a real term, and
   KL_prcp's gradient reaches both views.
4. The release averages each micro-batch and then averages those means. Here every mean divides by a
   count over the whole mini-batch on all ranks (`denominator`). So the losses of any split add up
   to the loss of the whole, and a token weighs the same however long its neighbours are.
"""

from __future__ import annotations

from functools import partial
from typing import NamedTuple

import torch
from torch import Tensor

KL_CLAMP = 10.0  # upper bound of k3, as released: one wild token cannot dominate the gradient
LOG_RATIO_CLAMP = 20.0  # keeps exp() of a log-ratio finite in fp32, as released


# -------------------------------------------------------------------------------------------- means


class Counts(NamedTuple):
    """What means divide by. Counts of the parts of a batch add up to those of the batch."""

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
    """Scalar mean of values[B, T] where mask[B, T] is True; 0, never NaN, where it is nowhere True.

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

    rewards[P * G], groups adjacent -> advantages[P * G]. std is unbiased (as released). A group of
    one has nothing to be compared with and gets 0. Computed in float64: five equal rewards of 0.9
    leave a rounding residue in float32 that eps = 1e-6 would turn into advantages of 0.05.
    """
    if rewards.dim() != 1 or group_size < 1 or len(rewards) % group_size:
        shape = tuple(rewards.shape)
        raise ValueError(f"rewards of shape {shape} do not divide into groups of {group_size}")
    if group_size == 1:
        return torch.zeros_like(rewards)
    groups = rewards.double().view(-1, group_size)  # [P, G]
    centred = groups - groups.mean(1, keepdim=True)
    advantages = centred / (groups.std(1, keepdim=True) + eps)
    return advantages.view(-1).to(rewards.dtype)


# -------------------------------------------------------------------------------------------- terms


def kl_k3(log_probs: Tensor, ref_log_probs: Tensor) -> Tensor:
    """Schulman's k3 at each sampled token: exp(d) - d - 1 with d = log pi_ref - log pi; [B, T].

    Never negative; its expectation under pi is KL(pi || pi_ref). Clamped as released: outside the
    clamps the value is bounded and the gradient is 0.
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

    With the ratio r = pi / pi_old, per token: max(-A r, -A clip(r, 1 - clip_low, 1 + clip_high)),
    but at most -A clip_dual where A < 0. log_probs, old_log_probs, mask[B, T]; advantages[B], or
    [B, T] where a variant weights tokens. `denominator`: as in papo_loss.

    Metrics: pg_loss; ppo_kl (mean log pi_old - log pi); clip_frac (share of tokens where the clip
    decides, on either side); clip_frac_dual (share where the dual clip decides).
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
) -> tuple[Tensor, dict[str, Tensor]]:
    """The objective L of the header, term by term. Scalar, and each term's value as a metric.

    Log-probs and mask[B, T], advantages[B] or [B, T], algo: papo.Algo. ref_log_probs are needed
    where algo.kl_ref_coef is not 0, masked_log_probs where kl_prcp_coef or masked_entropy_coef is
    not 0 (else ValueError); given without need they are measured and add nothing. A response whose
    has_image[B] is False has no masked view: its KL_prcp is 0 in value and gradient, and
    masked_entropy leaves it out. `denominator`: where this batch is part of a mini-batch, the
    Counts of the whole over all ranks; default: this batch's own.
    """
    _check_inputs(algo, ref_log_probs, masked_log_probs)
    counts = count(mask, has_image) if denominator is None else denominator
    average = algo.average
    mean = partial(masked_mean, denominator=_denominator(counts, average), average=average)
    clips = (algo.clip_low, algo.clip_high, algo.clip_dual)
    policy_args = (log_probs, old_log_probs, advantages, mask)
    loss, metrics = policy_loss(*policy_args, *clips, average=average, denominator=counts)

    log_probs = _zero_padding(log_probs, mask)
    terms = {}  # name -> (coefficient, value); L is their sum
    if ref_log_probs is not None:
        ref_log_probs = _zero_padding(ref_log_probs, mask)
        terms["kl_ref"] = algo.kl_ref_coef, mean(kl_k3(log_probs, ref_log_probs), mask)

    if masked_log_probs is not None:
        masked_log_probs = _zero_padding(masked_log_probs, mask)
        image_mask = mask.bool()  # the tokens that have a masked view
        if has_image is not None:
            image_mask = image_mask & has_image.bool()[:, None]
            masked_log_probs = torch.where(
                has_image.bool()[:, None], masked_log_probs, log_probs.detach()
            )
        kl_prcp = mean(_kl_prcp(log_probs, masked_log_probs, algo), mask)
        terms["kl_prcp"] = -algo.kl_prcp_coef, kl_prcp  # maximised: the sign is minus
        masked_entropy = masked_mean(-masked_log_probs, image_mask, counts.image_tokens)
        terms["masked_entropy"] = algo.masked_entropy_coef, masked_entropy

    terms["entropy"] = algo.entropy_coef, masked_mean(-log_probs, mask, counts.tokens)

    for name, (coefficient, value) in terms.items():
        metrics[name] = value.detach()
        if coefficient:  # at 0 the graph stays exactly what it would be without the term
            loss = loss + coefficient * value
    return loss, metrics


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
