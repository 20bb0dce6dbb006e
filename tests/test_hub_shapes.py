"""Tiny models in folders shaped as the hub's: Qwen2.5-VL-Instruct and Qwen3-VL.

Qwen2.5-VL's folder has a flat config and the old names of weights; Qwen3-VL's has nested configs.
"""

import json
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from conftest import examples, generate, gradient_of, truncate
from PIL import Image
from safetensors.torch import load_file, save_file
from test_papo import check_packed_equals_padded
from test_rollout import check_equals_stock_greedy
from transformers import AutoConfig, AutoModelForImageTextToText

from experiments import start_model
from losses import kl_k3
from papo import pack_loss, prepare, preset
from support import checkpoint
from support.batch import pad_and_cat, seeded
from support.qwen_vl import Encoder, Policy

# From the hub's generation_config.json and preprocessor_config.json.
CHAT_DEFAULTS = {"do_sample": True, "repetition_penalty": 1.05, "temperature": 0.000001}
PREPROCESSORS = {
    "qwen2_5_vl": start_model.PREPROCESSOR,
    "qwen3_vl": start_model.PREPROCESSOR
    | {
        "image_processor_type": "Qwen2VLImageProcessorFast",
        "patch_size": 16,
        "size": {"longest_edge": 16777216, "shortest_edge": 65536},
        "image_mean": [0.5] * 3,
        "image_std": [0.5] * 3,
    },
}


def qwen3_config(vocab_size: int, special: int) -> dict:
    """A small Qwen3-VL's config.json; special: the id of the first special token."""
    text = {"hidden_size": 96, "intermediate_size": 160, "head_dim": 32, "vocab_size": vocab_size}
    text |= {"num_hidden_layers": 4, "num_attention_heads": 4, "num_key_value_heads": 2}
    text |= {"rope_scaling": {"rope_type": "default", "mrope_section": [6, 5, 5]}}
    vision = {"depth": 4, "hidden_size": 64, "intermediate_size": 128, "num_heads": 2}
    vision |= {"out_hidden_size": 96, "num_position_embeddings": 64}
    vision |= {"deepstack_visual_indexes": [0, 1, 2]}
    return {
        "model_type": "qwen3_vl",
        "tie_word_embeddings": True,
        "text_config": text | {"tie_word_embeddings": True, "dtype": "bfloat16"},
        "vision_config": vision,
        "vision_start_token_id": special + 9,
        "vision_end_token_id": special + 10,
        "image_token_id": special + 12,
        "video_token_id": special + 13,
    }


def hub_name(kind: str, name: str) -> str:
    """What the hub's files call a parameter of transformers' class."""
    if kind == "qwen3_vl":
        return name  # model.visual.*, model.language_model.*
    return name.replace("model.visual.", "visual.").replace("model.language_model.", "model.")


def write_folder(folder: Path, kind: str) -> Path:
    """A hub folder: configs, tokenizer files, and bf16 shards with an index."""
    folder.mkdir(parents=True)
    tokenizer = start_model.make_tokenizer()
    special = tokenizer.convert_tokens_to_ids(start_model.SPECIAL[0])
    tokenizer.chat_template = None
    tokenizer.save_pretrained(folder)
    template = start_model.CHAT_TEMPLATE
    (folder / "chat_template.json").write_text(json.dumps({"chat_template": template}))
    if kind == "qwen3_vl":
        (folder / "chat_template.jinja").write_text(template)
        config = qwen3_config(len(tokenizer), special)
    else:
        vision = {"depth": 4, "intermediate_size": 96, "fullatt_block_indexes": [1, 3]}
        text = {"intermediate_size": 160, "tie_word_embeddings": False, "torch_dtype": "bfloat16"}
        config = start_model.hub_config(len(tokenizer), special, vision, **text)
    (folder / "config.json").write_text(json.dumps(config))
    model = AutoModelForImageTextToText.from_config(AutoConfig.from_pretrained(folder))
    enlarge_weights(model)
    model.to(torch.bfloat16).save_pretrained(folder, max_shard_size="1MB")
    ids = {"bos_token_id": special, "pad_token_id": special, "eos_token_id": [special + 2, special]}
    (folder / "config.json").write_text(json.dumps(config))  # not as transformers 5 writes it
    (folder / "generation_config.json").write_text(json.dumps(CHAT_DEFAULTS | ids))
    (folder / "preprocessor_config.json").write_text(json.dumps(PREPROCESSORS[kind]))
    return folder


def enlarge_weights(model) -> None:
    """With the usual standard deviation of 0.02 a random model repeats its input."""
    for name, weight in sorted(model.named_parameters()):
        if weight.ndim > 1:
            is_token = "embed_tokens" in name or "lm_head" in name
            std = 0.15 if is_token else 0.1 if "visual" in name else 0.2
            torch.nn.init.normal_(weight, std=std, generator=seeded(name))


def load_shards(folder: Path) -> dict:
    weights = {}
    for file in folder.glob("*.safetensors"):
        weights |= load_file(file)
    return weights


@pytest.fixture(scope="module")
def qwen3(tmp_path_factory):
    return str(write_folder(tmp_path_factory.mktemp("hub") / "Qwen3-VL-4B-Instruct", "qwen3_vl"))


@pytest.fixture()
def policy(qwen3):
    return Policy.load(qwen3, Encoder(qwen3, 4096, 200_704, "Box it."))


@pytest.fixture()
def prompts(policy):
    return [policy.encoder.encode(example, index) for index, example in enumerate(examples())]


