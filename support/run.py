"""A run: its models and data, its folder, and what is due when.

Resuming drops the log lines after the checkpoint, because their steps are repeated. A signal
(SIGTERM, Ctrl-C) raises Stopped on every rank at the next opportunity: after a block of sampled
tokens, after scoring, else when the step is done. The run then saves the state before the
interrupted step, which is exact.
"""

from __future__ import annotations

import json
import signal
import sys
import time
from collections.abc import Iterator
from contextlib import AbstractContextManager, suppress
from pathlib import Path

import torch
from tqdm import tqdm

from support import StepError, checkpoint, curves, data, distributed, lora, pages, predictions
from support import run_folder as files
from support.batch import Example, Group, Prompt
from support.config import exit_with_error, flags_of
from support.distributed import from_first_rank, max_over_ranks
from support.qwen_vl import Encoder, Policy
from support.reward import compute_score
from support.run_folder import survivable
from support.saliency import saliency_for
from support.sandbox import Grader

SHOW_EVERY = 10  # steps between printed responses
SHOWN_CHARACTERS = 400
SAMPLE_ROWS = 4  # questions per evaluation set whose responses are kept to look at
MAX_USELESS_STEPS = 3
MAX_SAMPLER_GAP = 0.1  # nats per token; in fp32 rounding leaves 1e-6


class Stopped(Exception):  # noqa: N818  (an event, not an error)
    """A signal has asked the run to stop; raised on all ranks together."""


