"""Qwen-VL models: Encoder (chat template, tokenizer, image processor) and Policy (weights, token log-probs)."""

from __future__ import annotations

import json
from pathlib import Path
from types import MethodType

import torch
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
from support.packing import ATTENTION, build_row, row_log_probs

MODEL_TYPES = ("qwen2_5_vl", "qwen3_vl")


PROMPT_SUFFIX = (
    "You first think through the reasoning process as an internal monologue, enclosed within <think> </think> tags. "
    "Then, provide your final answer enclosed within \\boxed{}."
)


def black_patch_of(image_mean: list[float], image_std: list[float], d_patch: int) -> Tensor:
    """What a black patch is after normalisation, [D_patch]: (0 - mean) / std in each channel; 0 would be mean grey."""
    if d_patch % len(image_mean):
        raise ValueError(f"D_patch={d_patch} does not divide into {len(image_mean)} channels")
    black = -torch.tensor(image_mean) / torch.tensor(image_std)
    return black.repeat_interleave(
        d_patch // len(image_mean)
    )  # the channel is the slowest axis of a patch


class Encoder:
    """Example -> Prompt: chat template, tokenizer and image processor. Needs no weights, so it can run in threads.

    AutoProcessor would need torchvision (and so would AutoImageProcessor, in 5.17); this does its work for images: one
    placeholder token an image in the chat template's text, repeated here once for every patches_per_token patch.
    """

    def __init__(self, name: str, min_pixels: int, max_pixels: int, suffix: str = PROMPT_SUFFIX):
        self.config = AutoConfig.from_pretrained(name)
        if self.config.model_type not in MODEL_TYPES:
            raise ValueError(
                f"model {name!r} is a {self.config.model_type}: choose one of {', '.join(MODEL_TYPES)}"
            )
        self.tokenizer = AutoTokenizer.from_pretrained(name)
        template = cached_file(
            name, "chat_template.json", _raise_exceptions_for_missing_entries=False
        )
        if (
            template and self.tokenizer.chat_template is None
        ):  # older folders keep it there, for processors alone
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
    def patches_per_token(self) -> int:
        """Patches that become one token."""
        return self.images.merge_size**2

    @property
    def black_patch(self) -> Tensor:
        d_patch = 3 * self.images.temporal_patch_size * self.images.patch_size**2
        return black_patch_of(self.images.image_mean, self.images.image_std, d_patch)

    def _text(self, question: str) -> tuple[list[int], int]:
        """Token ids before expansion, and the number of <image> markers."""
        if self.suffix and self.suffix not in question:
            question = f"{question}\n\n{self.suffix}"
        pieces = question.split("<image>")
        content = [{"type": "text", "text": pieces[0]}] if pieces[0] else []
        for piece in pieces[1:]:
            content += [{"type": "image"}] + ([{"type": "text", "text": piece}] if piece else [])
        messages = [{"role": "user", "content": content}]
        text = self.tokenizer.apply_chat_template(
            messages, tokenize=False, add_generation_prompt=True
        )
        ids = self.tokenizer(text, add_special_tokens=False)["input_ids"]
        if ids.count(self.image_id) != len(pieces) - 1:
            raise ValueError(f"the question spells out an image token: {question[:80]!r}")
        return ids, len(pieces) - 1

    def prompt_length(self, question: str, sizes: list[tuple[int, int]]) -> int:
        """Tokens of the prompt from the (width, height) of its images alone; ValueError at an aspect ratio over 200."""
        ids, _ = self._text(question)
        patches = [
            self.images.get_number_of_image_patches(height, width) for width, height in sizes
        ]
        return len(ids) + sum(n // self.patches_per_token - 1 for n in patches)

    def encode(self, example: Example, index: int = 0) -> Prompt:
        """Example -> Prompt; ValueError where markers and images do not match or an image is too thin."""
        ids, markers = self._text(example.question)
        if markers != len(example.images):
            raise ValueError(
                f"{markers} <image> markers for {len(example.images)} images: {example.question[:80]!r}"
            )
        pixels = grid = augmented = None
        if example.images:
            processed = self.images(images=example.images, return_tensors="pt")
            pixels, grid = processed["pixel_values"], processed["image_grid_thw"]
            if example.images_aug:
                pairs = zip(example.images_aug, example.images, strict=True)
                augmented = [
                    aug.convert("RGB").resize(image.size) for aug, image in pairs
                ]  # the same patch grid
                augmented = self.images(images=augmented, return_tensors="pt")["pixel_values"]
        counts = iter([] if grid is None else (grid.prod(-1) // self.patches_per_token).tolist())
        expanded = [[i] * (next(counts) if i == self.image_id else 1) for i in ids]
        input_ids = torch.tensor([i for run in expanded for i in run])
        is_image_token = input_ids == self.image_id
        position_ids, _ = self.rope.get_rope_index(
            input_ids[None], is_image_token[None].int(), image_grid_thw=grid
        )
        return Prompt(
            example, input_ids, position_ids[:, 0], is_image_token, pixels, grid, augmented, index
        )


class Policy:
    """A Qwen-VL model with its encoder. `model` is the transformers class, plain or sharded (distributed.shard)."""

    def __init__(self, model, encoder: Encoder, temperature: float = 1.0):
        self.model, self.encoder, self.temperature = model.eval(), encoder, temperature
        model.row_log_probs = MethodType(
            row_log_probs, model
        )  # a method, so that FSDP can gather weights around it
        model.set_attn_implementation(ATTENTION)
        ends = model.generation_config.eos_token_id
        ends = {*(ends if isinstance(ends, list) else [ends]), encoder.tokenizer.eos_token_id} - {
            None
        }
        self.eos_ids, self.pad_id = sorted(ends), encoder.tokenizer.pad_token_id
        # Qwen's generation_config holds chat defaults (repetition_penalty 1.05, a near-zero temperature) which
        # generate() would merge into rollouts silently. Only the end tokens are kept; the export copies the file.
        model.generation_config = GenerationConfig(
            eos_token_id=self.eos_ids, pad_token_id=self.pad_id
        )
        # No response may sample a vision token: the next forward would look for a picture behind it.
        names = (
            "<|vision_start|>",
            "<|vision_end|>",
            "<|vision_pad|>",
            "<|image_pad|>",
            "<|video_pad|>",
        )
        vocabulary = encoder.tokenizer.get_vocab()
        known = {vocabulary.get(name) for name in names} | {
            model.config.image_token_id,
            model.config.video_token_id,
        }
        self.suppressed_ids = sorted(known - {None})

    @classmethod
    def load(
        cls, name, encoder, dtype=torch.float32, device="cpu", temperature=1.0, checkpointing=False
    ) -> Policy:
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
        mask = pad_and_cat(groups, "response_mask", self.device).bool()
        row = build_row(
            groups, masked, self.encoder.black_patch, self.encoder.images.merge_size, self.device
        )
        flat = self.model.row_log_probs(row, self.temperature)
        return flat.new_zeros(mask.shape).masked_scatter(mask, flat)
