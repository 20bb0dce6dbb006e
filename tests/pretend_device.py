"""A pretend CUDA device, for tests on a CPU: it computes there, and fails where CUDA would.

    device = PretendDevice()
    device.install(monkeypatch)
    with device:
        model.to(CUDA)

A tensor is on the device if its memory is, so the device keeps a list of storages. Their tensors
say that they are on cuda:0, and code takes its CUDA branches. In the `with` block

- operations on tensors of both devices raise, unless CUDA has an exception for them;
- `syncs` counts, by source line, where the host waits for the device: values it reads, copies
  either way, shapes that depend on values;
- memory that nobody has written holds NaN;
- `torch.cuda.CUDAGraph` and `torch.cuda.graph` are stand-ins: see `Graph`.

What only a GPU shows: kernels with limits or errors of their own, streams, memory, and time.
"""

from __future__ import annotations

import linecache
import sys
import weakref
from collections import Counter
from contextlib import contextmanager
from functools import partial
from pathlib import Path

import torch
import transformers
from torch import Tensor
from torch.autograd.graph import _engine_run_backward
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode, _disable_current_modes
from torch.utils._pytree import tree_map

CUDA = torch.device("cuda", 0)
PROJECT = str(Path(__file__).parent.parent)
TRANSFORMERS = str(Path(transformers.__file__).parent)
aten = torch.ops.aten

INDEXING = {aten.index, aten._unsafe_index, aten.index_put, aten.index_put_, aten._index_put_impl_}
# Beside pointwise operations, those whose zero-dimensional operand may stay on the host.
TAKE_HOST_SCALARS = {aten.masked_fill, aten.masked_fill_}
UNINITIALISED = {
    aten.empty,
    aten.empty_like,
    aten.empty_strided,
    aten.new_empty,
    aten.new_empty_strided,
}
WAITS = (torch.Tag.data_dependent_output, torch.Tag.dynamic_output_shape)


class PretendDevice:
    """The device, and what has happened on it."""

    def __init__(self):
        self.syncs: Counter[str] = Counter()
        self.graph: Graph | None = None  # the one that is being captured
        self._storages = weakref.WeakSet()
        self._placement: bool | None = None  # whether new tensors go here; None: as their operands
        self._modes = _Functions(self), _Operations(self)

    def install(self, monkeypatch) -> None:
        """Put stand-ins for what the code calls of torch.cuda where it finds a CUDA device.

        torch.cuda.is_available() stays as it is: torch itself would go on to look for a driver.
        """
        stand_ins = {
            "mem_get_info": lambda device=None: (2**33, 2**34),
            "memory_reserved": lambda device=None: 0,
            "memory_allocated": lambda device=None: 0,
            "CUDAGraph": partial(Graph, self),
            "graph": self._capture,
        }
        for name, stand_in in stand_ins.items():
            monkeypatch.setattr(torch.cuda, name, stand_in)
        group = torch._C._group_tensors_by_device_and_dtype
        monkeypatch.setattr(
            torch._C, "_group_tensors_by_device_and_dtype", partial(self._group_by_device, group)
        )
        for name, value in {"device": CUDA, "is_cuda": True, "is_cpu": False}.items():
            monkeypatch.setattr(Tensor, name, self._property(name, value))

    def _group_by_device(self, group, tensor_lists, with_indices: bool = False) -> dict:
        """Stands in for a function of optimizers, which asks C++ where tensors are."""
        groups = {}
        for (device, dtype), (lists, indices) in group(tensor_lists, with_indices).items():
            groups[CUDA if self.holds(lists[0][0]) else device, dtype] = lists, indices
        return groups

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
        if self.graph is not None:
            raise RuntimeError(f"operation not permitted when stream is capturing ({line})")
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
        n_here = sum(map(self.holds, inputs))
        if n_here:
            self._check(operation, args, kwargs, inputs)
        here = bool(n_here) if self._placement is None else self._placement
        if not here:
            return operation(*args, **kwargs)
        run = operation if self.graph is None else partial(self.graph.record, operation)
        result = run(*args, **kwargs)
        known = {x.untyped_storage() for x in inputs}
        results = [x.untyped_storage() for x in _tensors([result])]
        self._storages.update(storage for storage in results if storage not in known)
        if operation.overloadpacket in UNINITIALISED:
            _forget(result)
        return result

    def _check(self, operation, args: tuple, kwargs: dict, inputs: list[Tensor]) -> None:
        """Raise if an operation mixes devices, and note if the host waits for it."""
        packet = operation.overloadpacket
        elsewhere = [x for x in inputs if not self.holds(x)]
        if packet is aten.copy_:
            if elsewhere:
                self.sync("upload" if self.holds(args[0]) else "download")
        elif packet in INDEXING:
            self._check_indexing(operation, *args[:3])
        else:
            scalars = torch.Tag.pointwise in operation.tags or packet in TAKE_HOST_SCALARS
            if any(x.dim() or not scalars for x in elsewhere):
                raise _mixed(operation)
            knows_shape = kwargs.get("output_size") is not None  # of repeat_interleave
            if any(tag in operation.tags for tag in WAITS) and not knows_shape:
                self.sync("value" if WAITS[0] in operation.tags else "shape")

    def _check_indexing(self, operation, tensor: Tensor, indices, values=None) -> None:
        indices = [index for index in indices if index is not None]
        if not self.holds(tensor):
            raise _mixed(operation)
        if values is not None and values.dim() and not self.holds(values):
            raise _mixed(operation)
        if any(index.dtype == torch.bool for index in indices):
            self.sync("shape")
        if not all(map(self.holds, indices)):
            self.sync("index copied")  # allowed

    @contextmanager
    def _capture(self, graph: Graph, **options):
        """Stands in for torch.cuda.graph."""
        self.graph = graph
        try:
            yield
        finally:
            self.graph = None


