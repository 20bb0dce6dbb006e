r"""Speed and memory: rollouts, training forwards, log-probs, PAPO's extra cost, data, growth.

Beside the pipeline: nothing imports this file. Each comparison runs this code and a baseline in
turns, in one process, on the same random weights, images and response lengths. The baseline is
stock Hugging Face: `generate` on left-padded prompts for rollouts; for training, one padded row per
response, each with its own copy of the image. A ratio is the median over the repeats, followed by
the lowest and the highest.

    python -m experiments.bench                            every part, a tiny model on a CPU
    python -m experiments.bench --only rollouts forwards   some parts

With --model, one step as train.py runs it is measured instead, phase by phase (docs/gpu.md):

    python -m experiments.bench --device cuda --model random:qwen2.5-vl-3b
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
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
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

from experiments import start_model
from losses import group_advantages
from papo import Algo, prepare, preset, update
from rollout import Sampling, generate
from support import packing, toy
from support.batch import Example, Group, Prompt, mini_batches, seeded
from support.data import Rows, encode_ahead, shuffled_rounds
from support.distributed import init_distributed, make_mesh, shard
from support.qwen_vl import Encoder, Policy

ALL = 10_000  # responses at a time: no chunks
ROOT = Path(__file__).resolve().parent.parent
SIZES = ("random:qwen2.5-vl-3b", "random:qwen2.5-vl-7b", "random:tiny")
STOCK_ATTENTION = {"text_config": "sdpa", "vision_config": "sdpa"}


MIB = 2**20
GIB = 2**30


# Models, prompts and responses


def make_policy(name: str, folder: str, device="cpu", seed: int = 0) -> Policy:
    """Random fp32 weights made on the device: "tiny", or a size of start_model.random_config.

    The tokenizer is the toy's, so the special tokens get the ids they have there; the vocabulary
    keeps its published size. The encoder's files are written to `folder`.
    """
    tokenizer = start_model.make_tokenizer()
    first_special = tokenizer.convert_tokens_to_ids(start_model.SPECIAL[0])
    fields = start_model.hub_config(
        *start_model.TINY,
        vocab_size=len(tokenizer),
        tied=True,
        dtype="float32",
        special=first_special,
    )
    config = Qwen2_5_VLConfig(**fields) if name == "tiny" else start_model.random_config(name)
    for key, value in fields.items():
        if key.endswith("_token_id"):
            setattr(config, key, value)
    if not (Path(folder) / "config.json").exists():
        config.save_pretrained(folder)
        tokenizer.save_pretrained(folder)
        (Path(folder) / "preprocessor_config.json").write_text(json.dumps(start_model.PREPROCESSOR))
    encoder = Encoder(folder, 3136, 10_000_000, "Box it.")
    torch.manual_seed(seed)
    with torch.device(device):
        model = Qwen2_5_VLForConditionalGeneration(config)
    return Policy(model, encoder)


def make_policies(folder: str) -> tuple[Policy, Policy]:
    """The tiny policy, and one of the same weights with stock attention."""
    ours, stock = make_policy("tiny", folder), make_policy("tiny", folder)
    stock.model.set_attn_implementation(STOCK_ATTENTION)
    return ours, stock


def noise_prompt(encoder: Encoder, tokens: int, index: int) -> Prompt:
    """A prompt of about `tokens` tokens, most of them from one noise image.

    The question varies a little with `index`, so that prompts of one size differ in length.
    """
    question = "<image>How many red dots are there?" + " red" * (index % 5)
    text_tokens = encoder.prompt_length(question, [(28, 28)])
    image_tokens = max(tokens - text_tokens, 4)
    rows = math.isqrt(image_tokens)
    shape = (28 * rows, 28 * (image_tokens // rows), 3)
    pixels = torch.randint(0, 256, shape, generator=seeded("image", index), dtype=torch.uint8)
    return encoder.encode(Example(question, "1", [Image.fromarray(pixels.numpy())]), index)


def noise_prompts(encoder: Encoder, tokens: int, count: int) -> list[Prompt]:
    return [noise_prompt(encoder, tokens, index) for index in range(count)]


def random_group(prompt: Prompt, lengths: Tensor) -> Group:
    """Responses of the given lengths [G], made of random tokens."""
    mask = torch.arange(int(lengths.max())) < lengths[:, None]  # [G, T]
    tokens = torch.randint(20, 300, mask.shape, generator=seeded("tokens", prompt.index))
    return Group(
        prompt,
        tokens,
        response_mask=mask,
        truncated=torch.zeros(len(mask), dtype=torch.bool),
        sample_log_probs=torch.zeros(mask.shape),
        responses=[""] * len(mask),
    )


@contextmanager
def random_stops(policy: Policy, mean: float) -> Iterator[None]:
    """Inside, every sampled token ends its response with probability 1 / mean.

    A forward hook on the head sets the end token's logit, so lengths are geometric and follow from
    the sampler's own seeded uniforms: the same call gives the same lengths. Training never meets
    the hook, because it reads the head's weight directly (support/packing.py).
    """
    end_token = policy.eos_ids[0]
    log_odds = -math.log(mean - 1)  # of p = 1 / mean

    def set_end_token(module, inputs, logits):
        logits = logits.float()  # bf16 would change the end token's probability by some percent
        for token in policy.eos_ids:  # a list as index would be copied to the device, with a wait
            logits[..., token].fill_(-torch.inf)
        logits[..., end_token] = logits.logsumexp(-1) + log_odds
        return logits

    handle = policy.model.lm_head.register_forward_hook(set_end_token)
    try:
        yield
    finally:
        handle.remove()


def response_lengths(groups: list[Group]) -> Tensor:
    """[number of groups, G]"""
    return torch.stack([group.response_mask.sum(1) for group in groups])


# The baseline


class ForcedLengths(LogitsProcessor):
    """Response i ends with its lengths[i]-th token, not before."""

    def __init__(self, lengths: Tensor, prompt_width: int, eos_ids: list[int]):
        self.lengths = lengths
        self.prompt_width = prompt_width
        self.eos_ids = eos_ids

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        next_length = input_ids.shape[1] - self.prompt_width + 1
        scores[:, self.eos_ids] = float("-inf")
        scores[next_length >= self.lengths, self.eos_ids[0]] = float("inf")
        return scores.clamp(max=1e4)


def stock_generate(policy: Policy, prompts: list[Prompt], lengths: Tensor) -> Tensor:
    """generate with num_return_sequences on left-padded prompts; lengths[n_prompts, G]."""
    width = max(map(len, prompts))

    def left_pad(rows: list[Tensor], value: int) -> Tensor:
        return torch.stack([F.pad(row, (width - len(row), 0), value=value) for row in rows])

    forced = ForcedLengths(lengths.flatten(), width, policy.eos_ids)
    return policy.model.generate(
        input_ids=left_pad([p.input_ids for p in prompts], policy.pad_id),
        attention_mask=left_pad([torch.ones_like(p.input_ids) for p in prompts], 0),
        mm_token_type_ids=left_pad([p.is_image_token.long() for p in prompts], 0),
        pixel_values=torch.cat([p.pixel_values for p in prompts]),
        image_grid_thw=torch.cat([p.image_grid_thw for p in prompts]),
        max_new_tokens=int(lengths.max()),
        num_return_sequences=lengths.shape[1],
        do_sample=True,
        top_k=0,
        top_p=1.0,
        logits_processor=LogitsProcessorList([forced]),
    )


def padded_log_probs(policy: Policy, group: Group) -> Tensor:
    """Log-probs [G, T] from ordinary right-padded rows, the image repeated for each response."""
    prompt, device, n = group.prompt, policy.device, len(group.tokens)
    prompt_mask = torch.ones(n, len(prompt), dtype=torch.long)
    token_types = F.pad(prompt.is_image_token.long(), (0, group.tokens.shape[1]))
    inputs = {
        "input_ids": torch.cat([prompt.input_ids.expand(n, -1), group.tokens], 1),
        "attention_mask": torch.cat([prompt_mask, group.response_mask.long()], 1),
        "mm_token_type_ids": token_types.expand(n, -1),
        "pixel_values": prompt.pixel_values.repeat(n, 1),
        "image_grid_thw": prompt.image_grid_thw.repeat(n, 1),
    }
    inputs = {name: value.to(device) for name, value in inputs.items()}
    logits = policy.model(**inputs, use_cache=False).logits[:, len(prompt) - 1 : -1].float()
    targets = group.tokens.to(device)
    log_probs = -F.cross_entropy(logits.flatten(0, 1), targets.flatten(), reduction="none")
    return log_probs.view(n, -1) * group.response_mask.to(device)


# Measuring and printing


class Clock:
    """clock(call) -> seconds, the device's work included.

    On CUDA, `peak` is the last call's highest memory in GiB.
    """

    def __init__(self, device):
        self.cuda = torch.device(device).type == "cuda"
        self.peak = 0.0

    def __call__(self, call: Callable) -> float:
        if self.cuda:
            torch.cuda.synchronize()
            torch.cuda.reset_peak_memory_stats()
        start = time.perf_counter()
        call()
        if self.cuda:
            torch.cuda.synchronize()
            self.peak = torch.cuda.max_memory_allocated() / GIB
        return time.perf_counter() - start


seconds = Clock("cpu")


def print_row(what: str, *cells: str) -> None:
    padded = [f"{cell:<15}" for cell in (*cells, "", "", "")[:3]]
    print(f"| {what:<64} | {' | '.join(padded)} |", flush=True)


def compare(
    what: str, repeats: int, ours: Callable, baseline: Callable, tokens: int | None = None
) -> None:
    """Run both in turns and print a row: seconds, or tokens per second where `tokens` is given."""
    times = [(seconds(ours), seconds(baseline)) for _ in range(repeats)]
    ratios = [slow / fast for fast, slow in times]
    cells = []
    for side in (0, 1):
        middle = median(pair[side] for pair in times)
        cells.append(f"{tokens / middle:.3g} tokens/s" if tokens else f"{middle:.3g} s")
    spread = f"[{min(ratios):.2f}, {max(ratios):.2f}] over {repeats}"
    print_row(what, *cells, f"{median(ratios):.2f} {spread}")


# The parts of the table


def rollouts(folder: str, repeats: int) -> None:
    """Sampling against stock generate, 16 prompts x 8 responses of mean length about 50."""
    ours, stock = make_policies(folder)
    n_prompts, group_size = 16, 8
    for tokens in (50, 400, 1200):
        prompts = noise_prompts(ours.encoder, tokens, n_prompts)
        sample = partial(
            generate, ours, prompts, group_size, Sampling(256, rollout_batch=ALL), key=(0, 0)
        )
        with random_stops(ours, mean=50):
            lengths = response_lengths(sample())  # also warms up
            compare(
                f"rollout, {tokens}-token prompts, {n_prompts} x {group_size}, "
                f"mean length {lengths.float().mean():.0f}",
                min(repeats, 2) if tokens > 800 else repeats,
                sample,
                partial(stock_generate, stock, prompts, lengths),
                tokens=int(lengths.sum()),
            )


def forwards(folder: str, repeats: int) -> None:
    """Log-probs and their gradient against padded rows, for one group."""
    ours, stock = make_policies(folder)
    group_size = 5
    lengths = torch.randint(30, 61, (group_size,), generator=seeded("group lengths"))
    for tokens in (64, 400, 1200):
        group = random_group(noise_prompt(ours.encoder, tokens, 0), lengths)
        compare(
            f"forward + backward, {tokens}-token prompt, {group_size} responses of 30-60",
            repeats if tokens > 800 else 3 * repeats,
            lambda group=group: ours.log_probs([group]).sum().backward(),
            lambda group=group: padded_log_probs(stock, group).sum().backward(),
        )


def memory(folder: str, repeats: int) -> None:
    """Peak memory of log-probs and their gradient, each measurement in a process of its own."""
    for kind in ("tied", "untied"):
        command = [sys.executable, "-m", "experiments.bench", "--only", f"memory-{kind}"]
        done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True, cwd=ROOT)
        what = f"peak of 2,000 log-probs, vocabulary 151,936, hidden 256, {kind}"
        print_row(what, f"{done.stdout.split()[-1]} MiB", "", "target < 700")


def measure_memory(tied: bool) -> float:
    """MiB that 2,000 log-probs and their gradient add to the process.

    Every gradient is written once beforehand, so that the peak holds activations, logits and
    gradients in flight, not parameters and their gradients.
    """
    _, vision, full_attention, _ = start_model.TINY
    config = start_model.hub_config(
        (256, 512, 1, 4, 2),
        vision,
        full_attention,
        mrope=[8, 12, 12],
        vocab_size=151936,
        tied=tied,
        dtype="float32",
        special=300,
    )
    model = Qwen2_5_VLForConditionalGeneration(Qwen2_5_VLConfig(**config)).train()
    assert tied == (model.lm_head.weight is model.get_input_embeddings().weight)
    for parameter in model.parameters():
        parameter.grad = torch.ones_like(parameter)
    model.set_attn_implementation(packing.ATTENTION)
    prompt = packing.empty_group().prompt
    groups = [random_group(prompt, torch.full((8,), 50)) for _ in range(5)]
    row = packing.build_row(groups, "", torch.zeros(1176), 2, "cpu")
    before = process_peak()
    packing.row_log_probs(model, row, 1.0).sum().backward()
    return process_peak() - before


def process_peak() -> float:
    """MiB. Linux's VmHWM; ru_maxrss would start at the peak of the parent process."""
    status = Path("/proc/self/status")
    if status.exists():
        found = re.search(r"VmHWM:\s+(\d+) kB", status.read_text())
        if found:
            return int(found[1]) / 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


