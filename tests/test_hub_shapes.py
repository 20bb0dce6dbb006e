"""Folders shaped as the hub's, with tiny weights: Qwen2.5-VL-Instruct (flat config, old weight names) and Qwen3-VL."""

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from conftest import examples, random_image
from PIL import Image
from safetensors.torch import load_file, save_file
from test_papo import gradients, plain_log_probs
from test_rollout import stock_greedy
from test_train import lines, run  # noqa: F401  (a fixture)
from transformers import AutoConfig, AutoModelForImageTextToText

import train
from masking import mask_prompt
from papo import mini_batches, prepare, preset, update
from rollout import generate
from support import checkpoint, toy
from support.batch import Example, pad_and_cat, seeded
from support.qwen_vl import Encoder, Policy

# Of Qwen2.5-VL-3B-Instruct's and Qwen3-VL-4B-Instruct's own files.
CHAT = {
    "bos_token_id": 0,
    "pad_token_id": 0,
    "do_sample": True,
    "repetition_penalty": 1.05,
    "temperature": 0.000001,
}
PREPROCESSORS = {
    "qwen2_5_vl": toy.PREPROCESSOR,
    "qwen3_vl": toy.PREPROCESSOR | {
        "image_processor_type": "Qwen2VLImageProcessorFast", "processor_class": "Qwen3VLProcessor", "patch_size": 16,
        "size": {"longest_edge": 16777216, "shortest_edge": 65536}, "image_mean": [0.5] * 3, "image_std": [0.5] * 3,
    },
}  # fmt: skip


def nested_config(vocab_size: int, special: int) -> dict:
    """Qwen3-VL's config.json, small."""
    text = {
        "model_type": "qwen3_vl_text", "hidden_size": 96, "intermediate_size": 160, "num_hidden_layers": 4,
        "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 32, "vocab_size": vocab_size,
        "tie_word_embeddings": True, "rope_theta": 5000000, "max_position_embeddings": 262144, "rms_norm_eps": 1e-6,
        "rope_scaling": {"mrope_interleaved": True, "mrope_section": [6, 5, 5], "rope_type": "default"},
        "attention_bias": False, "attention_dropout": 0.0, "hidden_act": "silu", "initializer_range": 0.02,
        "bos_token_id": special, "eos_token_id": special + 2, "dtype": "bfloat16", "use_cache": True,
    }  # fmt: skip
    vision = {
        "model_type": "qwen3_vl", "depth": 4, "hidden_size": 64, "intermediate_size": 128, "num_heads": 2,
        "patch_size": 16, "spatial_merge_size": 2, "temporal_patch_size": 2, "in_channels": 3, "out_hidden_size": 96,
        "num_position_embeddings": 64, "deepstack_visual_indexes": [0, 1, 2], "hidden_act": "gelu_pytorch_tanh",
        "initializer_range": 0.02,
    }  # fmt: skip
    ids = {
        "vision_start_token_id": 9,
        "vision_end_token_id": 10,
        "image_token_id": 12,
        "video_token_id": 13,
    }
    return {"architectures": ["Qwen3VLForConditionalGeneration"], "model_type": "qwen3_vl", "tie_word_embeddings": True,
            "text_config": text, "vision_config": vision} | {name: special + i for name, i in ids.items()}  # fmt: skip


def hub_name(kind: str, name: str) -> str:
    """A parameter of transformers' class under the name the hub's files have for it."""
    if kind == "qwen3_vl":
        return name  # model.visual.*, model.language_model.*
    return name.replace("model.visual.", "visual.").replace("model.language_model.", "model.")


def write_folder(folder: Path, kind: str, tied: bool, template: str) -> str:
    """A hub folder: bf16 shards with an index, configs, chat defaults, tokenizer files."""
    folder.mkdir()
    tokenizer = toy.make_tokenizer()
    special = tokenizer.convert_tokens_to_ids(toy.SPECIAL[0])
    if kind == "qwen3_vl":
        config = nested_config(len(tokenizer), special)
    else:
        sizes = (128, 160, 4, 4, 2), (4, 64, 96, 2), [1, 3]
        config = toy.hub_config(*sizes, [4, 6, 6], len(tokenizer), tied, "bfloat16", special)
    tokenizer.chat_template = None
    tokenizer.save_pretrained(folder)
    state = json.loads((folder / "tokenizer.json").read_text())["model"]
    merges = "\n".join(m if isinstance(m, str) else " ".join(m) for m in state["merges"])
    chat = CHAT | {
        "eos_token_id": [special + 2, special],
        "bos_token_id": special,
        "pad_token_id": special,
    }
    files = {
        "config.json": config, "generation_config.json": chat, "preprocessor_config.json": PREPROCESSORS[kind],
        "vocab.json": state["vocab"],
    }  # fmt: skip
    if template != "jinja":
        files["chat_template.json"] = {"chat_template": toy.CHAT_TEMPLATE}
    for name, content in files.items():
        (folder / name).write_text(json.dumps(content, indent=2) + "\n")
    (folder / "merges.txt").write_text(f"#version: 0.2\n{merges}\n")
    if template != "json":
        (folder / "chat_template.jinja").write_text(toy.CHAT_TEMPLATE)
    model = AutoModelForImageTextToText.from_config(AutoConfig.from_pretrained(folder))
    for name, weight in sorted(
        model.named_parameters()
    ):  # large layers: at the usual 0.02 a model repeats its input
        if weight.ndim > 1:
            std = (
                0.15
                if "embed_tokens" in name or "lm_head" in name
                else 0.1
                if "visual" in name
                else 0.2
            )
            torch.nn.init.normal_(weight, std=std, generator=seeded(name))
    weights = {
        hub_name(kind, name): w.detach().to(torch.bfloat16) for name, w in model.named_parameters()
    }
    names, shards, index = sorted(weights), 2, {}
    for i in range(shards):
        file = f"model-{i + 1:05d}-of-{shards:05d}.safetensors"
        part = {name: weights[name].contiguous() for name in names[i::shards]}
        save_file(part, folder / file, metadata={"format": "pt"})
        index |= dict.fromkeys(part, file)
    size = sum(2 * w.numel() for w in weights.values())
    text = json.dumps(
        {"metadata": {"total_size": size}, "weight_map": dict(sorted(index.items()))}, indent=2
    )
    (folder / "model.safetensors.index.json").write_text(text)
    return str(folder)