def _tensors(values) -> list[Tensor]:
    """The tensors among the values, or in lists among them."""
    found = []
    for value in values:
        if isinstance(value, Tensor):
            found.append(value)
        elif isinstance(value, list | tuple):
            found += _tensors(value)
    return found


def _mixed(operation) -> RuntimeError:
    devices = "Expected all tensors to be on the same device, but found cuda:0 and cpu"
    return RuntimeError(f"{devices} ({operation} at {_source_line()})")


def _source_line() -> str:
    """The line that is running, such as "papo.py: loss.backward()": the innermost one of this
    project or of transformers."""
    frame = sys._getframe()
    while frame:
        path = frame.f_code.co_filename
        in_transformers = path.startswith(TRANSFORMERS)
        # A virtual environment may lie in the project's folder.
        in_project = path.startswith(PROJECT) and "site-packages" not in path
        if in_transformers or in_project and path != __file__:
            line = f"{Path(path).name}: {linecache.getline(path, frame.f_lineno).strip()}"
            return f"transformers {line}" if in_transformers else line
        frame = frame.f_back
    return "elsewhere"


def _forget(tensor: Tensor) -> Tensor:
    """Overwrite its memory: as floats NaN, as integers -1."""
    tensor.untyped_storage().fill_(0xFF)
    return tensor


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
            Tensor.cuda: lambda x, *_: self._move(x, here=True),
            Tensor.tolist: self._to_list,
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
        dtypes = [x for x in named if isinstance(x, torch.dtype)]
        dtypes += [x.dtype for x in named if isinstance(x, Tensor)]
        places = [
            torch.device(x).type == "cuda" for x in named if isinstance(x, str | torch.device)
        ]
        places += [self.device.holds(x) for x in named if isinstance(x, Tensor)]
        if dtypes:
            tensor = tensor.to(dtypes[0])
        return self._move(tensor, places[0]) if places else tensor

    def _move(self, tensor: Tensor, here: bool) -> Tensor:
        if self.device.holds(tensor) == here:
            return tensor
        self.device.sync("upload" if here else "download")
        with self.device.placing(here):
            return tensor.clone()

    def _to_list(self, tensor: Tensor) -> list:
        if self.device.holds(tensor):
            self.device.sync("value")
        return tensor.tolist()

    def _numpy(self, tensor: Tensor, *args, **kwargs):
        if self.device.holds(tensor):
            raise TypeError(f"can't convert cuda:0 device type tensor to numpy ({_source_line()})")
        return tensor.numpy()

    def _backward(self, tensor: Tensor, gradient: Tensor | None = None, **options) -> None:
        gradient = torch.ones_like(tensor) if gradient is None else gradient
        with self:  # hooks and recomputed layers run in it
            _engine_run_backward(
                (tensor,),
                (gradient,),
                False,
                False,
                (),
                allow_unreachable=True,
                accumulate_grad=True,
            )


