r"""PAPO, the algorithm: presets, the policy (load, encode, token log-probs), and the update over one rollout batch.

Read losses.py for the equations and masking.py for the corrupted view; rollout.py fills the groups that `prepare` and
`update` train on; train.py is the loop around them.

Where this differs from the released code (see also losses.py and masking.py):
1. A group (one prompt, its G responses) is one row of the forward, the prompt and its picture once (packing.py), and
   logits exist for a chunk of response tokens at a time. The log-probs and gradients are those of the plain way.
2. Rows are packed by a token budget, and every mean is taken over the whole mini-batch on all ranks: neither the
   budget nor the number of ranks changes the update.
3. A response that holds an image placeholder is text: pictures are placed by their position in the prompt, not by
   looking for token ids.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

import torch
import torch.distributed as dist
from torch.distributed.fsdp import (
    FSDPModule,
)

import masking
from losses import Counts, count, papo_loss
from support.batch import Group, empty_group, pad_and_cat, seeded
from support.cli import flag
from support.distributed import (
    reduce,
)
from support.qwen_vl import Policy


@dataclass(frozen=True)
class Algo:
    """The objective of losses.py and what it is fed. A fork makes its own with `dataclasses.replace`."""

    name: str = "papo_g"
    kl_ref_coef: float = flag(
        0.01, "beta: pull towards the reference model; 0: no reference model is loaded"
    )
    kl_prcp_coef: float = flag(0.02, "gamma: KL_prcp, maximised")
    entropy_coef: float = flag(0.0, "eta1: entropy under the image, pushed down")
    masked_entropy_coef: float = flag(
        0.0, "eta2: the same under the masked image; a constant without --masked_grad"
    )
    clip_low: float = flag(0.2, "PPO clip below 1")
    clip_high: float = flag(0.3, "PPO clip above 1")
    clip_dual: float = flag(3.0, "dual clip: bound of the ratio where the advantage is negative")
    average: str = flag(
        "token", "token: over all tokens (released); seq: per response first (paper, Eq. 2)"
    )
    dynamic_sampling: bool = flag(False, "drop groups all right or all wrong, and sample on (DAPO)")
    mask_ratio: float = flag(0.6, "share of patches the masked view changes")
    mask_strategy: str = flag("random", "random, semantic, noise")
    mask_sigma: float = flag(1.0, "noise: standard deviation in normalised pixel units")
    kl_prcp_estimator: str = flag(
        "k3", "k3: the released code's form; paper: the paper's literal one"
    )
    kl_prcp_clip: float = flag(
        0.0, "clip KL_prcp at each token to [0, this]; 0: off (the release offers 0.2)"
    )
    kl_prcp_coef_end: float = flag(
        -1.0, "anneal gamma, entropies along, linearly to this at the last step; < 0: off"
    )
    masked_grad: bool = flag(False, "recompute the masked log-probs with gradient in every update")

    def __post_init__(self):
        for name, choices in {
            "average": ("token", "seq"),
            "mask_strategy": masking.STRATEGIES,
            "kl_prcp_estimator": ("k3", "paper"),
        }.items():
            if getattr(self, name) not in choices:
                raise ValueError(
                    f"{name}={getattr(self, name)!r}: choose one of {', '.join(choices)}"
                )
        if not 0.0 <= self.mask_ratio <= 1.0:
            raise ValueError(
                f"mask_ratio={self.mask_ratio}: choose a share of patches between 0 and 1"
            )

    @property
    def needs_masked_view(self) -> bool:
        return bool(self.kl_prcp_coef or self.masked_entropy_coef)

    def annealed(self, progress: float) -> Algo:
        """This algorithm after a share `progress` in [0, 1] of the run."""
        if self.kl_prcp_coef_end < 0 or not self.kl_prcp_coef:
            return self
        scale = 1 + progress * (self.kl_prcp_coef_end / self.kl_prcp_coef - 1)
        names = ("kl_prcp_coef", "entropy_coef", "masked_entropy_coef")
        return replace(self, **{name: getattr(self, name) * scale for name in names})


_DAPO = dict(kl_ref_coef=0.0, clip_high=0.28, dynamic_sampling=True)


PRESETS: dict[str, dict] = {
    "grpo": dict(kl_prcp_coef=0.0),
    "dapo": dict(kl_prcp_coef=0.0, **_DAPO),
    "papo_g": dict(),
    "papo_d": dict(kl_prcp_coef=0.01, entropy_coef=0.03, masked_entropy_coef=0.03, **_DAPO),
    "grpo_no_kl_ref": dict(kl_prcp_coef=0.0, kl_ref_coef=0.0),
    "papo_g_no_kl_ref": dict(
        kl_ref_coef=0.0, kl_prcp_coef=0.01, entropy_coef=0.03, masked_entropy_coef=0.03
    ),
}


def preset(name: str, size: str = "3b") -> Algo:
    """The released scripts' settings. size "7b" (from a text hidden size of 3,584 on) gives papo_g its entropy loss."""
    if name not in PRESETS:
        raise ValueError(f"algo={name!r}: choose one of {', '.join(PRESETS)}")
    if size not in ("3b", "7b"):
        raise ValueError(f"size={size!r}: choose '3b' or '7b'")
    fields = dict(PRESETS[name])
    if name == "papo_g" and size == "7b":
        fields.update(entropy_coef=0.05, masked_entropy_coef=0.05)
    return Algo(name=name, **fields)


