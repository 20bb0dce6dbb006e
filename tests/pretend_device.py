"""A pretend CUDA device, for tests on a CPU: it computes there, and fails where CUDA would.

A tensor is on the device if its memory is, so the device keeps a list of storages. Their tensors
say that they are on cuda:0, and code takes its CUDA branches. Inside `with device:`

- operations on tensors of both devices raise, unless CUDA has an exception for them;
- `syncs` counts, by source line, where the host waits for the device: values it reads, copies
  either way, shapes that depend on values;
- memory that nobody has written holds NaN;
- the steps of decoding run one by one, where CUDA would replay a recording of the first: a wait in
  a replayed step is an error, and so is a recording that is freed before the host has waited for
  its replays. (test_decoding.py checks that all steps are the same operations on the same memory.)

What only a GPU shows: kernels with limits or errors of their own, streams, memory, and time.
"""

from __future__ import annotations

import traceback
import weakref
from collections import Counter
from contextlib import contextmanager
from pathlib import Path

import torch
import transformers
from torch import Tensor
from torch.autograd.graph import _engine_run_backward
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from support import decoding

CUDA = torch.device("cuda", 0)
MIXED = "Expected all tensors to be on the same device, but found cuda:0 and cpu"
PROJECT = str(Path(__file__).parent.parent)
TRANSFORMERS = str(Path(transformers.__file__).parent)
aten = torch.ops.aten

INDEXING = {aten.index, aten._unsafe_index, aten.index_put, aten.index_put_, aten._index_put_impl_}
# Beside pointwise operations, those whose zero-dimensional operand may stay on the host.
TAKE_HOST_SCALARS = {aten.masked_fill, aten.masked_fill_, *INDEXING}
UNINITIALISED = {aten.empty, aten.empty_like, aten.empty_strided, aten.new_empty}
WAITS = (torch.Tag.data_dependent_output, torch.Tag.dynamic_output_shape)


class PretendDevice:
    """The device, and what has happened on it."""

    def __init__(self):
        self.syncs: Counter[str] = Counter()
        self.queued: list[weakref.ref] = []  # recordings whose replays nobody has waited for
        self._storages = weakref.WeakSet()
        self._placement: bool | None = None  # whether new tensors go here; None: as their operands
        self._modes = _Functions(self), _Operations(self)

    def install(self, monkeypatch) -> None:
        """Put stand-ins for what the code calls of torch.cuda where it finds a CUDA device.

        torch.cuda.is_available() stays as it is: torch itself would go on to look for a driver.
        """
        monkeypatch.setattr(decoding, "repeat", self._repeat)
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

    def __enter__(self) -> PretendDevice:
        for mode in self._modes:
            mode.__enter__()
        return self

    def __exit__(self, *error) -> None:
        for mode in reversed(self._modes):
            mode.__exit__(*error)

    def holds(self, tensor: Tensor) -> bool:
        """Whether a tensor is on the device."""
        return tensor.untyped_storage() in self._storages

    def sync(self, kind: str) -> None:
        """Note that the host waits for the device."""
        line = f"{kind}: {_source_line()}"
        if kind in ("value", "shape", "download"):
            if not all(recording() for recording in self.queued):
                raise RuntimeError(f"a recording was freed while its replays were queued ({line})")
            self.queued.clear()
        self.syncs[line] += 1

    @contextmanager
    def placing(self, here: bool):
        """What is made in the block is on the device, or on the host."""
        before, self._placement = self._placement, here
        try:
            yield
        finally:
            self._placement = before

    def run(self, operation, args: tuple, kwargs: dict):
        """Run an operation as the device would."""
        inputs = _tensors([*args, *kwargs.values()])
        here = any(map(self.holds, inputs))
        if here:
            self._check(operation, args, inputs)
        result = operation(*args, **kwargs)
        if not (here if self._placement is None else self._placement):
            return result
        known = {x.untyped_storage() for x in inputs}
        self._storages.update({x.untyped_storage() for x in _tensors([result])} - known)
        if operation.overloadpacket in UNINITIALISED:
            result.untyped_storage().fill_(0xFF)  # as floats NaN, as integers -1
        return result

    def _check(self, operation, args: tuple, inputs: list[Tensor]) -> None:
        """Raise if an operation mixes devices, and note if the host waits for it."""
        packet = operation.overloadpacket
        if packet is aten.copy_:
            if not all(map(self.holds, inputs)):
                self.sync("upload" if self.holds(args[0]) else "download")
            return
        if packet in INDEXING:
            indices, inputs = _tensors(args[1]), _tensors([args[0], *args[2:3]])
            if any(index.dtype == torch.bool for index in indices):
                self.sync("shape")
            if not all(map(self.holds, indices)):
                self.sync("index copied")  # allowed
        elif any(tag in operation.tags for tag in WAITS):
            self.sync("value" if WAITS[0] in operation.tags else "shape")
        takes_scalars = torch.Tag.pointwise in operation.tags or packet in TAKE_HOST_SCALARS
        if any(x.dim() or not takes_scalars for x in inputs if not self.holds(x)):
            raise RuntimeError(f"{MIXED} ({operation} at {_source_line()})")

    def _repeat(self, step, times: int, device) -> Recording:
        """Stands in for decoding.repeat."""
        step()
        before = self.syncs.copy()
        for _ in range(times - 1):
            step()
        if self.syncs != before:
            raise RuntimeError(f"a replayed step makes the host wait: {self.syncs - before}")
        recording = Recording()
        if device == CUDA:
            self.queued.append(weakref.ref(recording))
        return recording