def train_step(policy, reference, optimizer, groups: list[Group], algo: Algo) -> None:
    """Everything a step does after its rollout, with a single update."""
    for group in groups:
        group.old_log_probs = None
        group.view_log_probs.clear()
    prepare(policy, reference, [groups], algo, key=(0, 0))
    update(policy, optimizer, [groups], algo)


def extra_cost(folder: str, repeats: int) -> None:
    """A step of papo_g against one of grpo on the same toy rollouts, sampling included."""
    policy = make_policy("tiny", folder)
    reference = copy.deepcopy(policy)
    optimizer = torch.optim.SGD(policy.model.parameters(), lr=0.0)
    prompts = [policy.encoder.encode(toy.example("train", i), i) for i in range(16)]
    sample = partial(generate, policy, prompts, 8, Sampling(40), key=(0, 0))
    groups = sample()
    for group in groups:
        group.advantages = torch.randn(8)

    def step(name: str) -> None:
        sample()
        train_step(policy, reference, optimizer, groups, preset(name))

    step("papo_g")  # warms up
    compare(
        "toy step: grpo (first column), papo_g",
        2 * repeats,
        partial(step, "grpo"),
        partial(step, "papo_g"),
    )


def data_ahead(folder: str, repeats: int) -> None:
    """How long a step waits for its prompts.

    Images are decoded from JPEG and prompts encoded in threads, while the step before trains.
    """
    policy = make_policy("tiny", folder)
    tokens, prompts_per_step = 1200, 8
    prompt = noise_prompt(policy.encoder, tokens, 0)
    jpeg = io.BytesIO()
    prompt.example.images[0].save(jpeg, "JPEG")

    def read_row(i: int) -> Example:
        image = Image.open(io.BytesIO(jpeg.getvalue())).convert("RGB")
        return Example(prompt.example.question, "1", [image])

    def train(batch: list) -> None:
        for encoded in batch:
            group = random_group(encoded, torch.full((5,), 50))
            policy.log_probs([group]).sum().backward()

    alone = median(seconds(lambda: policy.encoder.encode(read_row(0))) for _ in range(5))
    rows, shares = Rows("jpeg", read_row, range(64)), shuffled_rounds(64, prompts_per_step)
    rounds = encode_ahead(rows, policy.encoder.encode, shares)
    waits, steps = [], []
    for _ in range(repeats + 1):
        batch = []
        waits.append(seconds(lambda batch=batch: batch.extend(next(rounds))))
        steps.append(seconds(partial(train, batch)))
    rounds.close()
    print_row(f"decode and encode one {tokens}-token prompt, one thread", f"{1000 * alone:.0f} ms")
    print_row(f"wait for {prompts_per_step} prompts, first step", f"{1000 * waits[0]:.0f} ms")
    print_row(
        f"wait for {prompts_per_step} prompts, later steps",
        f"{1000 * max(waits[1:]):.1f} ms",
        f"{median(steps):.1f} s step",
        "longest",
    )


