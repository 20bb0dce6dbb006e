"""A training step as on CUDA, in bf16 with checkpointing, on two ranks: the dtype of everything.

pytest starts this file under torchrun, where it runs train.py and writes what it saw.
"""

import sys
from collections import defaultdict
from functools import partial
from pathlib import Path

import pytest
import torch
from torch.distributed.tensor import DTensor
from torch.nn import functional as F

if __name__ == "__main__":
    sys.path.insert(0, str(Path(__file__).parent.parent))

from conftest import edited_code, on_ranks, run_flags  # noqa: E402  (needs the path)

import train  # noqa: E402
from support.distributed import fsdp_blocks  # noqa: E402
from support.qwen_vl import Policy  # noqa: E402
from support.run import Run  # noqa: E402

FLAGS = (
    "--algo papo_g --steps 1 --prompts_per_step 2 --mini_batch 2 --group_size 2 "
    "--max_new_tokens 3 --eval_every 0 --save_every 0 --tokens_per_forward 16384"
)
PHASES = ("generate", "prepare", "update")
pytestmark = pytest.mark.slow  # bf16 on a CPU

# -------------------------------------------------------------------------------- under torchrun


class Observer:
    """Notes the dtypes of tensors: self.seen[phase, what] has a set per time it was seen."""

    def __init__(self):
        self.phase = ""
        self.seen = defaultdict(list)

    def note(self, what, values):
        tensors = [value for value in values if isinstance(value, torch.Tensor)]
        dtypes = {tensor.dtype for tensor in tensors if tensor.is_floating_point()}
        self.seen[self.phase, what].append(dtypes)

    def watch(self, owner, name, see):
        """Note `see(arguments, result)` at every call of a function."""
        original = getattr(owner, name)

        def wrapped(*args, **kwargs):
            result = original(*args, **kwargs)
            self.note(name, see(args, result))
            return result

        setattr(owner, name, wrapped)

    def watch_layers(self, name, policy):
        """Note what goes in and out of every smallest module in the layers of both towers."""
        for number, block in enumerate(fsdp_blocks(policy.model)):
            for path, module in block.named_modules():
                if not list(module.children()):
                    module.register_forward_hook(partial(self._hook, (name, number, path)))

    def _hook(self, what, module, args, out):
        self.note(what, [*args, out])

    def enter_phase(self, name):
        """When train.py calls the function of that name."""
        original = getattr(train, name)

        def wrapped(*args, **kwargs):
            self.phase = name
            return original(*args, **kwargs)

        setattr(train, name, wrapped)

    def look_at_gradients(self, optimizer, *_):
        parameters = optimizer.param_groups[0]["params"]
        self.note("weights", parameters)
        self.note("gradients", [parameter.grad for parameter in parameters])
        gradients = [local(parameter.grad).flatten() for parameter in parameters]
        self.note("gradients, reduced in", [in_fewest_bits(torch.cat(gradients))])

    def look_at_moments(self, optimizer, *_):
        for state in optimizer.state.values():
            self.note("moments", state.values())


def local(tensor):
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def in_fewest_bits(values):
    """The values in bf16 if they fit into it."""
    rounded = values.bfloat16()
    return rounded if torch.equal(rounded.float(), values) else values


def observe(run, train_as_usual, out):
    observer = Observer()
    observer.watch_layers("policy", run.policy)
    observer.watch_layers("reference", run.reference)
    observer.watch(F, "scaled_dot_product_attention", lambda args, out: [*args, out])
    observer.watch(Policy, "log_probs", lambda args, out: [out])
    for name in PHASES:
        observer.enter_phase(name)
    run.optimizer.register_step_pre_hook(observer.look_at_gradients)
    run.optimizer.register_step_post_hook(observer.look_at_moments)
    observer.note("reference weights", run.reference.model.parameters())
    train_as_usual(run)
    if run.rank == 0:
        torch.save(dict(observer.seen), out)


def main(out, *flags):
    """train.py, which chooses what it chooses on CUDA, but for the device."""
    on_cuda = 'self.device.type == "cuda"'
    choice = f"torch.bfloat16 if {on_cuda} else torch.float32"
    Run.__init__.__code__ = edited_code(Run.__init__, choice, "torch.bfloat16")
    Run._load_policy.__code__ = edited_code(Run._load_policy, on_cuda, "True")
    train.train = partial(observe, train_as_usual=train.train, out=out)
    train.finish = lambda run: None  # no export and no figures
    train.main(flags)


# ----------------------------------------------------------------------------------- under pytest


@pytest.fixture(scope="module")
def seen(folder, tmp_path_factory):
    out = tmp_path_factory.mktemp("precision")
    flags = run_flags(folder, out / "run", FLAGS)
    done = on_ranks(2, str(out / "seen.pt"), *flags, script=__file__)
    assert done.returncode == 0, done.stderr[-3000:]
    return torch.load(out / "seen.pt", weights_only=False)


def dtypes(seen, what):
    """All that were noted of it, in any phase."""
    found = [times for (_, each), times in seen.items() if each == what]
    return set().union(*(dtypes for times in found for dtypes in times))


def in_layers(seen):
    """What was noted in layers, by phase, model, number of the layer, and module."""
    return {(phase, *what): times for (phase, what), times in seen.items() if len(what) == 3}


def test_both_towers_compute_in_bf16(seen):
    """In policy and reference; while sampling, too."""
    layers = in_layers(seen)
    assert {key[:2] for key in layers} == {
        ("generate", "policy"),
        ("prepare", "policy"),
        ("prepare", "reference"),
        ("update", "policy"),
    }
    assert {number for _, _, number, _ in layers} == {
        0,
        1,
        2,
        3,
        4,
        5,
    }  # two of vision, four of text
    for key, times in layers.items():
        assert all(each == {torch.bfloat16} for each in times), key
    assert dtypes(seen, "scaled_dot_product_attention") == {torch.bfloat16}


def test_layers_are_recomputed_in_the_backward(seen):
    """Each runs twice per row: test_both_towers_compute_in_bf16 has looked at both."""
    n_rows = len(seen["update", "log_probs"])
    assert n_rows == 1
    times_run = defaultdict(set)
    for (phase, _, number, _), times in in_layers(seen).items():
        if phase == "update":
            times_run[number].add(len(times))
    # The recomputation stops where it has all that it needs, which is before the last module.
    assert times_run == {number: {n_rows, 2 * n_rows} for number in range(6)}


def test_weights_gradients_and_moments_are_fp32(seen):
    """And gradients are summed over the ranks in fp32."""
    for what in ("weights", "gradients", "moments", "gradients, reduced in"):
        assert dtypes(seen, what) == {torch.float32}, what
    assert dtypes(seen, "reference weights") == {torch.bfloat16}


def test_log_probs_are_fp32(seen):
    assert dtypes(seen, "log_probs") == {torch.float32}


if __name__ == "__main__":
    main(*sys.argv[1:])
