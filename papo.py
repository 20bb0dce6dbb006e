r"""PAPO, the algorithm: presets, the steps a variant may replace, the update on one batch.

Read losses.py for the equations and masking.py for the masked view. rollout.py fills the groups
that `prepare` and `update` train on; train.py is the loop around them.

    prepare   mask the images; record old, reference and masked log-probs, without gradient
    update    one optimizer step per mini-batch on losses.papo_loss

The data they pass is a Group: one prompt, its G responses, and what is recorded about them
(support/batch.py). Every mean is over the whole mini-batch on all ranks, so packing and the number
of ranks do not change the update, up to rounding. A variant, such as variants/vppo.py, is a
subclass of Algo: other defaults, flags of its own, and some of Algo's steps replaced.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from statistics import fmean
from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor

import masking
from losses import Counts, count, masked_mean, papo_loss
from support import cli
from support.batch import Group, Prompt, has_image, pad_and_cat, seeded, view_log_probs
from support.cli import flag
from support.distributed import (
    clip_gradients,
    concat_over_ranks,
    max_over_ranks,
    reduce_over_replicas,
    sum_over_ranks,
    world_size,
)
from support.packing import pack_rows
from support.qwen_vl import Policy
from support.variants import check_view, check_weights, load_variant

# ------------------------------------------------------------------------------------------ presets

preset_flag = partial(flag, shown_default="preset")  # for what presets set


@dataclass(frozen=True)
class Algo:
    """Settings of the objective of losses.py. Every field but `name` is a command-line flag."""

    name: str = "papo_g"
    kl_ref_coef: float = preset_flag(
        0.01, "beta: weight of KL_ref; 0: load no reference model", group="objective"
    )
    kl_prcp_coef: float = preset_flag(0.02, "gamma: weight of KL_prcp, which is maximised")
    entropy_coef: float = preset_flag(0.0, "eta1: weight of the entropy under the image, minimised")
    masked_entropy_coef: float = preset_flag(
        0.0, "eta2: the same under the masked image; no gradient without --masked_grad"
    )
    clip_low: float = preset_flag(0.2, "PPO clip: the ratio's lower bound is 1 - this")
    clip_high: float = preset_flag(0.3, "PPO clip: the ratio's upper bound is 1 + this")
    clip_dual: float = flag(3.0, "dual clip: upper bound of the ratio at negative advantages")
    average: str = flag(
        "token", "average of L_pg and the KLs; token: over tokens; seq: per response (Eq. 2)"
    )
    dynamic_sampling: bool = preset_flag(
        False, "drop groups that are all right or all wrong, and sample more (DAPO)"
    )
    mask_ratio: float = flag(0.6, "share of patches to mask; random and noise: a probability")
    mask_strategy: str = flag("random", "random, semantic or noise")
    mask_sigma: float = flag(1.0, "noise: standard deviation in normalised pixel units")
    kl_prcp_estimator: str = flag("k3", "k3: as the released code; paper: as printed")
    kl_prcp_clip: float = flag(0.0, "upper limit of KL_prcp per token; 0: k3's own, 10")
    kl_prcp_coef_end: float = flag(
        -1.0, "final gamma, reached linearly; entropies scale along; below 0: constant"
    )
    masked_grad: bool = flag(False, "recompute masked log-probs with gradient in every update")

    # A variant may need further image columns of the data, and "old_log_probs" or "entropies" to
    # be recorded in the groups.
    columns: ClassVar[tuple[str, ...]] = ()
    needs: ClassVar[tuple[str, ...]] = ()

    def __post_init__(self):
        cli.check_choice(self, "average", ("token", "seq"))
        cli.check_choice(self, "mask_strategy", masking.STRATEGIES)
        cli.check_choice(self, "kl_prcp_estimator", ("k3", "paper"))
        masking.check_ratio(self.mask_ratio)
        if self.clip_dual <= 1:
            raise ValueError(f"clip_dual={self.clip_dual}: must be above 1")
        cli.check_range(self, "kl_prcp_clip", 0, math.inf)

    # The steps a variant may replace.

    def annealed(self, step: int, last_step: int) -> Algo:
        """The settings at `step`, which runs from 0 to last_step - 1."""
        if self.kl_prcp_coef_end < 0 or not self.kl_prcp_coef:
            return self
        progress = step / max(last_step - 1, 1)
        scale = 1 + progress * (self.kl_prcp_coef_end / self.kl_prcp_coef - 1)
        names = ("kl_prcp_coef", "entropy_coef", "masked_entropy_coef")
        return replace(self, **{name: scale * getattr(self, name) for name in names})

    def images(self, prompt: Prompt, policy: Policy, generator) -> list[tuple[Prompt, Prompt]]:
        """Pairs of prompts: group_size responses are sampled under the first of a pair and trained
        under the second. Advantages compare the responses of all pairs."""
        return [(prompt, prompt)]

    def views(self) -> dict[str, float]:
        """Views to record log-probs under: name -> coefficient of KL(pi || pi_view) in the loss.
        Above 0 the KL is minimised. For "mask", PAPO's, kl_prcp_coef decides."""
        in_loss = self.kl_prcp_coef or self.masked_entropy_coef
        return {"mask": -self.kl_prcp_coef} if in_loss else {}

    def view(self, name: str, prompt: Prompt, policy: Policy, generator) -> tuple[Tensor, Tensor]:
        """The pixels of a view, [N_patch, D_patch], and which patches changed, [N_patch] bool."""
        return masking.mask_prompt(prompt, self, policy.encoder, generator, policy.saliency)

    def weigh(self, groups: list[Group], policy: Policy) -> list[Tensor]:
        """Factors of the advantages, [G, 1] or [G, T] for each group; none: all are 1.
        groups: this rank's share of a mini-batch, with all records. All ranks call it."""
        return []


