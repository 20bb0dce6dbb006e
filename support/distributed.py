"""The process group, FSDP2 sharding and gathering, collectives."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import timedelta

import torch
import torch.distributed as dist
from torch.distributed.fsdp import (
    FSDPModule,
    MixedPrecisionPolicy,
    fully_shard,
    register_fsdp_forward_method,
)
from torch.distributed.tensor import DTensor


def init_distributed() -> tuple[int, int, torch.device]:
    """(rank, world size, device) of this process; joins the process group torchrun describes, or one of its own."""
    cuda = torch.cuda.is_available()
    device = (
        torch.device("cuda", int(os.environ.get("LOCAL_RANK", "0")))
        if cuda
        else torch.device("cpu")
    )
    if cuda:
        torch.cuda.set_device(device)
    alone = (
        {} if "RANK" in os.environ else dict(store=dist.HashStore(), rank=0, world_size=1)
    )  # plain python
    # A dead rank is torchrun's to notice; a slow one, with the longest responses of an evaluation, is waited for.
    dist.init_process_group(
        "cpu:gloo,cuda:nccl" if cuda else "gloo", timeout=timedelta(hours=4), **alone
    )
    return dist.get_rank(), dist.get_world_size(), device


def on_first_rank(task: Callable):
    """What `task()` returns on the first rank, told to all; its OSError is raised on all. All ranks call it."""
    told: list = [None, None]
    if not dist.is_initialized() or dist.get_rank() == 0:
        try:
            told[0] = task()
        except OSError as error:
            told[1] = str(error)
    if dist.is_initialized():
        dist.broadcast_object_list(told)
    if told[1] is not None:
        raise OSError(told[1])
    return told[0]


@contextmanager
def one_rank_at_a_time() -> Iterator[None]:
    """The ranks of each machine run the block one after the other. All ranks enter it."""
    rank, ranks = (
        int(os.environ.get(name, default))
        for name, default in (("LOCAL_RANK", 0), ("LOCAL_WORLD_SIZE", 1))
    )
    most = [None] * dist.get_world_size()
    dist.all_gather_object(most, ranks)
    for _ in range(rank):
        dist.barrier()
    try:
        yield
    finally:  # a rank that fails lets the others go on to their own error
        for _ in range(max(most) - rank):
            dist.barrier()


def reduce(values, op: str = "sum") -> list[float]:
    """Numbers summed (or maximised) over all ranks, in float64; themselves without a process group."""
    if not dist.is_initialized():
        return [float(v) for v in values]
    device = "cuda" if dist.get_backend() == "nccl" else "cpu"
    tensor = torch.tensor([float(v) for v in values], dtype=torch.float64, device=device)
    dist.all_reduce(tensor, dist.ReduceOp.SUM if op == "sum" else dist.ReduceOp.MAX)
    return tensor.tolist()


def fsdp_blocks(model) -> list:
    """The blocks that are sharded and full_weights one at a time; the rest (embeddings, head) is the root's."""
    return [*model.model.visual.blocks, *model.model.language_model.layers]


def shard(model, mesh, dtype: torch.dtype) -> None:
    """FSDP2 in place: each vision block and decoder layer is one unit, the rest (embeddings, head) the root."""
    precision = MixedPrecisionPolicy(param_dtype=dtype, reduce_dtype=torch.float32)
    for block in fsdp_blocks(model):
        fully_shard(block, mesh=mesh, mp_policy=precision)
    fully_shard(model, mesh=mesh, mp_policy=precision)
    register_fsdp_forward_method(model, "row_log_probs")


@contextmanager
def optimizer_offloaded(optimizer, on: bool = True) -> Iterator[None]:
    """The optimiser's moments wait in host memory while the block samples; their device memory is given back.

    The tensors stay where they are and lose their storage for a while, as FSDP does with full_weights weights.
    """
    tensors = [
        t
        for state in optimizer.state.values()
        for t in state.values()
        if on and isinstance(t, torch.Tensor)
    ]
    storages = [(t.to_local() if isinstance(t, DTensor) else t).untyped_storage() for t in tensors]
    copies = [
        storage.clone() if storage.device.type == "cpu" else storage.cpu() for storage in storages
    ]
    for storage in storages:
        storage.resize_(0)
    try:
        yield
    finally:
        for storage, copy in zip(storages, copies, strict=True):
            storage.resize_(copy.nbytes())
            storage.copy_(copy)


@contextmanager
def full_weights(model) -> Iterator[None]:
    """Whole weights on every rank, so that ranks can generate on their own: one gather here, no collective inside."""
    modules = [m for m in model.modules() if isinstance(m, FSDPModule)]
    for module in modules:
        module.unshard()
        module.set_reshard_after_forward(False, recurse=False)
    try:
        yield
    finally:
        for module in modules:
            module.set_reshard_after_forward(module is not model, recurse=False)
            module.reshard()
        if (
            torch.cuda.is_available()
        ):  # the cache's large blocks, or updates would not find room in one piece
            torch.cuda.empty_cache()