@pytest.fixture(scope="module")
def qwen3(tmp_path_factory):
    return write_folder(
        tmp_path_factory.mktemp("hub") / "Qwen3-VL-4B-Instruct", "qwen3_vl", True, "json"
    )


@pytest.fixture()
def policy(qwen3):
    return Policy.load(qwen3, Encoder(qwen3, 4096, 200_704, "Box it."))


@pytest.fixture()
def prompts(policy):
    return [policy.encoder.encode(example, index) for index, example in enumerate(examples())]


@pytest.mark.parametrize(
    "kind, tied, template",
    [
        ("qwen2_5_vl", True, "json"),
        ("qwen2_5_vl", False, "jinja"),
        ("qwen2_5_vl", True, "both"),
        ("qwen3_vl", True, "json"),
    ],
)
def test_a_hub_folder_trains_and_exports(run, tmp_path, monkeypatch, kind, tied, template):  # noqa: F811
    source = write_folder(tmp_path / "hub", kind, tied, template)
    loaded = AutoModelForImageTextToText.from_pretrained(source)  # every weight under its name
    shards = [load_file(file) for file in sorted(Path(source).glob("*.safetensors"))]
    for name, weight in loaded.named_parameters():
        assert any(
            torch.equal(s[hub_name(kind, name)], weight)
            for s in shards
            if hub_name(kind, name) in s
        ), name
    trained = {}

    def export(self, real=train.Run.export):
        real(self)
        trained["policy"] = self.policy
        with torch.no_grad():
            prompt = self.policy.encoder.encode(
                Example("<image>How many red dots are there?", "1", [random_image(112, 96)])
            )
            trained["group"] = generate(self.policy, [prompt], 2, max_new_tokens=5)[0]
            trained["log_probs"] = self.policy.log_probs([trained["group"]])

    monkeypatch.setattr(train.Run, "export", export)
    flags = [
        "--model",
        source,
        "--steps",
        "1",
        "--eval_every",
        "0",
        "--save_every",
        "0",
        "--algo",
        "papo_g",
    ]
    out = run("run", *flags)
    model_folder = out / "model"
    for name in checkpoint.COPIED_FILES:
        assert (model_folder / name).exists() == (Path(source) / name).exists(), name
        if (model_folder / name).exists():
            assert (model_folder / name).read_bytes() == (Path(source) / name).read_bytes(), name
    stored = {name for file in model_folder.glob("*.safetensors") for name in load_file(file)}
    assert ("lm_head.weight" in stored) == (not tied)
    assert stored == {name for shard in shards for name in shard}  # the hub's own names
    exported = AutoModelForImageTextToText.from_pretrained(model_folder)
    assert exported.dtype == torch.float32
    assert (exported.lm_head.weight is exported.model.language_model.embed_tokens.weight) == tied
    same = trained["policy"].model.state_dict()
    assert all(
        torch.equal(w, same[name].full_tensor()) for name, w in exported.state_dict().items()
    )
    assert any(
        not torch.equal(w.float(), v)
        for w, v in zip(loaded.parameters(), exported.parameters(), strict=True)
    )
    again = Policy.load(str(model_folder), Encoder(str(model_folder), 3136, 200_704))
    with torch.no_grad():
        assert torch.equal(again.log_probs([trained["group"]]), trained["log_probs"])
    second = run("again", *flags, "--model", str(model_folder))  # and as --model
    assert lines(second)[0]["groups_kept"] >= 0 and (second / "model" / "config.json").exists()