def growth(folder: str, repeats: int) -> None:
    """Rollout and update of this code as one size grows and the others stay."""
    policy = make_policy("tiny", folder)
    optimizer = torch.optim.SGD(policy.model.parameters(), lr=0.0)
    base = {"prompt tokens": 200, "group size": 8, "prompts": 8}
    tried = {"prompt tokens": (50, 200, 800), "group size": (4, 8, 16), "prompts": (4, 8, 16)}
    for name, values in tried.items():
        for value in values:
            rolled, updated = time_of_size(policy, optimizer, base | {name: value})
            cells = f"rollout {rolled:.2f} s", f"update {updated:.2f} s"
            print_row(f"growth: {name} {value}", *cells)


def time_of_size(policy: Policy, optimizer, size: dict[str, int]) -> tuple[float, float]:
    """Seconds of a rollout, mean length about 30, and of the training on it."""
    group_size = size["group size"]
    prompts = noise_prompts(policy.encoder, size["prompt tokens"], size["prompts"])
    groups = []
    sample = partial(
        generate, policy, prompts, group_size, Sampling(100, rollout_batch=ALL), key=(0, 0)
    )
    with random_stops(policy, mean=30):
        rolled = seconds(lambda: groups.extend(sample()))
    for group in groups:
        group.advantages = torch.randn(group_size)
    algo = preset("papo_g_no_kl_ref")
    return rolled, seconds(partial(train_step, policy, None, optimizer, groups, algo))


