r"""How fast it is: rollouts, training forwards, memory of log-probs, PAPO's extra cost, data, growth with sizes.

Beside the pipeline: nothing imports it. Each comparison alternates this code and the plain Hugging Face way in one
process, on the same random weights, pictures and response lengths; a ratio is the median over the repeats, with the
lowest and the highest. Weights are random and never stop by themselves, so lengths come from a recorded draw
(geometric, seed 0), forced on both sides.

    python bench.py                                             the table, a tiny model on a CPU, within 5 minutes
    python bench.py --only rollouts forwards --repeats 5        parts of it
    python bench.py --device cuda --model random:qwen2.5-vl-3b  one papo_g step at the paper's sizes (docs/gpu.md)
"""

from __future__ import annotations

import argparse
import copy
import io
import json
import math
import re
import resource
import subprocess
import sys
import tempfile
import time
from functools import partial
from pathlib import Path
from statistics import median

import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor
from transformers import (
    LogitsProcessor,
    LogitsProcessorList,
    Qwen2_5_VLConfig,
    Qwen2_5_VLForConditionalGeneration,
)

from losses import group_advantages
from papo import prepare, preset, update
from rollout import generate
from support import packing, toy
from support.batch import Example, Group, Prompt, empty_group, seeded
from support.data import Rows, Stream
from support.qwen_vl import Encoder, Policy

TINY = (
    (128, 384, 4, 4, 2),
    (2, 64, 128, 2),
    [1],
    [4, 6, 6],
)  # text, vision, full-attention blocks, mrope: the toy's


MIB = 2**20


def make_policy(name: str, folder: str, device="cpu", seed=0) -> Policy:
    """Random fp32 weights made on the device: "tiny", or a size of toy.random_config. The encoder's files are written.

    The tokenizer is the toy's, and the special ids are moved to where it has them; the vocabulary keeps its full size.
    """
    tokenizer = toy.make_tokenizer()
    special = tokenizer.convert_tokens_to_ids(toy.SPECIAL[0])
    fields = toy.hub_config(*TINY, len(tokenizer), True, "float32", special)
    config = Qwen2_5_VLConfig(**fields) if name == "tiny" else toy.random_config(name)
    for key in fields:
        if key.endswith("_token_id"):
            setattr(config, key, fields[key])
    if not (Path(folder) / "config.json").exists():
        config.save_pretrained(folder)
        tokenizer.save_pretrained(folder)
        (Path(folder) / "preprocessor_config.json").write_text(json.dumps(toy.PREPROCESSOR))
    encoder = Encoder(folder, 3136, 10_000_000, "Box it.")
    torch.manual_seed(seed)
    with torch.device(device):
        model = Qwen2_5_VLForConditionalGeneration(config)
    return Policy(model, encoder)


