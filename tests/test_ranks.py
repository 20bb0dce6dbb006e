"""One batch on 1 and 4 ranks: equal metrics and gradients, up to rounding, for every preset.

pytest starts this file under torchrun, where it updates the policy on its rank's share of the batch
and writes what it measured.
"""

import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from torch.distributed.tensor import DTensor

ROOT = Path(__file__).parent.parent
if __name__ == "__main__":
    sys.path.insert(0, str(ROOT))

from papo import PRESETS, mini_batches, prepare, preset, update  # noqa: E402  (needs the path)
from support import distributed, toy  # noqa: E402
from support.batch import Example, Group, seeded  # noqa: E402
from support.qwen_vl import Encoder, Policy  # noqa: E402

OBJECTIVES = {name: preset(name) for name in PRESETS}
OBJECTIVES["masked_grad"] = replace(
    preset("papo_d"), masked_grad=True, masked_entropy_coef=0.05, entropy_coef=0.05, average="seq"
)

# -------------------------------------------------------------------------------- under torchrun


class RecordingSGD(torch.optim.SGD):
    """Records the clipped gradients instead of taking a step.

    So both mini-batches' gradients are those of the same weights, and only rounding can differ.
    """

    def __init__(self, parameters):
        super().__init__(parameters, lr=0.0)
        self.recorded = []

    def step(self):
        parameters = self.param_groups[0]["params"]
        gradients = [parameter.grad.full_tensor().flatten() for parameter in parameters]
        self.recorded.append(torch.cat(gradients))


def make_group(encoder, index):
    """Three random responses to a prompt with one image, two (index 4) or none (1 and 5)."""
    generator, example = seeded("group", index), toy.example("train", index)
    if index in (1, 5):
        example = Example("How many red dots are there" + " really" * index + "?", "1", [])
    elif index == 4:
        images = example.images + toy.example("train", 99).images
        example = Example("<image>" + example.question, "1", images)
    lengths = torch.randint(1, 9, (3,), generator=generator)
    mask = torch.arange(int(lengths.max())) < lengths[:, None]
    group = Group(
        prompt=encoder.encode(example, index),
        tokens=torch.randint(20, 300, mask.shape, generator=generator),
        response_mask=mask,
        truncated=torch.zeros(3, dtype=torch.bool),
        sample_log_probs=torch.zeros(mask.shape),
    )
    group.advantages = torch.randn(3, generator=generator)
    return group


def load_policies(folder, encoder):
    """The policy, and a reference with other weights so that KL_ref is not 0."""
    policy, reference = Policy.load(folder, encoder), Policy.load(folder, encoder)
    noise = seeded("noise")
    for parameter in reference.model.parameters():
        parameter.data += 0.01 * torch.randn(parameter.shape, generator=noise)
    return policy, reference


def measure(folder, out):
    """Write {objective: (metrics, clipped gradients of both mini-batches)}."""
    rank, world, _ = distributed.init_distributed()
    mesh = dist.device_mesh.init_device_mesh("cpu", (world,))
    encoder = Encoder(folder, 3136, 200_704, toy.SUFFIX)
    policies = load_policies(folder, encoder)
    for policy in policies:
        distributed.shard(policy.model, mesh, torch.float32)
        policy.tokens_per_forward = 200
    policy, reference = policies
    results = {}
    for name, algo in OBJECTIVES.items():
        # Of 4 ranks, the last has no group at all, and the second only prompts without an image.
        groups = [make_group(encoder, i) for i in (0, 1, 2, 4, 5, 6) if i % world == rank]
        optimizer = RecordingSGD(policy.model.parameters())
        batches = mini_batches(groups, 4)
        metrics = prepare(policy, reference, batches, algo, key=(0, 0))
        metrics |= update(policy, optimizer, batches, algo, max_grad_norm=1.0)
        results[name] = metrics, optimizer.recorded
        for each in policies:  # a forward without a backward must not leave the root gathered
            assert all(isinstance(p, DTensor) for p in each.model.parameters()), name
    if rank == 0:
        torch.save(results, out)
    dist.barrier()
    dist.destroy_process_group()


# ----------------------------------------------------------------------------------- under pytest


def test_four_ranks_give_the_metrics_and_gradients_of_one(folder, tmp_path):
    measure(folder, tmp_path / "1.pt")
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node", "4"]
    done = subprocess.run(
        [*torchrun, __file__, folder, str(tmp_path / "4.pt")],
        env=os.environ | {"OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    one, four = torch.load(tmp_path / "1.pt"), torch.load(tmp_path / "4.pt")
    assert one.keys() == four.keys() == OBJECTIVES.keys()
    for name, (metrics, gradients) in one.items():
        other_metrics, other_gradients = four[name]
        assert metrics.keys() == other_metrics.keys()
        assert metrics["grad_norm"] > 2  # so that gradients are clipped, by the norm over all ranks
        for key, value in metrics.items():
            assert other_metrics[key] == pytest.approx(value, rel=2e-6, abs=1e-6), (name, key)
        assert len(gradients) == len(other_gradients) == 2
        for gradient, other in zip(gradients, other_gradients, strict=True):
            assert (gradient - other).abs().max() < 1e-6, name
            assert gradient.norm() == pytest.approx(1.0, abs=1e-4), name


if __name__ == "__main__":
    measure(*sys.argv[1:])