def pack(groups: list[Group], budget: int) -> list[list[Group]]:
    """Groups into rows of at most `budget` tokens (a larger group gets a row of its own), in order.

    Every rank gets as many rows as the rank with the most: under FSDP each forward is a meeting of all ranks.
    """
    rows: list[list[Group]] = []
    room = 0
    for group in groups:
        if not rows or group.n_tokens > room:
            rows.append([])
            room = budget
        rows[-1].append(group)
        room -= group.n_tokens
    most = int(reduce([len(rows)], "max")[0])
    return rows + [[empty_group()] for _ in range(most - len(rows))]


@torch.no_grad()
def fill(policy: Policy, groups: list[Group], name: str, budget: int, masked: bool = False) -> None:
    """Put the policy's log-probs of every response into the groups' field `name`, [G, T] on the CPU."""
    rows = pack(groups, budget)
    for row in rows:
        per_row = policy.log_probs(row, masked).cpu().split([len(g.tokens) for g in row])
        for group, values in zip(row, per_row, strict=True):
            setattr(group, name, values[:, : group.tokens.shape[1]])
    if rows and isinstance(
        policy.model, FSDPModule
    ):  # a backward would, and the reference model never sees one
        policy.model.reshard()


def prepare(
    policy: Policy, reference: Policy | None, groups: list[Group], algo: Algo, budget: int, updates: int, key: tuple,
    saliency=None,
) -> dict[str, float]:  # fmt: skip
    """What the updates need of the policy before it moves: masks, and old, reference and masked log-probs.

    No pass is wasted: no reference at beta 0, no masked pass where neither KL_prcp nor its entropy counts, and no old
    log-probs where one update is all there is (they are that update's own, detached). `key` seeds the masks, together
    with the prompt's index. Returns {"mask_ratio"}, the share of patches hit over all ranks.
    """
    if updates > 1:
        fill(policy, groups, "old_log_probs", budget)
    if algo.kl_ref_coef:
        fill(reference, groups, "ref_log_probs", budget)
    if not algo.needs_masked_view:
        return {}
    seen = [g for g in groups if g.has_image]
    for g in groups:
        g.masked_log_probs = torch.zeros_like(
            g.sample_log_probs
        )  # what a group without an image keeps, unread
    for g in seen:
        generator = seeded("mask", *key, g.prompt.index)
        g.masked_pixel_values, g.patch_mask = masking.mask_prompt(
            g.prompt, algo, policy.encoder, generator, saliency
        )
    if not algo.masked_grad:
        fill(policy, seen, "masked_log_probs", budget, masked=True)
    hit, patches = reduce(
        [sum(int(g.patch_mask.sum()) for g in seen), sum(len(g.patch_mask) for g in seen)]
    )
    return {"mask_ratio": hit / max(patches, 1.0)}


