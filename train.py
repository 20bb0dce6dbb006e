r"""Train a vision-language model with PAPO, or one of its relatives, on one or many devices.

    torchrun train.py --algo papo_g                                              the toy, on a laptop, minutes
    torchrun --nproc_per_node 2 train.py --algo papo_g --model Qwen/Qwen2.5-VL-3B-Instruct
    torchrun train.py --resume runs/papo_g-toy-s0 --steps 100                    go on where a run stopped

Read `train` first: it is the loop of the paper, top to bottom. FSDP2 shards fp32 weights and computes in bf16 on CUDA;
on a CPU everything is fp32. Each rank keeps its own prompts from sampling to update: no batch ever travels.

Differences from the released trainer: no Ray, no vLLM: the weights that train are gathered in bf16 while the model
samples; fp32 master weights in place of bf16 with Kahan compensation; an empty round of dynamic sampling adds nothing,
and after 20 rounds the step trains on what there is.
"""

from __future__ import annotations

import dataclasses
import itertools
import json
import math
import os
import signal
import sys
import time
from collections import Counter
from contextlib import suppress
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh
from tqdm import tqdm

from evaluate import mean_accuracy, predict
from losses import group_advantages
from papo import Algo, prepare, preset, update
from rollout import generate
from support import benchmarks, checkpoint, data, distributed, memory, plots, toy
from support.batch import Group, Prompt
from support.cli import exit_with_error, flag, model_folder, parse_flags, resolve_config
from support.distributed import (
    reduce,
)
from support.loggers import LOGGERS
from support.metrics import collapse_warning, read_metrics
from support.qwen_vl import PROMPT_SUFFIX, Encoder, Policy
from support.reward import compute_score
from support.run import append, begin
from support.sandbox import Grader

MAX_ROUNDS = 20  # of dynamic sampling, a step


@dataclass
class Config:
    """The defaults are the paper's; where the data is a toy, toy.OVERRIDES goes over them. A preset's flags follow."""

    algo: str = flag("papo_g", "grpo, dapo, papo_g, papo_d, grpo_no_kl_ref, papo_g_no_kl_ref")
    model: str = flag(
        "toy", "toy, toy:grid=4,... (toy.Setting), a local Hugging Face folder, or a hub id"
    )
    data: str = flag(
        "PAPOGalaxy/PAPO_ViRL39K_train",
        "toy or toy:..., a parquet/JSON/JSONL file, a folder, a hub id",
    )
    val_data: str = flag(
        "PAPOGalaxy/PAPO_MMK12_test", "the same, for evaluation; none: no evaluation"
    )
    reward: str = flag("", "path/file.py:function(response, answer) instead of the released rule")
    out: str = flag("", "folder of the run; default runs/ALGO-MODEL-sSEED")
    resume: str = flag("", "folder of a run to go on with, from its newest checkpoint")
    seed: int = flag(0, "of everything that is drawn")
    steps: int = flag(0, "0: as many as the epochs give")
    epochs: float = flag(2.0, "passes over the data, where steps is 0")
    prompts_per_step: int = flag(384, "prompts a step, over all ranks")
    group_size: int = flag(5, "responses a prompt")
    mini_batch: int = flag(
        128, "prompts an optimiser step, over all ranks; also a round of dynamic sampling"
    )
    tokens_per_forward: int = flag(16_384, "a training row holds groups up to this many tokens")
    rollout_batch: int = flag(320, "responses a rank samples at a time")
    max_prompt_tokens: int = flag(4096, "longer prompts are left out")
    max_new_tokens: int = flag(2048, "longest response")
    min_pixels: int = flag(200_704, "smaller images are enlarged")
    max_pixels: int = flag(1_003_520, "larger images are reduced")
    temperature: float = flag(1.0, "of sampling and of all log-probs")
    top_p: float = flag(0.99, "nucleus sampling")
    top_k: int = flag(0, "0: off")
    lr: float = flag(1e-6, "AdamW, constant")
    weight_decay: float = flag(1e-2, "AdamW")
    max_grad_norm: float = flag(1.0, "gradient clipping")
    offload_optimizer: bool = flag(
        False, "AdamW's moments wait in host memory while the model samples"
    )
    freeze_vision: bool = flag(False, "train the language model only")
    prompt_suffix: str = flag(PROMPT_SUFFIX, "appended to questions that lack it")
    eval_every: int = flag(
        50, "steps between evaluations (also before the first and after the last); 0: never"
    )
    eval_n: int = flag(1, "samples a question in evaluations")
    eval_rows: int = flag(500, "questions of each evaluation set")
    save_every: int = flag(50, "steps between checkpoints (also after the last); 0: never")
    keep: int = flag(2, "checkpoints kept, the newest")
    wandb: bool = flag(False, "log to Weights & Biases too")
    tensorboard: bool = flag(False, "log to TensorBoard too")

    def __post_init__(self):
        for name in (
            "prompts_per_step",
            "group_size",
            "mini_batch",
            "max_new_tokens",
            "keep",
            "tokens_per_forward",
        ):
            if getattr(self, name) < 1:
                raise ValueError(f"{name}={getattr(self, name)}: must be at least 1")
        if not self.temperature > 0:
            raise ValueError(
                f"temperature={self.temperature}: must be above 0, log-probs are divided by it"
            )
        if not 0 < self.top_p <= 1:
            raise ValueError(f"top_p={self.top_p}: must be above 0 and at most 1")


