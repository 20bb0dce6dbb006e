"""What CUDA would do with the code, shown on a CPU by a pretend device (pretend_device.py).

It notices mixed devices, counts waits of the host, and captures graphs. First the device itself;
then a whole step, which gives what it gives on a CPU; then omissions planted in the code, which the
device must notice.
"""

import copy
from dataclasses import replace

import pytest
import torch
from pretend_device import CUDA
from torch.nn import functional as F

import evaluate
import papo
import rollout
from experiments import bench
from papo import mini_batches, prepare, preset, row_loss, update
from rollout import generate
from support import attribution, data, decoding, graph, packing, qwen_vl
from support.ask import ask
from support.batch import pad_and_cat, seeded
from support.reward import compute_score


@pytest.fixture()
def policies(folder, encoder, varied_policy):
    """The same policy twice: one stays on the CPU."""
    return varied_policy, copy.deepcopy(varied_policy)


# -------------------------------------------------------------------------------- the device itself

HOST = torch.arange(4.0)
INDEX = torch.tensor([2, 0])

MIXTURES = {
    "addition": lambda x: x + HOST,
    "cat": lambda x: torch.cat([x, HOST]),
    "matmul": lambda x: x @ HOST,
    "index of a host tensor": lambda x: HOST[INDEX.to(CUDA)],
    "values to store": lambda x: x.index_put_((INDEX.to(CUDA),), HOST[:2]),
    "index_select": lambda x: x.index_select(0, INDEX),
    "gather with a scalar": lambda x: x.gather(0, torch.tensor(1)),
    "embedding": lambda x: F.embedding(INDEX, x[:, None]),
    "searchsorted": lambda x: torch.searchsorted(x, HOST),
    "isin": lambda x: torch.isin(x, HOST),
    "where": lambda x: torch.where(x > 1, x, HOST),
    "host result": lambda x: torch.add(x, 1, out=HOST.clone()),
    "backward": lambda x: (x.requires_grad_() * x).backward(HOST),
    "generator": lambda x: torch.rand(4, generator=torch.Generator(), device=CUDA),
}


@pytest.mark.parametrize("mix", MIXTURES.values(), ids=MIXTURES)
def test_mixed_devices_raise(device, mix):
    with device, pytest.raises(RuntimeError, match="same device|Expected a 'cuda' device"):
        mix(HOST.to(CUDA))


ALLOWED = {
    "addition": (lambda x: x + x, None),
    "a host scalar": (lambda x: x + torch.tensor(3.0), None),
    "where with a scalar": (lambda x: torch.where(x > 1, x, 0.0), None),
    "masked_fill": (lambda x: x.masked_fill(x > 1, torch.tensor(0.0)), None),
    "index_select": (
        lambda x: x.index_select(0, torch.ones(2, dtype=torch.long, device=CUDA)),
        None,
    ),
    "repeat_interleave": (lambda x: x.repeat_interleave(2), None),
    "another dtype": (lambda x: x.to(torch.float64), None),
    "the device it is on": (lambda x: x.to(CUDA), None),
    "item": (lambda x: x.sum().item(), "value"),
    "if": (lambda x: bool(x.any()), "value"),
    "tolist": (lambda x: x.tolist(), "value"),
    "equal": (lambda x: torch.equal(x, x), "value"),
    "nonzero": (lambda x: x.nonzero(), "shape"),
    "boolean index": (lambda x: x[x > 1], "shape"),
    "unique": (lambda x: x.unique(), "shape"),
    "repeats by a tensor": (lambda x: x.repeat_interleave(x.long()), "shape"),
    "cpu": (lambda x: x.cpu(), "download"),
    "copy to the host": (lambda x: torch.zeros(4).copy_(x), "download"),
    "copy to the device": (lambda x: x.copy_(HOST), "upload"),
    "host index": (lambda x: x[INDEX], "index copied"),
    "new tensor": (lambda x: torch.tensor([1.0], device=x.device), "upload"),
}


@pytest.mark.parametrize("use, kind", ALLOWED.values(), ids=ALLOWED)
def test_waits_of_the_host_are_counted(device, use, kind):
    with device:
        x = HOST.to(CUDA)
        device.syncs.clear()
        use(x)
    assert [line.split(":")[0] for line in device.syncs] == [kind] * bool(kind)
    assert all("test_device.py" in line for line in device.syncs)


