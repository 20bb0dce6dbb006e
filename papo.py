r"""PAPO, the algorithm: presets, the steps a variant may replace, the updates of a step.

losses.py has the equations and masking.py the masked view. A variant, such as variants/vppo.py, is
a subclass of Algo: other defaults, flags of its own, and some of Algo's steps replaced.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from statistics import fmean
from typing import ClassVar, Literal

import torch
from torch import Tensor

import masking
from losses import Counts, count, papo_loss, response_mean
from support.batch import Group, Prompt, cat_view, pad_and_cat, responses_with_image, seeded
from support.config import Flags, flag
from support.distributed import (
    clip_gradients,
    max_over_ranks,
    reduce_over_replicas,
    sum_over_ranks,
    world_size,
)
from support.lora import average_gradients
from support.packing import make_packs
from support.qwen_vl import Policy
from support.variants import check_view, check_weights, load_variant

# ------------------------------------------------------------------------------------------ presets


@dataclass(frozen=True)
class Algo(Flags):
    """Settings of the objective and of its masks, each a command-line flag, and the steps of the
    algorithm that a variant may replace: its methods."""

    kl_ref_coef: float = flag(0.01, "beta: weight of KL_ref; 0: load no reference model")
    kl_prcp_coef: float = flag(0.02, "gamma: weight of KL_prcp, which is maximised")
    entropy_coef: float = flag(0.0, "eta1: weight of H, the entropy under the image, minimised")
    masked_entropy_coef: float = flag(0.0, "eta2: weight of H_mask; see also --masked_grad")
    clip_low: float = flag(0.2, "PPO clip: the ratio's lower bound is 1 - this")
    clip_high: float = flag(0.3, "PPO clip: the ratio's upper bound is 1 + this")
    clip_dual: float = flag(3.0, "dual clip: the ratio's bound at negative advantages", low=1)
    average: Literal["token", "seq"] = flag("token", "of L_pg and the KLs; seq: per response first")
    dynamic_sampling: bool = flag(False, "drop all-right and all-wrong groups, sample more (DAPO)")
    mask_ratio: float = flag(0.6, "share of patches to mask, a probability", low=0, high=1)
    mask_strategy: Literal[masking.STRATEGIES] = flag("random", "which patches to mask, and how")
    mask_sigma: float = flag(1.0, "noise: standard deviation in normalised pixel units")
    kl_prcp_estimator: Literal["k3", "paper"] = flag("k3", "k3: as released; paper: as printed")
    masked_grad: bool = flag(False, "recompute masked log-probs with gradient in every update")

    image_columns: ClassVar[tuple[str, ...]] = ()  # to load as Prompt.more_pixel_values

    def at_step(self, step: int, n_steps: int) -> Algo:
        """The settings at `step`, from 0 to n_steps - 1. A reference model is loaded only if
        kl_ref_coef is not 0 in the run's own settings."""
        return self

    def sample(self, prompts: list[Prompt], policy: Policy, sample_groups: Callable, key: tuple):
        """A round's groups. sample_groups(prompts) samples G responses to each, as a group.

        A variant may pass each prompt twice, say once under another image: all responses of the
        same Prompt.index are compared. A group is trained under the images of group.prompt: to
        train under the original image, set group.prompt to the original prompt after sampling.
        Call sample_groups once: a second call repeats its random numbers. For numbers of your own
        there is batch.seeded(NAME, *key, index).
        """
        return sample_groups(prompts)

    def views(self) -> tuple[str, ...]:
        """Views of the image to record log-probs under: "mask", PAPO's, if the objective has it.

        A further view NAME adds KL(pi || pi_NAME) to the loss, times the setting NAME_coef: a
        negative one maximises it."""
        return ("mask",) if self.kl_prcp_coef or self.masked_entropy_coef else ()

    def view(self, name: str, prompt: Prompt, policy: Policy, generator) -> Tensor:
        """The pixels of a view, [N_patch, D_patch], of all images of a prompt.

        A variant with further views tells them apart by name; super() has "mask"."""
        # policy.saliency is set at the start of a run where masks are semantic.
        return masking.mask_prompt(prompt, self, policy.encoder, generator, policy.saliency)

    def weigh(self, groups: list[Group], policy: Policy) -> list[Tensor]:
        """Factors of the advantages, [G, 1] or [G, T] for each group. An empty list: no weighting.

        groups: this rank's share of a mini-batch, maybe empty, with all log-probs recorded. All
        ranks call it, under no_grad. Factors are finite float32 tensors on the CPU."""
        return []