def train(run: Run) -> None:
    """The loop: sample, score, compare within groups, update; log, save, evaluate."""
    config, policy = run.config, run.policy
    if (
        run.due(config.eval_every) and not run.evaluated
    ):  # before the first step; or a run was killed just before one
        run.evaluate()
    for step in tqdm(
        range(run.step, run.steps), initial=run.step, total=run.steps, disable=run.rank > 0
    ):
        if run.told_to_stop():
            break
        start, position = time.time(), run.stream.position
        algo = run.algo.annealed(step / max(run.steps - 1, 1))
        with distributed.optimizer_offloaded(run.optimizer, config.offload_optimizer):
            groups, metrics = collect(run, step)
        if (
            run.told_to_stop()
        ):  # while sampling, which was cut short: the step will be taken again from its start
            run.stream.position = position
            break
        updates = math.ceil(metrics["groups_kept"] / config.mini_batch)
        mark = time.time()
        metrics |= prepare(
            policy,
            run.reference,
            groups,
            algo,
            config.tokens_per_forward,
            updates,
            (config.seed, step),
            run.saliency,
        )
        metrics |= update(
            policy,
            run.optimizer,
            groups,
            algo,
            config.mini_batch,
            config.tokens_per_forward,
            config.max_grad_norm,
        )
        seconds = time.time() - start
        metrics |= {
            "seconds": seconds,
            "seconds_rollout": mark - start,
            "seconds_update": time.time() - mark,
        }
        metrics["tokens_per_second"] = metrics.pop("response_tokens") / seconds
        run.step = step + 1
        run.log(metrics)
        if run.due(config.save_every):
            run.save()
        if run.due(config.eval_every):
            run.evaluate()
    if config.save_every and (
        not run.step or not run.due(config.save_every)
    ):  # stopped where none was due
        run.save()