PARTS = {
    "rollouts": rollouts,
    "forwards": forwards,
    "memory": memory,
    "papo": extra_cost,
    "data": data_ahead,
    "growth": growth,
}


# One step at the paper's sizes


def cast_parameters(model, dtype: torch.dtype) -> None:
    """Parameters alone, as FSDP and from_pretrained do: the frequencies of RoPE stay fp32."""
    for parameter in model.parameters():
        parameter.data = parameter.data.to(dtype)


class OneStep:
    """One step as train.py runs it. Prints seconds, peak memory and tokens/s or MFU per phase."""

    def __init__(self, args, folder: str, device: torch.device):
        self.args = args
        self.clock = Clock(device)
        self.dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
        self.policy = make_policy(args.model.removeprefix("random:"), folder, device)
        self.linears = count_linears(self.policy.model)
        copied = copy.deepcopy(self.policy.model)
        cast_parameters(copied, self.dtype)
        self.reference = Policy(copied, self.policy.encoder)
        mesh = make_mesh(device.type)
        for each in (self.policy, self.reference):
            if device.type == "cuda":
                each.model.gradient_checkpointing_enable({"use_reentrant": False})
            shard(each.model, mesh, self.dtype)
            each.tokens_per_forward = args.tokens_per_forward
        optimizer = {"adamw": torch.optim.AdamW, "sgd": torch.optim.SGD}[args.optimizer]
        fused = device.type == "cuda"
        self.optimizer = optimizer(self.policy.model.parameters(), lr=1e-6, fused=fused)
        self.rate = self.matrix_rate(8192 if device.type == "cuda" else 512)
        self.groups: list[Group] = []

    def matrix_rate(self, n: int) -> float:
        """FLOP/s of an n x n x n product, the best of ten."""
        a = torch.randn(n, n, device=self.policy.device, dtype=self.dtype)
        return 2 * n**3 / min(self.clock(lambda: a @ a) for _ in range(10))

    def attention(self) -> str:
        kernel = packing.varlen_kernel(torch.empty(0, dtype=self.dtype, device=self.policy.device))
        return f"{kernel.__module__}.{kernel.__name__}" if kernel else "SDPA"

    def run(self) -> None:
        args = self.args
        rate = f"{self.rate / 1e12:.3g} TFLOP/s"
        print_row("attention; measured matrix rate", self.attention(), rate, torch.__version__)
        rolled = self.rollout()
        self.set_advantages()
        self.prepare(self.groups[:1], preset(args.algo))  # the first call of a kernel, untimed
        self.update(self.groups[:1], preset(args.algo))
        totals = {}
        for name in ("grpo", args.algo):
            totals[name] = rolled + self.training(name)
            print_row(f"{name}: the step", f"{totals[name]:.1f} s")
        extra = totals[args.algo] / totals["grpo"] - 1
        print_row(f"{args.algo} over grpo at equal rollouts", f"{extra:+.1%}")

    def rollout(self) -> float:
        args = self.args
        prompts = noise_prompts(self.policy.encoder, args.prompt_tokens, args.prompts)
        sample = partial(
            generate,
            self.policy,
            prompts,
            args.group_size,
            Sampling(args.max_new_tokens, top_p=0.99, rollout_batch=args.rollout_batch),
            key=(0, 0),
            progress=True,
        )
        with random_stops(self.policy, args.mean):
            took = self.clock(lambda: self.groups.extend(sample()))
        lengths = response_lengths(self.groups).float()
        what = f"rollout, {args.prompts} x {args.group_size}, mean length {lengths.mean():.0f}"
        self.print_phase(what, took, f"{lengths.sum() / took:.0f} tokens/s")
        return took

    def set_advantages(self) -> None:
        size = self.args.group_size
        rewards = torch.rand(len(self.groups) * size, generator=seeded("rewards"))
        index = torch.arange(len(self.groups)).repeat_interleave(size)
        advantages = group_advantages(rewards, index).float().split(size)
        for group, values in zip(self.groups, advantages, strict=True):
            group.advantages = values

    def training(self, name: str) -> float:
        """Seconds of log-probs and updates."""
        algo = preset(name)
        flops = forward_flops(self.policy.model.config, self.groups, self.linears)
        passes = (self.updates > 1) + bool(algo.kl_ref_coef) + len(algo.views())
        prepared = self.clock(partial(self.prepare, self.groups, algo))
        mfu = f"MFU {passes * flops / prepared / self.rate:.1%}"
        self.print_phase(f"{name}: {passes} passes of log-probs", prepared, mfu)
        updated = self.clock(partial(self.update, self.groups, algo))
        mfu = f"MFU {3 * flops / updated / self.rate:.1%}"
        self.print_phase(f"{name}: {self.updates} updates", updated, mfu)
        return prepared + updated

    @property
    def updates(self) -> int:
        return math.ceil(len(self.groups) / self.args.mini_batch)

    def prepare(self, groups: list[Group], algo: Algo) -> None:
        batches = mini_batches(groups, self.args.mini_batch)
        prepare(self.policy, self.reference, batches, algo, key=(0, 0))

    def update(self, groups: list[Group], algo: Algo) -> None:
        update(self.policy, self.optimizer, mini_batches(groups, self.args.mini_batch), algo)

    def print_phase(self, what: str, took: float, last: str) -> None:
        print_row(what, f"{took:.2f} s", f"{self.clock.peak:.1f} GiB", last)


