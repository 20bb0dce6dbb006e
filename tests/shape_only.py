"""Run a model of any size by its shapes alone, and count the memory that its tensors would take.

Weights and activations are on the meta device, so they have shapes and no values. Integer tensors
(token ids, image grids, positions in a row) stay real, because code reads their values.
"""

import torch
from torch import Tensor
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map_only

from support.batch import Example, Prompt


class ShapeOnly(TorchDispatchMode):
    """Inside, an operation with a meta tensor runs on the meta device.

    `peak`: the most bytes that the tensors made inside, and `counted` ones, took at once. Storages
    of `ignored` tensors are left out.
    """

    def __init__(self, ignored=(), counted=()):
        super().__init__()
        self.ignored = {tensor.untyped_storage()._cdata for tensor in ignored}
        self.alive: dict[int, tuple[StorageWeakRef, int]] = {}
        self.now = self.peak = 0
        for tensor in counted:
            self._count(tensor)

    def __torch_dispatch__(self, operation, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        given = (args, kwargs)
        if any(isinstance(each, Tensor) and each.is_meta for each in tree_leaves(given)):
            args, kwargs = tree_map_only(Tensor, _on_meta, given)
            if "device" in kwargs:
                kwargs["device"] = torch.device("meta")
        result = operation(*args, **kwargs)
        if operation._schema.is_mutable and not given[0][0].is_meta:
            return given[0][0]  # written from a meta tensor: it keeps its values
        for tensor in tree_leaves(result):
            if isinstance(tensor, Tensor):
                self._count(tensor)
        return result

    def _count(self, tensor: Tensor) -> None:
        storage = tensor.untyped_storage()
        known = self.alive.get(storage._cdata)
        if storage._cdata in self.ignored or (known and not known[0].expired()):
            return
        if known:  # freed, and its address used again
            self.now -= known[1]
        self.alive[storage._cdata] = StorageWeakRef(storage), storage.nbytes()
        self.now += storage.nbytes()
        if self.now > self.peak:
            self.peak = max(self.peak, self.live())

    def live(self) -> int:
        """Bytes in use now."""
        self.alive = {key: each for key, each in self.alive.items() if not each[0].expired()}
        self.now = sum(size for _, size in self.alive.values())
        return self.now


def _on_meta(tensor: Tensor) -> Tensor:
    if tensor.is_meta:
        return tensor
    return torch.empty_strided(
        tensor.shape, tensor.stride(), dtype=tensor.dtype, device="meta"
    ).requires_grad_(tensor.requires_grad)


class VarlenAttention(torch.autograd.Function):
    """The shapes of a varlen kernel: it keeps its inputs and its output for the backward."""

    @staticmethod
    def forward(ctx, query, key, value):
        out = torch.empty_like(query)
        ctx.save_for_backward(query, key, value, out)
        return out

    @staticmethod
    def backward(ctx, gradient):
        query, key, value, _ = ctx.saved_tensors
        return tuple(torch.empty_like(each) for each in (query, key, value))


def image_prompt(tokens: int, rows: int, columns: int) -> Prompt:
    """A prompt with one image of so many patches, of which four make an image token."""
    patches = rows * columns
    return Prompt(
        example=Example("", "", []),
        input_ids=torch.zeros(tokens, dtype=torch.long),
        position_ids=torch.arange(tokens).expand(3, -1),
        is_image_token=torch.arange(tokens) < patches // 4,
        pixel_values=torch.zeros(patches, 1176),
        image_grid_thw=torch.tensor([[1, rows, columns]]),
    )