def test_a_tensor_is_where_its_memory_is(device):
    with device:
        x = HOST.to(CUDA)
        here = (x, x[1:].view(3, 1), x.double(), x.new_zeros(2), torch.zeros(2, device=CUDA))
        assert all(each.is_cuda and each.device == CUDA for each in here)
        on_host = (HOST, x.cpu(), torch.zeros_like(x, device="cpu"), torch.zeros(2))
        assert not any(each.is_cuda or each.device.type == "cuda" for each in on_host)
        layer = torch.nn.Linear(4, 2).to(CUDA)
        layer(x).sum().backward()
        assert layer.weight.is_cuda and layer.weight.grad.is_cuda
        with pytest.raises(TypeError, match="numpy"):
            x.numpy()
        assert torch.empty(3, device=CUDA).isnan().all()
    assert HOST.tolist() == x.tolist() == [0, 1, 2, 3]


def test_a_captured_graph_runs_when_it_is_replayed(device):
    with device:
        total, step = torch.zeros(3, device=CUDA), torch.ones(1, device=CUDA)

        def function():
            nonlocal doubled
            doubled = total + total
            total.copy_(doubled + step)

        doubled = None
        captured = graph.record_cuda(function)
        assert total.tolist() == [1, 1, 1]  # record_cuda ran it once, the capture did not
        assert doubled.isnan().all()
        step += 1
        captured.replay()
        assert (total.tolist(), doubled.tolist()) == ([4, 4, 4], [2, 2, 2])


def test_what_a_graph_cannot_hold_raises(device):
    """Reading a value, copying from the host, and memory that has been freed."""
    with device:
        x = torch.zeros(3, device=CUDA)
        for function in (lambda: x.sum().item(), lambda: x[x > 0], lambda: x + HOST[:3].to(CUDA)):
            with pytest.raises(RuntimeError, match="not permitted when stream is capturing"):
                graph.record_cuda(function)

        def rebind():
            nonlocal x
            x = x + 1  # not in place: the graph reads an x that nobody holds any more

        captured = graph.record_cuda(rebind)
        with pytest.raises(RuntimeError, match="freed since the capture"):
            captured.replay()


def test_a_graph_of_the_cpu_cannot_hold_a_value_either():
    mask = HOST > 0
    for read in (lambda: HOST.sum().item(), lambda: HOST[mask], lambda: HOST.nonzero()):
        with pytest.raises(RuntimeError, match="reads a value, so it cannot be replayed"):
            graph.record_cpu(read)
    graph.record_cpu(lambda: HOST[torch.tensor([0])])


# ---------------------------------------------------------------------------- the step, as on a CPU

SAMPLING = {"max_new_tokens": 13, "key": (0, 1), "top_p": 0.9}


@pytest.mark.parametrize(
    "block, candidates",
    [(4, 1024), (6, 2), (128, 1024)],
    ids=["a last block of one step", "candidates miss top-p", "one block"],
)
def test_sampling_equals_the_cpus(
    policies, prompts, device, monkeypatch, record_calls, block, candidates
):
    """Through captured graphs, with prompts of unequal lengths, two images, none, and responses
    that end at different times."""
    for policy in policies:
        policy.eos_ids = list(range(0, 400, 8))
    policy, on_device = policies
    expected = generate(policy, prompts, 3, **SAMPLING)
    monkeypatch.setitem(decoding.BLOCK, "cuda", block)
    monkeypatch.setitem(decoding.CANDIDATES, "cuda", candidates)
    captures = record_calls(graph, "record_cuda")
    with device:
        on_device.model.to(CUDA)
        found = generate(on_device, prompts, 3, **SAMPLING)
    assert len(captures) >= 13 // block
    assert not copied_indices(device)
    check_same_groups(found, expected)
    lengths = pad_and_cat(found, "response_mask").sum(1)
    assert len(set(lengths.tolist())) > 3


def copied_indices(device):
    """The lines of our own that index a tensor on the device by one on the host."""
    lines = [line for line in device.syncs if line.startswith("index copied: ")]
    return [line for line in lines if "transformers" not in line]


