"""Qwen-VL models: the Encoder (example -> prompt tensors) and the Policy (weights, log-probs).

Differences from the released code:
1. One mechanism expands image placeholders here. AutoProcessor would do it but needs torchvision,
   and so does AutoImageProcessor in transformers 5.17.
2. A response that contains an image token is text: images are placed by their position in the
   prompt. The release looks for token ids and would expect an image behind it.
3. All vision tokens are suppressed in sampling; the release only biases the image token by -100.
"""

from __future__ import annotations

import json
import math
import os
import re
import time
from collections.abc import Callable
from pathlib import Path
from types import MethodType

import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import (
    AutoConfig,
    AutoModelForImageTextToText,
    AutoTokenizer,
    GenerationConfig,
    Qwen2VLImageProcessorPil,
)
from transformers.utils import cached_file

from support.batch import Example, Group, Prompt, pad_and_cat
from support.distributed import reshard_root
from support.packing import ATTENTION, build_pack, make_packs, pack_hidden_states, pack_log_probs

MODEL_TYPES = ("qwen2_5_vl", "qwen3_vl")
HIDDEN_SIZE_7B = 3584  # text hidden size from which presets take a model for the paper's 7B
PROMPT_SUFFIX = (
    "You first think through the reasoning process as an internal monologue, enclosed within "
    "<think> </think> tags. Then, provide your final answer enclosed within \\boxed{}."
)
TINY = 20_000_000  # parameters of a model that a thread or two run best
VISION_TOKEN = r"<\|(vision|image|video)_(start|end|pad)\|>"


def size_of(name: str) -> str:
    """Which of the paper's two sizes, "3b" or "7b", the presets take a folder or hub id for."""
    is_7b = AutoConfig.from_pretrained(name).get_text_config().hidden_size >= HIDDEN_SIZE_7B
    return "7b" if is_7b else "3b"


class Encoder:
    """Example -> Prompt: chat template, tokenizer and image processor.

    It needs no weights, so it runs in threads while the model works. `name`: a local Hugging Face
    folder or a hub id. Images are resized to between min_pixels and max_pixels. `suffix` is
    appended to questions that lack it.
    """

    def __init__(self, name: str, min_pixels: int, max_pixels: int, suffix: str = PROMPT_SUFFIX):
        self.source = name
        self.config = AutoConfig.from_pretrained(name)
        if self.config.model_type not in MODEL_TYPES:
            kind, choices = self.config.model_type, ", ".join(MODEL_TYPES)
            raise ValueError(f"model {name!r} is a {kind}: choose one of {choices}")
        self.tokenizer = _load_tokenizer(name)
        self.image_processor = Qwen2VLImageProcessorPil.from_pretrained(name)
        self.image_processor.size = {"shortest_edge": min_pixels, "longest_edge": max_pixels}
        self.suffix = suffix
        self.image_id = self.config.image_token_id
        added = self.tokenizer.added_tokens_decoder.values()
        self.control_tokens = [token.content for token in added if token.special]
        chat = self._render([{"type": "text", "text": "?"}])
        # Qwen3-VL Thinking's chat template writes it for the model.
        self.opening = "<think>" if chat.rstrip().endswith("<think>") else ""
        with torch.device("meta"):  # no weights: only its position ids are used
            self.rope = AutoModelForImageTextToText.from_config(self.config).model

    @property
    def patches_per_token(self) -> int:
        """Patches that the merger joins to one image token."""
        return self.image_processor.merge_size**2

    @property
    def black_patch(self) -> Tensor:
        """A black patch as the processor would return it, [D_patch].

        Black is (0 - mean) / std in each channel after normalisation; 0 would be mean grey. The
        channel is the slowest axis of a patch.
        """
        images = self.image_processor
        black = -torch.tensor(images.image_mean) / torch.tensor(images.image_std)
        per_channel = images.temporal_patch_size * images.patch_size**2
        return black.repeat_interleave(per_channel)

    def prompt_length(self, question: str, sizes: list[tuple[int, int]]) -> int:
        """Prompt tokens, from the (width, height) of the images alone.

        ValueError for an image with an aspect ratio above 200.
        """
        ids, _ = self._tokenize(question)
        length = len(ids)
        for width, height in sizes:
            patches = self.image_processor.get_number_of_image_patches(height, width)
            length += patches // self.patches_per_token - 1  # the placeholder is counted already
        return length

    def encode(self, example: Example, index: int = 0) -> Prompt:
        """Example -> Prompt. ValueError where markers and images do not match, or an image is too
        thin."""
        ids, markers = self._tokenize(example.question)
        if markers != len(example.images):
            counts = f"{markers} <image> markers for {len(example.images)} images"
            raise ValueError(f"{counts}: {example.question[:80]!r}")
        pixels, grid, more = self._process_images(example)
        input_ids = torch.tensor(ids)
        if grid is not None:  # one placeholder per image -> one per image token
            copies = torch.ones_like(input_ids)
            copies[input_ids == self.image_id] = grid.prod(-1) // self.patches_per_token
            input_ids = input_ids.repeat_interleave(copies)
        is_image_token = input_ids == self.image_id
        position_ids, _ = self.rope.get_rope_index(
            input_ids[None], is_image_token[None].int(), image_grid_thw=grid
        )
        return Prompt(
            example=example,
            input_ids=input_ids,
            position_ids=position_ids[:, 0],
            is_image_token=is_image_token,
            pixel_values=pixels,
            image_grid_thw=grid,
            index=index,
            more_pixel_values=more,
        )

    def _tokenize(self, question: str) -> tuple[list[int], int]:
        """Token ids with one placeholder per image, and the number of <image> markers."""
        for token in self.control_tokens:
            if token in question:
                raise ValueError(f"the question spells out {token}: {question[:80]!r}")
        if self.suffix and self.suffix not in question:
            question = f"{question}\n\n{self.suffix}"
        parts = [part for part in re.split("(<image>)", question) if part]
        image = {"type": "image"}
        content = [image if p == "<image>" else {"type": "text", "text": p} for p in parts]
        ids = self.tokenizer(self._render(content), add_special_tokens=False)["input_ids"]
        return ids, parts.count("<image>")

    def _render(self, content: list[dict]) -> str:
        """The chat template's text, up to where the response begins."""
        return self.tokenizer.apply_chat_template(
            [{"role": "user", "content": content}], tokenize=False, add_generation_prompt=True
        )

    def _process_images(self, example: Example):
        """pixel_values, image_grid_thw (None where there is no image), pixels of more_images."""
        if not example.images:
            return None, None, {}
        processed = self.image_processor(images=example.images, return_tensors="pt")
        more = {}
        for column, others in example.more_images.items():
            pairs = zip(others, example.images, strict=True)
            resized = [other.convert("RGB").resize(image.size) for other, image in pairs]
            same_grid = self.image_processor(images=resized, return_tensors="pt")
            more[column] = same_grid["pixel_values"]
        return processed["pixel_values"], processed["image_grid_thw"], more