def one_step(args, folder: str, device: torch.device) -> None:
    """One step of --algo and one of grpo, on the same rollouts."""
    OneStep(args, folder, device).run()


def count_linears(model) -> dict[str, int]:
    """Weights that every token of a part passes: linear layers and the patch convolution.

    The vision tower's are per patch; the merger works on every fourth patch.
    """
    counts = {"text": 0, "vision": 0, "head": model.lm_head.weight.numel()}
    for name, module in model.named_modules():
        if isinstance(module, (torch.nn.Linear, torch.nn.Conv3d)) and "lm_head" not in name:
            part = "vision" if "visual" in name else "text"
            counts[part] += module.weight.numel() // (4 if "merger" in name else 1)
    return counts


def forward_flops(config, groups: list[Group], linears: dict[str, int]) -> float:
    """Model FLOPs of one forward over the groups.

    Every prompt token and image is counted once, every response token once, the head for response
    tokens only, and no recomputation. Linear layers take 2 per weight and token, attention 4 d per
    query-key pair.
    """
    text, vision = config.get_text_config(), config.vision_config
    total = 0.0
    for group in groups:
        prompt, patches = len(group.prompt), len(group.prompt.pixel_values)
        lengths = group.response_mask.sum(1).tolist()
        responses = sum(lengths)
        linear = linears["text"] * (prompt + responses)
        linear += linears["head"] * responses
        linear += linears["vision"] * patches
        text_pairs = prompt**2 / 2 + sum(n * prompt + n**2 / 2 for n in lengths)
        text_pairs *= text.num_hidden_layers
        attention = text.hidden_size * text_pairs
        attention += vision.hidden_size * vision_pairs(vision, patches)
        total += 2 * linear + 4 * attention
    return total


