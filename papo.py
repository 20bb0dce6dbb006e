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

import hashlib
import json
import math
from dataclasses import dataclass, field, replace
from pathlib import Path
from types import MethodType

import torch
import torch.distributed as dist
import torch.nn.functional as F
from PIL import Image
from torch import Tensor
from torch.distributed.fsdp import FSDPModule
from transformers import (
    AutoConfig,
    AutoModelForImageTextToText,
    AutoTokenizer,
    GenerationConfig,
    Qwen2VLImageProcessorPil,
)
from transformers.utils import cached_file

import masking
from losses import Counts, count, papo_loss
from packing import ATTENTION, build_row, row_log_probs

MODEL_TYPES = ("qwen2_5_vl", "qwen3_vl")
PROMPT_SUFFIX = (
    "You first think through the reasoning process as an internal monologue, enclosed within <think> </think> tags. "
    "Then, provide your final answer enclosed within \\boxed{}."
)


# ---------------------------------------------------------------------------------------------------------- presets


def flag(default, doc: str):
    """A dataclass field that is a command-line flag with one line of help."""
    return field(default=default, metadata={"doc": doc})


@dataclass(frozen=True)
class Algo:
    """The objective of losses.py and what it is fed. A fork makes its own with `dataclasses.replace`."""

    name: str = "papo_g"
    kl_ref_coef: float = flag(0.01, "beta: pull towards the reference model; 0: no reference model is loaded")
    kl_prcp_coef: float = flag(0.02, "gamma: KL_prcp, maximised")
    entropy_coef: float = flag(0.0, "eta1: entropy under the image, pushed down")
    masked_entropy_coef: float = flag(0.0, "eta2: the same under the masked image; a constant without --masked_grad")
    clip_low: float = flag(0.2, "PPO clip below 1")
    clip_high: float = flag(0.3, "PPO clip above 1")
    clip_dual: float = flag(3.0, "dual clip: bound of the ratio where the advantage is negative")
    average: str = flag("token", "token: over all tokens (released); seq: per response first (paper, Eq. 2)")
    dynamic_sampling: bool = flag(False, "drop groups all right or all wrong, and sample on (DAPO)")
    mask_ratio: float = flag(0.6, "share of patches the masked view changes")
    mask_strategy: str = flag("random", "random, semantic, noise")
    mask_sigma: float = flag(1.0, "noise: standard deviation in normalised pixel units")
    kl_prcp_estimator: str = flag("k3", "k3: the released code's form; paper: the paper's literal one")
    kl_prcp_clip: float = flag(0.0, "clip KL_prcp at each token to [0, this]; 0: off (the release offers 0.2)")
    kl_prcp_coef_end: float = flag(-1.0, "anneal gamma, entropies along, linearly to this at the last step; < 0: off")
    masked_grad: bool = flag(False, "recompute the masked log-probs with gradient in every update")

    def __post_init__(self):
        for name, choices in {
            "average": ("token", "seq"),
            "mask_strategy": masking.STRATEGIES,
            "kl_prcp_estimator": ("k3", "paper"),
        }.items():
            if getattr(self, name) not in choices:
                raise ValueError(f"{name}={getattr(self, name)!r}: choose one of {', '.join(choices)}")
        if not 0.0 <= self.mask_ratio <= 1.0:
            raise ValueError(f"mask_ratio={self.mask_ratio}: choose a share of patches between 0 and 1")

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
    "papo_g_no_kl_ref": dict(kl_ref_coef=0.0, kl_prcp_coef=0.01, entropy_coef=0.03, masked_entropy_coef=0.03),
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


# ------------------------------------------------------------------------------------------ what a batch is made of


@dataclass
class Example:
    """One row of data. `<image>` markers in the question say where the images go."""

    question: str
    answer: str
    images: list[Image.Image]  # RGB, one a marker, in order
    images_aug: list[Image.Image] | None = None  # pre-masked images, used instead of random masks
    id: str = ""


