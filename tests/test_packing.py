"""Faster attention and faster modules equal the plain ones. CUDA's own kernels need a GPU.

test_papo.py compares packed rows with padded ones.
"""

import sys
from functools import partial
from types import ModuleType, SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from conftest import random_image
from test_hub_shapes import qwen3_config
from test_papo import log_probs_and_gradients
from torch.distributed.utils import _to_kwargs
from transformers import AutoConfig, AutoModelForImageTextToText

from support import packing
from support.batch import Example, dummy_group, pad_and_cat, seeded
from support.qwen_vl import Policy, use_faster_forwards


def reference_varlen(q, k, v, *lengths, scale, causal):
    """A varlen kernel as a loop over sequences. Causal: the last query sees the last key."""
    q_ends, k_ends, longest_q, longest_k = lengths
    assert (longest_q, longest_k) == (q_ends.diff().max(), k_ends.diff().max())
    q_lengths, k_lengths = q_ends.diff().tolist(), k_ends.diff().tolist()
    outputs = []
    for each in zip(q.split(q_lengths), k.split(k_lengths), v.split(k_lengths), strict=True):
        query, key, value = (x.transpose(0, 1) for x in each)  # [heads, length, D]
        n, m = query.shape[1], key.shape[1]
        mask = torch.ones(n, m, dtype=torch.bool, device=q.device)
        out = F.scaled_dot_product_attention(
            query,
            key.repeat_interleave(len(query) // len(key), 0),
            value.repeat_interleave(len(query) // len(value), 0),
            attn_mask=mask.tril(m - n) if causal else mask,
            scale=scale,
        )
        outputs.append(out.transpose(0, 1))
    return torch.cat(outputs)


def test_sequences_for_a_kernel_equal_masks(policy, groups, monkeypatch):
    """In both towers: unequal responses, one of a single token, two images, none, a dummy."""
    assert (pad_and_cat(groups, "response_mask").sum(1) == 1).any()
    groups.append(dummy_group())
    expected, expected_gradients = log_probs_and_gradients(policy, groups, policy.log_probs)
    calls = []

    def kernel(*tensors, **options):
        calls.append(options["causal"])
        return reference_varlen(*tensors, **options)

    monkeypatch.setattr(packing, "varlen_kernel", lambda query: kernel)
    found, found_gradients = log_probs_and_gradients(policy, groups, policy.log_probs)
    assert (calls.count(True), calls.count(False)) == (4, 2)  # one per layer of text and vision
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=0)
    assert (found_gradients - expected_gradients).norm() < 1e-5 * expected_gradients.norm()


def test_fsdp_passes_a_pack_on(groups):
    """FSDP2 moves the inputs of a forward to its device; what is no tensor must survive."""
    row = packing.build_pack(groups, "", "cpu")
    [(moved,)], _ = _to_kwargs((row,), {}, torch.device("meta"), False)
    assert type(moved) is packing.Pack and moved.attend is row.attend
    for before, after in zip(row, moved, strict=True):
        if isinstance(before, torch.Tensor):
            assert after.is_meta and after.shape == before.shape


def test_image_features_equal_transformers(folder, encoder, policy, record_calls):
    """With windows cut at the edges and several images, though attention is called once a layer."""
    images = [random_image(336, 252), random_image(56, 56, 1), random_image(140, 420, 2)]
    prompt = encoder.encode(Example("<image>" * len(images), "1", images))
    stock = AutoModelForImageTextToText.from_pretrained(folder, attn_implementation="sdpa")
    calls = record_calls(packing, "varlen_kernel")
    expected, found = (
        model.model.get_image_features(prompt.pixel_values, prompt.image_grid_thw, return_dict=True)
        for model in (stock, policy.model)
    )
    assert len(calls) == len(stock.model.visual.blocks)
    torch.testing.assert_close(found.pooler_output, expected.pooler_output, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("kind", ["qwen2_5_vl", "qwen3_vl"])
def test_faster_forwards_equal_transformers(policy, kind):
    """In value and gradient. Qwen3-VL's patch embedding has a bias, and some of its norms have a
    head's size."""
    model = policy.model
    if kind == "qwen3_vl":
        config = AutoConfig.for_model(**qwen3_config(400, 380))
        model = AutoModelForImageTextToText.from_config(config)
        use_faster_forwards(model)
    replaced = [module for module in model.modules() if "forward" in vars(module)]
    assert len({type(module) for module in replaced}) == 2
    for module in replaced:
        for parameter in module.parameters():
            torch.nn.init.normal_(parameter)
        width = module.proj.weight[0].numel() if hasattr(module, "proj") else len(module.weight)
        x = torch.randn(5, width).requires_grad_()
        results = []
        for forward in (module.forward, partial(type(module).forward, module)):
            out = forward(x)
            scale = torch.randn(out.shape, generator=seeded("scale"))
            gradients = torch.autograd.grad((out * scale).sum(), [x, *module.parameters()])
            results.append([out, *gradients])
        torch.testing.assert_close(*results, atol=1e-4, rtol=1e-4)


def test_which_kernel_is_chosen(monkeypatch):
    """None on a CPU or in fp32; flash-attn where it can be imported, else torch's."""
    on_gpu = SimpleNamespace(is_cuda=True, dtype=torch.bfloat16)
    monkeypatch.setattr(packing, "_has_flash_attention", lambda: True)
    monkeypatch.setattr(packing, "_import_flash_attn", packing._import_flash_attn.__wrapped__)
    flash_attn = ModuleType("flash_attn")  # imports, but what it should hold is missing
    monkeypatch.setitem(sys.modules, "flash_attn", flash_attn)
    assert packing.varlen_kernel(torch.zeros(1, dtype=torch.bfloat16)) is None
    assert packing.varlen_kernel(SimpleNamespace(is_cuda=True, dtype=torch.float32)) is None
    assert packing.varlen_kernel(on_gpu) is packing._torch_varlen_attention
    flash_attn.flash_attn_varlen_func = lambda *args, **options: (args, options)
    call = packing.varlen_kernel(on_gpu)(1, 2, scale=0.5, causal=True)
    assert call == ((1, 2), {"softmax_scale": 0.5, "causal": True})


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU, Ampere or newer")
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("name", ["flash-attn", "torch"])
def test_kernels_equal_sdpa_on_cuda(folder, encoder, groups, monkeypatch, name, dtype):
    """Packed rows have about the log-probs and gradients of fp32, which SDPA computes."""
    kernel = packing._torch_varlen_attention if name == "torch" else packing._import_flash_attn()
    if kernel is None:
        pytest.skip("flash-attn cannot be imported")
    monkeypatch.setattr(packing, "_import_flash_attn", lambda: kernel)
    policies = [Policy.load(folder, encoder, each, "cuda") for each in (torch.float32, dtype)]
    results = [log_probs_and_gradients(each, groups, each.log_probs) for each in policies]
    for fp32, half in zip(*results, strict=True):
        assert (half.float() - fp32).norm() < 0.05 * fp32.norm()