def vision_pairs(vision, patches: int) -> int:
    """Query-key pairs of all vision blocks; most blocks see a window, some the whole image."""
    window = (vision.window_size // vision.patch_size) ** 2
    full_blocks = len(vision.fullatt_block_indexes)
    window_blocks = vision.depth - full_blocks
    return patches * (full_blocks * patches + window_blocks * min(window, patches))


def numerics(args, folder: str, device: torch.device) -> None:
    """Half-precision log-probs, packed and padded, against packed fp32.

    Prints ||difference|| / ||fp32|| and the worst token's difference.
    """
    half = torch.bfloat16 if device.type == "cuda" else torch.float32
    policy = make_policy(args.model.removeprefix("random:"), folder, device)
    lengths = torch.empty(2, args.group_size).geometric_(1 / args.mean, generator=seeded("lengths"))
    lengths = lengths.long().clamp(max=args.max_new_tokens)
    prompts = noise_prompts(policy.encoder, args.prompt_tokens, 2)
    groups = [random_group(p, n) for p, n in zip(prompts, lengths, strict=True)]
    with torch.no_grad():
        exact = [policy.log_probs([group]) for group in groups]
        cast_parameters(policy.model, half)
        together = policy.log_probs(groups).split(args.group_size)
        packed = [x[:, : e.shape[1]] for x, e in zip(together, exact, strict=True)]
        policy.model.set_attn_implementation(STOCK_ATTENTION)
        padded = [padded_log_probs(policy, group) for group in groups]
    norm = torch.cat([e.flatten() for e in exact]).norm()
    for what, values in (("packed", packed), ("padded", padded)):
        differences = torch.cat([(a - b).flatten() for a, b in zip(values, exact, strict=True)])
        relative = f"{differences.norm() / norm:.2e}"
        worst = f"worst {differences.abs().max():.2e}"
        print_row(f"{what} {half} against packed fp32", relative, worst)


# Command line


def parse_args(argv=None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description="Measure speed and memory against stock Hugging Face.",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    # The last two are the processes that `memory` starts.
    parts = [*PARTS, "memory-tied", "memory-untied"]
    add = parser.add_argument
    add("--only", nargs="+", default=list(PARTS), choices=parts, help="parts of the table")
    add(
        "--repeats", type=int, default=3, help="per comparison; rollouts of 1,200 tokens: 2 at most"
    )
    add("--device", default="cpu", choices=("cpu", "cuda"), help="where --model runs")
    add("--model", default="", choices=SIZES, help="measure one step of such a model instead")
    add("--numerics", action="store_true", help="with --model: compare log-probs, bf16 and fp32")
    add("--profile", default="", help="with --model: write the profiler's table to this file")
    add("--algo", default="papo_g", help="with --model: the preset to compare with grpo")
    optimizers = ("adamw", "sgd")
    add("--optimizer", default="adamw", choices=optimizers, help="with --model: sgd has no moments")
    sizes = {
        "prompts": (192, "prompts per step"),
        "group_size": (5, "responses per prompt"),
        "prompt_tokens": (1200, "tokens per prompt, about"),
        "mean": (350, "mean response length, about"),
        "max_new_tokens": (2048, "longest response"),
        "rollout_batch": (1024, "at most so many responses at a time"),
        "mini_batch": (64, "prompts per update"),
        "tokens_per_forward": (16_384, "tokens per training forward"),
    }
    for name, (value, meaning) in sizes.items():
        add(f"--{name}", type=int, default=value, help=f"with --model: {meaning}")
    args = parser.parse_args(argv)
    if args.device == "cuda" and not args.model:
        parser.error(f"--device cuda: needs --model, one of {', '.join(SIZES)}")
    if args.model and torch.cuda.is_available() != (args.device == "cuda"):
        found = "no" if args.device == "cuda" else "a"
        parser.error(f"--device {args.device}: torch sees {found} CUDA device here")
    return args


def measure_model(args, folder: str) -> None:
    measure = numerics if args.numerics else one_step
    _, _, device = init_distributed()
    profiler = torch.profiler.profile() if args.profile else nullcontext()
    try:
        with profiler:
            measure(args, folder, device)
    finally:
        torch.distributed.destroy_process_group()
    if not args.profile:
        return
    order = "self_cuda_time_total" if args.device == "cuda" else "self_cpu_time_total"
    Path(args.profile).write_text(profiler.key_averages().table(sort_by=order, row_limit=60))


def print_table(args, folder: str) -> None:
    threads = torch.get_num_threads()
    print(f"torch {torch.__version__}, {threads} threads, {args.repeats} repeats")
    print_row("what", "this code", "baseline", "baseline / this code")
    start = time.perf_counter()
    for name in args.only:
        PARTS[name](folder, args.repeats)
    print_row("total", f"{time.perf_counter() - start:.0f} s")


def main(argv=None) -> None:
    args = parse_args(argv)
    if args.only in (["memory-tied"], ["memory-untied"]):
        print(round(measure_memory(tied=args.only == ["memory-tied"])))
        return
    with tempfile.TemporaryDirectory() as folder:
        if args.model:
            measure_model(args, folder)
        else:
            print_table(args, folder)


if __name__ == "__main__":
    main()
