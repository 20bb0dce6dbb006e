"""LoRA: adapters beside frozen weights, the reference without them, checkpoints and exports."""

import copy
from pathlib import Path

import pytest
import torch
from conftest import check_same_metrics, check_same_weights, metric_lines, on_ranks
from safetensors.torch import load_file
from transformers import AutoModelForImageTextToText

import train
from papo import prepare, preset, update
from support import distributed, lora
from support.batch import mini_batches
from support.qwen_vl import Encoder, Policy

TRAIN = "--algo papo_g --lora_rank 4 --lora_alpha 8 --eval_every 0 --lr 1e-2"


def with_adapters(folder, encoder, dtype=torch.float32):
    policy = Policy.load(folder, encoder, dtype)
    lora.add_adapters(policy.model, 4, 8.0, folder)
    return policy


def test_adapters_change_nothing_at_first(folder, encoder, groups):
    plain, policy = Policy.load(folder, encoder), with_adapters(folder, encoder)
    with torch.no_grad():
        assert torch.equal(plain.log_probs(groups), policy.log_probs(groups))
    again = lora.adapter_parameters(with_adapters(folder, encoder).model)
    for name, parameter in lora.adapter_parameters(policy.model).items():
        assert torch.equal(parameter, again[name]), name
        assert ("lora_A" in name) == bool(parameter.abs().sum() > 0)


def test_only_adapters_train_and_the_reference_stays(folder, encoder, groups):
    policy = with_adapters(folder, encoder)
    reference = lora.Reference(policy)
    before = reference.per_group(groups, reference.log_probs)
    frozen = {n: p.clone() for n, p in policy.model.named_parameters() if not p.requires_grad}
    trained = [p for p in policy.model.parameters() if p.requires_grad]
    assert len(trained) == len(lora.adapter_parameters(policy.model)) == 2 * 7 * 4  # layers
    optimizer, algo = torch.optim.AdamW(trained, lr=1e-2), preset("papo_g")
    for step in range(2):
        batches = mini_batches(copy.deepcopy(groups), 2)
        prepare(policy, reference, batches, algo, key=(0, step))
        assert all(map(torch.equal, before, (group.ref_log_probs for group in sum(batches, []))))
        metrics = update(policy, optimizer, batches, algo)
    assert metrics["kl_ref"] > 1e-4  # from the base, not from a copy of the policy
    assert all(map(torch.equal, before, reference.per_group(groups, reference.log_probs)))
    assert not any(map(torch.equal, before, policy.per_group(groups, policy.log_probs)))
    for name, parameter in policy.model.named_parameters():
        if name in frozen:
            assert torch.equal(parameter, frozen[name]) and parameter.grad is None, name


def test_fp32_adapters_beside_sharded_bf16_weights(one_rank, folder, encoder, groups):
    """FSDP2 refuses two dtypes in one unit, so it must not see the adapters."""
    plain, sharded = (with_adapters(folder, encoder, torch.bfloat16) for _ in range(2))
    adapters = [lora.adapter_parameters(each.model) for each in (plain, sharded)]
    mesh = distributed.make_mesh("cpu")
    distributed.shard(sharded.model, mesh, torch.bfloat16, ignored=set(adapters[1].values()))
    log_probs = [each.log_probs(groups) for each in (plain, sharded)]
    assert torch.equal(*log_probs)
    for each in log_probs:
        each.sum().backward()
    for name, parameter in adapters[0].items():
        assert parameter.dtype == parameter.grad.dtype == torch.float32
        assert torch.equal(parameter.grad, adapters[1][name].grad), name


def test_the_export_is_the_adapted_model(run, folder, groups, monkeypatch):
    """Merged, as a plain folder; and the adapter alone, as peft loads it on the source model."""
    from peft import PeftModel

    found = []
    export = train.Run.export

    def export_and_record(self):
        export(self)
        with torch.no_grad():
            found.append(self.policy.log_probs(groups))

    monkeypatch.setattr(train.Run, "export", export_and_record)
    out = run("run", f"{TRAIN} --steps 2")
    encoder = Encoder(str(out / "model"), 3136, 200_704)
    merged = Policy.load(str(out / "model"), encoder)
    base = AutoModelForImageTextToText.from_pretrained(folder)
    adapted = PeftModel.from_pretrained(base, out / "adapter").get_base_model()
    with torch.no_grad():
        start = Policy.load(folder, encoder).log_probs(groups)
        assert (start - found[0]).abs().max() > 1e-3
        for policy in (merged, Policy(adapted, encoder)):
            assert (policy.log_probs(groups) - found[0]).abs().max() < 1e-5
    weights = [load_file(Path(each) / "model.safetensors") for each in (out / "model", folder)]
    assert weights[0].keys() == weights[1].keys()


def test_a_checkpoint_holds_adapters_and_resumes_exactly(run):
    whole = run("whole", f"{TRAIN} --steps 3")
    half = run("half", f"{TRAIN} --steps 2 --save_every 1 --keep 1")
    size = sum(file.stat().st_size for file in (half / "checkpoints").rglob("*.distcp"))
    assert size < (half / "model" / "model.safetensors").stat().st_size / 2
    train.main(["--resume", str(half), "--steps", "3"])
    check_same_metrics(whole, half)
    check_same_weights(whole, half)


@pytest.mark.slow
def test_the_toy_learns_with_adapters(tmp_path):
    flags = "--algo papo_g --lora_rank 8 --steps 60 --eval_every 60"
    done = on_ranks(1, *flags.split(), "--out", str(tmp_path / "run"))
    assert done.returncode == 0, done.stderr[-3000:]
    first, last = (line for line in metric_lines(tmp_path / "run") if "eval/general" in line)
    assert last["eval/general"] > first["eval/general"] + 0.1
