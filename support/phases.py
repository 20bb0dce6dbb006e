"""Named phases of the program: their seconds, and advice when one runs out of memory."""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager

import torch

ADVICE = {
    "loading": "use more ranks or a smaller model",
    "sampling": "lower --rollout_batch, --max_new_tokens or --max_pixels, or --offload_optimizer",
    "log-probs": "lower --tokens_per_forward, --max_pixels or --group_size",
    "update": "lower --tokens_per_forward, --max_pixels or --group_size, use more ranks, or "
    "--freeze_vision",
    "saving": "lower --tokens_per_forward",
    "exporting": "--resume the run on more ranks",
}
seconds: Counter = Counter()  # phase -> wall time since the caller last cleared it


@contextmanager
def phase(name: str) -> Iterator[None]:
    """Time a block, or a function as a decorator, and mark out-of-memory errors that pass through.

    Phases may nest. The innermost one is blamed for an error.
    """
    start = time.perf_counter()
    try:
        yield
    except torch.OutOfMemoryError as error:
        if not hasattr(error, "phase"):
            error.phase = name
        raise
    finally:
        seconds[name] += time.perf_counter() - start


def out_of_memory_message(error: torch.OutOfMemoryError) -> str:
    """One line: the phase, the flags to change and torch's figures."""
    name = getattr(error, "phase", "setting up")
    advice = f": {ADVICE[name]}" if name in ADVICE else ""
    figures = " ".join(str(error).split())[:300]
    return f"out of memory while {name}{advice}. {figures}"
