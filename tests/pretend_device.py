"""A pretend CUDA device, for tests on a CPU: it computes there, and fails where CUDA would.

A tensor is on the device if its memory is, so the device keeps a list of storages. Their tensors
say that they are on cuda:0, and code takes its CUDA branches. Inside `with device:` operations on
tensors of both devices raise, unless CUDA has an exception for them, and memory that nobody has
written holds NaN. Decoding takes its steps one by one, where CUDA would replay a recording.

What only a GPU shows: kernels with limits or errors of their own, streams, memory, and time.
"""

import weakref
from contextlib import contextmanager

import torch
from torch import Tensor
from torch.autograd.graph import _engine_run_backward
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from support import decoding

CUDA = torch.device("cuda", 0)
MIXED = "Expected all tensors to be on the same device, but found cuda:0 and cpu"
aten = torch.ops.aten

# CUDA copies indices from the host.
INDEXING = {aten.index, aten._unsafe_index, aten.index_put, aten.index_put_, aten._index_put_impl_}
# Beside pointwise operations, those whose zero-dimensional operand may stay on the host.
TAKE_HOST_SCALARS = {aten.masked_fill, aten.masked_fill_, *INDEXING}
UNINITIALISED = {aten.empty, aten.empty_like, aten.empty_strided, aten.new_empty}


class PretendDevice(TorchDispatchMode):
    """The device. It sees every operation, those of the backward too."""

    def __init__(self):
        super().__init__()
        self._storages = weakref.WeakSet()
        self._placement: bool | None = None  # whether new tensors go here; None: as their operands
        self._functions = _Functions(self)

    def install(self, monkeypatch) -> None:
        """Put stand-ins for what the code calls of torch.cuda where it finds a CUDA device.

        torch.cuda.is_available() stays as it is: torch itself would go on to look for a driver.
        """
        monkeypatch.setattr(
            decoding, "repeat", lambda step, times, device: [step() for _ in range(times)]
        )
        name = "_group_tensors_by_device_and_dtype"  # of optimizers; asks C++ where tensors are
        group = getattr(torch._C, name)

        def group_here(*args):
            groups = group(*args).items()
            return {(CUDA if self.holds(x[0][0][0]) else at, dtype): x for (at, dtype), x in groups}

        monkeypatch.setattr(torch._C, name, group_here)
        for name, value in {"device": CUDA, "is_cuda": True, "is_cpu": False}.items():
            monkeypatch.setattr(Tensor, name, self._property(name, value))

    def _property(self, name: str, value_here) -> property:
        elsewhere = getattr(Tensor, name).__get__
        return property(lambda tensor: value_here if self.holds(tensor) else elsewhere(tensor))

    def __enter__(self):
        self._functions.__enter__()
        return super().__enter__()

    def __exit__(self, *error) -> None:
        super().__exit__(*error)
        self._functions.__exit__(*error)

    def holds(self, tensor: Tensor) -> bool:
        """Whether a tensor is on the device."""
        return tensor.untyped_storage() in self._storages

    @contextmanager
    def placing(self, here: bool):
        """What is made in the block is on the device, or on the host."""
        before, self._placement = self._placement, here
        try:
            yield
        finally:
            self._placement = before

    def __torch_dispatch__(self, operation, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        with torch._C.DisableTorchFunction():
            inputs = _tensors([*args, *kwargs.values()])
            here = any(map(self.holds, inputs))
            if here:
                self._check(operation, args, inputs)
            result = operation(*args, **kwargs)
            if not (here if self._placement is None else self._placement):
                return result
            if kwargs.get("generator") is not None:
                raise RuntimeError("Expected a 'cuda' device type for generator but found 'cpu'")
            known = {x.untyped_storage() for x in inputs}
            self._storages.update({x.untyped_storage() for x in _tensors([result])} - known)
            if operation.overloadpacket in UNINITIALISED:
                result.untyped_storage().fill_(0xFF)  # as floats NaN, as integers -1
            return result

    def _check(self, operation, args: tuple, inputs: list[Tensor]) -> None:
        """Raise if an operation mixes devices."""
        packet = operation.overloadpacket
        if packet is aten.copy_:
            return
        if packet in INDEXING:
            inputs = _tensors([args[0], *args[2:3]])
        takes_scalars = torch.Tag.pointwise in operation.tags or packet in TAKE_HOST_SCALARS
        if any(x.dim() or not takes_scalars for x in inputs if not self.holds(x)):
            raise RuntimeError(f"{MIXED} ({operation})")


def _tensors(values) -> list[Tensor]:
    """The tensors among the values, or in lists among them."""
    return [value for value in tree_leaves(values) if isinstance(value, Tensor)]


class _Functions(TorchFunctionMode):
    """Sees the functions of torch as they are called: here devices are named and asked for."""

    def __init__(self, device: PretendDevice):
        super().__init__()
        self.device = device
        self.special = {
            Tensor.to: self._to,
            Tensor.cpu: lambda x: self._move(x, here=False),
            Tensor.tolist: lambda x: self._move(x, here=False).tolist(),
            Tensor.numpy: self._numpy,
            Tensor.__array__: self._numpy,
            Tensor.backward: self._backward,
        }

    def __torch_function__(self, function, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        if function in self.special:
            return self.special[function](*args, **kwargs)
        if kwargs.get("device") is not None:
            return self._make(function, args, kwargs)
        return function(*args, **kwargs)

    def _make(self, function, args: tuple, kwargs: dict):
        """A function that is told where its result goes, such as torch.zeros."""
        here = torch.device(kwargs["device"]).type == "cuda"
        kwargs = kwargs | {"device": "cpu"}
        if function in (torch.tensor, torch.as_tensor):
            return self._move(function(*args, **kwargs), here)
        with self.device.placing(here):
            return function(*args, **kwargs)

    def _to(self, tensor: Tensor, *args, **kwargs) -> Tensor:
        """Tensor.to(device), (dtype) or (device, dtype), some of them by name."""
        device, dtype, *_ = torch._C._nn._parse_to(*args, **kwargs)
        if dtype is not None:
            tensor = tensor.to(dtype)
        return tensor if device is None else self._move(tensor, device.type == "cuda")

    def _move(self, tensor: Tensor, here: bool) -> Tensor:
        if self.device.holds(tensor) == here:
            return tensor
        with self.device.placing(here):
            return tensor.clone()

    def _numpy(self, tensor: Tensor, *args, **kwargs):
        if self.device.holds(tensor):
            raise TypeError("can't convert cuda:0 device type tensor to numpy")
        return tensor.numpy()

    def _backward(self, tensor: Tensor, gradient: Tensor | None = None, **unused) -> None:
        gradient = torch.ones_like(tensor) if gradient is None else gradient
        options = {"allow_unreachable": True, "accumulate_grad": True}
        with self:  # hooks and recomputed layers run in it
            _engine_run_backward((tensor,), (gradient,), False, False, (), **options)