def check_same_groups(groups, others):
    for ours, theirs in zip(groups, others, strict=True):
        assert torch.equal(ours.tokens, theirs.tokens)
        assert torch.equal(ours.response_mask, theirs.response_mask)
        torch.testing.assert_close(
            ours.sample_log_probs, theirs.sample_log_probs, atol=1e-4, rtol=0
        )


def train_step(policy, reference, groups, name, **changes):
    """Metrics of one step of two mini-batches, and the weights after it on the host."""
    algo = replace(preset(name), **changes)
    policy.tokens_per_forward = 150
    optimizer = torch.optim.AdamW(policy.model.parameters(), lr=1e-3, eps=1e-4)
    batches = mini_batches(groups, 2)
    metrics = prepare(policy, reference, batches, algo, key=(0, 0))
    metrics |= update(policy, optimizer, batches, algo)
    return metrics, [parameter.detach().cpu() for parameter in policy.model.parameters()]


@pytest.mark.parametrize("name", ["papo_g", "papo_d"])
def test_a_training_step_equals_the_cpus(policy, varied_policy, groups, device, name):
    """With a reference model (papo_g), entropies (papo_d), checkpointing, and a text-only row."""
    policy.model.gradient_checkpointing_enable({"use_reentrant": False})
    on_device, reference = copy.deepcopy(policy), copy.deepcopy(varied_policy)
    expected, expected_weights = train_step(policy, varied_policy, copy.deepcopy(groups), name)
    with device:
        for each in (on_device, reference):
            each.model.to(CUDA)
        found, weights = train_step(on_device, reference, groups, name)
    assert found == pytest.approx(expected, rel=1e-4, abs=1e-6)
    for ours, theirs in zip(weights, expected_weights, strict=True):
        torch.testing.assert_close(ours, theirs, atol=1e-5, rtol=0)


@pytest.mark.parametrize("name", ["vppo", "pgpo", "dyco_rl", "dvrp", "noisy_rollout"])
def test_a_variants_step_equals_the_cpus(varied_policy, groups, device, name):
    algo, on_device = preset(name), copy.deepcopy(varied_policy)
    prompts = [group.prompt for group in groups]
    changes = {"shortest_response": 0} if name == "dyco_rl" else {}
    expected, _ = train_step(varied_policy, varied_policy, copy.deepcopy(groups), name, **changes)
    images = [algo.images(prompt, varied_policy, seeded(0)) for prompt in prompts]
    with device:
        on_device.model.to(CUDA)
        found, _ = train_step(on_device, on_device, groups, name, **changes)
        device_images = [algo.images(prompt, on_device, seeded(0)) for prompt in prompts]
    assert found == pytest.approx(expected, rel=1e-3, abs=1e-5)
    for pairs, others in zip(images, device_images, strict=True):
        for (sampled, _), (other, _) in zip(pairs, others, strict=True):
            if sampled.pixel_values is not None:
                torch.testing.assert_close(sampled.pixel_values, other.pixel_values)


def score(responses, answers, budget):
    return [compute_score(*pair) for pair in zip(responses, answers, strict=True)]


def test_evaluation_equals_the_cpus(policies, device):
    rows = data.load("toy", "general", limit=3)
    policy, on_device = policies
    sampling = {"max_new_tokens": 8, "rollout_batch": 4}
    expected = list(evaluate.predict(policy, rows, score, 2, **sampling))
    with device:
        on_device.model.to(CUDA)
        found = list(evaluate.predict(on_device, rows, score, 2, **sampling))
    assert found == expected
    assert [len(records) for records in found] == [4, 2]


def test_an_explanation_equals_the_cpus(policies, prompts, device, tmp_path, record_calls):
    drawn = record_calls(attribution, "draw")
    policy, on_device = policies
    settings = {"max_new_tokens": 4, "masks": 2, "heat_patches": 4, "temperature": 0.0}
    config = evaluate.EvalConfig(out=str(tmp_path), **settings)
    evaluate.explain(policy, prompts[1], config)
    with device:
        on_device.model.to(CUDA)
        evaluate.explain(on_device, prompts[1], config)
    (_, *expected, _), (_, *found, _) = [args for args, _ in drawn]
    check_same_groups(found[:1], expected[:1])
    torch.testing.assert_close(found[1:], expected[1:], atol=1e-4, rtol=0)


