"""Kernels: what CUDA's are handed, checked on a CPU by plain formulas, and CUDA's own where there is one."""

import pytest
import torch
import torch.nn.functional as F
from conftest import random_image

from support import packing
from support.batch import Example, seeded
from support.qwen_vl import Policy

cuda = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU")


def plain_varlen(q, k, v, q_ends, k_ends, longest_q, longest_k, scale, causal):
    """A varlen kernel sequence by sequence, causal at the bottom right."""
    assert longest_q == q_ends.diff().max() and longest_k == k_ends.diff().max()
    parts = []
    for i in range(len(q_ends) - 1):
        own = q[q_ends[i] : q_ends[i + 1]].transpose(0, 1)
        seen = [x[k_ends[i] : k_ends[i + 1]].transpose(0, 1) for x in (k, v)]
        seen = [x.repeat_interleave(len(own) // len(x), 0) for x in seen]
        n, m = own.shape[1], seen[0].shape[1]
        mask = torch.ones(n, m, dtype=torch.bool).tril(m - n) if causal else None
        parts.append(
            F.scaled_dot_product_attention(own, *seen, attn_mask=mask, scale=scale).transpose(0, 1)
        )
    return torch.cat(parts)


def top_left(q, k, v, *lengths, scale, causal):
    """The other alignment, which SDPA's is_causal has."""
    k, v = (x.repeat_interleave(2, 1).transpose(0, 1) for x in (k, v))
    return F.scaled_dot_product_attention(
        q.transpose(0, 1), k, v, is_causal=True, scale=scale
    ).transpose(0, 1)


def test_varlen_sequences_equal_sdpa(policy, groups, monkeypatch):
    """The layout that CUDA's kernels are handed, for the language model and the vision tower, through the gradient."""
    policy.model.set_attn_implementation(packing.ATTENTION)
    results = []
    for kernel in (None, plain_varlen):
        monkeypatch.setattr(packing, "varlen_kernel", lambda *key, kernel=kernel: kernel)
        policy.model.zero_grad()
        log_probs = policy.log_probs(groups)
        (log_probs * torch.randn(log_probs.shape, generator=seeded("w"))).sum().backward()
        results.append(
            (log_probs, torch.cat([p.grad.flatten() for p in policy.model.parameters()]))
        )
    (a, slow), (b, fast) = results
    torch.testing.assert_close(a, b, atol=1e-5, rtol=0)
    assert (slow - fast).norm() < 1e-5 * slow.norm()


def test_a_misaligned_kernel_is_refused():
    assert packing.agrees_with_sdpa(plain_varlen, "cpu", torch.float32)
    assert not packing.agrees_with_sdpa(top_left, "cpu", torch.float32)

    def backwards(*x, **how):  # right but for its gradient
        out = plain_varlen(*x, **how)
        return 2 * out.detach() - out

    assert not packing.agrees_with_sdpa(backwards, "cpu", torch.float32)
    leaf = torch.ones(1, requires_grad=True)

    def layer(x):  # asked for the first time inside a checkpointed forward
        assert packing.agrees_with_sdpa(plain_varlen, "cpu", torch.float32)
        return x * 2

    torch.utils.checkpoint.checkpoint(layer, leaf, use_reentrant=False).backward()
    with torch.no_grad():
        assert packing.agrees_with_sdpa(plain_varlen, "cpu", torch.float32) and leaf.grad == 2
    assert (
        packing.varlen_kernel("cpu", torch.float32) is None
        and packing.varlen_kernel("cuda", torch.float32) is None
    )


@pytest.mark.parametrize("sizes", [[(84, 84)], [(336, 252), (56, 56), (140, 420)]])
def test_windows_in_one_call_equal_windows_in_a_loop(folder, encoder, sizes):
    """Whole windows, cut ones at the edges, several images: image features are those of transformers' loop."""
    images = [random_image(*size, seed=i) for i, size in enumerate(sizes)]
    prompt = encoder.encode(Example("<image>" * len(images), "1", images))
    features = []
    for vision in (packing.ATTENTION["vision_config"], "sdpa"):
        model = Policy.load(folder, encoder).model
        model.set_attn_implementation({"vision_config": vision})
        out = model.model.get_image_features(
            prompt.pixel_values, prompt.image_grid_thw, return_dict=True
        )
        features.append(torch.cat(out.pooler_output))
        assert model.model.visual.config._attn_implementation == vision
    torch.testing.assert_close(*features, atol=1e-5, rtol=1e-5)


def test_windows_take_few_calls(policy, encoder, monkeypatch):
    policy.model.set_attn_implementation(packing.ATTENTION)
    calls = []
    original = F.scaled_dot_product_attention
    monkeypatch.setattr(
        F, "scaled_dot_product_attention", lambda *a, **k: calls.append(1) or original(*a, **k)
    )
    prompt = encoder.encode(Example("<image>", "1", [random_image(336, 336)]))
    policy.model.model.get_image_features(
        prompt.pixel_values, prompt.image_grid_thw, return_dict=True
    )
    assert len(calls) == 2  # a windowed block of nine equal windows, a full one


@cuda
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_varlen_kernel_equals_sdpa_on_cuda(dtype):
    """Whichever kernel is picked, and torch's own: fewer queries than keys, several sequences, forward and gradient."""
    kernel = packing.varlen_kernel("cuda", dtype)
    assert kernel, "neither flash-attn nor an aligned kernel of torch's: SDPA it is"
    random = torch.Generator().manual_seed(0)
    q_ends, k_ends = torch.tensor([0, 300, 330, 333]), torch.tensor([0, 300, 630, 933])
    shapes = [(333, 4), (933, 2), (933, 2)]
    inputs = [
        torch.randn(n, h, 128, generator=random).to("cuda", dtype).requires_grad_()
        for n, h in shapes
    ]
    ends = [e.to("cuda", torch.int32) for e in (q_ends, k_ends)]
    out = kernel(*inputs, *ends, 300, 330, scale=0.1, causal=True)
    exact = [x.detach().float().cpu().requires_grad_() for x in inputs]
    plain = plain_varlen(*exact, q_ends, k_ends, 300, 330, scale=0.1, causal=True)
    weight = torch.randn(out.shape, generator=random)
    grads = torch.autograd.grad((out.float().cpu() * weight).sum(), inputs)
    expected = torch.autograd.grad((plain * weight).sum(), exact)
    for a, b in zip((out, *grads), (plain, *expected), strict=True):
        assert (a.float().cpu() - b).norm() < 0.01 * b.norm()


@cuda
def test_bf16_log_probs_are_near_those_of_float32(folder, encoder, groups):
    """Packed in bf16 on CUDA (a varlen kernel) against packed in fp32 (SDPA)."""
    log_probs = []
    with torch.no_grad():
        for dtype in (torch.float32, torch.bfloat16):
            log_probs.append(Policy.load(folder, encoder, dtype, "cuda").log_probs(groups).float())
    exact, half = log_probs
    assert (half - exact).norm() < 0.02 * exact.norm()
