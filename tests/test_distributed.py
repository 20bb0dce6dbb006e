"""distributed.py: meshes of many ranks, and what is set up for CUDA without one."""

import pytest
import torch.distributed as dist
from conftest import process_restored, run_flags
from torch.testing._internal.distributed.fake_pg import FakeStore

import train
from support import distributed


@pytest.fixture()
def twelve_ranks():
    """This process as the first of twelve ranks; the others, and all communication, are fake."""
    dist.init_process_group("fake", store=FakeStore(), rank=0, world_size=12)
    yield
    dist.destroy_process_group()


@pytest.mark.parametrize("shard_size, shape", [(12, (12,)), (4, (3, 4)), (1, (12, 1))])
def test_shard_size_divides_the_ranks_into_replicas(twelve_ranks, shard_size, shape):
    mesh = distributed.make_mesh("cpu", shard_size)
    assert mesh.shape == shape
    first_replica = mesh.mesh.view(-1, shard_size)[0].tolist()
    assert first_replica == list(range(shard_size))  # consecutive ranks: of one machine


@pytest.mark.parametrize(
    "machines, shape",
    [([12], (12,)), ([6, 6], (2, 6)), ([8, 4], (3, 4)), ([7, 5], (12, 1))],
)
def test_weights_are_sharded_within_machines_by_default(twelve_ranks, monkeypatch, machines, shape):
    """`machines`: the number of ranks on each."""
    local_sizes = [ranks for ranks in machines for _ in range(ranks)]
    monkeypatch.setattr(distributed, "gather_over_ranks", lambda value: local_sizes)
    assert distributed.make_mesh("cpu").shape == shape


@pytest.mark.parametrize("shard_size", [5, 24, -4])
def test_a_wrong_shard_size_is_named_with_the_choices(twelve_ranks, shard_size):
    choices = "choices: 1, 2, 3, 4, 6, 12"
    message = f"shard_size={shard_size}: must divide the number of ranks, 12; {choices}"
    with pytest.raises(ValueError, match=message):
        distributed.make_mesh("cpu", shard_size)


def test_a_wrong_shard_size_ends_a_run_with_one_line(folder, tmp_path, capsys):
    with process_restored(), pytest.raises(SystemExit) as ended:
        train.main(run_flags(folder, tmp_path / "run", "--shard_size 3"))
    assert ended.value.code == 2
    [line] = capsys.readouterr().err.strip().splitlines()[-1:]
    assert line.endswith("error: shard_size=3: must divide the number of ranks, 1; choices: 1")