def test_an_answer_equals_the_cpus(policies, prompts, device, capsys):
    policy, on_device = policies
    config = evaluate.EvalConfig(temperature=0.0, max_new_tokens=6)
    ask(policy, prompts[0], config)
    expected = capsys.readouterr().out
    with device:
        on_device.model.to(CUDA)
        ask(on_device, prompts[0], config)
    assert capsys.readouterr().out == expected


def test_the_benchmarks_random_stops_can_be_captured(policies, device):
    _, on_device = policies
    hidden = torch.randn(2, on_device.model.lm_head.in_features)
    with device, torch.no_grad(), bench.random_stops(on_device, mean=5):
        head = on_device.model.to(CUDA).lm_head
        x = hidden.to(CUDA)
        graph.record_cuda(lambda: head(x))


# ------------------------------------------------------------------------------- rows without a key


@pytest.fixture()
def strict_attention(monkeypatch):
    """strict_attention() makes SDPA as some kernels of CUDA are: NaN, in value and gradient, for a
    query without a key. Returns the list that the masks it is given go to."""
    attend, masks = F.scaled_dot_product_attention, []

    def strict(query, key, value, attn_mask=None, **options):
        out = attend(query, key, value, attn_mask=attn_mask, **options)
        if attn_mask is None:
            return out
        masks.append(attn_mask)
        return out * torch.where(attn_mask.any(-1, keepdim=True), 1.0, torch.nan)

    def install():
        monkeypatch.setattr(F, "scaled_dot_product_attention", strict)
        return masks

    return install


def sample_and_train(policy, prompts):
    """All that a step computes, with gradients in place of weights."""
    policy.tokens_per_forward = 200
    groups = generate(policy, prompts, 3, **SAMPLING)
    for group in groups:
        group.advantages = torch.tensor([1.0, -0.5, -0.5])
    batches = mini_batches(groups, 2)
    optimizer = torch.optim.SGD(policy.model.parameters(), lr=0.1)
    metrics = prepare(policy, policy, batches, preset("papo_g"), key=(0, 0))
    metrics |= update(policy, optimizer, batches, preset("papo_g"))
    log_probs = [(g.old_log_probs, g.ref_log_probs, g.masked_log_probs) for g in groups]
    return groups, metrics, log_probs, [*policy.model.parameters()]


def test_nothing_depends_on_attention_without_keys(policies, prompts, strict_attention):
    """Not the tokens, log-probs, metrics, or weights after the step: to the last bit."""
    for policy in policies:
        policy.eos_ids = list(range(0, 400, 8))
    groups, *expected = sample_and_train(policies[0], prompts)
    masks = strict_attention()
    other_groups, *found = sample_and_train(policies[1], prompts)
    assert masks
    for ours, theirs in zip(groups, other_groups, strict=True):
        assert torch.equal(ours.tokens, theirs.tokens)
        assert torch.equal(ours.sample_log_probs, theirs.sample_log_probs)
    torch.testing.assert_close(found, expected, atol=0, rtol=0)


def test_attention_without_keys_is_noticed(policy, groups, strict_attention, plant):
    """Where padding attends to nothing, the strict kernel spoils the gradient."""
    plant(
        packing._span_attention,
        "causal.tril(length)",
        "causal.tril(length) & fed[:, None, :, None]",
    )
    strict_attention()
    policy.log_probs(groups).sum().backward()
    assert policy.model.lm_head.weight.grad.isnan().any()


# ------------------------------------------------------------------------------- planted omissions


def sample(policy, groups):
    """Prompts and responses leave the cache at different times."""
    policy.eos_ids = list(range(0, 400, 8))
    generate(policy, [group.prompt for group in groups], 2, max_new_tokens=5, key=(0, 1), top_p=0.9)


def forward(policy, groups):
    policy.log_probs(groups)


def loss(policy, groups):
    for group in groups:
        group.ref_log_probs = group.view_log_probs["mask"] = group.sample_log_probs
    row_loss(policy, groups, preset("papo_g"))


def train(policy, groups):
    train_step(policy, policy, groups, "papo_g")


