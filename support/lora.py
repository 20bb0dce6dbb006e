"""LoRA: train small adapters beside frozen weights, so that one card is enough (--lora_rank).

peft puts an adapter on each linear layer of the language model: W x becomes W x + s B A x, with
s = lora_alpha / lora_rank. A[rank, in] is random and B[out, rank] is 0 at first. W stays frozen, in
bf16 on CUDA; A and B are fp32. The vision tower has no adapters.

The reference model is the policy with its adapters off, so no second copy is loaded. Adapters stay
apart while sampling: in bf16, W + s B A - s B A is not W, and the reference would drift.

Every rank holds the whole adapters, outside FSDP, whose units take parameters of one dtype only.
Their gradients are averaged over the ranks, as FSDP averages those of what it shards.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path

import torch
import torch.distributed as dist
from safetensors.torch import save_file
from torch import Tensor, nn

from support.batch import Group, seeded
from support.distributed import world_size

LAYERS = r".*language_model\.layers\..*(q|k|v|o|gate|up|down)_proj"


def defaults(rank) -> dict:
    """Defaults of other flags: adapters take ten times the learning rate of full training."""
    return {"lr": 1e-5} if str(rank) != "0" else {}


def add_adapters(model, rank: int, alpha: float, source: str) -> None:
    """Freeze a transformers model and give it adapters, the same on every rank.

    source: the folder or hub id of its weights, which the exported adapter names.
    """
    from peft import LoraConfig, inject_adapter_in_model  # needed with --lora_rank only

    config = LoraConfig(r=rank, lora_alpha=alpha, target_modules=LAYERS)
    config.base_model_name_or_path = source
    inject_adapter_in_model(config, model)  # which freezes all other parameters
    for name, parameter in adapter_parameters(model).items():
        value = torch.zeros(parameter.shape)
        if "lora_A" in name:
            nn.init.kaiming_uniform_(value, a=math.sqrt(5), generator=seeded(name))
        parameter.data = value.to(parameter.device)


def adapter_parameters(model) -> dict[str, nn.Parameter]:
    """Name -> A or B; {} for a model without adapters."""
    return {name: p for name, p in model.named_parameters() if "lora_" in name}


def adapted_layers(model) -> dict[str, nn.Module]:
    """Name -> peft's layer, which holds base_layer, lora_A and lora_B."""
    return {name: module for name, module in model.named_modules() if hasattr(module, "lora_A")}


class Reference:
    """The reference policy of papo.prepare: a Policy with its adapters off."""

    def __init__(self, policy):
        self.policy, self.log_probs = policy, policy.log_probs

    def per_group(self, groups: list[Group], values_of: Callable) -> list[Tensor]:
        """See Policy.per_group."""
        layers = adapted_layers(self.policy.model).values()
        for layer in layers:
            layer.enable_adapters(False)
        values = self.policy.per_group(groups, values_of)
        for layer in layers:
            layer.enable_adapters(True)
        return values


@torch.no_grad()
def average_gradients(model) -> None:
    """Average the adapters' gradients over the ranks; all ranks call it after the backwards."""
    if world_size() == 1:
        return
    for parameter in adapter_parameters(model).values():
        dist.all_reduce(parameter.grad)
        parameter.grad /= world_size()


def save_adapter(model, folder: Path) -> None:
    """Write the adapter alone, in peft's format: PeftModel.from_pretrained loads it."""
    [config] = model.peft_config.values()
    config.save_pretrained(folder)
    weights = {
        f"base_model.model.{name.replace('.default', '')}": parameter.detach().cpu().contiguous()
        for name, parameter in adapter_parameters(model).items()
    }
    save_file(weights, folder / "adapter_model.safetensors")