def collect(run: Run, step: int) -> tuple[list[Group], dict[str, float]]:
    """This rank's groups of a step, with responses and advantages, and what was seen while sampling them.

    Without dynamic sampling one round gives the step's prompts. With it (DAPO), rounds of `mini_batch` prompts are
    sampled, groups whose mean accuracy is not strictly inside (0.01, 0.99) are dropped, and sampling goes on until
    there are `prompts_per_step` groups, or for MAX_ROUNDS; the surplus is cut in the order of sampling.
    """
    config, kept, seen = run.config, [], Counter()
    skipped = run.stream.skipped.total()
    for turn in itertools.count():
        prompts = []
        for index, prompt in next(run.stream):
            prompt.index = turn * run.stream.prompts_per_round + index
            prompts.append(prompt)
        groups = generate(
            run.policy, prompts, config.group_size, key=(config.seed, step), max_new_tokens=config.max_new_tokens,
            top_p=config.top_p, top_k=config.top_k, rollout_batch=config.rollout_batch, stop=lambda: run.stopping,
            progress=run.rank == 0,
        )  # fmt: skip
        kept += score(run, groups, seen)
        total, stop = map(int, reduce([len(kept), run.stopping]))
        enough = total >= config.prompts_per_step or turn + 1 == MAX_ROUNDS
        if enough or stop or not run.algo.dynamic_sampling:
            break
    if total > config.prompts_per_step:
        everyone = [None] * run.world
        dist.all_gather_object(everyone, [g.prompt.index for g in kept])
        cut = sorted(i for part in everyone for i in part)[config.prompts_per_step]
        kept = [g for g in kept if g.prompt.index < cut]
    seen["skipped_rows"] = run.stream.skipped.total() - skipped
    seen = dict(zip(SEEN, reduce([seen[name] for name in SEEN]), strict=True))
    n = max(seen["responses"], 1.0)
    means = {name: seen[name] / n for name in ("reward", "accuracy", "format", "truncated")}
    means["response_length"] = seen["response_tokens"] / n
    counts = {name: seen[name] for name in (*COUNTS, "response_tokens")}
    counts["unusable_rows"] = run.stream.rows.skipped.total()
    return kept, means | counts | {
        "groups_kept": min(total, config.prompts_per_step),
        "rounds": turn + 1,
    }


COUNTS = (
    "zero_advantage_groups",
    "skipped_rows",
    "reward_timeouts",
    "reward_errors",
    "reward_unscored",
)


SEEN = ("responses", "reward", "accuracy", "format", "truncated", "response_tokens", *COUNTS)


def score(run: Run, groups: list[Group], seen: Counter) -> list[Group]:
    """Grade one round of groups, give them their advantages, add up what was seen; the groups to train on."""
    answers = [g.prompt.example.answer for g in groups for _ in g.responses]
    texts = [text for g in groups for text in g.responses]
    scores = run.grader(texts, answers)
    rewards = torch.tensor([s["overall"] for s in scores], dtype=torch.float64)
    accuracy = torch.tensor([s["accuracy"] for s in scores], dtype=torch.float64)
    seen["responses"] += len(scores)
    seen["reward"] += rewards.sum().item()
    seen["accuracy"] += accuracy.sum().item()
    seen["format"] += sum(s["format"] for s in scores)
    for name in ("timeouts", "errors", "unscored"):
        seen[f"reward_{name}"] += getattr(run.grader, name)
    kept, size = [], run.config.group_size
    advantages = group_advantages(rewards, size)
    whole = torch.tensor(["unscored" not in s for s in scores], dtype=torch.float64)
    for (
        group,
        own,
        right,
        graded,
    ) in zip(  # view, not split: without prompts split gives one empty group
        groups, *(x.view(-1, size) for x in (advantages, accuracy, whole)), strict=True
    ):
        group.advantages = own.float() * bool(
            graded.all()
        )  # next to a 0 that nobody graded, no comparison holds
        seen["truncated"] += group.truncated.sum().item()
        seen["response_tokens"] += group.response_mask.sum().item()
        seen["zero_advantage_groups"] += int(
            group.advantages.abs().max() < 1e-6
        )  # equal rewards leave 1e-10
        if not run.algo.dynamic_sampling or (graded.all() and 0.01 < right.mean() < 0.99):
            kept.append(group)
    return kept


