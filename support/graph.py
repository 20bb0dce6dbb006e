"""Record a function's operations once and replay them: CUDA graphs, and an equivalent for the CPU.

A replay runs the recorded kernels on the recorded tensors, without the Python that chose them. So
the function must read and write tensors with fixed addresses, and nothing in it may depend on a
tensor's value. For a small model most of a decoding step's time is Python overhead.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cache, partial

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

DEPENDS_ON_VALUES = {torch.Tag.data_dependent_output, torch.Tag.dynamic_output_shape}


def repeat(function: Callable[[], None], times: int, device: torch.device) -> None:
    """Run `function` `times` times: the first as Python, the others as replays of it."""
    if times == 1:
        function()
        return
    record = record_cuda if device.type == "cuda" else record_cpu
    graph = record(function)
    for _ in range(times - 1):
        graph.replay()


def record_cuda(function: Callable[[], None]):
    """Run `function` once, and record it as a CUDA graph."""
    function()  # outside the graph: libraries set themselves up at their first call
    graph = torch.cuda.CUDAGraph()
    # Only this thread records: others (NCCL's watchdog) may use CUDA meanwhile.
    with torch.cuda.graph(graph, capture_error_mode="thread_local"):
        function()  # recorded, not run
    return graph


def record_cpu(function: Callable[[], None]):
    """Run `function` once, and record it as a CpuGraph."""
    graph = CpuGraph()
    with graph:
        function()
    return graph


class CpuGraph(TorchDispatchMode):
    """Records the operations inside a `with` block, which run as usual; `replay` runs them again.

    Results keep their memory, so a replay overwrites them and views of them stay valid.
    """

    def __init__(self):
        super().__init__()
        self.calls: list[Callable] = []

    @classmethod
    def _should_skip_dynamo(cls) -> bool:
        return False  # torch would wrap __torch_dispatch__, at a third of its time

    def __torch_dispatch__(self, operation, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        _refuse_values(operation, args)
        result = operation(*args, **kwargs)
        if operation._schema.is_mutable:
            self.calls.append(partial(operation, *args, **kwargs))
        elif not _is_view(operation):
            self.calls.append(_call_into(result, operation, args, kwargs))
        return result

    def replay(self) -> None:
        with torch._C._AutoDispatchBelowAutograd():  # autograd's bookkeeping costs time
            for call in self.calls:
                call()


def _refuse_values(operation, args: tuple) -> None:
    """RuntimeError if an operation's result is a number, or has a shape, that depends on values."""
    reads_values = _is_tagged(operation)
    if operation is torch.ops.aten.index.Tensor:  # its tag is meant for masks
        reads_values = any(index is not None and index.dtype == torch.bool for index in args[1])
    if reads_values:
        raise RuntimeError(f"{operation} reads a value, so it cannot be replayed")


@cache
def _is_tagged(operation) -> bool:
    return bool(DEPENDS_ON_VALUES & set(operation.tags))


@cache
def _is_view(operation) -> bool:
    """Whether an operation returns a view of an argument, which stays valid."""
    if operation is torch.ops.aten._unsafe_view.default:  # declares none, but is one
        return True
    return any(result.alias_info is not None for result in operation._schema.returns)


def _call_into(result, operation, args: tuple, kwargs: dict) -> Callable:
    """A call that computes `operation` again, into the tensors of `result`."""
    overload, names = _out_overload(operation)
    if overload is None:
        return partial(_compute_and_copy, result, operation, args, kwargs)
    results = (result,) if isinstance(result, torch.Tensor) else result
    return partial(overload, *args, **kwargs, **dict(zip(names, results, strict=True)))


@cache
def _out_overload(operation) -> tuple[Callable | None, list[str]]:
    """The overload that writes into given tensors, and their names; (None, []) without one."""

    def inputs(overload) -> list[tuple[str, str]]:
        arguments = overload._schema.arguments
        return [(each.name, str(each.type)) for each in arguments if not each.is_out]

    packet = operation.overloadpacket
    for overload in (getattr(packet, name) for name in packet.overloads()):
        names = [each.name for each in overload._schema.arguments if each.is_out]
        if names and inputs(overload) == inputs(operation):
            return overload, names
    return None, []


def _compute_and_copy(result, operation, args: tuple, kwargs: dict) -> None:
    computed = operation(*args, **kwargs)
    for kept, new in zip(tree_leaves(result), tree_leaves(computed), strict=True):
        kept.copy_(new)