def mini_batches(groups: list[Group], size: int) -> list[list[Group]]:
    """This rank's share of each mini-batch of `size` prompts; all ranks together hold the groups of the step.

    Groups are counted in the order of their prompts' index over all ranks, so no group moves and membership does not
    depend on the number of ranks.
    """
    indices = [g.prompt.index for g in groups]
    if dist.is_initialized():
        gathered = [None] * dist.get_world_size()
        dist.all_gather_object(gathered, indices)
        indices = [i for part in gathered for i in part]
    place = {index: n // size for n, index in enumerate(sorted(indices))}
    return [
        [g for g in groups if place[g.prompt.index] == n] for n in range(-(-len(indices) // size))
    ]


def row_loss(policy: Policy, row: list[Group], algo: Algo, counts: Counts | None = None):
    """papo_loss of one row of groups that `prepare` has seen: scalar with gradient, and metrics."""
    device = policy.device
    log_probs = policy.log_probs(row)  # [B, T]
    known = all(g.old_log_probs is not None for g in row)
    old = pad_and_cat(row, "old_log_probs", device) if known else log_probs.detach()
    ref = pad_and_cat(row, "ref_log_probs", device) if algo.kl_ref_coef else None
    masked = None
    if algo.needs_masked_view:
        live = algo.masked_grad
        masked = (
            policy.log_probs(row, masked=True)
            if live
            else pad_and_cat(row, "masked_log_probs", device)
        )
    advantages = torch.cat([g.advantages for g in row]).to(device)  # [B]
    has_image = torch.tensor([g.has_image for g in row for _ in g.tokens], device=device)  # [B]
    mask = pad_and_cat(row, "response_mask", device).bool()
    return papo_loss(log_probs, old, advantages, mask, algo, ref, masked, counts, has_image)


def update(
    policy: Policy,
    optimizer,
    groups: list[Group],
    algo: Algo,
    mini_batch: int,
    budget: int,
    max_grad_norm: float = 1.0,
) -> dict[str, float]:
    """One pass over the step's groups, an optimiser step a mini-batch; returns the means of the metrics over them.

    A mini-batch's denominators are counted over all ranks before its first backward, so its rows, on whatever rank and
    in whatever number, add up to one gradient. FSDP averages gradients over ranks: hence `* world`. A gradient norm
    that is not finite skips that optimiser step (as released) and is counted in `skipped_updates`.
    """
    world = dist.get_world_size() if dist.is_initialized() else 1
    history: list[dict[str, float]] = []
    policy.model.train()
    for batch in mini_batches(groups, mini_batch):
        own = [count(g.response_mask, torch.full((len(g.tokens),), g.has_image)) for g in batch]
        counts = Counts(*reduce([sum(c[i] for c in own) for i in range(3)]))
        rows = pack(batch, budget)
        sums: dict[str, float] = {}
        for row in (
            rows
        ):  # gradients are reduced row by row: unreduced ones would be a whole model on every rank
            loss, metrics = row_loss(policy, row, algo, counts)
            (loss * world).backward()
            sums = {name: sums.get(name, 0.0) + float(value) for name, value in metrics.items()}
        # The optimiser's weights, not the model's: after a forward without a backward FSDP leaves the root's whole, and
        # the model names those, whose gradients nobody fills.
        parameters = [p for group in optimizer.param_groups for p in group["params"]]
        norm = torch.nn.utils.clip_grad_norm_(parameters, max_grad_norm)
        norm = float(norm.full_tensor() if hasattr(norm, "full_tensor") else norm)
        if finite := math.isfinite(norm):
            optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        sums = dict(zip(sums, reduce(sums.values()), strict=True))
        history.append(
            sums | {"grad_norm": norm if finite else 0.0, "skipped_updates": float(not finite)}
        )
    policy.model.eval()
    means = (
        {name: sum(h[name] for h in history) / len(history) for name in history[0]}
        if history
        else {}
    )
    return means | {"skipped_updates": sum(h["skipped_updates"] for h in history)}