class Run:
    """Everything a run holds: models, data, grader, files. Building it is the set-up, in order."""

    def __init__(
        self, config: Config, algo_flags: dict, rank: int, world: int, device: torch.device
    ):
        self.config, self.rank, self.world, self.device = config, rank, world, device
        self.step, self.stopping, self.evaluated = 0, False, False
        self.unwritten: list[str] = []  # lines of metrics that a full disk refused
        self.warned = False  # of a collapse
        self.dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
        self.source = model_folder(config.model, config.seed)
        encoder = Encoder(self.source, config.min_pixels, config.max_pixels, config.prompt_suffix)
        self.algo = dataclasses.replace(preset(config.algo, encoder.size), **algo_flags)
        self.saliency = self._saliency()
        measure = dict(
            length=encoder.prompt_length,
            max_prompt_tokens=config.max_prompt_tokens,
            seed=config.seed,
        )
        rows = data.load(config.data, "train", **measure)
        self.eval_sets = {}
        if config.eval_every and config.val_data != "none":
            self.eval_sets = benchmarks.eval_sets(
                config.val_data, limit=config.eval_rows, **measure
            )
        same_everywhere(rows, *self.eval_sets.values())
        per_round = config.mini_batch if self.algo.dynamic_sampling else config.prompts_per_step
        self.steps = config.steps or max(
            1, int(config.epochs * len(rows)) // config.prompts_per_step
        )
        ranks = int(os.environ.get("LOCAL_WORLD_SIZE", 1))  # of this machine, who share its cores
        self.grader = Grader(
            config.reward or compute_score, workers=max(1, min(4, (os.cpu_count() or 1) // ranks))
        )
        self.policy = self._load(encoder, torch.float32)
        self.reference = self._load(encoder, self.dtype) if self.algo.kl_ref_coef else None
        trainable = [p for p in self.policy.model.parameters() if p.requires_grad]
        self.optimizer = torch.optim.AdamW(
            trainable, lr=config.lr, weight_decay=config.weight_decay
        )
        self.stream = data.Stream(
            rows, encoder.encode, per_round, rank, world, config.seed, self._open()
        )
        if rank == 0:
            print(
                f"data: {len(rows)} rows of {rows.name}; left out: {dict(rows.skipped) or 'none'}"
            )
            print(
                memory.resource_report(
                    self.folder, self.policy.model, config, world, bool(self.reference), device
                )
            )
        for number in (signal.SIGINT, signal.SIGTERM):
            signal.signal(number, self._stop)

    def _saliency(self):
        if self.algo.mask_strategy != "semantic" or not self.algo.needs_masked_view:
            return None
        if toy.setting_of(self.config.data):
            return toy.saliency
        from support.saliency import dino_saliency

        return dino_saliency()

    def _load(self, encoder: Encoder, dtype: torch.dtype) -> Policy:
        cuda, mesh = self.device.type == "cuda", init_device_mesh(self.device.type, (self.world,))
        with distributed.one_rank_at_a_time():  # a machine's memory holds one whole copy at a time
            policy = Policy.load(
                self.source, encoder, dtype, self.device, self.config.temperature, cuda
            )
            policy.model.model.visual.requires_grad_(not self.config.freeze_vision)
            distributed.shard(policy.model, mesh, self.dtype)
        return policy

    def _open(self) -> int:
        """The run's folder, made or taken up again from its newest checkpoint; returns the position in the data."""
        config, position = self.config, 0
        self.folder = Path(
            distributed.on_first_rank(lambda: config.resume or config.out or free_folder(config))
        )
        self.metrics = self.folder / "metrics.jsonl"
        found = (
            distributed.on_first_rank(lambda: checkpoint.complete(self.folder)[-1:])
            if config.resume
            else []
        )
        if found:
            state = checkpoint.load(found[0], self.policy.model, self.optimizer)
            self.step, position = state["step"], state["position"]
        resolved = (
            asdict(config)
            | asdict(self.algo)
            | {"algo": config.algo, "steps": self.steps, "resume": ""}
        )
        resolved.pop("name")
        lines = distributed.on_first_rank(
            lambda: begin(self.folder, resolved, self.step if found else -1)
        )
        self.history = lines
        self.evaluated = any(
            m["step"] == self.step and any(k.startswith("eval/") for k in m) for m in lines
        )
        if not (self.folder / "config.json").exists():
            raise OSError(
                f"{self.folder} is not the first rank's folder: all machines must share it"
            )
        wanted = [
            make for name, make in LOGGERS.items() if getattr(config, name) and self.rank == 0
        ]
        self.loggers = [make(self.folder) for make in wanted]
        return position

    def _stop(self, number, frame) -> None:
        self.stopping = True  # sampling ends at once, anything else is finished first
        if number == signal.SIGINT:
            signal.signal(number, signal.default_int_handler)  # a second Ctrl-C waits for nothing

    def told_to_stop(self) -> bool:
        """Whether any rank has had a signal; all ranks call it."""
        return bool(reduce([self.stopping], "max")[0])

    def due(self, every: int) -> bool:
        return bool(every) and (self.step % every == 0 or self.step == self.steps)

    def log(self, metrics: dict, samples: list[dict] = ()) -> None:
        """One line of metrics.jsonl, and decoded samples of an evaluation, on the first rank."""
        if self.rank == 0:
            line = {"step": self.step} | {
                k: round(v, 8) if isinstance(v, float) else v for k, v in metrics.items()
            }
            self.unwritten = append(self.metrics, [*self.unwritten, json.dumps(line) + "\n"])
            for logger in self.loggers:
                logger(line, samples)
            if samples:
                append(
                    self.folder / "samples.jsonl", [json.dumps(sample) + "\n" for sample in samples]
                )
            self.history.append(line)
            if (
                "reward" in line
                and not self.warned
                and (warning := collapse_warning(self.history))
            ):
                self.warned = True
                tqdm.write(warning, file=sys.stderr)

    def save(self) -> None:
        state = {"step": self.step, "position": self.stream.position}
        try:
            checkpoint.save(self.folder, self.policy.model, self.optimizer, state, self.config.keep)
        except OSError as error:
            if self.rank == 0:
                tqdm.write(
                    f"error: step {self.step} is not saved, training goes on: {error}",
                    file=sys.stderr,
                )

    def evaluate(self) -> None:
        """avg@n of each evaluation set, as a line of its own in metrics.jsonl; nothing where a signal cut it short."""
        config, line, samples = self.config, {}, []
        for name, rows in self.eval_sets.items():
            with distributed.optimizer_offloaded(self.optimizer, config.offload_optimizer):
                records = predict(
                    self.policy, rows, self.grader, config.eval_n, self.rank, self.world, config.seed,
                    f"evaluate {name}" if self.rank == 0 else "",
                    max_new_tokens=config.max_new_tokens, top_p=1.0, rollout_batch=config.rollout_batch,
                    stop=lambda: self.stopping,
                )  # fmt: skip
            line[f"eval/{name}"] = mean_accuracy(records)
            samples += [{"step": self.step, "set": name} | record for record in records[:4]]
        if line and not self.told_to_stop():
            self.log(line, samples)

    def finish(self) -> None:
        """Export the weights, draw the curves, and say what came out."""
        try:
            checkpoint.export(self.policy.model, self.source, self.folder / "model", self.dtype)
        except OSError as error:
            exit_with_error(
                f"{self.folder}/model is not written: {error}; make room, then --resume {self.folder}"
            )
        prompt = first_usable([*self.eval_sets.values(), self.stream.rows][0], self.policy.encoder)
        [group] = generate(
            self.policy,
            [prompt],
            1,
            key=("sample", self.config.seed),
            max_new_tokens=self.config.max_new_tokens,
        )
        example = prompt.example
        if self.rank:
            return
        plots.curves(self.folder)
        steps, evals = read_metrics(self.metrics)
        for name in [k for k in (evals[0] if evals else {}) if k.startswith("eval/")]:
            print(
                f"{name.removeprefix('eval/'):<20} accuracy {evals[0][name]:.3f} before, {evals[-1][name]:.3f} after"
            )
        for i, image in enumerate(example.images):
            image.save(self.folder / f"sample{i}.png")
            print(f"picture: {self.folder}/sample{i}.png")
        print(
            f"question: {example.question}\nresponse: {group.responses[0]}\nanswer: {example.answer}"
        )
        print(
            f"metrics: {self.metrics}\ncurves: {self.folder}/curves.png\nmodel: {self.folder}/model"
        )

    def close(self) -> None:
        """End threads and worker processes: the interpreter would wait for them before it exits."""
        self.stream.close()
        self.grader.close()


def same_everywhere(*sets: data.Rows) -> None:
    """ValueError where the ranks read different rows: their shuffles would differ, and prompts be missed, unseen."""
    read = [None] * dist.get_world_size()
    dist.all_gather_object(read, [(len(rows), hash(tuple(rows.numbers))) for rows in sets])
    if any(other != read[0] for other in read):
        counts = ", ".join(str([n for n, _ in other]) for other in read)
        raise ValueError(
            f"the ranks read different rows of {sets[0].name}: usable are {counts} of the sets"
        )


def first_usable(rows: data.Rows, encoder: Encoder) -> Prompt:
    """The first row whose pictures are whole; ValueError if there is none."""
    for i in range(len(rows)):
        with suppress(ValueError):
            return encoder.encode(rows[i])
    raise ValueError(f"{rows.name}: no usable row")


def free_folder(config: Config) -> str:
    """runs/ALGO-MODEL-sSEED, or the next free suffix: nothing existing is ever overwritten."""
    model = Path(config.model.rstrip("/")).name.replace(":", "-")
    name = f"runs/{config.algo}-{model}-s{config.seed}"
    names = itertools.chain([name], (f"{name}-{i}" for i in itertools.count(2)))
    return next(name for name in names if not Path(name).exists())


def settings(argv=None) -> tuple[Config, dict]:
    """The command line, over what a resumed run was started with, over the defaults: Config and preset overrides."""
    given = parse_flags(__doc__, Config, Algo, argv=argv)
    algo_names = {f.name for f in dataclasses.fields(Algo)} - {"name"}
    if given.get("resume"):
        path = Path(given["resume"]) / "config.json"
        if not path.is_file():
            exit_with_error(f"--resume {given['resume']}: no config.json there")
        saved = json.loads(path.read_text())
        free = {
            "resume",
            "steps",
            "wandb",
            "tensorboard",
            "keep",
            "save_every",
            "eval_every",
            "offload_optimizer",
        }
        for name in given.keys() - free:
            if given[name] != saved[name]:
                exit_with_error(
                    f"--resume {given['resume']}: --{name} {given[name]} contradicts the run's {saved[name]}"
                )
        given = saved | given
    elif given.get("out") and Path(given["out"]).exists():
        exit_with_error(f"--out {given['out']} exists: choose another folder, or --resume it")
    try:
        config = resolve_config(Config, given)
    except (ValueError, OSError) as error:
        exit_with_error(error)
    return config, {k: v for k, v in given.items() if k in algo_names}


def main(argv=None) -> None:
    config, algo_flags = settings(argv)
    rank, world, device = distributed.init_distributed()
    try:
        run = Run(config, algo_flags, rank, world, device)
    except (ValueError, OSError, ImportError) as error:
        exit_with_error(error)
    except torch.OutOfMemoryError as error:
        sys.exit(f"rank {rank}: {memory.out_of_memory(error)}")
    try:
        train(run)
        if run.step == run.steps:
            run.finish()
        elif rank == 0:
            print(f"stopped behind step {run.step}: --resume {run.folder} goes on")
    except torch.OutOfMemoryError as error:
        sys.exit(f"rank {rank}: {memory.out_of_memory(error)}")
    finally:
        run.close()
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