@pytest.mark.parametrize("kind", PREPROCESSORS)
def test_a_hub_folder_trains_and_exports(run, tmp_path, kind):
    """One with an own output head, and one whose head is tied to the embeddings."""
    source = write_folder(tmp_path / "hub", kind)
    flags = f"--steps 1 --eval_every 0 --save_every 0 --algo papo_g --model {source}"
    exported = run("run", flags) / "model"
    for name in checkpoint.COPIED_FILES:
        assert (exported / name).exists() == (source / name).exists(), name
        if (source / name).exists():
            assert (exported / name).read_bytes() == (source / name).read_bytes(), name

    weights, trained = load_shards(source), load_shards(exported)
    model = AutoModelForImageTextToText.from_pretrained(exported)
    names = {name: hub_name(kind, name) for name, _ in model.named_parameters()}
    assert trained.keys() == weights.keys() == set(names.values())
    assert ("lm_head.weight" in trained) == (kind == "qwen2_5_vl")
    assert model.dtype == torch.float32
    moved = [(trained[name] - weights[name].float()).abs().max() for name in weights]
    assert 1e-3 < max(moved) < 3e-3  # two updates of lr 1e-3; test_ranks.py compares exactly
    for name, weight in model.named_parameters():
        assert torch.equal(weight, trained[names[name]]), name


def test_missing_weights_are_an_error(folder, encoder, tmp_path):
    """transformers would fill them with random numbers."""
    source = shutil.copytree(folder, tmp_path / "model")
    weights = load_file(source / start_model.WEIGHTS)
    del weights["visual.blocks.0.norm2.weight"]
    save_file(weights, source / start_model.WEIGHTS, metadata={"format": "pt"})
    with pytest.raises(OSError, match="1 weights are missing, such as .*norm2"):
        Policy.load(str(source), encoder)


def test_a_template_that_opens_think_keeps_the_tag_in_the_response(qwen3, tmp_path):
    """As Qwen3-VL Thinking's: without it no response would earn the format reward."""
    folder = shutil.copytree(qwen3, tmp_path / "thinking")
    text = start_model.CHAT_TEMPLATE.replace("assistant\n", "assistant\n<think>")
    (folder / "chat_template.jinja").write_text(text)
    encoder = Encoder(str(folder), 4096, 200_704)
    encoder.tokenizer.pad_token = None  # nor is one needed
    policy = Policy.load(str(folder), encoder)
    prompt = encoder.encode(examples()[0])
    assert encoder.tokenizer.decode(prompt.input_ids[-8:]).rstrip().endswith("<think>")
    [group] = generate(policy, [prompt], 3, max_new_tokens=4)
    assert all(text.startswith("<think>") for text in group.responses)
    decoded = encoder.tokenizer.decode(group.tokens[0][group.response_mask[0]])
    assert group.responses[0].removeprefix("<think>") in decoded
    assert Encoder(qwen3, 4096, 200_704).opening == ""


def test_qwen3_trains_papo(policy, prompts):
    """The gradient of papo_g is that of grpo minus gamma times that of KL_prcp."""
    groups = generate(policy, prompts[:1], 3, max_new_tokens=8)
    groups[0].advantages = torch.tensor([1.0, -0.5, -0.5])
    gradients = {}
    for name, gamma in (("grpo", 0.0), ("papo_g", 0.5)):
        algo = replace(preset(name), kl_ref_coef=0.0, kl_prcp_coef=gamma)
        prepare(policy, None, [groups], algo, key=(0, 0))
        loss, _ = pack_loss(policy, groups, algo)
        gradients[name] = gradient_of(policy, loss)
    mask = groups[0].response_mask
    kl = kl_k3(policy.log_probs(groups), groups[0].masked_log_probs)[mask].mean()
    added = gradients["papo_g"] - gradients["grpo"]
    assert added.norm() > 1e-3
    torch.testing.assert_close(added, -0.5 * gradient_of(policy, kl), atol=1e-5, rtol=1e-3)


def test_qwen3_greedy_equals_stock_generate(policy, prompts):
    """And a pack's log-probs padded rows', with image features added to the first layers."""
    groups = generate(policy, prompts, 1, max_new_tokens=16, temperature=0)
    assert len(pad_and_cat(groups, "tokens").unique()) > 12  # not mere repetition
    check_equals_stock_greedy(policy, prompts, groups, 16)
    groups = generate(policy, prompts, 3, max_new_tokens=12, rollout_batch=5)
    with torch.no_grad():
        sampled = pad_and_cat(groups, "sample_log_probs")
        torch.testing.assert_close(policy.log_probs(groups), sampled, atol=1e-4, rtol=0)
    truncate(groups)
    for chosen in (groups[1:2], groups):
        log_probs = check_packed_equals_padded(policy, chosen, tolerance=2e-5)
        assert log_probs[pad_and_cat(chosen, "response_mask")].std() > 0.3  # not uniform
    with torch.no_grad():
        before = policy.log_probs(groups[:1])
        for merger in policy.model.model.visual.deepstack_merger_list:
            merger.linear_fc2.weight.mul_(5.0)
        assert not torch.allclose(before, policy.log_probs(groups[:1]), atol=1e-4)


def test_qwen3_has_its_own_black(policy):
    """In patches of 16 pixels, with its own mean and standard deviation."""
    image = Image.new("RGB", (64, 64))
    black = policy.encoder.image_processor(images=[image], return_tensors="pt")["pixel_values"]
    torch.testing.assert_close(policy.encoder.black_patch.expand_as(black), black)