# ------------------------------------------------------------------------------------------- graphs


class Graph:
    """Stands in for torch.cuda.CUDAGraph.

    While it is captured nothing runs: results have their shape but no values, and nothing is
    written. A replay runs the operations on the same addresses. What was made while capturing
    belongs to the graph; other memory it does not keep, and a replay raises if that has been freed.
    """

    def __init__(self, device: PretendDevice):
        self.device = device
        self.calls = []
        self._own: list[Tensor] = []

    def record(self, operation, *args, **kwargs):
        """Returns what the operation would return."""
        made = []
        if operation._schema.is_mutable:
            result = kwargs.get("out", args[0]) if operation._schema.returns else None
        elif _is_view(operation):
            return operation(*args, **kwargs)
        else:
            args_on_meta, kwargs_on_meta = tree_map(self._on_meta, (args, kwargs))
            shapes = operation(*args_on_meta, **kwargs_on_meta)
            result = tree_map(_without_values, shapes)
            made = _tensors([result])
        self._own += made
        addresses = tree_map(self._address_of, (args, kwargs))
        self.calls.append((operation, *addresses, [_Address(tensor) for tensor in made]))
        return result

    def _is_here(self, argument) -> bool:
        """Whether it is a tensor on the device. A kernel takes a scalar of the host by value."""
        return isinstance(argument, Tensor) and self.device.holds(argument)

    def _on_meta(self, argument):
        """A tensor as torch's meta device has it, which knows shapes alone."""
        return argument.to("meta") if self._is_here(argument) else argument

    def _address_of(self, argument):
        return _Address(argument) if self._is_here(argument) else argument

    def replay(self) -> None:
        with _disable_current_modes():
            for operation, *addresses in self.calls:
                args, kwargs, made = tree_map(_tensor_at, addresses)
                result = operation(*args, **kwargs)
                if made:
                    for kept, new in zip(made, _tensors([result]), strict=True):
                        kept.copy_(new)


def _is_view(operation) -> bool:
    """Whether an operation returns a view of an argument. _unsafe_view does, though undeclared."""
    aliases = any(each.alias_info is not None for each in operation._schema.returns)
    return aliases or operation is aten._unsafe_view.default


def _without_values(tensor: Tensor) -> Tensor:
    return _forget(torch.empty_strided(tensor.shape, tensor.stride(), dtype=tensor.dtype))


class _Address:
    """Where a tensor is, without keeping it alive."""

    def __init__(self, tensor: Tensor):
        self.storage = weakref.ref(tensor.untyped_storage())
        self.dtype = tensor.dtype
        self.layout = tensor.storage_offset(), tensor.size(), tensor.stride()


def _tensor_at(address):
    if not isinstance(address, _Address):
        return address
    storage = address.storage()
    if storage is None:
        raise RuntimeError("a replay uses memory that has been freed since the capture")
    return torch.empty(0, dtype=address.dtype).set_(storage, *address.layout)