def choose_threads(model) -> None:
    """Run a tiny model on two threads where two cores are idle, else on one.

    Beside other work torch's threads wait for one another, and a step of so small operations takes
    several times as long. OMP_NUM_THREADS decides where it is set, as torchrun does for ranks.
    """
    n_parameters = sum(parameter.numel() for parameter in model.parameters())
    if n_parameters < TINY and "OMP_NUM_THREADS" not in os.environ:
        torch.set_num_threads(2 if idle_cores() > 1.5 else 1)


def idle_cores(seconds: float = 0.2) -> float:
    """How many cores are idle at the moment; 0 where Linux's /proc/stat does not say."""
    if not Path("/proc/stat").exists():
        return 0.0
    idle_ticks = []  # of all cores, 100 per second
    for wait in (0, seconds):
        time.sleep(wait)
        idle_ticks.append(int(Path("/proc/stat").read_text().split()[4]))
    return (idle_ticks[1] - idle_ticks[0]) / 100 / seconds


def _load_tokenizer(name: str):
    tokenizer = AutoTokenizer.from_pretrained(name)
    template = cached_file(name, "chat_template.json", _raise_exceptions_for_missing_entries=False)
    if template and tokenizer.chat_template is None:
        # Older folders keep the template in a file that only processors read.
        tokenizer.chat_template = json.loads(Path(template).read_text())["chat_template"]
    return tokenizer


def use_faster_forwards(model) -> None:
    """Give two kinds of modules a forward of one kernel, equal to their own up to rounding."""
    embed = model.model.visual.patch_embed
    embed.forward = MethodType(_embed_patches, embed)
    for module in model.model.language_model.modules():
        if type(module).__name__.endswith("RMSNorm"):  # a class per architecture
            module.forward = MethodType(_rms_norm, module)


def _embed_patches(self, pixel_values: Tensor) -> Tensor:
    """A patch is as large as the kernel of this Conv3d, so the convolution is a linear layer.

    cuDNN is slow at such kernels in bf16, or has none.
    """
    weight = self.proj.weight.flatten(1)
    return F.linear(pixel_values.to(weight.dtype), weight, self.proj.bias)


