"""support/packing.py: the sequences attention kernels are given, and CUDA's kernels on a GPU.

test_papo.py compares packed rows with padded ones.
"""

import sys
import types
from functools import partial

import pytest
import torch
import torch.nn.functional as F
from conftest import random_image

from support import packing
from support.batch import Example, seeded
from support.qwen_vl import Policy

cuda = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU")


def reference_varlen(q, k, v, *lengths, scale, causal):
    """A varlen kernel written as a loop over sequences, causal at the bottom right."""
    q_ends, k_ends, longest_q, longest_k = lengths
    assert longest_q == q_ends.diff().max()
    assert longest_k == k_ends.diff().max()
    q_lengths, k_lengths = q_ends.diff().tolist(), k_ends.diff().tolist()
    sequences = zip(q.split(q_lengths), k.split(k_lengths), v.split(k_lengths), strict=True)
    outputs = []
    for sequence in sequences:
        query, key, value = (x.transpose(0, 1) for x in sequence)  # [heads, length, D]
        mask = None
        if causal:
            n, m = query.shape[1], key.shape[1]
            mask = torch.ones(n, m, dtype=torch.bool).tril(m - n)
        out = F.scaled_dot_product_attention(
            query,
            key.repeat_interleave(len(query) // len(key), 0),
            value.repeat_interleave(len(query) // len(value), 0),
            attn_mask=mask,
            scale=scale,
        )
        outputs.append(out.transpose(0, 1))
    return torch.cat(outputs)


def top_left_varlen(q, k, v, *lengths, scale, causal):
    """A kernel aligned at the top left, as SDPA's is_causal is."""
    k, v = (x.repeat_interleave(2, 1).transpose(0, 1) for x in (k, v))
    out = F.scaled_dot_product_attention(q.transpose(0, 1), k, v, is_causal=True, scale=scale)
    return out.transpose(0, 1)


def wrong_gradient_varlen(*tensors, **options):
    """The right output with the wrong sign of the gradient."""
    out = reference_varlen(*tensors, **options)
    return 2 * out.detach() - out


def test_varlen_sequences_equal_sdpa(policy, groups, monkeypatch):
    """The sequences that CUDA's kernels are given, in language model and vision tower."""
    policy.model.set_attn_implementation(packing.ATTENTION)

    def log_probs_and_gradients(kernel):
        monkeypatch.setattr(packing, "varlen_kernel", lambda device, dtype: kernel)
        policy.model.zero_grad()
        log_probs = policy.log_probs(groups)
        (log_probs * torch.randn(log_probs.shape, generator=seeded("w"))).sum().backward()
        return log_probs, torch.cat([p.grad.flatten() for p in policy.model.parameters()])

    sdpa, sdpa_gradient = log_probs_and_gradients(None)
    varlen, varlen_gradient = log_probs_and_gradients(reference_varlen)
    torch.testing.assert_close(sdpa, varlen, atol=1e-5, rtol=0)
    assert (sdpa_gradient - varlen_gradient).norm() < 1e-5 * sdpa_gradient.norm()


def test_a_kernel_that_disagrees_with_sdpa_is_refused():
    agrees = partial(packing.agrees_with_sdpa, device="cpu", dtype=torch.float32)
    assert agrees(reference_varlen)
    assert not agrees(top_left_varlen)
    assert not agrees(wrong_gradient_varlen)
    with torch.no_grad():
        assert agrees(reference_varlen)
    assert packing.varlen_kernel("cpu", torch.float32) is None
    assert packing.varlen_kernel("cuda", torch.float32) is None


def test_a_kernel_can_be_checked_inside_a_checkpointed_forward():
    """Where the first training step asks for it."""
    leaf = torch.ones(1, requires_grad=True)

    def layer(x):
        assert packing.agrees_with_sdpa(reference_varlen, "cpu", torch.float32)
        return x * 2

    torch.utils.checkpoint.checkpoint(layer, leaf, use_reentrant=False).backward()
    assert leaf.grad == 2


@pytest.mark.parametrize("sizes", [[(84, 84)], [(336, 252), (56, 56), (140, 420)]])
def test_windows_in_one_call_equal_windows_in_a_loop(folder, encoder, sizes):
    """Image features equal transformers' own, with windows cut at the edges and several images."""
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


def test_equal_windows_share_a_call(policy, encoder, record_calls):
    policy.model.set_attn_implementation(packing.ATTENTION)
    calls = record_calls(F, "scaled_dot_product_attention")
    prompt = encoder.encode(Example("<image>", "1", [random_image(336, 336)]))
    policy.model.model.get_image_features(
        prompt.pixel_values, prompt.image_grid_thw, return_dict=True
    )
    assert len(calls) == 2  # one block with nine equal windows, one with full attention


def test_a_broken_flash_attn_is_not_used(monkeypatch):
    monkeypatch.setattr(packing, "is_flash_attn_2_available", lambda: True)
    without_the_function = types.ModuleType("flash_attn")
    monkeypatch.setitem(sys.modules, "flash_attn", without_the_function)
    with pytest.warns(UserWarning, match="not usable: cannot import name 'flash_attn_varlen_func'"):
        assert packing.flash_attention() is None


@cuda
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_varlen_kernel_equals_sdpa_on_cuda(dtype):
    """The kernel that is chosen, on several sequences with fewer queries than keys."""
    kernel = packing.varlen_kernel("cuda", dtype)
    assert kernel, "neither flash-attn nor an aligned torch kernel"
    random = torch.Generator().manual_seed(0)
    q_ends, k_ends = torch.tensor([0, 300, 330, 333]), torch.tensor([0, 300, 630, 933])
    inputs = []
    for length, heads in ((333, 4), (933, 2), (933, 2)):
        values = torch.randn(length, heads, 128, generator=random)
        inputs.append(values.to("cuda", dtype).requires_grad_())
    ends = [e.to("cuda", torch.int32) for e in (q_ends, k_ends)]
    out = kernel(*inputs, *ends, 300, 330, scale=0.1, causal=True)
    exact_inputs = [x.detach().float().cpu().requires_grad_() for x in inputs]
    exact = reference_varlen(*exact_inputs, q_ends, k_ends, 300, 330, scale=0.1, causal=True)
    weight = torch.randn(out.shape, generator=random)
    grads = torch.autograd.grad((out.float().cpu() * weight).sum(), inputs)
    exact_grads = torch.autograd.grad((exact * weight).sum(), exact_inputs)
    for a, b in zip((out, *grads), (exact, *exact_grads), strict=True):
        assert (a.float().cpu() - b).norm() < 0.01 * b.norm()


@cuda
def test_bf16_log_probs_are_near_float32_on_cuda(folder, encoder, groups):
    """Packed rows in bf16 (a varlen kernel) and in fp32 (SDPA)."""
    log_probs = []
    with torch.no_grad():
        for dtype in (torch.float32, torch.bfloat16):
            log_probs.append(Policy.load(folder, encoder, dtype, "cuda").log_probs(groups).float())
    fp32, bf16 = log_probs
    assert (bf16 - fp32).norm() < 0.02 * fp32.norm()
