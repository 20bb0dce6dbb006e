r"""PAPO, the algorithm: presets, and the update on one batch of rollouts.

Read losses.py for the equations and masking.py for the masked view. rollout.py fills the groups
that `prepare` and `update` train on; train.py is the loop around them.

    prepare   mask the images; record old, reference and masked log-probs, without gradient
    update    one optimizer step per mini-batch on losses.papo_loss

The data they pass is a Group: one prompt, its G responses, and what is recorded about them
(support/batch.py). Every mean is over the whole mini-batch on all ranks, so packing and the number
of ranks do not change the update, up to rounding. losses.py and masking.py list the differences
from the paper and the released code.
"""

from __future__ import annotations

import itertools
import math
from dataclasses import dataclass, replace
from functools import partial

import torch
from torch.distributed.tensor import DTensor

import masking
from losses import Counts, count, papo_loss
from support import cli
from support.batch import Group, pad_and_cat, seeded
from support.distributed import (
    concat_over_ranks,
    reduce_over_replicas,
    reshard_root,
    sum_over_ranks,
    world_size,
)
from support.packing import pack_rows
from support.phases import phase
from support.qwen_vl import Policy

# ------------------------------------------------------------------------------------------ presets


flag = partial(cli.flag, shown_default="preset")  # for what presets set


@dataclass(frozen=True)
class Algo:
    """Settings of the objective of losses.py. Every field but `name` is a command-line flag."""

    name: str = "papo_g"
    kl_ref_coef: float = flag(
        0.01, "beta: weight of KL_ref; 0: load no reference model", group="objective"
    )
    kl_prcp_coef: float = flag(0.02, "gamma: weight of KL_prcp, which is maximised")
    entropy_coef: float = flag(0.0, "eta1: weight of the entropy under the image, minimised")
    masked_entropy_coef: float = flag(
        0.0, "eta2: the same under the masked image; no gradient without --masked_grad"
    )
    clip_low: float = flag(0.2, "PPO clip: the ratio's lower bound is 1 - this")
    clip_high: float = flag(0.3, "PPO clip: the ratio's upper bound is 1 + this")
    clip_dual: float = cli.flag(3.0, "dual clip: upper bound of the ratio at negative advantages")
    average: str = cli.flag(
        "token", "average of L_pg and the KLs; token: over tokens; seq: per response (Eq. 2)"
    )
    dynamic_sampling: bool = flag(
        False, "drop groups that are all right or all wrong, and sample more (DAPO)"
    )
    mask_ratio: float = cli.flag(0.6, "share of patches to mask; random and noise: a probability")
    mask_strategy: str = cli.flag("random", "random, semantic or noise")
    mask_sigma: float = cli.flag(1.0, "noise: standard deviation in normalised pixel units")
    kl_prcp_estimator: str = cli.flag(
        "k3", "k3: the released code's form; paper: the formula as printed"
    )
    kl_prcp_clip: float = cli.flag(0.0, "upper limit of KL_prcp per token; 0: none")
    kl_prcp_coef_end: float = cli.flag(
        -1.0, "final gamma, reached linearly; entropies scale along; below 0: constant"
    )
    masked_grad: bool = cli.flag(False, "recompute masked log-probs with gradient in every update")

    def __post_init__(self):
        choices = {
            "average": ("token", "seq"),
            "mask_strategy": masking.STRATEGIES,
            "kl_prcp_estimator": ("k3", "paper"),
        }
        for name, allowed in choices.items():
            if getattr(self, name) not in allowed:
                given = getattr(self, name)
                raise ValueError(f"{name}={given!r}: choose one of {', '.join(allowed)}")
        masking.check_ratio(self.mask_ratio)
        if self.clip_dual <= 1:
            raise ValueError(f"clip_dual={self.clip_dual}: must be above 1")
        if self.kl_prcp_clip < 0:
            raise ValueError(f"kl_prcp_clip={self.kl_prcp_clip}: must be at least 0")

    @property
    def needs_masked_view(self) -> bool:
        return bool(self.kl_prcp_coef or self.masked_entropy_coef)

    def annealed(self, progress: float) -> Algo:
        """This objective at `progress` in [0, 1] of training."""
        if self.kl_prcp_coef_end < 0 or not self.kl_prcp_coef:
            return self
        scale = 1 + progress * (self.kl_prcp_coef_end / self.kl_prcp_coef - 1)
        return replace(
            self,
            kl_prcp_coef=self.kl_prcp_coef * scale,
            entropy_coef=self.entropy_coef * scale,
            masked_entropy_coef=self.masked_entropy_coef * scale,
        )


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


