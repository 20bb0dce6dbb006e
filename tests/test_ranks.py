"""One batch on 1 and 4 ranks: equal metrics and gradients, up to rounding, for every term.

Four ranks hold one copy of the weights, two replicas of half a copy per rank, or four whole copies.
pytest starts this file under torchrun, where it updates the policy on its rank's share of the batch
and writes what it measured.
"""

import os
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from torch.distributed.tensor import DTensor
from transformers import AutoModelForImageTextToText

ROOT = Path(__file__).parent.parent
if __name__ == "__main__":
    sys.path.insert(0, str(ROOT))

from papo import prepare, preset, update  # noqa: E402  (needs the path)
from support import checkpoint, distributed, lora, toy  # noqa: E402
from support.batch import Example, Group, mini_batches, seeded  # noqa: E402
from support.qwen_vl import Encoder, Policy  # noqa: E402

# Every term: the entropies; a reference, and weights from attention; a second view; weights scaled
# over the mini-batch; tokens chosen from it.
OBJECTIVES = {name: preset(name) for name in ("papo_d", "dyco_rl", "dvrp", "vppo", "tor")}
OBJECTIVES["dyco_rl"] = replace(preset("dyco_rl"), shortest_response=0)
OBJECTIVES["masked_grad"] = replace(
    preset("papo_d"), masked_grad=True, masked_entropy_coef=0.05, entropy_coef=0.05, average="seq"
)
SAVED = "masked_grad"  # the last objective: its moments are in the checkpoints

# -------------------------------------------------------------------------------- under torchrun


def full(tensor):
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


class RecordingAdamW(torch.optim.AdamW):
    """Records the clipped gradients. Its steps fill the moments and leave the weights alone.

    So both mini-batches' gradients are those of the same weights, and only rounding can differ.
    """

    def __init__(self, parameters):
        super().__init__(parameters, lr=0.0)
        self.recorded = []

    def step(self):
        parameters = self.param_groups[0]["params"]
        self.recorded.append(torch.cat([full(each.grad).flatten() for each in parameters]))
        super().step()


def make_group(encoder, index):
    """Three random responses to a prompt with one image, two (index 4) or none (1 and 5)."""
    generator = seeded("group", index)
    example = toy.example("train", index)
    if index in (1, 5):
        example = Example("How many red dots are there" + " really" * index + "?", "1", [])
    elif index == 4:
        example = Example("<image>" + example.question, "1", example.images * 2)
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


def full_content(policy, optimizer):
    """Weights and optimizer state by name, each tensor whole; all ranks call it."""
    states = checkpoint.state_dicts(policy.model, optimizer)
    content = dict(states["model"])
    for name, state in states["optimizer"]["state"].items():
        content |= {f"{name}: {key}": tensor for key, tensor in state.items()}
    return {name: full(tensor).clone() for name, tensor in content.items()}


class Shape:
    """A policy on the ranks in replicas of `shard_size`, and what was measured on it."""

    def __init__(self, folder, encoder, shard_size, out, lora_rank=0):
        self.mesh = distributed.make_mesh("cpu", shard_size)
        self.source, self.folder = folder, Path(out).with_suffix("") / f"shard_size_{shard_size}"
        self.policy, self.reference = load_policies(folder, encoder)
        self.adapters = set()
        if lora_rank:
            lora.add_adapters(self.policy.model, lora_rank, 8.0, folder)
            self.adapters = {*lora.adapter_parameters(self.policy.model).values()}
            for adapter in self.adapters:  # B is 0 at first, and then A has no gradient
                adapter.data.add_(0.01)
        for each in (self.policy, self.reference):
            distributed.shard(each.model, self.mesh, torch.float32, ignored=self.adapters)
            each.tokens_per_forward = 100  # a group per pack
        self.results = {"shape": self.mesh.shape}

    def update(self, name):
        """Metrics of an update with the objective, and both mini-batches' clipped gradients."""
        rank, world = dist.get_rank(), dist.get_world_size()
        # Of 4 ranks, the last has no group at all, and the second only prompts without an image. In
        # the first mini-batch the others have two packs each.
        indices = [i for i in (0, 1, 2, 4, 5, 6, 8, 10) if i % world == rank]
        batches = mini_batches([make_group(self.policy.encoder, i) for i in indices], 6)
        trained = [p for p in self.policy.model.parameters() if p.requires_grad]
        self.optimizer = RecordingAdamW(trained)
        algo = OBJECTIVES[name]
        prepare(self.policy, self.reference, batches, algo, key=(0, 0))
        metrics = update(self.policy, self.optimizer, batches, algo, max_grad_norm=1.0)
        self.results[name] = metrics, self.optimizer.recorded
        for each in (self.policy, self.reference):
            # A forward without a backward must not leave the root gathered.
            whole = {p for p in each.model.parameters() if not isinstance(p, DTensor)}
            assert whole <= self.adapters, name

    def save(self):
        self.results["content"] = full_content(self.policy, self.optimizer)
        state = {"step": 1, "position": 0}
        checkpoint.save(self.folder, self.policy.model, self.optimizer, state, keep=1)
        [self.results["checkpoint"]] = checkpoint.complete(self.folder)

    def load_and_export(self, checkpoint_dir):
        for parameter, state in self.optimizer.state.items():
            for tensor in (parameter.data, *state.values()):
                tensor.zero_()
        checkpoint.load(checkpoint_dir, self.policy.model, self.optimizer)
        self.results["loaded"] = full_content(self.policy, self.optimizer)
        model_dir = self.folder / "model"
        checkpoint.export(self.policy.model, self.source, model_dir, torch.float32)
        self.results["exported"] = model_dir