STEPS = ("columns", "needs", "annealed", "images", "views", "view", "weigh")

_DAPO = {"kl_ref_coef": 0.0, "clip_high": 0.28, "dynamic_sampling": True}
_PRCP_AND_ENTROPY = {"kl_prcp_coef": 0.01, "entropy_coef": 0.03, "masked_entropy_coef": 0.03}
# The released scripts' settings. What a preset does not list keeps Algo's default.
PRESETS: dict[str, dict] = {
    "grpo": {"kl_prcp_coef": 0.0},
    "dapo": {"kl_prcp_coef": 0.0, **_DAPO},
    "papo_g": {"kl_prcp_coef": 0.02, "kl_ref_coef": 0.01},
    "papo_d": {**_PRCP_AND_ENTROPY, **_DAPO},
    "grpo_no_kl_ref": {"kl_prcp_coef": 0.0, "kl_ref_coef": 0.0},
    "papo_g_no_kl_ref": {**_PRCP_AND_ENTROPY, "kl_ref_coef": 0.0},
}


def algo_class(name: str) -> type[Algo]:
    """Algo for a preset; for variants/NAME.py or path/to/FILE.py the subclass defined there."""
    return Algo if name in PRESETS else load_variant(name, Algo, STEPS, tuple(PRESETS))


def preset(name: str, size: str = "3b") -> Algo:
    """The objective called `name`. At size "7b" papo_g adds both entropies, as released."""
    if size not in ("3b", "7b"):
        raise ValueError(f"size={size!r}: choose '3b' or '7b'")
    algo = algo_class(name)(name=name, **PRESETS.get(name, {}))
    if name == "papo_g" and size == "7b":
        algo = replace(algo, entropy_coef=0.05, masked_entropy_coef=0.05)
    return algo


# ------------------------------------------------------------------------------- before the updates