def preset(name: str, size: str = "3b") -> Algo:
    """The objective called `name`. At size "7b" papo_g adds both entropies, as released."""
    if name not in PRESETS:
        raise ValueError(f"algo={name!r}: choose one of {', '.join(PRESETS)}")
    if size not in ("3b", "7b"):
        raise ValueError(f"size={size!r}: choose '3b' or '7b'")
    algo = Algo(name=name, **PRESETS[name])
    if name == "papo_g" and size == "7b":
        algo = replace(algo, entropy_coef=0.05, masked_entropy_coef=0.05)
    return algo


# ------------------------------------------------------------------------------- before the updates


def mini_batches(groups: list[Group], size: int) -> list[list[Group]]:
    """This rank's share of each mini-batch of `size` prompts.

    Groups are ordered by Prompt.index over all ranks. So the assignment does not depend on the
    number of ranks, and no group has to move.
    """
    indices = concat_over_ranks([group.prompt.index for group in groups])
    batch_of = {index: i // size for i, index in enumerate(sorted(indices))}
    batches = [[] for _ in range(math.ceil(len(indices) / size))]
    for group in groups:
        batches[batch_of[group.prompt.index]].append(group)
    return batches


@phase("log-probs")
def prepare(
    policy: Policy, reference: Policy | None, batches: list[list[Group]], algo: Algo, key: tuple
) -> dict[str, float]:
    """Store in the groups what the updates need, before the first of them changes the policy.

    batches: see mini_batches. Passes that the objective does not use are skipped. With one update
    per step the old log-probs equal that update's own, so they are not computed either. `key` and
    Prompt.index seed the masks. Returns the share of patches masked over all ranks as
    {"mask_ratio"}, or {} without a masked view.
    """
    groups = list(itertools.chain.from_iterable(batches))
    if len(batches) > 1:
        compute_log_probs(policy, groups, "old_log_probs")
    if algo.kl_ref_coef:
        compute_log_probs(reference, groups, "ref_log_probs")
    if not algo.needs_masked_view:
        return {}

    with_image = [group for group in groups if group.has_image]
    for group in groups:  # a placeholder for groups without an image, which papo_loss ignores
        group.masked_log_probs = torch.zeros_like(group.sample_log_probs)
    for group in with_image:
        generator = seeded("mask", *key, group.prompt.index)
        group.masked_pixel_values, group.patch_mask = masking.mask_prompt(
            group.prompt, algo, policy.encoder, generator, policy.saliency
        )
    if not algo.masked_grad:
        compute_log_probs(policy, with_image, "masked_log_probs", masked=True)
    n_masked = sum(int(group.patch_mask.sum()) for group in with_image)
    n_patches = sum(len(group.patch_mask) for group in with_image)
    n_masked, n_patches = sum_over_ranks([n_masked, n_patches])
    return {"mask_ratio": n_masked / max(n_patches, 1.0)}


@torch.no_grad()
def compute_log_probs(policy: Policy, groups: list[Group], name: str, masked: bool = False) -> None:
    """Store the policy's log-probs of every response in the groups' field `name`, [G, T] on CPU."""
    rows = pack_rows(groups, policy.tokens_per_forward)
    for row in rows:
        log_probs = policy.log_probs(row, masked).cpu()
        per_group = log_probs.split([len(group.tokens) for group in row])
        for group, values in zip(row, per_group, strict=True):
            setattr(group, name, values[:, : group.tokens.shape[1]])
    if rows:
        reshard_root(policy.model)


# --------------------------------------------------------------------------------------- the update


@phase("update")
def update(
    policy: Policy, optimizer, batches: list[list[Group]], algo: Algo, max_grad_norm: float = 1.0
) -> dict[str, float]:
    """One optimizer step per mini-batch. Returns each metric's mean over them.

    If the gradient norm is not finite, the step is skipped (as released). A skipped step counts in
    skipped_updates and in no mean.
    """
    history, skipped = [], 0
    policy.model.train()
    for batch in batches:
        metrics = accumulate_gradients(policy, batch, algo)
        norm = clip_gradients(optimizer, max_grad_norm)
        if math.isfinite(norm):
            optimizer.step()
            history.append(metrics | {"grad_norm": norm})
        else:
            skipped += 1
        optimizer.zero_grad(set_to_none=True)
    policy.model.eval()
    means = {}
    for name in history[0] if history else ():
        means[name] = sum(metrics[name] for metrics in history) / len(history)
    return means | {"skipped_updates": float(skipped)}


def accumulate_gradients(policy: Policy, batch: list[Group], algo: Algo) -> dict[str, float]:
    """Backward over this rank's rows of a mini-batch. Returns the metrics over all ranks.

    Denominators are summed over all ranks first. So the losses of rows can be added, and the
    gradient does not depend on how groups were packed: every token has the same weight.
    """
    counts = [count(group.response_mask, _has_image([group])) for group in batch]
    totals = [sum(each[i] for each in counts) for i in range(len(Counts._fields))]
    denominator = Counts(*sum_over_ranks(totals))
    sums = 0.0
    # Every rank gets the same number of rows (pack_rows adds empty ones), so all log the same keys.
    rows = pack_rows(batch, policy.tokens_per_forward)
    for number, row in enumerate(rows, start=1):
        loss, metrics = row_loss(policy, row, algo, denominator)
        is_last = number == len(rows)
        reduce_over_replicas(policy.model, enabled=is_last)
        (loss * world_size()).backward()  # FSDP averages over ranks, but we want the sum
        sums = sums + torch.stack([*metrics.values()]).double()  # on the device: no wait per row
    return dict(zip(metrics, sum_over_ranks(sums.tolist()), strict=True))


def row_loss(policy: Policy, row: list[Group], algo: Algo, denominator: Counts | None = None):
    """losses.papo_loss of one packed row after `prepare`: a scalar with gradient, and metrics.

    All log-probs are taken at the sampling temperature and are 0 at padding.
    """

    def recorded(name: str) -> torch.Tensor:
        return pad_and_cat(row, name, policy.device)  # [B, T]

    log_probs = policy.log_probs(row)  # [B, T]
    # Where none were recorded, this is the step's only update: the policy is still the old one.
    has_old = all(group.old_log_probs is not None for group in row)
    masked = None
    if algo.needs_masked_view and algo.masked_grad:
        masked = policy.log_probs(row, masked=True)
    elif algo.needs_masked_view:
        masked = recorded("masked_log_probs")
    return papo_loss(
        log_probs,
        old_log_probs=recorded("old_log_probs") if has_old else log_probs.detach(),
        advantages=torch.cat([group.advantages for group in row]).to(policy.device),
        mask=recorded("response_mask").bool(),
        algo=algo,
        ref_log_probs=recorded("ref_log_probs") if algo.kl_ref_coef else None,
        masked_log_probs=masked,
        denominator=denominator,
        has_image=_has_image(row).to(policy.device),
    )


def clip_gradients(optimizer, max_norm: float) -> float:
    """Clip in place; returns the norm before clipping.

    Uses the optimizer's parameters: after a forward without a backward FSDP2 leaves the root
    gathered, and model.parameters() then returns tensors without gradients.
    """
    parameters = [p for group in optimizer.param_groups for p in group["params"]]
    norm = torch.nn.utils.clip_grad_norm_(parameters, max_norm)
    if isinstance(norm, DTensor):
        norm = norm.full_tensor()
    return float(norm)


def _has_image(groups: list[Group]) -> torch.Tensor:
    """Whether each response's prompt has an image, [B] bool."""
    return torch.tensor([group.has_image for group in groups for _ in group.tokens])