_DAPO = {"kl_ref_coef": 0.0, "clip_high": 0.28, "dynamic_sampling": True}
_PRCP_AND_ENTROPY = {"kl_prcp_coef": 0.01, "entropy_coef": 0.03, "masked_entropy_coef": 0.03}
# The released scripts' settings. What a line does not list keeps Algo's default, such as GRPO's
# clip_high of 0.3.
PRESETS: dict[str, dict] = {
    "grpo": {"kl_prcp_coef": 0.0},
    "dapo": {"kl_prcp_coef": 0.0, **_DAPO},
    "papo_g": {},
    "papo_d": {**_PRCP_AND_ENTROPY, **_DAPO},
    "grpo_no_kl_ref": {"kl_prcp_coef": 0.0, "kl_ref_coef": 0.0},
    "papo_g_no_kl_ref": {**_PRCP_AND_ENTROPY, "kl_ref_coef": 0.0},
}
# What a model at least as wide as the 7B takes instead: the release adds entropies to papo_g there.
PRESETS_7B = {"papo_g": {"entropy_coef": 0.05, "masked_entropy_coef": 0.05}}


def algo_class(name: str) -> type[Algo]:
    """Algo for a preset; for variants/NAME.py or path/to/FILE.py the subclass defined there."""
    return Algo if name in PRESETS else load_variant(name, Algo, tuple(PRESETS))


def preset_settings(name: str, size: str = "3b") -> dict:
    """The settings that a preset changes for a model of this size; {} for a variant."""
    if size not in ("3b", "7b"):
        raise ValueError(f"size={size!r}: choose '3b' or '7b'")
    presets = PRESETS | PRESETS_7B if size == "7b" else PRESETS
    return presets.get(name, {})


def preset(name: str, size: str = "3b") -> Algo:
    """The algorithm called `name`, a preset or a variant, for one of the paper's model sizes."""
    return algo_class(name)(**preset_settings(name, size))


# ------------------------------------------------------------------------------- before the updates


def prepare(
    policy: Policy, reference: Policy | None, batches: list[list[Group]], algo: Algo, key: tuple
) -> None:
    """Store in the groups what the updates need, before the first of them changes the policy.

    batches: see mini_batches. `key` and Prompt.index seed the views.
    """
    groups = [group for batch in batches for group in batch]
    # The first update needs no old log-probs, since pi_old is pi there. A variant's `weigh` may.
    has_weights = type(algo).weigh is not Algo.weigh
    need_old = groups if has_weights else [group for batch in batches[1:] for group in batch]
    # per_group puts the groups into packs and returns log-probs [G, T] of each, without gradient.
    # All ranks call it, also with an empty list.
    old = policy.per_group(need_old, policy.log_probs)
    for group, log_probs in zip(need_old, old, strict=True):
        group.old_log_probs = log_probs
    if algo.kl_ref_coef:
        ref = reference.per_group(groups, reference.log_probs)
        for group, log_probs in zip(groups, ref, strict=True):
            group.ref_log_probs = log_probs
    with_image = [group for group in groups if group.has_image]
    for name in algo.views():
        for group in with_image:
            generator = seeded(name, *key, group.prompt.index)
            view = algo.view(name, group.prompt, policy, generator)
            check_view(view, algo, name, group.prompt)
            group.view_pixel_values[name] = view
        # With masked_grad the loss computes its own under "mask"; these are for a `weigh`, if any.
        under_view = policy.per_group(with_image, partial(policy.log_probs, view=name))
        for group, log_probs in zip(with_image, under_view, strict=True):
            group.view_log_probs[name] = log_probs
    for batch in batches:
        with torch.no_grad():
            weights = algo.weigh(batch, policy)
        check_weights(weights, algo, batch)
        if weights:
            for group, weight in zip(batch, weights, strict=True):
                group.weights = weight.expand(group.tokens.shape)


# --------------------------------------------------------------------------------------- the update