Loop, Cache = decoding.DecodingLoop, decoding.GroupedCache
OMISSIONS = [  # what is run, a function, and a piece of its source: what follows | is left out
    (sample, rollout._sample_chunk, "torch.stack(uniforms)|.to(device)"),
    (sample, rollout._sample_chunk, "torch.tensor(policy.eos_ids|, device=device"),
    (sample, rollout._sample_chunk, "for i, _ in jobs])|.to(device)"),
    (sample, Cache._set_lengths, "[:, None]|.to(self.device)"),
    (sample, Cache._arrange, "to_groups.flatten()|.to(self.device)"),
    (sample, Cache._arrange, "to_rows.flatten()|.to(self.device)"),
    (sample, Cache.grow, "[0][0].shape[2]|, device=self.device"),
    (sample, Loop.__init__, "torch.tensor(last|, device=device"),
    (sample, Loop.run, "torch.zeros(n, max_new_tokens|, device=tokens.device"),
    (sample, Loop.run, "tokens[:, :done]|.cpu()"),
    (sample, Loop._run_block, "torch.arange(start, start + size|, device=device"),
    (sample, Loop._run_block, "torch.zeros(n, size|, device=device"),
    (sample, Loop._run_block, "dtype=torch.long|, device=device"),
    (sample, Loop._run_block, "dtype=torch.bool|, device=device"),
    (sample, decoding.decode, "chunk.eos_ids|.cpu()"),
    (forward, packing.build_row, "torch.cat(ids)[None]|.to(device)"),
    (forward, packing.build_row, "torch.cat(positions, 1)[:, None]|.to(device)"),
    (forward, packing.build_row, "torch.cat(image_tokens)[None]|.to(device)"),
    (forward, packing.build_row, "pixel_values=pixel_values|.to(device)"),
    (forward, packing.build_row, "grid|.to(device)"),
    (forward, packing.build_row, "torch.cat(targets)|.to(device)"),
    (forward, packing.build_layout, "index|.to(device)"),
    (forward, packing._span_attention, "dtype=torch.bool|, device=q.device"),
    (forward, packing.window_attention, "torch.arange(length|, device=q.device"),
    (forward, qwen_vl.Policy._unflatten, '"response_mask"|, self.device'),
    (train, qwen_vl.Policy.per_group, "values_of(row)|.cpu()"),
    (loss, papo.row_loss, "group.advantages for group in row])|.to(policy.device)"),
    (loss, papo.row_loss, "has_image=has_image(row)|.to(policy.device)"),
    (loss, papo.row_loss, "view_log_probs(row, name|, policy.device"),
    (loss, papo.row_loss, "pad_and_cat, row|, device=policy.device"),
]
SLOW_OMISSIONS = [  # CUDA takes an index from the host, and copies it every time
    (sample, Cache.keep, "rows|.to(self.device)"),
    (sample, Cache.keep, "max(self.lengths), prompts|.to(self.device)"),
    (sample, Loop.__init__, "torch.arange(len(chunk.prompt_of)|, device=device"),
    (sample, Loop.__init__, "chunk.prompt_of|.to(device)"),
    (sample, Loop._keep, "keep|.to(self.rows.device)"),
    (forward, packing.build_row, "torch.cat(predicts)|.to(device)"),
    (forward, packing.build_layout, "fed|.to(device)"),
]


@pytest.fixture()
def run_without(varied_policy, groups, device, monkeypatch, plant):
    """run_without(run, function, piece) leaves out what follows | in the piece, and runs."""
    monkeypatch.setitem(decoding.BLOCK, "cuda", 2)

    def plant_and_run(run, function, piece):
        before, left_out = piece.split("|")
        plant(function, before + left_out, before)
        with device:
            varied_policy.model.to(CUDA)
            run(varied_policy, groups)

    return plant_and_run


@pytest.mark.parametrize("omission", OMISSIONS, ids=lambda o: f"{o[1].__name__}: {o[2]}")
def test_an_omission_raises(run_without, omission):
    with pytest.raises(RuntimeError, match="Expected all tensors to be on the same device"):
        run_without(*omission)


@pytest.mark.parametrize("omission", SLOW_OMISSIONS, ids=lambda o: f"{o[1].__name__}: {o[2]}")
def test_a_slow_omission_is_counted(run_without, device, omission):
    run_without(*omission)
    assert copied_indices(device)
