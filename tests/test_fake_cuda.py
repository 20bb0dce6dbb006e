"""On the CUDA build of torch, without a GPU: the published 3B model in bf16, as fake CUDA tensors.

A FakeTensor has a device, a dtype and a shape, but no values. It refuses to mix devices or to read
a value, so a missing `.to(device)`, a wait for the device and a kernel's signature show here.
test_device.py has sampling, test_shapes.py the same model by its shapes alone.
"""

from types import SimpleNamespace

import pytest
import torch
from shape_only import image_prompt
from torch._subclasses.fake_tensor import FakeTensorMode, unset_fake_temporarily
from torch.utils._pytree import tree_map
from transformers import Qwen2_5_VLForConditionalGeneration

from experiments import start_model
from support import packing
from support.batch import Group
from support.qwen_vl import use_faster_forwards

pytestmark = pytest.mark.skipif(not torch.version.cuda, reason="needs the CUDA build of torch")


@pytest.fixture()
def mode(monkeypatch):
    """On a GPU that has FlashAttention. flash-attn itself takes no fake tensors, and the random
    state that a checkpoint keeps is a real GPU's."""
    monkeypatch.setattr(packing, "_has_flash_attention", lambda: True)
    monkeypatch.setattr(packing, "_import_flash_attn", lambda: None)
    monkeypatch.setattr(packing, "checkpoint", lambda f, *args, use_reentrant: f(*args))
    return FakeTensorMode(allow_non_fake_inputs=True)


@pytest.fixture()
def model(mode):
    """Qwen2.5-VL 3B with the engine's attention and forwards."""
    with mode, torch.device("cuda"):
        config = start_model.random_config("qwen2.5-vl-3b")
        model = Qwen2_5_VLForConditionalGeneration._from_config(config, dtype=torch.bfloat16)
    model.set_attn_implementation(packing.ATTENTION)
    use_faster_forwards(model)
    return model


def fake_row(groups, mode):
    """build_pack's result for a GPU; which values it has is decided on the host."""
    with unset_fake_temporarily():
        row = packing.build_pack(groups, "", "cpu")
        sequences = row.attend.sequences

    def fake(value):
        return mode.from_tensor(value).to("cuda") if isinstance(value, torch.Tensor) else value

    with mode:
        row.attend.sequences = tuple(fake(each) for each in sequences)
        return tree_map(fake, row)


def test_a_training_forward(mode, model, monkeypatch):
    """Two groups in one row, through torch's varlen kernel."""

    def features(pixel_values, grid, return_dict):
        """One block with windows of 64 patches; the whole tower reads its grid's values."""
        visual, patches = model.model.visual, len(pixel_values)
        hidden = visual.patch_embed(pixel_values)
        angles = torch.zeros(patches, 80, device="cuda")
        ends = torch.arange(0, patches + 1, 64, device="cuda", dtype=torch.int32)
        windows = {"cu_seqlens": ends, "max_seqlen": 64}
        hidden = visual.blocks[0](hidden, position_embeddings=(angles, angles), **windows)
        assert hidden.dtype == torch.bfloat16
        return SimpleNamespace(pooler_output=(visual.merger(hidden),))

    monkeypatch.setattr(model.model, "get_image_features", features)
    groups = []
    for prompt in (image_prompt(1300, 64, 72), image_prompt(700, 40, 44)):
        mask = torch.arange(40) < torch.tensor([40, 1, 7, 30, 2])[:, None]
        tokens = torch.zeros(mask.shape, dtype=torch.long)
        groups.append(Group(prompt, tokens, mask, mask.any(1), torch.zeros(mask.shape)))
    row = fake_row(groups, mode)
    with mode:
        log_probs = packing.pack_log_probs(model, row, 1.0)
    assert log_probs.shape == (160,) and log_probs.dtype == torch.float32
    assert log_probs.is_cuda and log_probs.requires_grad