class Run(AbstractContextManager):
    """What a training run holds. Building one loads data and models; `start` opens the folder.

    config: train.Config; algo: papo.Algo; ranks: (rank, world, device).
    """

    def __init__(self, config, algo, encoder: Encoder, ranks):
        self.config, self.algo = config, algo
        self.rank, self.world, self.device = ranks
        self.dtype = torch.bfloat16 if self.device.type == "cuda" else torch.float32
        self.step = 0  # steps completed
        self.position = 0  # rows of the data used by them
        self.evaluated_step = None  # the last step that has an evaluation in the log
        self._signalled = False
        self._lock = None  # the first rank's
        self.warnings: set[str] = set()  # printed ones
        self.useless_steps = 0  # steps in a row without any advantage

        self.mesh = distributed.make_mesh(self.device.type, config.shard_size)
        self.rows, self.eval_sets = self._load_data(encoder)
        epoch_steps = int(config.epochs * len(self.rows)) // config.prompts_per_step
        self.n_steps = config.steps or max(1, epoch_steps)
        # Trained weights are fp32. Those beside adapters and those of the reference are frozen.
        self.policy = self._load_policy(encoder, self.dtype if config.lora_rank else torch.float32)
        self.policy.saliency = saliency_for(algo.mask_strategy, config.data)
        self.reference = None
        if algo.kl_ref_coef and config.lora_rank:
            self.reference = lora.Reference(self.policy)
        elif algo.kl_ref_coef:
            self.reference = self._load_policy(encoder, self.dtype)
        self.optimizer = torch.optim.AdamW(
            [p for p in self.policy.model.parameters() if p.requires_grad],
            lr=config.lr,
            weight_decay=config.weight_decay,
            fused=self.device.type == "cuda",  # else AdamW copies all parameters in every step
        )
        self.grader = Grader(
            config.reward or compute_score,
            deadline=config.reward_deadline,
            budget=config.reward_budget,
            memory=config.reward_memory,
        )

    # --------------------------------------------------------------------------------------- set-up

    def _load_data(self, encoder: Encoder) -> tuple[data.Rows, dict[str, data.Rows]]:
        config = self.config
        options = {"length": encoder.prompt_length, "max_prompt_tokens": config.max_prompt_tokens}
        options["seed"] = config.seed
        rows = data.load(config.data, columns=self.algo.image_columns, **options)
        eval_sets = {}
        if config.eval_every and config.val_data != "none":
            eval_sets = data.eval_sets(config.val_data, limit=config.eval_rows, **options)
        return rows, eval_sets

    def _load_policy(self, encoder: Encoder, dtype: torch.dtype) -> Policy:
        config = self.config
        options = {"dtype": dtype, "device": self.device, "temperature": config.temperature}
        options["checkpointing"] = self.device.type == "cuda"
        with distributed.one_rank_at_a_time():  # host memory holds one whole copy at a time
            policy = Policy.load(encoder.source, encoder, **options)
            policy.tokens_per_forward = config.tokens_per_forward
            policy.model.model.visual.requires_grad_(not config.freeze_vision)
            if config.lora_rank:
                lora.add_adapters(policy.model, config.lora_rank, config.lora_alpha, encoder.source)
            # A single rank has nothing to shard, but FSDP also computes in half precision what is
            # stored in fp32.
            if self.world > 1 or dtype != self.dtype:
                adapters = lora.adapter_parameters(policy.model).values()
                distributed.shard(policy.model, self.mesh, self.dtype, ignored=set(adapters))
        return policy

    def start(self) -> None:
        """Open the folder, resume from its newest checkpoint, read data ahead, heed signals."""
        self.folder, newest = from_first_rank(self._claim_folder)
        if newest:
            state = checkpoint.load(newest, self.policy.model, self.optimizer)
            self.step, self.position = state["step"], state["position"]
        self.evaluated_step = from_first_rank(self._open_folder)
        if not (self.folder / "config.json").exists():
            raise OSError(f"{self.folder} is not the first rank's: all machines must share it")
        config = self.config
        makers = [make for name, make in files.LOGGERS.items() if getattr(config, name)]
        self.loggers = [make(self.folder) for make in makers if self.rank == 0]
        is_dynamic = self.algo.dynamic_sampling
        self.per_round = config.mini_batch if is_dynamic else config.prompts_per_step
        where = {"position": self.position, "rank": self.rank, "world": self.world}
        rounds = data.shuffled_rounds(len(self.rows), self.per_round, seed=config.seed, **where)
        self.rounds = data.encode_ahead(self.rows, self.policy.encoder.encode, rounds)
        for number in (signal.SIGINT, signal.SIGTERM):
            signal.signal(number, self._on_signal)
        if self.rank == 0:
            for rows in (self.rows, *self.eval_sets.values()):
                print(rows.summary())
            print(checkpoint.disk_line(self.folder, self.policy.model, config.keep))
        if self.algo.views() and not self.rows.with_image:
            views = ", ".join(self.algo.views())
            self._warn(
                f"no row of {self.rows.name} has an image, so the views of {self.config.algo} "
                f"({views}) and the terms of its objective that need them are empty"
            )

    def _claim_folder(self) -> tuple[Path, Path | None]:
        """Make and lock the folder. Returns it, and the checkpoint to resume from, if there is one.

        A run without a checkpoint starts over, unless it has a model."""
        config = self.config
        if config.out and not config.resume and any(Path(config.out).glob("[!.]*")):
            raise OSError(f"--out {config.out} exists: choose another, delete it, or --resume it")
        folder = Path(config.resume or config.out or files.free_name(config))
        folder.mkdir(parents=True, exist_ok=True)
        self._lock = files.lock(folder)
        if complete := checkpoint.complete(folder):
            return folder, complete[-1]
        if config.resume and (folder / "model").exists():
            raise OSError(f"{folder} has a model but no checkpoint: nothing to resume")
        if config.resume:
            print(f"{folder} has no checkpoint: starting at step 0")
        return folder, None

    def _open_folder(self) -> int | None:
        """Write config.json, rewind the logs to the checkpoint; returns `evaluated_step`."""
        config = flags_of(self.config, self.algo) | {"steps": self.n_steps, "resume": ""}
        text = json.dumps(config, indent=1) + "\n"
        checkpoint.write_atomically(self.folder / "config.json", text)
        sets = (self.rows, *self.eval_sets.values())
        checksums = {rows.name: rows.checksum for rows in sets}
        files.keep_checksums(self.folder, checksums, resuming=self.step > 0)
        checkpoint.clean(self.folder, self.config.keep)
        if self.config.algo.endswith(".py"):
            files.keep_copy(Path(self.config.algo), self.folder, resuming=bool(self.config.resume))
        last_kept = self.step or -1
        files.rewind(self.folder / "samples.jsonl", last_kept)
        lines = files.rewind(self.folder / "metrics.jsonl", last_kept)
        is_evaluated = any(line["step"] == self.step and "reward" not in line for line in lines)
        return self.step if is_evaluated else None

    # ------------------------------------------------------------------------------------- the loop

    def steps(self) -> Iterator[int]:
        """Yield the number of each step to take, from 0. Raises Stopped after a signal."""
        with tqdm(initial=self.step, total=self.n_steps, disable=self.rank > 0) as self.bar:
            while self.step < self.n_steps:
                self.raise_if_stopped()
                self.started = time.time()
                yield self.step
                self.bar.update()

    def next_prompts(self, round_index: int) -> list[Prompt]:
        """This rank's prompts of a round of sampling, numbered over all rounds and ranks."""
        prompts = next(self.rounds)
        for prompt in prompts:
            prompt.index += round_index * self.per_round
        return prompts

    def finish_step(self, metrics: dict[str, float], groups: list[Group]) -> None:
        """Count a step, log its metrics with its times, save a checkpoint if one is due."""
        self.step += 1
        self.position += metrics["rounds"] * self.per_round
        metrics["seconds"] = time.time() - self.started
        metrics["tokens_per_second"] = metrics.pop("response_tokens") / metrics["seconds"]
        if self.device.type == "cuda":
            metrics["peak_memory"] = max_over_ranks(torch.cuda.max_memory_allocated() / 2**30)
            torch.cuda.reset_peak_memory_stats()
        self.bar.set_postfix({name: f"{metrics[name]:.3f}" for name in ("reward", "accuracy")})
        self.log(metrics)
        if metrics.get("sampler_gap", 0.0) > MAX_SAMPLER_GAP:
            self._warn(
                f"sampler_gap is above {MAX_SAMPLER_GAP}: attention or precision is wrong here, "
                "unless the algorithm samples under another image than it trains on"
            )
        self._notice_equal_rewards(metrics, groups)
        if self.step % SHOW_EVERY == 0:
            self._show_responses(groups)
        if self.is_due(self.config.save_every):
            self.save()

    def _notice_equal_rewards(self, metrics: dict[str, float], groups: list[Group]) -> None:
        """Warn after some steps in a row without any advantage: Adam would scale up their noise."""
        useful = metrics["groups_kept"]
        if not self.algo.dynamic_sampling:  # which keeps no such group
            useful -= metrics["zero_advantage_groups"]
        self.useless_steps = 0 if useful > 0 else self.useless_steps + 1
        if self.useless_steps == MAX_USELESS_STEPS:
            self._warn(
                f"in {MAX_USELESS_STEPS} steps no group had different rewards, so there is nothing "
                "to learn from: the task is too easy or too hard for this model, or --reward does "
                "not fit it"
            )
            self._show_responses(groups)

    def _warn(self, text: str) -> None:
        """Print a warning, the same text once."""
        if self.rank == 0 and text not in self.warnings:
            tqdm.write(f"warning: {text}", file=sys.stderr)
        self.warnings.add(text)

    def _show_responses(self, groups: list[Group]) -> None:
        """Print a group's best and worst response, if possible of a group where they differ."""
        if self.rank > 0 or not groups:
            return
        differing = (group for group in groups if group.rewards.min() < group.rewards.max())
        group = next(differing, groups[0])
        example = group.prompt.example
        tqdm.write(f"step {self.step}: {example.question} (answer: {example.answer})")
        by_reward = group.rewards.argsort(descending=True).tolist()
        for i in (by_reward[0], by_reward[-1]):
            tqdm.write(f"  reward {group.rewards[i]:.2f}: {group.responses[i][:SHOWN_CHARACTERS]}")

    def is_due(self, every: int) -> bool:
        """Whether something due every so many steps, and after the last, is due now; 0: never."""
        return bool(every) and (self.step % every == 0 or self.step == self.n_steps)

    def evaluation_is_due(self) -> bool:
        is_new = self.evaluated_step != self.step and bool(self.eval_sets)
        return is_new and self.is_due(self.config.eval_every)

    def log_evaluation(self, results: dict[str, list[predictions.Question]]) -> None:
        """Log avg@n of each evaluation set, and the first response to its first questions."""
        samples = []
        for name, questions in results.items():
            records = [each[0] for each in questions if each[0]["row"] < SAMPLE_ROWS]
            samples += [{"step": self.step, "set": name} | record for record in records]
        accuracies = {f"eval/{k}": predictions.mean_accuracy(v) for k, v in results.items()}
        self.evaluated_step = self.step
        self.log(accuracies, samples)

    def log(self, metrics: dict, samples: list[dict] = ()) -> None:
        """Write one line of metrics.jsonl, and samples to samples.jsonl, on the first rank."""
        if self.rank > 0:
            return
        rounded = {k: round(v, 8) if isinstance(v, float) else v for k, v in metrics.items()}
        line = {"step": self.step} | rounded
        files.append(self.folder / "metrics.jsonl", [line])
        files.append(self.folder / "samples.jsonl", samples)
        for logger in self.loggers:
            logger(line, samples)

    def save(self) -> None:
        """Save a checkpoint of the completed steps."""
        state = {"step": self.step, "position": self.position}
        with survivable(f"the checkpoint of step {self.step}"):
            models = self.policy.model, self.optimizer
            checkpoint.save(self.folder, *models, state, keep=self.config.keep)

    # -------------------------------------------------------------------------------------- the end

    def _on_signal(self, number, frame) -> None:
        self._signalled = True
        if number == signal.SIGINT:  # a second Ctrl-C waits for nothing
            signal.signal(number, signal.default_int_handler)

    def stop_requested(self) -> bool:
        """Whether this rank has had a signal."""
        return self._signalled

    def raise_if_stopped(self) -> None:
        """Raise Stopped if any rank has had a signal; all ranks call it."""
        if max_over_ranks(self.stop_requested()):
            raise Stopped

    def __exit__(self, kind, error, traceback) -> bool:
        """Save what a signal has stopped; make the user's errors one line; end threads."""
        try:
            if isinstance(error, Stopped):
                self._stop_early()
            elif isinstance(error, StepError):
                exit_with_error(error)
        finally:
            self.rounds.close()
            self.grader.close()
            if self._lock:
                self._lock.close()
        return isinstance(error, Stopped)

    def _stop_early(self) -> None:
        """Save the completed steps, unless --save_every is 0, and say how to continue."""
        if self.config.save_every and self.step:
            self.save()
        is_saved = bool(checkpoint.complete(self.folder))
        then = f"continue with --resume {self.folder}" if is_saved else "no checkpoint was saved"
        if self.rank == 0:
            print(f"stopped after step {self.step}; {then}")

    def export(self) -> None:
        """Write model/, a plain Hugging Face folder."""
        source, model_dir = self.policy.encoder.source, self.folder / "model"
        try:
            checkpoint.export(self.policy.model, source, model_dir, self.dtype)
            if self.config.lora_rank:
                adapter = self.folder / "adapter"
                from_first_rank(lambda: lora.save_adapter(self.policy.model, adapter))
        except OSError as error:
            raise StepError(
                f"{model_dir} is not written: {error}; make room, then --resume {self.folder}"
            ) from error

    def summarise(self) -> None:
        """Print accuracies before and after, a response and the files; draw the curves."""
        if self.rank > 0:
            return
        for metric, values in curves.read_metrics(self.folder).items():
            if metric.startswith("eval/"):
                name = metric.removeprefix("eval/")
                before, *_, after = [*values.values()] * 2  # a single one is both
                print(f"{name:<20} accuracy {before:.3f} before, {after:.3f} after")
        samples = files.read_log(self.folder / "samples.jsonl")
        self._show_sample([sample for sample in samples if sample["step"] == self.step])
        print(f"metrics: {self.folder}/metrics.jsonl")
        with survivable(self.folder / "curves.png"):
            print(f"curves: {curves.draw_run(self.folder)}")
        with survivable(self.folder / "samples.html"):
            title, out = f"Responses of {self.folder.name}", self.folder / "samples.html"
            if page := pages.samples(samples, self._find_example, title, out):
                print(f"samples: {page}")
        print(f"model: {self.folder}/model")

    def _show_sample(self, samples: list[dict]) -> None:
        """Print the first of these responses, and write its images."""
        example = self._find_example(samples[0]) if samples else None
        if not example:
            return
        for i, image in enumerate(example.images):
            with survivable(self.folder / f"sample{i}.png"):
                image.save(self.folder / f"sample{i}.png")
                print(f"image: {self.folder}/sample{i}.png")
        print(f"question: {example.question}")
        print(f"response: {samples[0]['predict']}")
        print(f"answer: {example.answer}")

    def _find_example(self, line: dict) -> Example | None:
        """The question of a line of samples.jsonl; None if its set is not read any more."""
        with suppress(LookupError, ValueError):
            return self.eval_sets[line["set"]][line["row"]]
