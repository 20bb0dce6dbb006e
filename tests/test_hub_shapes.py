"""Tiny models in folders shaped as the hub's: Qwen2.5-VL-Instruct and Qwen3-VL.

Qwen2.5-VL's folder has a flat config and the old names of weights; Qwen3-VL's has nested configs.
"""

import json
import math
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from conftest import examples, generate, metric_lines, random_image, truncate
from PIL import Image
from safetensors.torch import load_file, save_file
from test_papo import check_packed_equals_padded
from test_rollout import check_equals_stock_greedy
from test_variants import gradient_of
from transformers import AutoConfig, AutoModelForImageTextToText

import train
from experiments import start_model
from losses import kl_k3
from masking import mask_prompt
from papo import pack_loss, prepare, preset, update
from support import checkpoint, toy
from support.batch import Example, mini_batches, pad_and_cat, seeded
from support.qwen_vl import PROMPT_SUFFIX, Encoder, Policy

# From the hub's generation_config.json and preprocessor_config.json.
CHAT_DEFAULTS = {"do_sample": True, "repetition_penalty": 1.05, "temperature": 0.000001}
PREPROCESSORS = {
    "qwen2_5_vl": start_model.PREPROCESSOR,
    "qwen3_vl": start_model.PREPROCESSOR
    | {
        "image_processor_type": "Qwen2VLImageProcessorFast",
        "processor_class": "Qwen3VLProcessor",
        "patch_size": 16,
        "size": {"longest_edge": 16777216, "shortest_edge": 65536},
        "image_mean": [0.5] * 3,
        "image_std": [0.5] * 3,
    },
}


