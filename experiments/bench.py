r"""Speed: rollouts beside stock Hugging Face, a step of GRPO beside TRL's, one step by phase.

    python -m experiments.bench                                 both comparisons, on the toy
    python -m experiments.bench --only trl                      one
    python -m experiments.bench --model random:qwen2.5-vl-3b    one step of training, by phase

A comparison runs this code and a baseline on the same weights and images, with as many tokens; for
rollouts that is stock `generate` on left-padded prompts, in turns with this code. A ratio is the
median over the repeats, followed by the lowest and the highest. One step is as train.py runs it, on
CUDA where torch finds it (docs/on-gpus.md).
"""

from __future__ import annotations

import argparse
import copy
import importlib.util
import math
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from itertools import pairwise
from pathlib import Path
from statistics import median

import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor
from transformers import Qwen2_5_VLForConditionalGeneration, TrainerCallback

from experiments import start_model
from papo import prepare, preset, update
from rollout import Sampling, generate
from support import packing, toy
from support.batch import Example, Prompt, mini_batches, seeded
from support.distributed import init_distributed, make_mesh, shard
from support.qwen_vl import Encoder, Policy
from support.reward import compute_score
from support.run_folder import read_log

SIZES = ("random:qwen2.5-vl-3b", "random:qwen2.5-vl-7b")
REPEATS = 3  # of a comparison

# ------------------------------------------------------------------- models, prompts and responses


def toy_encoder() -> Encoder:
    return Encoder(str(toy.MODEL), 3136, 10_000_000)


def toy_policies() -> tuple[Policy, Policy]:
    """The toy's start model, and the same weights with stock attention."""
    ours, stock = (Policy.load(toy.MODEL, toy_encoder()) for _ in range(2))
    stock.model.set_attn_implementation({"text_config": "sdpa", "vision_config": "sdpa"})
    return ours, stock


def random_policy(name: str, device: torch.device) -> Policy:
    """A published size with random fp32 weights, made on the device.

    Tokenizer and special tokens are the toy's; the vocabulary keeps its published size.
    """
    encoder = toy_encoder()
    special = encoder.tokenizer.convert_tokens_to_ids(start_model.SPECIAL[0])
    config = start_model.random_config(name, special)
    torch.manual_seed(0)
    with torch.device(device):
        model = Qwen2_5_VLForConditionalGeneration(config)
    return Policy(model, encoder)