@dataclass
class Prompt:
    """An example as the model reads it: P tokens, N_patch patches of all its images."""

    example: Example
    input_ids: Tensor  # [P], each image placeholder expanded to its number of tokens
    position_ids: Tensor  # [3, P], time, height, width (mrope)
    image_mask: Tensor  # [P] bool, where the image features go
    pixel_values: Tensor | None = None  # [N_patch, D_patch]
    image_grid_thw: Tensor | None = None  # [n_images, 3]
    aug_pixel_values: Tensor | None = None  # [N_patch, D_patch], from Example.images_aug
    index: int = 0  # place among the step's prompts, the same on any number of ranks

    def __len__(self) -> int:
        return len(self.input_ids)


@dataclass
class Group:
    """One prompt and its G responses of at most T tokens: the unit of masking, advantages, filtering and packing."""

    prompt: Prompt
    tokens: Tensor  # [G, T], right-padded
    response_mask: Tensor  # [G, T] bool, the first end token included
    truncated: Tensor  # [G] bool, ran into max_new_tokens
    sample_log_probs: Tensor  # [G, T], the sampler's, of the full softmax; for checks, training recomputes them
    responses: list[str] = field(default_factory=list)  # G decoded texts
    advantages: Tensor | None = None  # [G]
    masked_pixel_values: Tensor | None = None  # [N_patch, D_patch], one mask for the whole group
    hit: Tensor | None = None  # [N_patch] bool, the patches the mask changed
    old_log_probs: Tensor | None = None  # [G, T], as the next two; None: one update is all, so its own are the old ones
    ref_log_probs: Tensor | None = None
    masked_log_probs: Tensor | None = None

    @property
    def has_image(self) -> bool:
        return self.prompt.pixel_values is not None

    @property
    def n_tokens(self) -> int:
        """Tokens of the packed row: the prompt once, each response but its last token."""
        return len(self.prompt) + int((self.response_mask.sum(1) - 1).clamp(min=0).sum())


def empty_group() -> Group:
    """Two prompt tokens and nothing else: what a rank without groups feeds so as to run as many rows as the others."""
    nothing, positions = torch.zeros(1, 0), torch.arange(2).expand(3, -1)
    prompt = Prompt(Example("", "", []), torch.zeros(2, dtype=torch.long), positions, torch.zeros(2, dtype=torch.bool))
    return Group(
        prompt, nothing.long(), nothing.bool(), torch.zeros(1, dtype=torch.bool), nothing, [""], torch.zeros(1),
        old_log_probs=nothing, ref_log_probs=nothing, masked_log_probs=nothing,
    )  # fmt: skip


def stack(groups: list[Group], name: str, device="cpu") -> Tensor:
    """A field [G, T] of every group, right-padded to one [B, T]."""
    tensors = [getattr(group, name) for group in groups]
    width = max(t.shape[1] for t in tensors)
    return torch.cat([F.pad(t, (0, width - t.shape[1])) for t in tensors]).to(device)


def seeded(*key) -> torch.Generator:
    """A CPU generator that depends on the key alone: the same draw on any rank, in any order, after any resume."""
    digest = hashlib.blake2b(repr(key).encode(), digest_size=8).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest, "little") >> 1)


# ---------------------------------------------------------------------------------------------------------- encoder