def update(
    policy: Policy, optimizer, batches: list[list[Group]], algo: Algo, max_grad_norm: float = 1.0
) -> dict[str, float]:
    """One optimizer step per mini-batch. Returns each metric's mean over them, the largest for
    sampler_gap_max.

    If the gradient norm is not finite, the step is skipped (as released). A skipped step counts in
    skipped_updates and in no mean.
    """
    history: list[dict[str, float]] = []
    policy.model.train()  # for gradient checkpointing; these models have no dropout
    for batch in batches:
        metrics = accumulate_gradients(policy, batch, algo)
        norm = clip_gradients(optimizer, max_grad_norm)
        if math.isfinite(norm):
            optimizer.step()
            history.append(metrics | {"grad_norm": norm})
        optimizer.zero_grad(set_to_none=True)
    policy.model.eval()
    skipped = {"skipped_updates": float(len(batches) - len(history))}
    if not history:
        return skipped
    means = {name: fmean(metrics[name] for metrics in history) for name in history[0]}
    means["sampler_gap_max"] = max(metrics["sampler_gap_max"] for metrics in history)
    return means | skipped


def accumulate_gradients(policy: Policy, batch: list[Group], algo: Algo) -> dict[str, float]:
    """Backward over this rank's packs of a mini-batch. Returns the metrics over all ranks.

    The means divide by counts over all ranks, so losses of packs add up.
    """
    own = Counts(0, 0, 0)
    if batch:
        own = count(pad_and_cat(batch, "response_mask"), responses_with_image(batch))
    denominator = Counts(*sum_over_ranks(own))
    # A pack is one forward: whole groups of at most tokens_per_forward tokens, or one larger group.
    # FSDP gathers weights in every forward and backward, so all ranks must take equally many. Where
    # a rank has fewer, make_packs adds a batch.dummy_group, which counts for nothing. The vision
    # tower runs in each of them, on a blank image if there is none.
    packs = make_packs(batch, policy.tokens_per_forward)
    sums: Counter = Counter()  # of tensors on the device: no synchronisation per pack
    largest_gaps = []
    for number, pack in enumerate(packs, start=1):
        loss, metrics = pack_loss(policy, pack, algo, denominator)
        # Under HSDP the replicas of the weights exchange gradients in the last backward only.
        reduce_over_replicas(policy.model, enabled=number == len(packs))
        # FSDP averages over all ranks; we want the sum, since the counts are those of all ranks.
        (loss * world_size()).backward()
        largest_gaps.append(metrics.pop("sampler_gap_max"))
        for name, value in metrics.items():
            sums[name] += value.double()
    average_gradients(policy.model)  # of LoRA adapters, which FSDP leaves alone
    totals = sum_over_ranks(torch.stack([*sums.values()]).tolist())
    largest_gap = max_over_ranks(torch.stack(largest_gaps).max())
    return dict(zip(sums, totals, strict=True)) | {"sampler_gap_max": largest_gap}


def pack_loss(policy: Policy, pack: list[Group], algo: Algo, denominator: Counts | None = None):
    """losses.papo_loss of one pack of groups after `prepare`: a scalar with gradient, and metrics.

    All log-probs are taken at the sampling temperature and are 0 at padding.
    """
    recorded = partial(pad_and_cat, pack, device=policy.device)  # field -> [B, T]
    response_mask = recorded("response_mask").bool()
    log_probs = policy.log_probs(pack)  # [B, T]
    # Where none were recorded, in a step's first update, pi_old = pi.
    has_old = pack[0].old_log_probs is not None
    old_log_probs = recorded("old_log_probs") if has_old else log_probs.detach()
    advantages = torch.cat([group.advantages for group in pack]).to(policy.device)  # [B]
    if pack[0].weights is not None:
        advantages = advantages[:, None] * recorded("weights")  # [B, T]

    def under(view: str) -> Tensor:
        if view == "mask" and algo.masked_grad:
            return policy.log_probs(pack, view)  # papo_loss ignores groups without an image
        return cat_view(pack, view, policy.device)

    views = {name: under(name) for name in algo.views()}
    # PAPO's own view has its coefficient, estimator and entropy in papo_loss.
    masked_log_probs = views.pop("mask", None)
    loss, metrics = papo_loss(
        log_probs,
        old_log_probs,
        advantages,
        response_mask,
        algo,
        ref_log_probs=recorded("ref_log_probs") if algo.kl_ref_coef else None,
        masked_log_probs=masked_log_probs,
        denominator=denominator,
        has_image=responses_with_image(pack).to(policy.device),
        further_views={name: (getattr(algo, f"{name}_coef"), views[name]) for name in views},
    )
    # How far sampling and training disagree about the same tokens. Under the same image it is
    # rounding.
    gap = (recorded("sample_log_probs") - old_log_probs).abs()
    metrics["sampler_gap"] = response_mean(gap, response_mask, denominator)
    metrics["sampler_gap_max"] = gap.max()  # padding is 0 in both
    return loss, metrics
