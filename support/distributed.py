"""The ranks: process group, FSDP2 and collectives.

FSDP2 shards every weight over the ranks of one machine; several machines hold replicas (`make_mesh`
can shard wider or narrower). Each vision block and each decoder layer is a unit: its weights are
gathered just before its forward and its backward, in the compute dtype (bf16 on CUDA), and dropped
after them, while fp32 master weights, gradients and optimizer state stay sharded. What is left
(embeddings, head, norms) belongs to the root unit. So every forward is a collective, and all ranks
must run equally many (`packing.make_packs`).
"""

from __future__ import annotations

import math
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import timedelta
from pathlib import Path

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import (
    FSDPModule,
    MixedPrecisionPolicy,
    fully_shard,
    register_fsdp_forward_method,
)
from torch.distributed.tensor import DTensor

# Sampling and updates need blocks of many sizes, and CUDA's allocator keeps one of each it has
# served unless its segments can grow. torch (2.11 to 2.13) reads this at the first allocation, so
# it may be set after `import torch`. The older PYTORCH_CUDA_ALLOC_CONF goes before it: a user's
# setting of either name stays.
os.environ.setdefault("PYTORCH_ALLOC_CONF", "expandable_segments:True")

# How long a collective waits for a rank that loads, samples or saves; scoring comes on top.
TIMEOUT_MINUTES = 30
NVIDIA_DRIVER = Path("/proc/driver/nvidia/version")

# -------------------------------------------------------------------------------- the process group


def init_distributed(scoring_seconds: float = 0.0) -> tuple[int, int, torch.device]:
    """Join torchrun's process group, or make one of a single rank. Returns rank, world, device.

    scoring_seconds: how long other ranks may wait for one that scores responses. ValueError where
    CUDA cannot be used although torch and the machine have it, or where a GPU is missing.
    """
    # On Hopper torch prefers cuDNN's attention, which builds a plan for each new shape (tenths of a
    # second, and every pack has another) and is reported to give NaN gradients.
    torch.backends.cuda.enable_cudnn_sdp(False)
    check_cuda()
    device, backend = torch.device("cpu"), "gloo"
    if torch.cuda.is_available():
        index, count = local_rank(), torch.cuda.device_count()
        if index >= count:
            raise ValueError(f"--nproc_per_node is above this machine's number of GPUs, {count}")
        device, backend = torch.device("cuda", index), "cpu:gloo,cuda:nccl"
        torch.cuda.set_device(device)
    timeout = timedelta(minutes=TIMEOUT_MINUTES, seconds=scoring_seconds)
    alone = {} if "RANK" in os.environ else {"store": dist.HashStore(), "rank": 0, "world_size": 1}
    dist.init_process_group(backend, timeout=timeout, **alone)
    return dist.get_rank(), dist.get_world_size(), device


def check_cuda() -> None:
    """ValueError where torch would silently run on the CPU of a machine with an NVIDIA GPU."""
    wants_cpu = os.environ.get("CUDA_VISIBLE_DEVICES") == ""
    has_cuda = torch.version.cuda and NVIDIA_DRIVER.exists()
    if has_cuda and not wants_cpu and not torch.cuda.is_available():
        raise ValueError(
            f"torch {torch.__version__} cannot use this machine's GPU: update the NVIDIA driver "
            "(CUDA 13 needs 580 or newer), or install torch 2.13.0 from its cu126 index; "
            "CUDA_VISIBLE_DEVICES= runs on the CPU"
        )


def rank() -> int:
    """Number of this rank; 0 without a process group."""
    return dist.get_rank() if dist.is_initialized() else 0


def world_size() -> int:
    """Number of ranks; 1 without a process group."""
    return dist.get_world_size() if dist.is_initialized() else 1


def local_rank() -> int:
    """Number of this rank on its machine."""
    return int(os.environ.get("LOCAL_RANK", "0"))


def local_world_size() -> int:
    """Number of ranks on this machine, which share its cores and its memory."""
    return int(os.environ.get("LOCAL_WORLD_SIZE", "1"))


def from_first_rank(task: Callable):
    """Run `task` on the first rank and return its result on all; all ranks call it.

    An OSError or a ValueError of the task is raised on all ranks.
    """
    result, problem = None, None
    if rank() == 0:
        try:
            result = task()
        except (OSError, ValueError) as error:
            problem = error
    if dist.is_initialized():
        message = [result, problem]
        dist.broadcast_object_list(message)
        result, problem = message
    if problem:
        raise problem
    return result