class Encoder:
    """Example -> Prompt: chat template, tokenizer and image processor. Needs no weights, so it can run in threads.

    AutoProcessor would need torchvision (and so would AutoImageProcessor, in 5.17); this does its work for images: one
    placeholder token an image in the chat template's text, repeated here once for every merged patch.
    """

    def __init__(self, name: str, min_pixels: int, max_pixels: int, suffix: str = PROMPT_SUFFIX):
        self.config = AutoConfig.from_pretrained(name)
        if self.config.model_type not in MODEL_TYPES:
            raise ValueError(f"model {name!r} is a {self.config.model_type}: choose one of {', '.join(MODEL_TYPES)}")
        self.tokenizer = AutoTokenizer.from_pretrained(name)
        template = cached_file(name, "chat_template.json", _raise_exceptions_for_missing_entries=False)
        if template and self.tokenizer.chat_template is None:  # older folders keep it there, for processors alone
            self.tokenizer.chat_template = json.loads(Path(template).read_text())["chat_template"]
        self.images = Qwen2VLImageProcessorPil.from_pretrained(name)
        self.images.size = {"shortest_edge": min_pixels, "longest_edge": max_pixels}
        self.suffix = suffix
        self.image_id = self.config.image_token_id
        with torch.device("meta"):  # for its position ids only
            self.rope = AutoModelForImageTextToText.from_config(self.config).model

    @property
    def size(self) -> str:
        """Which of the paper's two sizes the presets take this model for."""
        return "7b" if self.config.get_text_config().hidden_size >= 3584 else "3b"

    @property
    def merged(self) -> int:
        """Patches that become one token."""
        return self.images.merge_size**2

    @property
    def black(self) -> Tensor:
        d_patch = 3 * self.images.temporal_patch_size * self.images.patch_size**2
        return masking.black_patch(self.images.image_mean, self.images.image_std, d_patch)

    def _text(self, question: str) -> tuple[list[int], int]:
        """Token ids before expansion, and the number of <image> markers."""
        if self.suffix and self.suffix not in question:
            question = f"{question}\n\n{self.suffix}"
        pieces = question.split("<image>")
        content = [{"type": "text", "text": pieces[0]}] if pieces[0] else []
        for piece in pieces[1:]:
            content += [{"type": "image"}] + ([{"type": "text", "text": piece}] if piece else [])
        messages = [{"role": "user", "content": content}]
        text = self.tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
        ids = self.tokenizer(text, add_special_tokens=False)["input_ids"]
        if ids.count(self.image_id) != len(pieces) - 1:
            raise ValueError(f"the question spells out an image token: {question[:80]!r}")
        return ids, len(pieces) - 1

    def prompt_length(self, question: str, sizes: list[tuple[int, int]]) -> int:
        """Tokens of the prompt from the (width, height) of its images alone; ValueError at an aspect ratio over 200."""
        ids, _ = self._text(question)
        patches = [self.images.get_number_of_image_patches(height, width) for width, height in sizes]
        return len(ids) + sum(n // self.merged - 1 for n in patches)

    def encode(self, example: Example, index: int = 0) -> Prompt:
        """Example -> Prompt; ValueError where markers and images do not match or an image is too thin."""
        ids, markers = self._text(example.question)
        if markers != len(example.images):
            raise ValueError(f"{markers} <image> markers for {len(example.images)} images: {example.question[:80]!r}")
        pixels = grid = augmented = None
        if example.images:
            processed = self.images(images=example.images, return_tensors="pt")
            pixels, grid = processed["pixel_values"], processed["image_grid_thw"]
            if example.images_aug:
                pairs = zip(example.images_aug, example.images, strict=True)
                augmented = [aug.convert("RGB").resize(image.size) for aug, image in pairs]  # the same patch grid
                augmented = self.images(images=augmented, return_tensors="pt")["pixel_values"]
        counts = iter([] if grid is None else (grid.prod(-1) // self.merged).tolist())
        expanded = [[i] * (next(counts) if i == self.image_id else 1) for i in ids]
        input_ids = torch.tensor([i for run in expanded for i in run])
        image_mask = input_ids == self.image_id
        position_ids, _ = self.rope.get_rope_index(input_ids[None], image_mask[None].int(), image_grid_thw=grid)
        return Prompt(example, input_ids, position_ids[:, 0], image_mask, pixels, grid, augmented, index)


# ----------------------------------------------------------------------------------------------------------- policy


class Policy:
    """A Qwen-VL model with its encoder. `model` is the transformers class, plain or sharded (checkpoint.shard)."""

    def __init__(self, model, encoder: Encoder, temperature: float = 1.0):
        self.model, self.encoder, self.temperature = model.eval(), encoder, temperature
        model.row_log_probs = MethodType(row_log_probs, model)  # a method, so that FSDP can gather weights around it
        model.set_attn_implementation(ATTENTION)
        ends = model.generation_config.eos_token_id
        ends = {*(ends if isinstance(ends, list) else [ends]), encoder.tokenizer.eos_token_id} - {None}
        self.eos_ids, self.pad_id = sorted(ends), encoder.tokenizer.pad_token_id
        # Qwen's generation_config holds chat defaults (repetition_penalty 1.05, a near-zero temperature) which
        # generate() would merge into rollouts silently. Only the end tokens are kept; the export copies the file.
        model.generation_config = GenerationConfig(eos_token_id=self.eos_ids, pad_token_id=self.pad_id)
        # No response may sample a vision token: the next forward would look for a picture behind it.
        names = ("<|vision_start|>", "<|vision_end|>", "<|vision_pad|>", "<|image_pad|>", "<|video_pad|>")
        vocabulary = encoder.tokenizer.get_vocab()
        known = {vocabulary.get(name) for name in names} | {model.config.image_token_id, model.config.video_token_id}
        self.suppressed_ids = sorted(known - {None})

    @classmethod
    def load(cls, name, encoder, dtype=torch.float32, device="cpu", temperature=1.0, checkpointing=False) -> Policy:
        """Weights of a local folder or hub id, in `dtype` on `device`; OSError where there are none."""
        model = AutoModelForImageTextToText.from_pretrained(name, dtype=dtype).to(device)
        if checkpointing:
            model.gradient_checkpointing_enable({"use_reentrant": False})
        return cls(model, encoder, temperature)

    @property
    def device(self) -> torch.device:
        return self.model.lm_head.weight.device

    def log_probs(self, groups: list[Group], masked: bool = False) -> Tensor:
        """log pi(token | prompt, earlier tokens) at the sampling temperature, [B, T], 0 at padding."""
        mask = stack(groups, "response_mask", self.device).bool()
        row = build_row(groups, masked, self.encoder.black, self.encoder.images.merge_size, self.device)
        flat = self.model.row_log_probs(row, self.temperature)
        return flat.new_zeros(mask.shape).masked_scatter(mask, flat)


# ---------------------------------------------------------------------------------------- one rollout batch, trained


def reduce(values, op: str = "sum") -> list[float]:
    """Numbers summed (or maximised) over all ranks, in float64; themselves without a process group."""
    if not dist.is_initialized():
        return [float(v) for v in values]
    device = "cuda" if dist.get_backend() == "nccl" else "cpu"
    tensor = torch.tensor([float(v) for v in values], dtype=torch.float64, device=device)
    dist.all_reduce(tensor, dist.ReduceOp.SUM if op == "sum" else dist.ReduceOp.MAX)
    return tensor.tolist()


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
    if rows and isinstance(policy.model, FSDPModule):  # a backward would, and the reference model never sees one
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
        g.masked_log_probs = torch.zeros_like(g.sample_log_probs)  # what a group without an image keeps, unread
    for g in seen:
        generator = seeded("mask", *key, g.prompt.index)
        g.masked_pixel_values, g.hit = masking.mask_prompt(g.prompt, algo, policy.encoder, generator, saliency)
    if not algo.masked_grad:
        fill(policy, seen, "masked_log_probs", budget, masked=True)
    hit, patches = reduce([sum(int(g.hit.sum()) for g in seen), sum(len(g.hit) for g in seen)])
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
    return [[g for g in groups if place[g.prompt.index] == n] for n in range(-(-len(indices) // size))]


def row_loss(policy: Policy, row: list[Group], algo: Algo, counts: Counts | None = None):
    """papo_loss of one row of groups that `prepare` has seen: scalar with gradient, and metrics."""
    device = policy.device
    log_probs = policy.log_probs(row)  # [B, T]
    known = all(g.old_log_probs is not None for g in row)
    old = stack(row, "old_log_probs", device) if known else log_probs.detach()
    ref = stack(row, "ref_log_probs", device) if algo.kl_ref_coef else None
    masked = None
    if algo.needs_masked_view:
        live = algo.masked_grad
        masked = policy.log_probs(row, masked=True) if live else stack(row, "masked_log_probs", device)
    advantages = torch.cat([g.advantages for g in row]).to(device)  # [B]
    has_image = torch.tensor([g.has_image for g in row for _ in g.tokens], device=device)  # [B]
    mask = stack(row, "response_mask", device).bool()
    return papo_loss(log_probs, old, advantages, mask, algo, ref, masked, counts, has_image)


def update(
    policy: Policy, optimizer, groups: list[Group], algo: Algo, mini_batch: int, budget: int, max_grad_norm: float = 1.0
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
        for row in rows:  # gradients are reduced row by row: unreduced ones would be a whole model on every rank
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
        history.append(sums | {"grad_norm": norm if finite else 0.0, "skipped_updates": float(not finite)})
    policy.model.eval()
    means = {name: sum(h[name] for h in history) / len(history) for name in history[0]} if history else {}
    return means | {"skipped_updates": sum(h["skipped_updates"] for h in history)}