def _rms_norm(self, hidden: Tensor) -> Tensor:
    return F.rms_norm(hidden, self.weight.shape, self.weight, self.variance_epsilon)


class Policy:
    """A Qwen-VL model and its encoder.

    `model`: the transformers class, plain or sharded (distributed.shard). `temperature`: that of
    sampling, by which all logits are divided.
    """

    # Settings that may be changed after building it.
    tokens_per_forward: int = 16_384  # at most, in a pack
    saliency: Callable | None = None  # image -> [h, w], for semantic masks
    most_responses: float = math.inf  # found to fit into memory at a time (rollout.generate)

    def __init__(self, model, encoder: Encoder, temperature: float = 1.0):
        self.model = model.eval()
        self.encoder = encoder
        self.temperature = temperature
        model.set_attn_implementation(ATTENTION)
        use_faster_forwards(model)
        for method in (pack_log_probs, pack_hidden_states):  # FSDP wraps methods only
            setattr(model, method.__name__, MethodType(method, model))
        ends = model.generation_config.eos_token_id
        ends = ends if isinstance(ends, list) else [ends]
        self.eos_ids = sorted({*ends, encoder.tokenizer.eos_token_id} - {None})
        self.pad_id = self.eos_ids[0]  # which nothing reads
        # No response may contain these: other programs would look for an image behind them.
        ids = encoder.tokenizer.get_vocab()
        self.suppressed_ids = sorted(ids[name] for name in ids if re.fullmatch(VISION_TOKEN, name))
        # Qwen's generation_config holds chat defaults (repetition_penalty 1.05, a near-zero
        # temperature) that generate() would merge into rollouts silently. Only the end tokens are
        # kept; the export copies the original file.
        ends = {"eos_token_id": self.eos_ids, "pad_token_id": self.pad_id}
        model.generation_config = GenerationConfig(**ends)

    @classmethod
    def load(
        cls, name, encoder, dtype=torch.float32, device="cpu", temperature=1.0, checkpointing=False
    ) -> Policy:
        """Load the weights of a local folder or hub id; OSError where any are missing.

        checkpointing: recompute each layer in the backward instead of storing its activations.
        """
        model, info = AutoModelForImageTextToText.from_pretrained(
            name, dtype=dtype, output_loading_info=True
        )
        if missing := sorted(info["missing_keys"]):  # transformers fills them at random
            raise OSError(f"model {name}: {len(missing)} weights are missing, such as {missing[0]}")
        model = model.to(device)
        choose_threads(model)
        if checkpointing:
            model.gradient_checkpointing_enable({"use_reentrant": False})
        return cls(model, encoder, temperature)

    @property
    def device(self) -> torch.device:
        return self.model.lm_head.weight.device

    def log_probs(self, groups: list[Group], view: str = "") -> Tensor:
        """log pi(token | prompt, earlier tokens) of groups packed into one pack.

        Returns [B, T], 0 at padding. view: under this of the groups' views, not under the images.
        """
        return self._values(groups, view)

    def entropies(self, groups: list[Group]) -> Tensor:
        """Entropy in nats of the full softmax behind each token, [B, T]; 0 at padding."""
        return self._values(groups, entropies=True)

    def _values(self, groups: list[Group], view: str = "", entropies: bool = False) -> Tensor:
        pack = build_pack(groups, view, self.device)
        of_tokens = self.model.pack_log_probs(pack, self.temperature, entropies)
        mask = pad_and_cat(groups, "response_mask", self.device).bool()
        return of_tokens.new_zeros(mask.shape).masked_scatter(mask, of_tokens)

    @torch.no_grad()
    def per_group(
        self, groups: list[Group], values_of: Callable[[list[Group]], Tensor]
    ) -> list[Tensor]:
        """Each group's share [G, T] of values_of(pack)[B, T], on the CPU; all ranks call it.

        values_of: such as self.log_probs. A pack holds at most tokens_per_forward tokens.
        """
        packs = make_packs(groups, self.tokens_per_forward)
        on_device = [values_of(pack) for pack in packs]  # moved afterwards: no wait per pack
        shares = []
        for pack, values in zip(packs, on_device, strict=True):
            of_groups = values.cpu().split([len(group.tokens) for group in pack])
            pairs = zip(pack, of_groups, strict=True)
            shares += [share[:, : group.tokens.shape[1]] for group, share in pairs]
        reshard_root(self.model)
        return shares[: len(groups)]  # without the dummies of make_packs

    def probe_attention(self, groups: list[Group], probe: Callable) -> None:
        """A forward whose layers first call probe(layer, query[1, H, S, D], key, value, scale)."""
        self.model.pack_hidden_states(build_pack(groups, "", self.device), probe)
