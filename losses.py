r"""Every equation of PAPO (arXiv 2507.06448) as a pure function of tensors: no model, no device, no logging, no state.

    minimise   L  =  L_pg  +  beta KL_ref  -  gamma KL_prcp  +  eta1 H  +  eta2 H_mask

Shapes: B = sequences (responses), T = response positions, right-padded; P = prompts, G = responses of one prompt.
`mask[B, T]` is 1 on a response's tokens, its first end token included, and 0 after it. Nothing here reads a padded
position: whatever stands there (NaN too) changes no loss, no metric and no gradient.

Where the paper, the released code and this file differ:
1. KL_prcp: the paper writes r - log r - 1 with r = pi / pi_mask, the released code has r = pi_mask / pi. Samples come
   from pi, so the code's form is the unbiased k3 estimate of KL(pi || pi_mask) and the paper's is not. Default: the
   code's; `Algo.kl_prcp_estimator = "paper"` takes the literal one.
2. H and H_mask are minus the mean log-prob of the sampled tokens, not entropies over the vocabulary (as released).
3. The masked log-probs normally come without gradient, so H_mask is a constant: it moves the loss and no weight
   (as released). Pass log-probs that carry gradient (`--masked_grad`) and it is alive, and KL_prcp has two branches.
4. The release averages each micro-batch and then averages those means. Here the denominators are the counts of the
   whole mini-batch over all ranks, so the parts of any split add up to the same loss and the same gradient.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

KL_CLAMP = 10.0  # k3, which is never below 0, stays below 10, as released: one wild token cannot own the gradient
LOG_RATIO_CLAMP = 20.0  # exp() of a log-ratio stays finite in fp32


class Counts(NamedTuple):
    """What the means divide by: response tokens, sequences, and tokens of the sequences whose prompt has an image."""

    tokens: float
    sequences: float
    image_tokens: float


def count(mask: Tensor, has_image: Tensor | None = None) -> Counts:
    """Counts of mask[B, T]; has_image[B] bool marks sequences with a picture (None: all). Counts of parts add up."""
    per_row = mask.bool().sum(-1)
    image = per_row if has_image is None else per_row * has_image
    return Counts(float(per_row.sum()), float(len(mask)), float(image.sum()))


def masked_mean(
    values: Tensor, mask: Tensor, denominator: float | None = None, average: str = "token"
) -> Tensor:
    """Mean of values[B, T] over mask[B, T], as a scalar; 0 where nothing is left to average, never NaN.

    "token": sum over all tokens / number of tokens (the released configs). "seq": the mean inside each sequence, then
    over sequences (the paper's Eq. 2). `denominator` replaces this batch's own number of tokens or sequences.
    """
    mask = mask.bool()
    values = values.masked_fill(~mask, 0.0)  # not values * mask: padding may hold inf or NaN
    if average == "token":
        total, own = values.sum(), mask.sum()
    elif average == "seq":
        total, own = (values.sum(-1) / mask.sum(-1).clamp(min=1)).sum(), len(mask)
    else:
        raise ValueError(f"average={average!r}: choose 'token' or 'seq'")
    return total / max(float(own if denominator is None else denominator), 1.0)


def group_advantages(rewards: Tensor, group_size: int, eps: float = 1e-6) -> Tensor:
    """A_i = (R_i - mean R) / (std R + eps) inside each group; rewards[P*G], groups adjacent -> advantages[P*G].

    std is unbiased (as released); a group of one has nothing to be compared with and gets 0. In float64 inside: five
    equal rewards of 0.9 leave a rounding residue in fp32 that eps = 1e-6 would blow up to advantages of 0.05.
    """
    if rewards.dim() != 1 or group_size < 1 or len(rewards) % group_size:
        raise ValueError(
            f"rewards of shape {tuple(rewards.shape)} do not divide into groups of {group_size}"
        )
    if group_size == 1:
        return torch.zeros_like(rewards)
    groups = rewards.double().view(-1, group_size)  # [P, G]
    centred = groups - groups.mean(1, keepdim=True)
    return (centred / (groups.std(1, keepdim=True) + eps)).view(-1).to(rewards.dtype)


def kl_k3(log_probs: Tensor, ref_log_probs: Tensor) -> Tensor:
    """Schulman's k3 at each sampled token: exp(d) - d - 1, d = log_ref - log_pi; [B, T], [B, T] -> [B, T], >= 0.

    Its expectation under pi is KL(pi || ref). Clamped as released; outside the clamps value is bounded, gradient 0.
    """
    d = (ref_log_probs - log_probs).clamp(-LOG_RATIO_CLAMP, LOG_RATIO_CLAMP)
    return (d.exp() - d - 1).clamp(-KL_CLAMP, KL_CLAMP)


def policy_loss(
    log_probs: Tensor,
    old_log_probs: Tensor,
    advantages: Tensor,
    mask: Tensor,
    clip_low: float,
    clip_high: float,
    clip_dual: float = 3.0,
    average: str = "token",
    denominator: float | Counts | None = None,
) -> tuple[Tensor, dict[str, Tensor]]:
    """L_pg, the clipped policy gradient of GRPO and DAPO with the dual clip; scalar and metrics.

    log_probs, old_log_probs, mask [B, T]; advantages [B], the same for every token of a response. Metrics: pg_loss,
    ppo_kl (mean of log pi_old - log pi), clip_frac (tokens where clip(r) decides, either side; the paper's "clip ratio
    high"), clip_frac_dual (tokens of negative advantage where the bound -A * clip_dual decides).
    """
    counts = resolve_counts(denominator, mask, None, average)
    log_probs, old_log_probs = _hide_padding(mask, log_probs, old_log_probs)
    advantages = advantages.to(log_probs.dtype).unsqueeze(-1)  # [B, 1]
    log_ratio = (log_probs - old_log_probs).clamp(-LOG_RATIO_CLAMP, LOG_RATIO_CLAMP)
    ratio = log_ratio.exp()  # [B, T]
    unclipped = -advantages * ratio
    clipped = -advantages * ratio.clamp(1 - clip_low, 1 + clip_high)
    ppo = torch.maximum(unclipped, clipped)
    bound = -advantages * clip_dual
    dual = (advantages < 0) & (ppo > bound)
    loss = masked_mean(torch.where(dual, bound, ppo), mask, _denominator(counts, average), average)
    metrics = {
        "pg_loss": loss,
        "clip_frac": masked_mean((clipped > unclipped).to(ratio.dtype), mask, counts.tokens),
        "clip_frac_dual": masked_mean(dual.to(ratio.dtype), mask, counts.tokens),
        "ppo_kl": masked_mean(-log_ratio, mask, counts.tokens),
    }
    return loss, {k: v.detach() for k, v in metrics.items()}


def papo_loss(
    log_probs: Tensor,
    old_log_probs: Tensor,
    advantages: Tensor,
    mask: Tensor,
    algo,
    ref_log_probs: Tensor | None = None,
    masked_log_probs: Tensor | None = None,
    denominator: float | Counts | None = None,
    has_image: Tensor | None = None,
) -> tuple[Tensor, dict[str, Tensor]]:
    """The whole objective L of the header, term by term; scalar and metrics, each the mean it says.

    Log-probs and mask [B, T], advantages [B], algo: papo.Algo. `ref_log_probs` is needed where algo.kl_ref_coef is not
    0, `masked_log_probs` where kl_prcp_coef or masked_entropy_coef is not 0 (ValueError otherwise); given without need,
    they are measured and add nothing. Rows where has_image[B] is False have no masked view: KL_prcp is 0 there in value
    and gradient, and they do not count in masked_entropy.
    `denominator`: the counts of the whole mini-batch over all ranks. A plain number is its token count (its sequence
    count under average = "seq") and scales this batch's other counts alike. Default: this batch's own.
    """
    counts = resolve_counts(denominator, mask, has_image, algo.average)
    loss, metrics = policy_loss(
        log_probs, old_log_probs, advantages, mask,
        algo.clip_low, algo.clip_high, algo.clip_dual, algo.average, counts,
    )  # fmt: skip
    log_probs, ref_log_probs, masked_log_probs = _hide_padding(
        mask, log_probs, ref_log_probs, masked_log_probs
    )
    over = _denominator(counts, algo.average)

    if ref_log_probs is not None:
        kl_ref = masked_mean(kl_k3(log_probs, ref_log_probs), mask, over, algo.average)
        loss, metrics["kl_ref"] = _add(loss, algo.kl_ref_coef, kl_ref)
    elif algo.kl_ref_coef:
        raise ValueError(f"kl_ref_coef={algo.kl_ref_coef} needs ref_log_probs")

    if masked_log_probs is not None:
        seen = mask.new_ones(len(mask), dtype=torch.bool) if has_image is None else has_image.bool()
        masked_log_probs = torch.where(seen[:, None], masked_log_probs, log_probs.detach())
        kl_prcp = masked_mean(_kl_prcp(log_probs, masked_log_probs, algo), mask, over, algo.average)
        loss, metrics["kl_prcp"] = _add(
            loss, -algo.kl_prcp_coef, kl_prcp
        )  # maximised: the sign is minus
        masked_entropy = masked_mean(
            -masked_log_probs, mask.bool() & seen[:, None], counts.image_tokens
        )
        loss, metrics["masked_entropy"] = _add(loss, algo.masked_entropy_coef, masked_entropy)
    elif algo.kl_prcp_coef or algo.masked_entropy_coef:
        needs = f"kl_prcp_coef={algo.kl_prcp_coef}, masked_entropy_coef={algo.masked_entropy_coef}"
        raise ValueError(f"{needs} need masked_log_probs")

    entropy = masked_mean(-log_probs, mask, counts.tokens)
    loss, metrics["entropy"] = _add(loss, algo.entropy_coef, entropy)
    return loss, metrics


def _kl_prcp(log_probs: Tensor, masked_log_probs: Tensor, algo) -> Tensor:
    """KL_prcp at each token, [B, T]: k3 with the masked view as the other distribution."""
    if algo.kl_prcp_estimator == "k3":
        kl = kl_k3(log_probs, masked_log_probs)
    elif (
        algo.kl_prcp_estimator == "paper"
    ):  # r - log r - 1, r = pi / pi_mask: the roles change places
        kl = kl_k3(masked_log_probs, log_probs)
    else:
        raise ValueError(f"kl_prcp_estimator={algo.kl_prcp_estimator!r}: choose 'k3' or 'paper'")
    return kl.clamp(max=algo.kl_prcp_clip) if algo.kl_prcp_clip else kl


def _add(loss: Tensor, coefficient: float, term: Tensor) -> tuple[Tensor, Tensor]:
    """loss + coefficient * term and the term's value; at coefficient 0 the graph is left bit for bit as it was."""
    return (loss + coefficient * term if coefficient else loss), term.detach()


def _hide_padding(mask: Tensor, *log_probs: Tensor | None) -> list[Tensor | None]:
    """0 at padded positions, before any arithmetic: exp(NaN) * 0 is NaN, in the gradient too."""
    return [None if x is None else x.masked_fill(~mask.bool(), 0.0) for x in log_probs]


def resolve_counts(
    denominator: float | Counts | None, mask: Tensor, has_image: Tensor | None, average: str
) -> Counts:
    """The Counts that `denominator` stands for: see papo_loss."""
    if isinstance(denominator, Counts):
        return denominator
    own = count(mask, has_image)
    if denominator is None:
        return own
    scale = float(denominator) / max(_denominator(own, average), 1.0)
    return Counts(*(n * scale for n in own))


def _denominator(counts: Counts, average: str) -> float:
    return counts.sequences if average == "seq" else counts.tokens