def error_of_rank_0(rank):
    """What from_first_rank raises on each rank, where only the first runs its task."""
    try:
        distributed.from_first_rank(lambda: int(f"a bad file on rank {rank}"))
    except ValueError as error:
        return distributed.gather_over_ranks(str(error))


def measure(folder, out):
    """Write {shard size: results}."""
    rank, world, _ = distributed.init_distributed()
    encoder = Encoder(folder, 3136, 200_704, toy.SUFFIX)
    sizes = [size for size in (1, 2, 4) if size <= world]
    shapes = [Shape(folder, encoder, size, out) for size in sizes]
    with_adapters = Shape(folder, encoder, world, out, lora_rank=4)
    with_adapters.update("papo_d")
    for shape in shapes:
        for name in OBJECTIVES if shape.mesh.ndim == 1 else [SAVED]:
            shape.update(name)
        shape.save()
    for shape, other in zip(shapes, [*shapes[1:], shapes[0]], strict=True):
        shape.load_and_export(other.results["checkpoint"])
    results = shapes[-1].results
    results["lora"], results["raised"] = with_adapters.results["papo_d"], error_of_rank_0(rank)
    if rank == 0:
        torch.save({size: shape.results for size, shape in zip(sizes, shapes, strict=True)}, out)
    dist.barrier()
    dist.destroy_process_group()


# ----------------------------------------------------------------------------------- under pytest


@pytest.fixture(scope="module")
def one_and_four(folder, tmp_path_factory):
    """What one rank measured, and {shard size: what four ranks did}."""
    from conftest import on_ranks  # not at the top: the four ranks have no use for it

    out = tmp_path_factory.mktemp("ranks")
    measure(folder, out / "1.pt")
    done = on_ranks(4, folder, str(out / "4.pt"), script=__file__)
    assert done.returncode == 0, done.stderr[-3000:]
    [one] = torch.load(out / "1.pt", weights_only=False).values()
    return one, torch.load(out / "4.pt", weights_only=False)


def test_four_ranks_give_the_metrics_and_gradients_of_one(one_and_four):
    one, four = one_and_four
    shapes = {size: results["shape"] for size, results in four.items()}
    assert shapes == {1: (4, 1), 2: (2, 2), 4: (4,)}
    assert four[4].keys() >= {*OBJECTIVES, "lora"} and one["raised"] * 4 == four[4]["raised"]
    for size, results in four.items():
        for name in results.keys() & {*OBJECTIVES, "lora"}:
            metrics, gradients = one[name]
            other_metrics, other_gradients = results[name]
            where = size, name
            assert metrics["grad_norm"] > 2  # so gradients are clipped, by the norm over all ranks
            assert other_metrics == pytest.approx(metrics, rel=2e-6, abs=1e-6), where
            assert len(gradients) == len(other_gradients) == 2
            for gradient, other in zip(gradients, other_gradients, strict=True):
                assert (gradient - other).abs().max() < 1e-6, where
                assert gradient.norm() == pytest.approx(1.0, abs=1e-4), where


def test_a_run_saved_under_one_shape_resumes_under_another(one_and_four):
    one, four = one_and_four
    for results in four.values():
        check_same_tensors(results["content"], one["content"], atol=1e-5)
    for size, saved_under in ((1, 2), (2, 4), (4, 1)):
        saved, loaded = four[saved_under]["content"], four[size]["loaded"]
        check_same_tensors(loaded, saved, atol=0.0)
        model = AutoModelForImageTextToText.from_pretrained(four[size]["exported"])
        exported = model.state_dict()
        check_same_tensors(exported, {name: saved[name] for name in exported}, atol=0.0)


def check_same_tensors(some, others, atol):
    assert some.keys() == others.keys()
    for name in some:
        assert (some[name] - others[name]).abs().max() <= atol, name


if __name__ == "__main__":
    measure(*sys.argv[1:])
    # All is written. On a loaded machine gloo's threads have aborted the interpreter's own exit:
    # "terminate called without an active exception".
    os._exit(0)