class Recording:
    """Stands in for a CUDA graph."""


def _tensors(values) -> list[Tensor]:
    """The tensors among the values, or in lists among them."""
    return [value for value in tree_leaves(values) if isinstance(value, Tensor)]


def _source_line() -> str:
    """The line that is running, such as "papo.py: loss.backward()": the innermost one of this
    project or of transformers."""
    for frame in reversed(traceback.extract_stack()):
        path = frame.filename
        if path.startswith(TRANSFORMERS):
            return f"transformers {Path(path).name}: {frame.line}"
        # A virtual environment may lie in the project's folder.
        if path.startswith(PROJECT) and "site-packages" not in path and path != __file__:
            return f"{Path(path).name}: {frame.line}"
    return "elsewhere"


# ---------------------------------------------------------------------------------------- its modes


class _Operations(TorchDispatchMode):
    """Sees every operation, those of the backward too."""

    def __init__(self, device: PretendDevice):
        super().__init__()
        self.device = device

    def __torch_dispatch__(self, operation, types, args=(), kwargs=None):
        with torch._C.DisableTorchFunction():
            return self.device.run(operation, args, kwargs or {})


class _Functions(TorchFunctionMode):
    """Sees the functions of torch as they are called: here devices are named and asked for."""

    def __init__(self, device: PretendDevice):
        super().__init__()
        self.device = device
        self.special = {
            Tensor.to: self._to,
            Tensor.cpu: lambda x: self._move(x, here=False),
            Tensor.tolist: lambda x: self._move(x, here=False, kind="value").tolist(),
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
        if here and kwargs.get("generator") is not None:
            raise RuntimeError("Expected a 'cuda' device type for generator but found 'cpu'")
        kwargs = kwargs | {"device": "cpu"}
        if function in (torch.tensor, torch.as_tensor):
            return self._move(function(*args, **kwargs), here)
        with self.device.placing(here):
            return function(*args, **kwargs)

    def _to(self, tensor: Tensor, *args, **kwargs) -> Tensor:
        """Tensor.to(device), (dtype), (device, dtype) or (other), some of them by name."""
        named = [*args, *kwargs.values()]
        for dtype in (x for x in named if isinstance(x, torch.dtype)):
            tensor = tensor.to(dtype)
        for other in (x for x in named if isinstance(x, Tensor)):
            tensor = self._move(tensor.to(other.dtype), self.device.holds(other))
        for place in (x for x in named if isinstance(x, str | torch.device)):
            tensor = self._move(tensor, torch.device(place).type == "cuda")
        return tensor

    def _move(self, tensor: Tensor, here: bool, kind: str = "") -> Tensor:
        if self.device.holds(tensor) == here:
            return tensor
        self.device.sync(kind or ("upload" if here else "download"))
        with self.device.placing(here):
            return tensor.clone()

    def _numpy(self, tensor: Tensor, *args, **kwargs):
        if self.device.holds(tensor):
            raise TypeError(f"can't convert cuda:0 device type tensor to numpy ({_source_line()})")
        return tensor.numpy()

    def _backward(self, tensor: Tensor, gradient: Tensor | None = None, **unused) -> None:
        gradient = torch.ones_like(tensor) if gradient is None else gradient
        options = {"allow_unreachable": True, "accumulate_grad": True}
        with self:  # hooks and recomputed layers run in it
            _engine_run_backward((tensor,), (gradient,), False, False, (), **options)