def prompt_of(encoder: Encoder, tokens: int, index: int) -> Prompt:
    """A prompt of about `tokens` tokens, most of them of one noise picture; a few tokens' difference by index."""
    question = "<image>How many red dots are there?" + " red" * (index % 5)
    patches = max(tokens - encoder.prompt_length(question, [(28, 28)]), 4)
    height = math.isqrt(patches)
    shape = (28 * height, 28 * (patches // height), 3)
    pixels = torch.randint(0, 256, shape, generator=seeded("picture", index), dtype=torch.uint8)
    return encoder.encode(Example(question, "1", [Image.fromarray(pixels.numpy())]), index)


def draw_lengths(n: int, mean: float, longest: int, seed: int = 0) -> Tensor:
    """The recorded draw: n geometric lengths in 1..longest; the cut lowers the mean a little."""
    uniforms = 1 - torch.rand(n, generator=seeded("lengths", seed), dtype=torch.float64)
    return (uniforms.log() / math.log(1 - 1 / mean)).ceil().long().clamp(1, longest)


def random_group(policy: Policy, prompt: Prompt, lengths: Tensor) -> Group:
    """Responses of the given lengths [G], of random tokens."""
    mask = torch.arange(int(lengths.max())) < lengths[:, None]
    tokens = torch.randint(20, 300, mask.shape, generator=seeded("tokens", prompt.index))
    zeros = torch.zeros(mask.shape)
    return Group(prompt, tokens, mask, zeros[:, 0].bool(), zeros, [""] * len(mask))


class ForcedLengths(LogitsProcessor):
    """Response i ends with its lengths[i]-th token, not before."""

    def __init__(self, lengths: Tensor, prompt_width: int, ends: list[int]):
        self.lengths, self.width, self.ends = lengths, prompt_width, ends

    def __call__(self, input_ids, scores):
        scores[:, self.ends] = float("-inf")
        scores[input_ids.shape[1] - self.width + 1 >= self.lengths, self.ends[0]] = float("inf")
        return scores.clamp(max=1e4)


def stock_generate(policy: Policy, prompts: list[Prompt], lengths: Tensor) -> Tensor:
    """Hugging Face's generate with num_return_sequences, left-padded; lengths[n_prompts, G]."""
    width = max(map(len, prompts))
    pad = [(width - len(p), 0) for p in prompts]
    ids = torch.stack(
        [F.pad(p.input_ids, n, value=policy.pad_id) for p, n in zip(prompts, pad, strict=True)]
    )
    mask = torch.stack(
        [F.pad(torch.ones_like(p.input_ids), n) for p, n in zip(prompts, pad, strict=True)]
    )
    types = torch.stack(
        [F.pad(p.is_image_token.long(), n) for p, n in zip(prompts, pad, strict=True)]
    )
    return policy.model.generate(
        input_ids=ids, attention_mask=mask, mm_token_type_ids=types, max_new_tokens=int(lengths.max()),
        pixel_values=torch.cat([p.pixel_values for p in prompts]), do_sample=True, top_k=0, top_p=1.0,
        image_grid_thw=torch.cat([p.image_grid_thw for p in prompts]), num_return_sequences=lengths.shape[1],
        logits_processor=LogitsProcessorList([ForcedLengths(lengths.flatten(), width, policy.eos_ids)]),
    )  # fmt: skip


def plain_log_probs(policy: Policy, group: Group) -> Tensor:
    """Ordinary right-padded rows, the image repeated for each: [G, T]."""
    prompt, n, device = group.prompt, len(group.tokens), policy.device
    ids = torch.cat([prompt.input_ids.expand(n, -1), group.tokens], 1)
    mask = torch.cat([torch.ones(n, len(prompt), dtype=torch.long), group.response_mask.long()], 1)
    types = F.pad(prompt.is_image_token.long(), (0, group.tokens.shape[1])).expand(n, -1)
    logits = policy.model(
        input_ids=ids.to(device), attention_mask=mask.to(device), mm_token_type_ids=types.to(device), use_cache=False,
        pixel_values=prompt.pixel_values.repeat(n, 1).to(device),
        image_grid_thw=prompt.image_grid_thw.repeat(n, 1).to(device),
    ).logits[:, len(prompt) - 1 : -1].float()  # fmt: skip
    log_probs = -F.cross_entropy(
        logits.flatten(0, 1), group.tokens.to(device).flatten(), reduction="none"
    )
    return log_probs.view(n, -1) * group.response_mask.to(device)


def seconds(call) -> float:
    start = time.perf_counter()
    call()
    return time.perf_counter() - start


def spread(ratios: list[float]) -> str:
    return f"{median(ratios):.2f} [{min(ratios):.2f}, {max(ratios):.2f}] over {len(ratios)}"


def versus(
    what: str, repeats: int, ours, plain, unit: str = "s", amount: float | None = None
) -> None:
    """One line: this code and the plain way, in turns. amount: of what the unit counts a second, else seconds."""
    times = [(seconds(ours), seconds(plain)) for _ in range(repeats)]
    a, b = (median(t[i] for t in times) for i in range(2))
    a, b = (amount / a, amount / b) if amount else (a, b)
    line(
        what, f"{a:.3g} {unit}", f"{b:.3g} {unit}", spread([plain / ours for ours, plain in times])
    )


def line(what: str, *cells: str) -> None:
    print(f"| {what:<64} | " + " | ".join(f"{c:<15}" for c in cells) + " |", flush=True)


def policies(folder: str) -> tuple[Policy, Policy]:
    """The tiny policy, and the same weights as transformers runs them by itself."""
    ours, plain = make_policy("tiny", folder), make_policy("tiny", folder)
    plain.model.set_attn_implementation({"text_config": "sdpa", "vision_config": "sdpa"})
    return ours, plain


def rollouts(
    folder: str,
    repeats: int,
    sizes=(50, 400, 1200),
    n_prompts=16,
    group_size=8,
    mean=50,
    longest=256,
):
    ours, plain = policies(folder)
    lengths = draw_lengths(n_prompts * group_size, mean, longest).view(n_prompts, group_size)
    for tokens in sizes:
        prompts = [prompt_of(ours.encoder, tokens, i) for i in range(n_prompts)]
        sampling = dict(max_new_tokens=longest, lengths=lengths, rollout_batch=lengths.numel())
        versus(
            f"rollout, {tokens}-token prompts, {n_prompts} x {group_size}, mean length {lengths.float().mean():.0f}",
            min(repeats, 2) if tokens > 800 else repeats,
            lambda p=prompts, s=sampling: generate(ours, p, group_size, **s),
            lambda p=prompts: stock_generate(plain, p, lengths),
            "tokens/s", int(lengths.sum()),
        )  # fmt: skip


def forwards(folder: str, repeats: int, sizes=(64, 400, 1200), group_size=5):
    ours, plain = policies(folder)
    lengths = torch.randint(30, 61, (group_size,), generator=seeded("group lengths"))
    for tokens in sizes:
        group = random_group(ours, prompt_of(ours.encoder, tokens, 0), lengths)
        versus(
            f"forward + backward, {tokens}-token prompt, {group_size} responses of 30-60",
            repeats if tokens > 800 else 3 * repeats,
            lambda g=group: ours.log_probs([g]).sum().backward(),
            lambda g=group: plain_log_probs(plain, g).sum().backward(),
        )


def memory(folder: str, repeats: int):
    """Peak memory of log-probs and their gradient over parameters and gradients, each in a process of its own."""
    for kind in ("tied", "untied"):
        command = [sys.executable, "-m", "experiments.bench", "--only", f"memory-{kind}"]
        peak = (
            subprocess.run(command, capture_output=True, text=True, check=True)
            .stdout.strip()
            .splitlines()[-1]
        )
        line(
            f"peak of 2,000 log-probs, vocabulary 151,936, hidden 256, {kind}",
            f"{peak} MiB",
            "",
            "target < 700",
        )


def measure_memory(tied: bool) -> float:
    """MiB. The baseline has every gradient written once, so the peak is activations, logits and gradients in flight."""
    config = toy.hub_config(
        (256, 512, 1, 4, 2), *TINY[1:3], [8, 12, 12], 151936, tied, "float32", 300
    )
    model = Qwen2_5_VLForConditionalGeneration(Qwen2_5_VLConfig(**config)).train()
    assert tied == (model.lm_head.weight is model.get_input_embeddings().weight)
    for parameter in model.parameters():
        parameter.grad = torch.ones_like(parameter)
    model.set_attn_implementation(packing.ATTENTION)
    prompt = empty_group().prompt
    groups = [random_group(None, prompt, torch.full((8,), 50)) for _ in range(5)]
    row = packing.build_row(groups, False, torch.zeros(1176), 2, "cpu")
    before = peak_of_process()
    packing.row_log_probs(model, row, 1.0).sum().backward()
    return peak_of_process() - before


def peak_of_process() -> float:
    """MiB. Linux's VmHWM, because ru_maxrss begins at the peak of the process that started this one."""
    status = Path("/proc/self/status")
    found = re.search(r"VmHWM:\s+(\d+)", status.read_text()) if status.exists() else None
    return (
        int(found[1]) / 1024 if found else resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
    )


def extra_cost(folder: str, repeats: int):
    """A step of papo_g against one of grpo on the same toy rollouts: the rollout, the passes before, the update."""
    policy = make_policy("tiny", folder)
    prompts = [policy.encoder.encode(toy.example("train", i), i) for i in range(16)]
    reference, sampling = copy.deepcopy(policy), dict(max_new_tokens=40, rollout_batch=320)
    optimizer = torch.optim.SGD(policy.model.parameters(), lr=0.0)
    groups = generate(policy, prompts, 8, **sampling)
    for group in groups:
        group.advantages = torch.randn(8)

    def step(name: str):
        algo = preset(name)
        for group in groups:
            group.old_log_probs = group.masked_log_probs = None
        generate(policy, prompts, 8, **sampling)
        prepare(policy, reference, groups, algo, 16_384, updates=1, key=(0, 0))
        update(policy, optimizer, groups, algo, mini_batch=16, budget=16_384)

    step("papo_g")
    versus(
        "toy step: grpo (first column), papo_g",
        2 * repeats,
        lambda: step("grpo"),
        lambda: step("papo_g"),
    )


def data_ahead(folder: str, repeats: int, tokens=1200, per_round=8):
    """How long a step waits for its prompts, decoded from JPEG and encoded in threads while the last one trained."""
    policy = make_policy("tiny", folder)
    prompt, file = prompt_of(policy.encoder, tokens, 0), io.BytesIO()
    prompt.example.images[0].save(file, "JPEG")

    def row(i: int) -> Example:
        return Example(
            prompt.example.question, "1", [Image.open(io.BytesIO(file.getvalue())).convert("RGB")]
        )

    alone = median(seconds(lambda: policy.encoder.encode(row(0))) for _ in range(5))
    stream = Stream(Rows("jpeg", row, range(64)), policy.encoder.encode, per_round)
    lengths, waits, works = torch.full((5,), 50), [], []
    for _ in range(repeats + 1):
        batch = []
        waits.append(seconds(lambda batch=batch: batch.extend(next(stream))))
        groups = [random_group(policy, p, lengths) for _, p in batch]
        works.append(seconds(lambda g=groups: [policy.log_probs([x]).sum().backward() for x in g]))
    stream.close()
    line(
        f"one {tokens}-token prompt decoded and encoded, one thread",
        f"{1000 * alone:.0f} ms",
        "",
        "",
    )
    line(f"wait for {per_round} prompts, first step", f"{1000 * waits[0]:.0f} ms", "", "")
    cells = f"{1000 * max(waits[1:]):.1f} ms", f"{median(works):.1f} s step", "longest"
    line(f"wait for {per_round} prompts, later steps", *cells)


def growth(folder: str, repeats: int):
    """Rollout and update of this code alone as one size grows, the others staying at 200 tokens, 8 prompts, G = 8."""
    policy, base = (
        make_policy("tiny", folder),
        {"prompt tokens": 200, "group size": 8, "prompts": 8},
    )
    optimizer = torch.optim.SGD(policy.model.parameters(), lr=0.0)
    for name, values in {
        "prompt tokens": (50, 200, 800),
        "group size": (4, 8, 16),
        "prompts": (4, 8, 16),
    }.items():
        for value in values:
            size = base | {name: value}
            n, g = size["prompts"], size["group size"]
            prompts = [prompt_of(policy.encoder, size["prompt tokens"], i) for i in range(n)]
            lengths = draw_lengths(n * g, 30, 100).view(n, g)
            sampling = dict(max_new_tokens=100, rollout_batch=n * g, lengths=lengths)
            start = time.perf_counter()
            groups = generate(policy, prompts, g, **sampling)
            rolled = time.perf_counter() - start
            for group in groups:
                group.advantages = torch.randn(g)
            algo = preset("papo_g_no_kl_ref")
            prepare(policy, None, groups, algo, 16_384, updates=1, key=(0, 0))
            updated = seconds(partial(update, policy, optimizer, groups, algo, n, 16_384))
            line(
                f"growth: {name} {value}", f"rollout {rolled:.2f} s", f"update {updated:.2f} s", ""
            )


def matrix_rate(device, dtype, n: int) -> float:
    """FLOP/s of an n x n x n product, the best of ten."""
    a = torch.randn(n, n, device=device, dtype=dtype)
    times = [Clock(device)(lambda: a @ a) for _ in range(10)]
    return 2 * n**3 / min(times)


class Clock:
    """clock(call) -> seconds, the device's work included; `peak` is the call's highest memory in GiB (CUDA)."""

    def __init__(self, device):
        self.cuda, self.peak = torch.device(device).type == "cuda", 0.0

    def __call__(self, call) -> float:
        if self.cuda:
            torch.cuda.synchronize()
            torch.cuda.reset_peak_memory_stats()
        start = time.perf_counter()
        call()
        if self.cuda:
            torch.cuda.synchronize()
            self.peak = torch.cuda.max_memory_allocated() / 2**30
        return time.perf_counter() - start


def forward_flops(config, groups: list[Group], linears: dict[str, int]) -> float:
    """Model FLOPs of one forward: every prompt token and picture once, every response token, no recomputation.

    2 a weight and token in linear layers (the head: response tokens only), 4 d a query-key pair in attention.
    """
    text, vision, total = config.get_text_config(), config.vision_config, 0.0
    for group in groups:
        p, rows, patches = (
            len(group.prompt),
            group.response_mask.sum(1).tolist(),
            len(group.prompt.pixel_values),
        )
        pairs = p * p / 2 + sum(r * p + r * r / 2 for r in rows)
        full, window = (
            len(vision.fullatt_block_indexes),
            (vision.window_size // vision.patch_size) ** 2,
        )
        seen = patches * (full * patches + (vision.depth - full) * min(window, patches))
        total += (
            2 * linears["text"] * (p + sum(rows))
            + 4 * text.hidden_size * text.num_hidden_layers * pairs
        )
        total += (
            2 * linears["head"] * sum(rows)
            + 2 * linears["vision"] * patches
            + 4 * vision.hidden_size * seen
        )
    return total


def count_linears(model) -> dict[str, int]:
    """Weights of linear layers (and the patch convolution), a number a token. The merger sees every fourth patch."""
    counts = {"text": 0, "vision": 0, "head": model.lm_head.weight.numel()}
    for name, module in model.named_modules():
        if isinstance(module, (torch.nn.Linear, torch.nn.Conv3d)) and "lm_head" not in name:
            part = "vision" if "visual" in name else "text"
            counts[part] += module.weight.numel() // (4 if "merger" in name else 1)
    return counts


def one_step(args, folder: str) -> None:
    """One papo_g (and one grpo) step as train.py does it, phase by phase: seconds, peak memory, tokens/s, MFU."""
    from support.distributed import init_distributed, shard

    _, world, device = init_distributed()
    half = torch.bfloat16 if args.device == "cuda" else torch.float32
    policy = make_policy(args.model.removeprefix("random:"), folder, device)
    linears = count_linears(policy.model)
    reference = Policy(copy.deepcopy(policy.model), policy.encoder)
    for each in (policy, reference):
        if args.device == "cuda":
            each.model.gradient_checkpointing_enable({"use_reentrant": False})
        mesh = torch.distributed.device_mesh.init_device_mesh(device.type, (world,))
        shard(each.model, mesh, half)
    rate = matrix_rate(device, half, 8192 if args.device == "cuda" else 512)
    kernel = packing.varlen_kernel(device.type, half)
    path = (
        "SDPA"
        if kernel is None
        else "flash-attn"
        if packing.is_flash_attn_2_available()
        else "torch varlen"
    )
    line("attention; measured matrix rate", path, f"{rate / 1e12:.3g} TFLOP/s", torch.__version__)
    prompts = [prompt_of(policy.encoder, args.prompt_tokens, i) for i in range(args.prompts)]
    lengths = draw_lengths(args.prompts * args.group_size, args.mean, args.max_new_tokens).view(
        args.prompts, -1
    )
    clock, tokens, groups, algo, totals = (
        Clock(device),
        int(lengths.sum()),
        [],
        preset(args.algo),
        {},
    )
    optimizer = torch.optim.AdamW(policy.model.parameters(), lr=1e-6)
    sampling = dict(
        max_new_tokens=args.max_new_tokens,
        rollout_batch=args.rollout_batch,
        top_p=0.99,
        lengths=lengths,
    )

    def report(what: str, took: float, last: str) -> None:
        line(what, f"{took:.2f} s", f"{clock.peak:.1f} GiB", last)

    rolled = clock(
        lambda: groups.extend(generate(policy, prompts, args.group_size, progress=True, **sampling))
    )
    report(f"rollout, {args.prompts} x {args.group_size}, mean {lengths.float().mean():.0f}", rolled,
           f"{tokens / rolled:.0f} tokens/s")  # fmt: skip
    rewards = torch.rand(args.prompts * args.group_size, generator=seeded("rewards"))
    advantages = group_advantages(rewards, args.group_size).split(args.group_size)
    for group, own in zip(groups, advantages, strict=True):
        group.advantages = own.float()
    flops = forward_flops(policy.model.config, groups, linears)
    updates = math.ceil(len(groups) / args.mini_batch)
    warm = groups[:1]  # the first call of every kernel, untimed
    prepare(policy, reference, warm, algo, args.tokens_per_forward, 2, (0, 0))
    update(policy, optimizer, warm, algo, args.mini_batch, args.tokens_per_forward)
    for one in ("grpo", args.algo):
        algo = preset(one)
        passes = (updates > 1) + bool(algo.kl_ref_coef) + algo.needs_masked_view
        before = clock(
            partial(
                prepare, policy, reference, groups, algo, args.tokens_per_forward, updates, (0, 0)
            )
        )
        report(
            f"{one}: {passes} passes of log-probs",
            before,
            f"MFU {passes * flops / before / rate:.1%}",
        )
        trained = clock(
            partial(
                update, policy, optimizer, groups, algo, args.mini_batch, args.tokens_per_forward
            )
        )
        report(f"{one}: {updates} updates", trained, f"MFU {3 * flops / trained / rate:.1%}")
        totals[one] = rolled + before + trained
        line(f"{one}: the step", f"{totals[one]:.1f} s", "", "")
    line(
        f"{args.algo} over grpo at equal rollouts",
        f"{totals[args.algo] / totals['grpo'] - 1:+.1%}",
        "",
        "",
    )
    torch.distributed.destroy_process_group()


def numerics(args, folder: str) -> None:
    """Log-probs in half precision, packed and plain, against packed fp32: ||diff|| / ||ref|| and the worst token."""
    half = torch.bfloat16 if args.device == "cuda" else torch.float32
    policy = make_policy(args.model.removeprefix("random:"), folder, args.device)
    prompts = [prompt_of(policy.encoder, args.prompt_tokens, i) for i in range(2)]
    lengths = draw_lengths(2 * args.group_size, args.mean, args.max_new_tokens).view(2, -1)
    groups = [random_group(policy, p, n) for p, n in zip(prompts, lengths, strict=True)]
    with torch.no_grad():
        exact = [policy.log_probs([g]) for g in groups]
        policy.model.to(half)
        packed = policy.log_probs(groups)
        policy.model.set_attn_implementation({"text_config": "sdpa", "vision_config": "sdpa"})
        plain = [plain_log_probs(policy, g) for g in groups]
    packed = [x[:, : e.shape[1]] for x, e in zip(packed.split(args.group_size), exact, strict=True)]
    for what, values in (("packed", packed), ("plain padded", plain)):
        diff = torch.cat([(a - b).flatten() for a, b in zip(values, exact, strict=True)])
        norm = diff.norm() / torch.cat([e.flatten() for e in exact]).norm()
        line(
            f"{what} {half} against packed fp32", f"{norm:.2e}", f"worst {diff.abs().max():.2e}", ""
        )


PARTS = {"rollouts": rollouts, "forwards": forwards, "memory": memory, "papo": extra_cost, "data": data_ahead,
         "growth": growth}  # fmt: skip


def main(argv=None) -> None:
    parser = argparse.ArgumentParser(formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    parts = [
        *PARTS,
        "memory-tied",
        "memory-untied",
    ]  # the last two: what `memory` starts, a process each
    parser.add_argument(
        "--only", nargs="+", default=list(PARTS), choices=parts, help="parts of the table"
    )
    parser.add_argument(
        "--repeats", type=int, default=3, help="of each comparison; at 1,200 tokens at most 2"
    )
    parser.add_argument("--device", default="cpu", choices=("cpu", "cuda"))
    sizes = ("random:qwen2.5-vl-3b", "random:qwen2.5-vl-7b", "random:tiny")
    parser.add_argument(
        "--model", default="", choices=sizes, help="measure one step of such a model"
    )
    parser.add_argument(
        "--numerics",
        action="store_true",
        help="with --model: log-probs in bf16, packed, plain, fp32",
    )
    parser.add_argument(
        "--profile",
        default="",
        help="with --model: write a table of the device's time to this file",
    )
    parser.add_argument("--algo", default="papo_g", help="of the step, compared with grpo")
    for name, value in dict(
        prompts=192, group_size=5, prompt_tokens=1200, mean=350, max_new_tokens=2048, rollout_batch=320, mini_batch=64,
        tokens_per_forward=16_384,
    ).items():  # fmt: skip
        parser.add_argument(f"--{name}", type=int, default=value, help="of the step with --model")
    args = parser.parse_args(argv)
    if args.only in (["memory-tied"], ["memory-untied"]):
        return print(round(measure_memory(args.only == ["memory-tied"])))
    if args.device == "cuda" and not args.model:
        parser.error(f"--device cuda: needs --model, one of {', '.join(sizes)}")
    if torch.cuda.is_available() != (args.device == "cuda") and args.model:
        parser.error(
            f"--device {args.device}: torch sees {'a' if args.device == 'cpu' else 'no'} CUDA device here"
        )
    with tempfile.TemporaryDirectory() as folder:
        if args.model:
            measure = numerics if args.numerics else one_step
            if not args.profile:
                return measure(args, folder)
            with torch.profiler.profile() as profile:
                measure(args, folder)
            order = "self_cuda_time_total" if args.device == "cuda" else "self_cpu_time_total"
            Path(args.profile).write_text(profile.key_averages().table(sort_by=order, row_limit=60))
            return
        start = time.perf_counter()
        print(
            f"torch {torch.__version__}, {torch.get_num_threads()} threads, {args.repeats} repeats"
        )
        line("what", "this code", "plain", "plain / this code")
        for name in args.only:
            PARTS[name](folder, args.repeats)
        line("all of it", f"{time.perf_counter() - start:.0f} s", "", "")


if __name__ == "__main__":
    main()