def qwen3_config(vocab_size: int, special: int) -> dict:
    """A small Qwen3-VL's config.json; special: the id of the first special token."""
    text = {
        "model_type": "qwen3_vl_text",
        "hidden_size": 96,
        "intermediate_size": 160,
        "num_hidden_layers": 4,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 32,
        "vocab_size": vocab_size,
        "tie_word_embeddings": True,
        "rope_theta": 5000000,
        "max_position_embeddings": 262144,
        "rms_norm_eps": 1e-6,
        "rope_scaling": {
            "mrope_interleaved": True,
            "mrope_section": [6, 5, 5],
            "rope_type": "default",
        },
        "attention_bias": False,
        "attention_dropout": 0.0,
        "hidden_act": "silu",
        "initializer_range": 0.02,
        "bos_token_id": special,
        "eos_token_id": special + 2,
        "dtype": "bfloat16",
        "use_cache": True,
    }
    vision = {
        "model_type": "qwen3_vl",
        "depth": 4,
        "hidden_size": 64,
        "intermediate_size": 128,
        "num_heads": 2,
        "patch_size": 16,
        "spatial_merge_size": 2,
        "temporal_patch_size": 2,
        "in_channels": 3,
        "out_hidden_size": 96,
        "num_position_embeddings": 64,
        "deepstack_visual_indexes": [0, 1, 2],
        "hidden_act": "gelu_pytorch_tanh",
        "initializer_range": 0.02,
    }
    return {
        "architectures": ["Qwen3VLForConditionalGeneration"],
        "model_type": "qwen3_vl",
        "tie_word_embeddings": True,
        "text_config": text,
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


def write_json(file: Path, content: dict) -> None:
    file.write_text(json.dumps(content, indent=2) + "\n")


def write_folder(folder: Path, kind: str, tied: bool, template: str) -> str:
    """A hub folder: configs, tokenizer files, and bf16 shards with an index.

    template: which files hold the chat template: json, jinja or both.
    """
    folder.mkdir()
    tokenizer = start_model.make_tokenizer()
    special = tokenizer.convert_tokens_to_ids(start_model.SPECIAL[0])
    write_tokenizer(folder, tokenizer, template)
    if kind == "qwen3_vl":
        config = qwen3_config(len(tokenizer), special)
    else:
        vision = {"depth": 4, "intermediate_size": 96, "fullatt_block_indexes": [1, 3]}
        text = {"intermediate_size": 160, "tie_word_embeddings": tied, "torch_dtype": "bfloat16"}
        config = start_model.hub_config(len(tokenizer), special, vision, **text)
    ids = {"bos_token_id": special, "pad_token_id": special, "eos_token_id": [special + 2, special]}
    write_json(folder / "config.json", config)
    write_json(folder / "generation_config.json", CHAT_DEFAULTS | ids)
    write_json(folder / "preprocessor_config.json", PREPROCESSORS[kind])
    model = AutoModelForImageTextToText.from_config(AutoConfig.from_pretrained(folder))
    enlarge_weights(model)
    write_shards(folder, kind, model)
    return str(folder)


def write_tokenizer(folder: Path, tokenizer, template: str) -> None:
    """Old and new tokenizer files, and the chat template."""
    tokenizer.chat_template = None
    tokenizer.save_pretrained(folder)
    bpe = json.loads((folder / "tokenizer.json").read_text())["model"]
    merges = [merge if isinstance(merge, str) else " ".join(merge) for merge in bpe["merges"]]
    (folder / "merges.txt").write_text("\n".join(["#version: 0.2", *merges]) + "\n")
    write_json(folder / "vocab.json", bpe["vocab"])
    if template in ("json", "both"):
        write_json(folder / "chat_template.json", {"chat_template": start_model.CHAT_TEMPLATE})
    if template in ("jinja", "both"):
        (folder / "chat_template.jinja").write_text(start_model.CHAT_TEMPLATE)


def enlarge_weights(model) -> None:
    """With the usual standard deviation of 0.02 a random model repeats its input."""
    for name, weight in sorted(model.named_parameters()):
        if weight.ndim == 1:
            continue
        std = 0.2
        if "embed_tokens" in name or "lm_head" in name:
            std = 0.15
        elif "visual" in name:
            std = 0.1
        torch.nn.init.normal_(weight, std=std, generator=seeded(name))


def write_shards(folder: Path, kind: str, model, n_shards: int = 2) -> None:
    weights = {}
    for name, weight in model.named_parameters():
        weights[hub_name(kind, name)] = weight.detach().to(torch.bfloat16).contiguous()
    names, weight_map = sorted(weights), {}
    for i in range(n_shards):
        file = f"model-{i + 1:05d}-of-{n_shards:05d}.safetensors"
        shard = {name: weights[name] for name in names[i::n_shards]}
        save_file(shard, folder / file, metadata={"format": "pt"})
        weight_map |= dict.fromkeys(shard, file)
    size = sum(2 * weight.numel() for weight in weights.values())
    index = {"metadata": {"total_size": size}, "weight_map": dict(sorted(weight_map.items()))}
    write_json(folder / "model.safetensors.index.json", index)


@pytest.fixture(scope="module")
def qwen3(tmp_path_factory):
    folder = tmp_path_factory.mktemp("hub") / "Qwen3-VL-4B-Instruct"
    return write_folder(folder, "qwen3_vl", True, "json")


@pytest.fixture()
def policy(qwen3):
    return Policy.load(qwen3, Encoder(qwen3, 4096, 200_704, "Box it."))


@pytest.fixture()
def prompts(policy):
    return [policy.encoder.encode(example, index) for index, example in enumerate(examples())]


@pytest.mark.parametrize(
    "kind, tied, template",
    [
        ("qwen2_5_vl", False, "jinja"),
        ("qwen2_5_vl", True, "both"),
        ("qwen3_vl", True, "json"),
    ],
)
def test_a_hub_folder_trains_and_exports(run, tmp_path, monkeypatch, kind, tied, template):
    source = Path(write_folder(tmp_path / "hub", kind, tied, template))
    weights = {}
    for file in source.glob("*.safetensors"):
        weights |= load_file(file)
    loaded = AutoModelForImageTextToText.from_pretrained(source)
    for name, weight in loaded.named_parameters():
        assert torch.equal(weights[hub_name(kind, name)], weight), name

    trained = {}
    real_export = train.Run.export

    def export(self):
        """Record what the trained policy computes."""
        real_export(self)
        example = Example("<image>How many red dots are there?", "1", [random_image(112, 96)])
        prompt = self.policy.encoder.encode(example)
        with torch.no_grad():
            [group] = generate(self.policy, [prompt], 2, max_new_tokens=5)
            log_probs = self.policy.log_probs([group])
        trained.update(model=self.policy.model, group=group, log_probs=log_probs)

    monkeypatch.setattr(train.Run, "export", export)
    flags = "--steps 1 --eval_every 0 --save_every 0 --algo papo_g --model"
    exported = run("run", f"{flags} {source}") / "model"

    for name in checkpoint.COPIED_FILES:
        assert (exported / name).exists() == (source / name).exists(), name
        if (source / name).exists():
            assert (exported / name).read_bytes() == (source / name).read_bytes(), name
    stored = set()
    for file in exported.glob("*.safetensors"):
        stored |= load_file(file).keys()
    assert stored == weights.keys()  # the hub's names
    assert ("lm_head.weight" in stored) == (not tied)

    model = AutoModelForImageTextToText.from_pretrained(exported)
    assert model.dtype == torch.float32
    assert (model.lm_head.weight is model.model.language_model.embed_tokens.weight) == tied
    trained_weights = trained["model"].state_dict()
    for name, weight in model.state_dict().items():
        assert torch.equal(weight, trained_weights[name]), name
    pairs = zip(loaded.parameters(), model.parameters(), strict=True)
    assert any(not torch.equal(before.float(), after) for before, after in pairs)

    policy = Policy.load(str(exported), Encoder(str(exported), 3136, 200_704))
    with torch.no_grad():
        assert torch.equal(policy.log_probs([trained["group"]]), trained["log_probs"])
    again = run("again", f"{flags} {exported}")
    assert metric_lines(again)[0]["groups_kept"] >= 0
    assert (again / "model" / "config.json").exists()


@pytest.mark.parametrize(
    "kind, old, new, message",
    [
        ("qwen2_5_vl", "visual.", None, r"\d\d weights are missing, such as model.visual"),
        ("qwen3_vl", "layers.2.", None, r"11 weights are missing, .*language_model.layers.2"),
        ("qwen2_5_vl", "lm_head.", None, "1 weights are missing, such as lm_head.weight"),
        ("qwen3_vl", "model.", "base_model.model.", "weights are missing"),  # as peft names them
    ],
)
def test_missing_weights_are_an_error(tmp_path, kind, old, new, message):
    """transformers would fill them with random numbers."""
    source = Path(write_folder(tmp_path / "hub", kind, kind == "qwen3_vl", "jinja"))
    (source / "model.safetensors.index.json").unlink()
    weights = {}
    for file in source.glob("*.safetensors"):
        weights |= load_file(file)
        file.unlink()
    if new is None:
        weights = {name: value for name, value in weights.items() if old not in name}
    else:
        weights = {name.replace(old, new, 1): value for name, value in weights.items()}
    save_file(weights, source / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(OSError, match=message):
        Policy.load(str(source), Encoder(str(source), 4096, 200_704))


def test_a_template_that_opens_think_keeps_the_tag_in_the_response(qwen3, tmp_path):
    """As Qwen3-VL Thinking's: without it no response would earn the format reward."""
    folder = shutil.copytree(qwen3, tmp_path / "thinking")
    template = folder / "chat_template.json"
    text = json.loads(template.read_text())["chat_template"]
    ends_with_turn = "<|im_start|>assistant\n"
    assert ends_with_turn in text or repr(ends_with_turn)[1:-1] in text
    for turn in (ends_with_turn, repr(ends_with_turn)[1:-1]):
        text = text.replace(turn, f"{turn}<think>")
    write_json(template, {"chat_template": text})
    policy = Policy.load(str(folder), Encoder(str(folder), 4096, 200_704))
    prompt = policy.encoder.encode(examples()[0])
    tail = policy.encoder.tokenizer.decode(prompt.input_ids[-8:])
    assert tail.rstrip().endswith("<think>")
    [group] = generate(policy, [prompt], 3, max_new_tokens=4)
    assert all(text.startswith("<think>") for text in group.responses)
    decoded = policy.encoder.tokenizer.decode(group.tokens[0][group.response_mask[0]])
    assert group.responses[0].removeprefix("<think>") in decoded
    assert Encoder(qwen3, 4096, 200_704).opening == ""


def test_a_suffix_can_avoid_an_untrained_think_token(qwen3):
    """Qwen3-VL-Instruct has <think> as a token that it was never trained on."""
    box_only = "Give your final answer enclosed within \\boxed{}."
    for suffix, expected in ((PROMPT_SUFFIX, True), (box_only, False)):
        encoder = Encoder(qwen3, 4096, 200_704, suffix)
        encoder.tokenizer.add_tokens(["<think>", "</think>"])
        think = encoder.tokenizer.convert_tokens_to_ids("<think>")
        prompt = encoder.encode(Example("How many?", "1", []))
        assert (think in prompt.input_ids.tolist()) == expected
        assert encoder.tokenizer.decode(prompt.input_ids).count("boxed{}") == 1


def test_a_tokenizer_without_a_pad_token_samples(qwen3):
    encoder = Encoder(qwen3, 4096, 200_704)
    encoder.tokenizer.pad_token = None
    policy = Policy.load(qwen3, encoder)
    groups = generate(policy, [encoder.encode(each) for each in examples()], 2, max_new_tokens=4)
    assert all(group.tokens.dtype == torch.long for group in groups)


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


def test_chat_defaults_do_not_bias_rollouts(policy, prompts):
    """Repetition penalty and near-zero temperature are ignored: samples differ, log-probs agree."""
    [group] = generate(policy, prompts[:1], 4, max_new_tokens=8, key=(0, 0))
    assert len({tuple(row.tolist()) for row in group.tokens}) > 1
    sampled = pad_and_cat([group], "sample_log_probs")
    with torch.no_grad():
        torch.testing.assert_close(policy.log_probs([group]), sampled, atol=1e-4, rtol=0)


def test_qwen3_greedy_equals_stock_generate(policy, prompts):
    groups = generate(policy, prompts, 2, max_new_tokens=16, temperature=0, rollout_batch=8)
    assert len(pad_and_cat(groups, "tokens").unique()) > 12  # not mere repetition
    check_equals_stock_greedy(policy, prompts, groups, 16)


@pytest.mark.parametrize("chosen", [[1], [0, 1, 2, 3]], ids=str)
def test_qwen3_packed_rows_equal_padded_rows(policy, prompts, chosen):
    """With image features added to the first layers."""
    groups = generate(policy, prompts, 3, max_new_tokens=12, rollout_batch=5)
    truncate(groups)
    groups = [groups[i] for i in chosen]
    log_probs = check_packed_equals_padded(policy, groups, tolerance=2e-5)
    assert log_probs[pad_and_cat(groups, "response_mask")].std() > 0.3  # not a uniform policy


def test_qwen3_image_features_reach_the_first_layers(policy, prompts):
    [group] = generate(policy, prompts[:1], 2, max_new_tokens=6)
    with torch.no_grad():
        before = policy.log_probs([group])
        for merger in policy.model.model.visual.deepstack_merger_list:
            merger.linear_fc2.weight.mul_(5.0)
        assert not torch.allclose(before, policy.log_probs([group]), atol=1e-4)


@pytest.mark.parametrize("strategy", ["random", "noise", "semantic"])
def test_qwen3_masks_16_pixel_patches(policy, strategy):
    encoder = policy.encoder
    images = [random_image(128, 96), random_image(64, 96, 1)]
    prompt = encoder.encode(Example("<image><image>?", "1", images))
    assert prompt.image_grid_thw.tolist() == [[1, 6, 8], [1, 6, 4]]
    assert encoder.black_patch.unique().tolist() == [-1.0]
    algo = replace(preset("papo_g"), mask_strategy=strategy, mask_ratio=0.5)
    masked, patch_mask = mask_prompt(prompt, algo, encoder, seeded(0), toy.saliency)
    assert masked.shape == prompt.pixel_values.shape == (72, 3 * 2 * 16 * 16)
    assert 20 < int(patch_mask.sum()) < 52
    assert torch.equal(masked[~patch_mask], prompt.pixel_values[~patch_mask])
    if strategy != "noise":
        image = Image.new("RGB", (64, 64))
        black = encoder.images(images=[image], return_tensors="pt")["pixel_values"]
        torch.testing.assert_close(masked[patch_mask], black[:1].expand(int(patch_mask.sum()), -1))


def test_qwen3_update(policy, prompts):
    """With masks, and with prompts that have no image."""
    groups = generate(policy, prompts, 3, max_new_tokens=8)
    for group in groups:
        group.advantages = torch.tensor([1.0, -0.5, -0.5])
    algo, before = preset("papo_d"), [p.detach().clone() for p in policy.model.parameters()]
    policy.tokens_per_forward = 200
    batches = mini_batches(groups, 2)
    metrics = prepare(policy, None, batches, algo, key=(0, 0))
    optimizer = torch.optim.AdamW(policy.model.parameters(), lr=1e-3)
    metrics |= update(policy, optimizer, batches, algo)
    assert 0.4 < metrics["mask_ratio"] < 0.8
    assert metrics["skipped_updates"] == 0
    assert metrics["kl_prcp"] > 0
    assert not any(math.isnan(value) for value in metrics.values())
    unchanged = map(torch.equal, before, policy.model.parameters())
    assert not all(unchanged)