def noise_prompts(encoder: Encoder, tokens: int, count: int) -> list[Prompt]:
    """Prompts of about `tokens` tokens, most of them from one noise image, of different lengths."""
    prompts = []
    for index in range(count):
        question = "<image>How many red dots are there?" + " red" * (index % 5)
        image_tokens = max(tokens - encoder.prompt_length(question, [(28, 28)]), 4)
        rows = math.isqrt(image_tokens)
        shape = (28 * rows, 28 * (image_tokens // rows), 3)
        generator = seeded("image", index)
        pixels = torch.randint(0, 256, shape, generator=generator, dtype=torch.uint8)
        image = Image.fromarray(pixels.numpy())
        prompts.append(encoder.encode(Example(question, "1", [image]), index))
    return prompts


@contextmanager
def random_stops(policy: Policy, mean: float) -> Iterator[None]:
    """Inside, a sampled token ends its response with probability 1 / mean; never if it is infinite.

    A forward hook on the head sets the end token's logit, so lengths are geometric and follow from
    the sampler's own seeded uniforms: the same call gives the same lengths. Training never meets
    the hook, because it reads the head's weight directly (support/packing.py).
    """
    log_odds = -math.log(mean - 1)  # of p = 1 / mean

    def set_end_token(module, inputs, logits):
        logits = logits.float()  # bf16 would change the end token's probability by some percent
        for token in policy.eos_ids:  # a list as index would be copied to the device, with a wait
            logits[..., token].fill_(-torch.inf)
        logits[..., policy.eos_ids[0]] = logits.logsumexp(-1) + log_odds
        return logits

    handle = policy.model.lm_head.register_forward_hook(set_end_token)
    try:
        yield
    finally:
        handle.remove()


def stock_generate(policy: Policy, prompts: list[Prompt], group_size: int, length: int) -> Tensor:
    """generate with num_return_sequences on left-padded prompts."""
    width = max(map(len, prompts))

    def left_pad(rows: list[Tensor], value: int) -> Tensor:
        return torch.stack([F.pad(row, (width - len(row), 0), value=value) for row in rows])

    return policy.model.generate(
        input_ids=left_pad([p.input_ids for p in prompts], policy.pad_id),
        attention_mask=left_pad([torch.ones_like(p.input_ids) for p in prompts], 0),
        mm_token_type_ids=left_pad([p.is_image_token.long() for p in prompts], 0),
        pixel_values=torch.cat([p.pixel_values for p in prompts]),
        image_grid_thw=torch.cat([p.image_grid_thw for p in prompts]),
        max_new_tokens=length,
        num_return_sequences=group_size,
        do_sample=True,
        top_k=0,
        top_p=1.0,
    )


# --------------------------------------------------------------------------------------- measuring


def timed(call: Callable) -> tuple[float, float]:
    """Seconds, the device's work included, and on CUDA the highest memory in GiB."""
    cuda = torch.cuda.is_available()
    if cuda:
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
    start = time.perf_counter()
    call()
    if cuda:
        torch.cuda.synchronize()
    seconds = time.perf_counter() - start
    return seconds, torch.cuda.max_memory_allocated() / 2**30 if cuda else 0.0


def print_row(what: str, *cells: str) -> None:
    padded = [f"{cell:<15}" for cell in (*cells, "", "", "")[:3]]
    print(f"| {what:<64} | {' | '.join(padded)} |", flush=True)


def rollouts() -> None:
    """Sampling against stock generate, in turns, after a first call of each."""
    ours, stock = toy_policies()
    for tokens in (50, 400, 1200):
        prompts = noise_prompts(ours.encoder, tokens, 16)
        sample = partial(generate, ours, prompts, 8, Sampling(50), key=(0, 0))
        baseline = partial(stock_generate, stock, prompts, 8, 50)
        with random_stops(ours, math.inf), random_stops(stock, math.inf):
            times = [(timed(sample)[0], timed(baseline)[0]) for _ in range(REPEATS + 1)][1:]
        ratios = [slow / fast for fast, slow in times]
        cells = [f"{median(side):.3g} s" for side in zip(*times, strict=True)]
        spread = f"{median(ratios):.2f} [{min(ratios):.2f}, {max(ratios):.2f}] over {REPEATS}"
        print_row(f"rollout, {tokens}-token prompts, 16 x 8 of 50", *cells, spread)


def beside_trl() -> None:
    """A step of GRPO by train.py, then by TRL's GRPOTrainer: model, prompts, reward and sizes are
    the same."""
    missing = [name for name in ("trl", "torchvision") if not importlib.util.find_spec(name)]
    if missing:
        print_row(f"GRPO step beside TRL: {' and '.join(missing)} not installed")
        return
    import train  # here, because the other parts do not need it

    flags = f"--algo=grpo --eval_every=0 --save_every=0 --steps={REPEATS + 1}".split()
    with tempfile.TemporaryDirectory() as folder:
        train.main([*flags, f"--out={folder}/ours"])
        lines = read_log(Path(folder, "ours", "metrics.jsonl"))
        theirs = median(trl_seconds(f"{folder}/trl", REPEATS + 1))
    ours = median([line["seconds"] for line in lines if "reward" in line][1:])  # after a warm-up
    cells = f"{ours:.3g} s", f"{theirs:.3g} s", f"{theirs / ours:.2f} over {REPEATS}"
    print_row("GRPO step beside TRL, 16 x 8", *cells)


def trl_seconds(out: str, steps: int) -> list[float]:
    """Seconds of each step after the first of TRL's GRPOTrainer on the toy."""
    from datasets import Dataset
    from trl import GRPOConfig, GRPOTrainer

    ends = []

    class StepEnds(TrainerCallback):
        def on_step_end(self, *args, **kwargs):
            ends.append(time.perf_counter())

    rows = []
    for example in (toy.example("train", i) for i in range(16 * steps)):
        text = f"{example.question.removeprefix('<image>')}\n\n{toy.SUFFIX}"
        row = {"prompt": [{"role": "user", "content": text}], "answer": example.answer}
        rows.append(row | {"image": example.images[0]})

    def reward(completions, answer, **_):
        pairs = zip(completions, answer, strict=True)
        return [compute_score(turns[0]["content"], right)["overall"] for turns, right in pairs]

    sizes = {"per_device_train_batch_size": 128, "num_generations": 8, "max_completion_length": 40}
    sizes |= {"max_steps": steps, "learning_rate": 2e-4, "beta": 0.01, "epsilon_high": 0.3}
    quiet = {"use_cpu": True, "bf16": False, "report_to": [], "save_strategy": "no"}
    quiet |= {"gradient_checkpointing": False}
    config = GRPOConfig(out, **sizes, **quiet)
    data = Dataset.from_list(rows)
    GRPOTrainer(str(toy.MODEL), reward, config, data, callbacks=[StepEnds()]).train()
    return [after - before for before, after in pairwise(ends)]


PARTS = {"rollouts": rollouts, "trl": beside_trl}

# ---------------------------------------------------------------------------------------- one step


def one_step(args) -> None:
    """A step of papo_g and one of grpo as train.py runs them, on the same rollouts, by phase."""
    _, _, device = init_distributed()
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    policy = random_policy(args.model.removeprefix("random:"), device)
    reference = Policy(copy.deepcopy(policy.model), policy.encoder)
    for parameter in reference.model.parameters():  # not the frequencies of RoPE, which stay fp32
        parameter.data = parameter.data.to(dtype)
    for each in (policy, reference):
        if device.type == "cuda":
            each.model.gradient_checkpointing_enable({"use_reentrant": False})
        shard(each.model, make_mesh(device.type), dtype)
        each.tokens_per_forward = args.tokens_per_forward
    optimizer_class = {"adamw": torch.optim.AdamW, "sgd": torch.optim.SGD}[args.optimizer]
    optimizer = optimizer_class(policy.model.parameters(), lr=1e-6, fused=device.type == "cuda")
    kernel = packing.varlen_kernel(torch.empty(0, dtype=dtype, device=device))
    attention = f"{kernel.__module__}.{kernel.__name__}" if kernel else "SDPA"
    print_row(f"attention: {attention}", f"torch {torch.__version__}")

    def phase(what: str, call: Callable) -> float:
        seconds, peak = timed(call)
        print_row(what, f"{seconds:.2f} s", f"{peak:.1f} GiB")
        return seconds

    prompts = noise_prompts(policy.encoder, args.prompt_tokens, args.prompts)
    sampling = Sampling(args.max_new_tokens, top_p=0.99, rollout_batch=args.rollout_batch)
    sample = partial(generate, policy, prompts, args.group_size, sampling, key=(0, 0))
    groups = []
    with random_stops(policy, args.mean):
        what = f"rollout, {args.prompts} x {args.group_size}"
        rolled = phase(what, lambda: groups.extend(sample()))
    tokens = sum(int(group.response_mask.sum()) for group in groups)
    mean_length = tokens / (args.prompts * args.group_size)
    print_row(f"mean length {mean_length:.0f}", f"{tokens / rolled:.0f} tokens/s")
    for group in groups:
        group.advantages = torch.randn(args.group_size)
    first, batches = [groups[:1]], mini_batches(groups, args.mini_batch)
    prepare(policy, reference, first, preset("papo_g"), key=(0, 0))  # a kernel's first call
    update(policy, optimizer, first, preset("papo_g"))
    totals = []
    for name in ("grpo", "papo_g"):
        prepared = partial(prepare, policy, reference, batches, preset(name), key=(0, 0))
        total = rolled + phase(f"{name}: log-probs", prepared)
        updated = partial(update, policy, optimizer, batches, preset(name))
        total += phase(f"{name}: {len(batches)} updates", updated)
        print_row(f"{name}: the step", f"{total:.1f} s")
        totals.append(total)
    print_row("papo_g over grpo at equal rollouts", f"{totals[1] / totals[0] - 1:+.1%}")
    torch.distributed.destroy_process_group()


def parse_args(argv=None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="Measure speed and memory.")
    add = parser.add_argument
    add("--only", nargs="+", default=list(PARTS), choices=PARTS, help="parts of the table")
    add("--model", default="", choices=SIZES, help="measure one step of such a model instead")
    add("--optimizer", default="adamw", choices=("adamw", "sgd"), help="sgd has no moments")
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
    return parser.parse_args(argv)


def main(argv=None) -> None:
    args = parse_args(argv)
    if args.model:
        one_step(args)
        return
    print(f"torch {torch.__version__}, {torch.get_num_threads()} threads")
    print_row("what", "this code", "baseline", "baseline / this code")
    for name in args.only:
        PARTS[name]()


if __name__ == "__main__":
    main()