def test_chat_defaults_bias_no_rollout(policy, prompts):
    """generation_config's repetition penalty and near-zero temperature stay out: samples differ, log-probs agree."""
    [group] = generate(policy, prompts[:1], 4, max_new_tokens=8, key=(0, 0))
    assert len({tuple(row.tolist()) for row in group.tokens}) > 1
    with torch.no_grad():
        torch.testing.assert_close(
            policy.log_probs([group]), pad_and_cat([group], "sample_log_probs"), atol=1e-4, rtol=0
        )


def test_qwen3_greedy_equals_stock_generate(policy, prompts):
    groups = generate(policy, prompts, 2, max_new_tokens=16, temperature=0, rollout_batch=8)
    assert len(pad_and_cat(groups, "tokens").unique()) > 12  # no mere repetition
    for prompt, group in zip(prompts, groups, strict=True):
        expected = stock_greedy(policy, prompt, 16)
        for tokens, mask in zip(group.tokens, group.response_mask, strict=True):
            assert tokens[mask].tolist() == expected.tolist()


@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("chosen", [[0], [1], [2], [0, 1, 2, 3]])
def test_qwen3_shared_prompt_row_equals_padded_batch(policy, prompts, chosen, checkpointing):
    """Log-probs and gradients with features added to the first layers: one image, two, none, several groups a row."""
    groups = generate(policy, prompts, 3, max_new_tokens=12, rollout_batch=5)
    for g, group in enumerate(groups):
        lengths = torch.tensor([12, 1 + g, 7 - g])
        group.response_mask &= torch.arange(group.tokens.shape[1])[None] < lengths[:, None]
    groups = [groups[i] for i in chosen]
    policy.temperature = 0.7
    if checkpointing:
        policy.model.gradient_checkpointing_enable({"use_reentrant": False})
    policy.model.train()
    row = policy.log_probs(groups)
    weights = torch.randn(row.shape, generator=seeded("weights"))
    (row * weights).sum().backward()
    fast = gradients(policy.model)
    policy.model.zero_grad()
    plain = torch.cat([plain_log_probs(policy, g) for g in groups])
    torch.testing.assert_close(row, plain, atol=2e-5, rtol=2e-5)
    assert plain[pad_and_cat(groups, "response_mask")].std() > 0.3  # the model has opinions
    (plain * weights).sum().backward()
    slow = gradients(policy.model)
    assert (fast - slow).norm() < 1e-5 * slow.norm()


def test_qwen3_pictures_matter_in_every_layer(policy, prompts):
    """The added features are not left out: without them the same row says something else."""
    [group] = generate(policy, prompts[:1], 2, max_new_tokens=6)
    with torch.no_grad():
        before = policy.log_probs([group])
        for merger in policy.model.model.visual.deepstack_merger_list:
            merger.linear_fc2.weight.mul_(5.0)
        assert not torch.allclose(before, policy.log_probs([group]), atol=1e-4)


@pytest.mark.parametrize("strategy", ["random", "noise", "semantic"])
def test_qwen3_masks_16_pixel_patches(policy, strategy):
    encoder = policy.encoder
    prompt = encoder.encode(
        Example("<image><image>?", "1", [random_image(128, 96), random_image(64, 96, 1)])
    )
    assert prompt.image_grid_thw.tolist() == [
        [1, 6, 8],
        [1, 6, 4],
    ] and encoder.black_patch.unique().tolist() == [-1.0]
    algo = replace(preset("papo_g"), mask_strategy=strategy, mask_ratio=0.5)
    masked, hit = mask_prompt(prompt, algo, encoder, seeded(0), toy.saliency)
    assert (
        masked.shape == prompt.pixel_values.shape == (72, 3 * 2 * 16 * 16)
        and 20 < int(hit.sum()) < 52
    )
    assert torch.equal(masked[~hit], prompt.pixel_values[~hit])
    if strategy != "noise":
        black = encoder.images(images=[Image.new("RGB", (64, 64))], return_tensors="pt")[
            "pixel_values"
        ]
        torch.testing.assert_close(masked[hit], black[:1].expand(int(hit.sum()), -1))


def test_qwen3_update(policy, prompts):
    """prepare and update with masks, text-only rows among them: everything finite, something learned."""
    groups = generate(policy, prompts, 3, max_new_tokens=8)
    for group in groups:
        group.advantages = torch.tensor([1.0, -0.5, -0.5])
    algo, before = preset("papo_d"), [p.detach().clone() for p in policy.model.parameters()]
    policy.tokens_per_forward = 200
    batches = mini_batches(groups, 2)
    metrics = prepare(policy, None, batches, algo, key=(0, 0))
    optimizer = torch.optim.AdamW(policy.model.parameters(), lr=1e-3)
    metrics |= update(policy, optimizer, batches, algo)
    assert (
        0.4 < metrics["mask_ratio"] < 0.8
        and metrics["skipped_updates"] == 0
        and metrics["kl_prcp"] > 0
    )
    assert all(value == value for value in metrics.values())
    assert any(
        not torch.equal(a, b) for a, b in zip(before, policy.model.parameters(), strict=True)
    )