def mini_batches(groups: list[Group], size: int) -> list[list[Group]]:
    """This rank's share of each mini-batch of `size` prompts.

    Groups are ordered by Prompt.index over all ranks. So the assignment does not depend on the
    number of ranks, and no group has to move.
    """
    indices = set(concat_over_ranks([group.prompt.index for group in groups]))
    batch_of = {index: i // size for i, index in enumerate(sorted(indices))}
    batches = [[] for _ in range(math.ceil(len(indices) / size))]
    for group in groups:
        batches[batch_of[group.prompt.index]].append(group)
    return batches


def prepare(
    policy: Policy, reference: Policy | None, batches: list[list[Group]], algo: Algo, key: tuple
) -> dict[str, float]:
    """Store in the groups what the updates need, before the first of them changes the policy.

    batches: see mini_batches. Passes that the objective does not use are skipped. At the first
    update the policy still is the old one, so only later mini-batches need old log-probs. `key` and
    Prompt.index seed the views. Returns the share of patches changed in each, over all ranks, such
    as {"mask_ratio": 0.6}.
    """
    groups = list(itertools.chain.from_iterable(batches))
    later = list(itertools.chain.from_iterable(batches[1:]))
    needs_old = groups if "old_log_probs" in algo.needs else later
    record(policy, needs_old, "old_log_probs", policy.log_probs)
    if "entropies" in algo.needs:
        record(policy, groups, "entropies", policy.entropies)
    if algo.kl_ref_coef:
        record(reference, groups, "ref_log_probs", reference.log_probs)
    metrics = prepare_views(policy, groups, algo, key)
    for batch in batches:
        with torch.no_grad():
            weights = check_weights(algo.weigh(batch, policy), algo, batch)
        for group, weight in zip(batch, weights, strict=False):  # an empty list: all are 1
            group.weights = weight.expand_as(group.sample_log_probs)
    return metrics


def record(policy: Policy, groups: list[Group], field: str, values_of: Callable) -> None:
    """Set a field [G, T] of the groups to what policy.per_group finds."""
    for group, values in zip(groups, policy.per_group(groups, values_of), strict=True):
        setattr(group, field, values)


def prepare_views(policy: Policy, groups: list[Group], algo: Algo, key: tuple) -> dict[str, float]:
    """Draw the objective's views of the images and record the log-probs under each."""
    with_image = [group for group in groups if group.has_image]
    metrics = {}
    for name in algo.views():
        n_changed = n_patches = 0
        for group in with_image:
            generator = seeded(name, *key, group.prompt.index)
            view = algo.view(name, group.prompt, policy, generator)
            pixels, changed = check_view(view, algo, name, group.prompt)
            group.view_pixel_values[name] = pixels
            n_changed += int(changed.sum())
            n_patches += len(changed)
        n_changed, n_patches = sum_over_ranks([n_changed, n_patches])
        metrics[f"{name}_ratio"] = n_changed / max(n_patches, 1.0)
        if name == "mask" and algo.masked_grad and type(algo).weigh is Algo.weigh:
            continue  # the update computes them itself, with gradient, and nothing else reads them
        under_view = policy.per_group(with_image, partial(policy.log_probs, view=name))
        for group, log_probs in zip(with_image, under_view, strict=True):
            group.view_log_probs[name] = log_probs
    return metrics


# --------------------------------------------------------------------------------------- the update


def update(
    policy: Policy, optimizer, batches: list[list[Group]], algo: Algo, max_grad_norm: float = 1.0
) -> dict[str, float]:
    """One optimizer step per mini-batch. Returns each metric's mean over them.

    If the gradient norm is not finite, the step is skipped (as released). A skipped step counts in
    skipped_updates and in no mean.
    """
    history: list[dict[str, float]] = []
    policy.model.train()
    for batch in batches:
        metrics = accumulate_gradients(policy, batch, algo)
        norm = clip_gradients(optimizer, max_grad_norm)
        if math.isfinite(norm):
            optimizer.step()
            history.append(metrics | {"grad_norm": norm})
        optimizer.zero_grad(set_to_none=True)
    policy.model.eval()
    means = {name: fmean(each[name] for each in history) for name in (history or [{}])[0]}
    if history:
        means["sampler_gap_max"] = max(each["sampler_gap_max"] for each in history)
    return means | {"skipped_updates": float(len(batches) - len(history))}


def accumulate_gradients(policy: Policy, batch: list[Group], algo: Algo) -> dict[str, float]:
    """Backward over this rank's rows of a mini-batch. Returns the metrics over all ranks.

    Denominators are summed over all ranks first. So the losses of rows can be added, and the
    gradient does not depend on how groups were packed: every token has the same weight.
    """
    counts = [count(group.response_mask, has_image([group])) for group in batch]
    totals = [sum(each[i] for each in counts) for i in range(len(Counts._fields))]
    denominator = Counts(*sum_over_ranks(totals))
    # Every rank gets the same number of rows (pack_rows adds empty ones), so all log the same keys.
    rows = pack_rows(batch, policy.tokens_per_forward)
    values, largest_gaps = [], []  # on the device: no wait per row
    for number, row in enumerate(rows, start=1):
        loss, metrics = row_loss(policy, row, algo, denominator)
        is_last = number == len(rows)
        reduce_over_replicas(policy.model, enabled=is_last)
        (loss * world_size()).backward()  # FSDP averages over ranks, but we want the sum
        largest_gaps.append(metrics.pop("sampler_gap_max"))
        values.append(torch.stack([*metrics.values()]).double())
    sums = sum_over_ranks(sum(values).tolist())
    largest_gap = max_over_ranks(torch.stack(largest_gaps).max())
    return dict(zip(metrics, sums, strict=True)) | {"sampler_gap_max": largest_gap}


def row_loss(policy: Policy, row: list[Group], algo: Algo, denominator: Counts | None = None):
    """losses.papo_loss of one packed row after `prepare`: a scalar with gradient, and metrics.

    All log-probs are taken at the sampling temperature and are 0 at padding.
    """
    recorded = partial(pad_and_cat, row, device=policy.device)  # field -> [B, T]
    log_probs = policy.log_probs(row)  # [B, T]
    # None are recorded for the step's first update: the policy is still the old one.
    has_old = all(group.old_log_probs is not None for group in row)
    old_log_probs = recorded("old_log_probs") if has_old else log_probs.detach()
    advantages = torch.cat([group.advantages for group in row]).to(policy.device)  # [B]
    if all(group.weights is not None for group in row):
        advantages = advantages[:, None] * recorded("weights")  # [B, T]
    views = {}
    for name, coefficient in algo.views().items():
        if name == "mask" and algo.masked_grad:
            under_view = policy.log_probs(row, name)
        else:
            under_view = view_log_probs(row, name, policy.device)
        views[name] = (coefficient, under_view)
    _, masked = views.pop("mask", (0.0, None))
    mask = recorded("response_mask").bool()
    loss, metrics = papo_loss(
        log_probs,
        old_log_probs=old_log_probs,
        advantages=advantages,
        mask=mask,
        algo=algo,
        ref_log_probs=recorded("ref_log_probs") if algo.kl_ref_coef else None,
        masked_log_probs=masked,
        denominator=denominator,
        has_image=has_image(row).to(policy.device),
        views=views,
    )
    # How far sampling and training disagree on the same tokens; 0 but for rounding.
    gap = (recorded("sample_log_probs") - old_log_probs).abs()
    metrics["sampler_gap"] = masked_mean(gap, mask, denominator and denominator.tokens)
    metrics["sampler_gap_max"] = F.pad(gap.flatten(), (0, 1)).max()  # 0 where there is no token
    return loss, metrics