@contextmanager
def one_rank_at_a_time() -> Iterator[None]:
    """The ranks of each machine run the block one after the other; all ranks enter it."""
    longest_queue = int(max_over_ranks(local_world_size()))
    for _ in range(local_rank()):
        dist.barrier()
    try:
        yield
    finally:  # also when this rank fails: the others must reach their own error
        for _ in range(longest_queue - local_rank()):
            dist.barrier()


# -------------------------------------------------------------------------------------- collectives


def gather_over_ranks(value) -> list:
    """The Python objects that the ranks pass, in the order of the ranks."""
    if not dist.is_initialized():
        return [value]
    gathered = [None] * dist.get_world_size()
    dist.all_gather_object(gathered, value)
    return gathered


def concat_over_ranks(values: list) -> list:
    """The lists that the ranks pass, one after the other."""
    return sum(gather_over_ranks(values), [])


def sum_over_ranks(values) -> list[float]:
    """Sums of the numbers over all ranks."""
    of_ranks = gather_over_ranks([float(value) for value in values])
    return [sum(numbers) for numbers in zip(*of_ranks, strict=True)]


def max_over_ranks(value) -> float:
    """The largest of the ranks' numbers."""
    return max(gather_over_ranks(float(value)))


# --------------------------------------------------------------------------------------------- FSDP


def make_mesh(device_type: str, shard_size: int = 0) -> DeviceMesh:
    """The mesh to `shard` models on: all ranks, in replicas of `shard_size`. All ranks call it.

    The ranks of a replica split one copy of the weights, and forwards gather within it; gradients
    are averaged over the replicas too. shard_size 0: the ranks of one machine, so that no forward
    gathers over the network. ValueError if the ranks cannot be divided like that.
    """
    world = dist.get_world_size()
    # torchrun numbers a machine's ranks consecutively. Unequal machines use a common divisor.
    shard_size = shard_size or math.gcd(*gather_over_ranks(local_world_size()))
    divisors = [size for size in range(1, world + 1) if world % size == 0]
    if shard_size not in divisors:
        choices = ", ".join(map(str, divisors))
        raise ValueError(
            f"shard_size={shard_size}: must divide the number of ranks, {world}; choices: {choices}"
        )
    if shard_size == world:
        return init_device_mesh(device_type, (world,))
    shape = world // shard_size, shard_size
    return init_device_mesh(device_type, shape, mesh_dim_names=("replicate", "shard"))


def fsdp_blocks(model) -> list:
    """The FSDP units below the root: vision blocks and decoder layers."""
    return [*model.model.visual.blocks, *model.model.language_model.layers]


def shard(model, mesh, dtype: torch.dtype, ignored: set = frozenset()) -> None:
    """Shard a model in place with FSDP2. It computes in `dtype` and reduces gradients in fp32.

    ignored: parameters that every rank keeps whole, as they are.
    """
    # cast_forward_inputs would round the angles of the vision tower's rotary embedding to bf16.
    precision = MixedPrecisionPolicy(
        param_dtype=dtype, reduce_dtype=torch.float32, cast_forward_inputs=False
    )
    for block in fsdp_blocks(model):
        fully_shard(block, mesh=mesh, mp_policy=precision, ignored_params=ignored)
    fully_shard(model, mesh=mesh, mp_policy=precision, ignored_params=ignored)
    for method in ("pack_log_probs", "pack_hidden_states"):
        register_fsdp_forward_method(model, method)


@contextmanager
def full_weights(model) -> Iterator[None]:
    """Hold the whole weights on every rank, so that ranks can generate independently.

    Entering is a collective; forwards inside the block are not.
    """
    modules = [module for module in model.modules() if isinstance(module, FSDPModule)]
    for module in modules:
        module.unshard()
        module.set_reshard_after_forward(False, recurse=False)
    try:
        yield
    finally:
        for module in modules:
            module.set_reshard_after_forward(module is not model, recurse=False)
            module.reshard()
        # The cache leaves large blocks behind, and updates would not find room in one piece.
        torch.cuda.empty_cache()  # nothing without CUDA


def reduce_over_replicas(model, enabled: bool) -> None:
    """Whether the next backward sums gradients over the replicas, across machines.

    Of several backwards only the last has to: within a replica they add up.
    """
    if isinstance(model, FSDPModule):
        model.set_requires_all_reduce(enabled)


def reshard_root(model) -> None:
    """Drop the root's gathered weights after a forward without a backward.

    FSDP2 keeps them for the backward that usually follows; the reference model never has one.
    """
    if isinstance(model, FSDPModule):
        model.reshard()


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
