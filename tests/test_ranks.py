"""One batch on 1, 2 and 4 ranks: the same losses, metrics and gradients, to rounding, for every preset."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).parent.parent

# Six groups of eight survive; on 4 ranks the last has none of them, on 2 and 4 ranks the second has only text. With
# lr 0 both mini-batches' gradients are those of the same weights, so rounding is all that can differ.
SCRIPT = """
import sys
import torch
import torch.distributed as dist
from torch.distributed.tensor import DTensor
sys.path[:0] = [{root!r}, {root!r} + "/tests"]
from papo import PRESETS, mini_batches, prepare, preset, update
from support import distributed, toy
from support.batch import Example, Group, seeded
from support.distributed import init_distributed
from support.qwen_vl import Encoder, Policy

folder, out = sys.argv[1:]
rank, world, _ = init_distributed()
mesh = dist.device_mesh.init_device_mesh("cpu", (world,))
encoder = Encoder(folder, 3136, 200_704, toy.SUFFIX)
policy, reference = Policy.load(folder, encoder), Policy.load(folder, encoder)
noise = seeded("noise")
for parameter in reference.model.parameters():  # another policy, so that KL_ref is not 0
    parameter.data += 0.01 * torch.randn(parameter.shape, generator=noise)
for each in (policy, reference):
    distributed.shard(each.model, mesh, torch.float32)
    each.tokens_per_forward = 200


def group(i):
    draw, example = seeded("group", i), toy.example("train", i)
    if i in (1, 5):
        example = Example("How many red dots are there" + " really" * i + "?", "1", [])
    elif i == 4:  # two pictures
        more = toy.example("train", 99)
        example = Example("<image>" + example.question, "1", example.images + more.images)
    lengths = torch.randint(1, 9, (3,), generator=draw)
    mask = torch.arange(int(lengths.max())) < lengths[:, None]
    tokens = torch.randint(20, 300, mask.shape, generator=draw)
    found = Group(encoder.encode(example, i), tokens, mask, mask[:, 0] & False, torch.zeros(mask.shape))
    found.advantages = torch.randn(3, generator=draw)
    return found


class Keep(torch.optim.SGD):
    def step(self):
        kept.append([p.grad.full_tensor().clone() for p in self.param_groups[0]["params"]])


results, optimizer = {{}}, Keep(policy.model.parameters(), lr=0.0)
for name in [*PRESETS, "papo_g live"]:
    kept = []
    algo = preset(name.split()[0])
    if name == "papo_g live":
        algo = preset("papo_d").__class__(masked_grad=True, masked_entropy_coef=0.05, entropy_coef=0.05, average="seq")
    groups = [group(i) for i in (0, 1, 2, 4, 5, 6) if i % world == rank]
    batches = mini_batches(groups, 4)
    metrics = prepare(policy, reference, batches, algo, key=(0, 0))
    metrics |= update(policy, optimizer, batches, algo, max_grad_norm=1.0)
    results[name] = metrics, kept
    for each in (policy, reference):  # a forward without a backward must not leave the root's weights whole
        assert all(isinstance(p, DTensor) for p in each.model.parameters()), name
if rank == 0:
    torch.save(results, out)
dist.barrier()
dist.destroy_process_group()
"""


@pytest.fixture(scope="module")
def results(folder, tmp_path_factory):
    """World size -> preset -> (metrics, gradients of both mini-batches)."""
    place, found = tmp_path_factory.mktemp("ranks"), {}
    (place / "script.py").write_text(SCRIPT.format(root=str(ROOT)))
    for world in (1, 2, 4):
        words = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node", str(world)]
        done = subprocess.run(
            [*words, str(place / "script.py"), folder, str(place / f"{world}.pt")],
            env=os.environ | {"OMP_NUM_THREADS": "1"}, capture_output=True, text=True, timeout=300,
        )  # fmt: skip
        assert done.returncode == 0, done.stderr[-3000:]
        found[world] = torch.load(place / f"{world}.pt")
    return found


@pytest.mark.parametrize("world", [2, 4])
def test_ranks_change_neither_metrics_nor_gradients(results, world):
    assert len(results[1]) == 7
    for name, (metrics, gradients) in results[1].items():
        others, theirs = results[world][name]
        assert metrics.keys() == others.keys() and metrics["grad_norm"] > 2
        for key, value in metrics.items():
            assert others[key] == pytest.approx(value, rel=2e-6, abs=1e-6), (name, key)
        assert len(gradients) == len(theirs) == 2
        for ours, their in zip(gradients, theirs, strict=True):
            ours, their = (torch.cat([g.flatten() for g in gs]) for gs in (ours, their))
            worst, size = (ours - their).abs().max(), ours.norm()
            print(f"{name}, {world} ranks: worst {worst:.1e} of a gradient of norm {size:.1e}")
            assert worst < 1e-6 and size == pytest.approx(1.0, abs=1e-4), (
                name
            )  # clipped: every weight counts
