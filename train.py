r"""Train a vision-language model with PAPO, GRPO or DAPO, on one or more devices.

    torchrun train.py --algo papo_g                 a toy on a laptop: a tiny model counts dots
    torchrun --nproc_per_node 2 train.py --algo papo_g --model Qwen/Qwen2.5-VL-3B-Instruct

`train` is the paper's loop, GRPO or DAPO with one more term: KL_prcp, between the policy under the
image and under a masked image, is maximised. losses.py has the objective. A response thinks, then
boxes its answer: <think> ... </think> \boxed{3}. What travels through a step is a list of Groups
(support/batch.py), a prompt and its G responses each:

    group.prompt             index in the step, input_ids [P], pixel_values [N_patch, D_patch]
    group.tokens             [G, T] sampled; response_mask [G, T], True on a response's tokens
    group.rewards            [G], then advantages [G]: set by `grade`
    group.old_log_probs      [G, T], and ref_log_probs: set by papo.prepare where needed
    group.view_log_probs     "mask" -> [G, T], under the masked image: set by papo.prepare

losses.py sees several groups stacked: B responses, [B, T].

Differences from the release (each file lists its own): it samples with vLLM under Ray, and trains
bf16 weights with Kahan compensation; here every rank gathers the training weights and samples with
them, and master weights are fp32. See also `collect`.
"""

from __future__ import annotations

import time
from collections import Counter
from dataclasses import dataclass
from functools import partial

import torch
import torch.distributed as dist

from evaluate import SCORING_SECONDS, validate
from losses import group_advantages
from papo import PRESETS, Algo, algo_class, prepare, preset_settings, update
from rollout import Sampling, generate
from support import config as flags
from support import distributed, lora, toy
from support.batch import Group, mini_batches
from support.config import flag
from support.qwen_vl import PROMPT_SUFFIX, Encoder, size_of
from support.run import Run
from support.variants import variant_names

MAX_ROUNDS = 20  # of dynamic sampling, per step


def train(run: Run) -> None:
    """The loop: sample, grade, prepare, update, log."""
    config, policy = run.config, run.policy
    validate(run)  # evaluates if it is time
    for step in run.steps():
        # A variant of the algorithm may change settings over time.
        algo = run.algo.at_step(step, run.n_steps)
        key = (config.seed, step)  # seeds samples and masks

        # 1. Sample G responses per prompt, grade them, compute group-relative advantages.
        groups, metrics = collect(run, algo, key)
        # This rank's share of each mini-batch, which may be empty.
        batches = mini_batches(groups, config.mini_batch)

        # 2. Before the first update changes the policy: mask the images, and record the old,
        #    reference and masked log-probs that the objective needs, all without gradient.
        #    (run.reference is the frozen start model, None without KL_ref.)
        start = time.time()
        prepare(policy, run.reference, batches, algo, key)

        # 3. One optimizer step per mini-batch of prompts, on the objective L of losses.py.
        metrics |= update(policy, run.optimizer, batches, algo, config.max_grad_norm)
        metrics["seconds_update"] = time.time() - start

        # 4. Log; save a checkpoint and evaluate when due.
        run.finish_step(metrics, groups)
        del groups, batches  # free this step's pixels before sampling again
        validate(run)


def collect(run: Run, algo: Algo, key: tuple) -> tuple[list[Group], dict[str, float]]:
    """Sample and grade one step's groups on this rank.

    Without dynamic sampling one round has all prompts of the step. With it (DAPO) a round samples
    `mini_batch` prompts and keeps the groups whose mean accuracy is strictly between 0.01 and 0.99,
    until `prompts_per_step` prompts are kept, or MAX_ROUNDS are over: the step then trains on what
    there is. The release keeps all of a round in which no group qualifies, and raises if the last
    round leaves too few. Returns the groups to train on, and metrics over all ranks.
    """
    config, start, skipped_before = run.config, time.time(), run.rows.skipped.total()
    kept: list[Group] = []
    sums: Counter = Counter()
    sample_groups = partial(
        generate,
        run.policy,
        group_size=config.group_size,
        sampling=Sampling.of(config),
        key=key,
        stop=run.stop_requested,
    )
    for round_index in range(MAX_ROUNDS):
        # This rank's share of prompts_per_step prompts, or of mini_batch under dynamic sampling.
        # Prompt.index goes on from round to round.
        prompts = run.next_prompts(round_index)
        # By default sample_groups(prompts); policy and key are for variants.
        groups = algo.sample(prompts, run.policy, sample_groups, key)
        run.raise_if_stopped()  # on all ranks, if any has had a signal
        kept += grade(run, algo, groups, sums)
        indices = sorted(set(distributed.concat_over_ranks([group.prompt.index for group in kept])))
        if len(indices) >= config.prompts_per_step or not algo.dynamic_sampling:
            break
    # Indices grow from round to round, so this cuts the surplus of the last. What is cut is not
    # sampled again in this pass over the data.
    chosen = indices[: config.prompts_per_step]
    kept = [group for group in kept if group.prompt.index in chosen]
    # Rows that this rank could not encode.
    sums["skipped_rows"] = run.rows.skipped.total() - skipped_before
    metrics = rollout_metrics(sums) | {
        "unusable_rows": run.rows.unusable.total(),  # found at loading, the same on all ranks
        "groups_kept": len(chosen),  # counted by prompt
        "rounds": round_index + 1,
        "seconds_rollout": time.time() - start,
    }
    return kept, metrics


def grade(run: Run, algo: Algo, groups: list[Group], sums: Counter) -> list[Group]:
    """Grade the groups, set their rewards and advantages, and return those to train on. Adds counts
    to `sums`.
    """
    # All responses to a prompt are compared, even if they form two groups (see Algo.sample).
    index = torch.tensor([group.prompt.index for group in groups for _ in group.responses])
    # Per response: accuracy and format, 0 or 1, and overall = 0.9 accuracy + 0.1 format. A response
    # past --reward_deadline has accuracy 0; one left when the round's --reward_budget ran out is
    # "unscored".
    scores = run.grader.of_groups(groups)
    run.raise_if_stopped()  # a signal while scoring need not wait for the update

    def column(name: str) -> torch.Tensor:
        return torch.tensor([score.get(name, 0.0) for score in scores], dtype=torch.float64)

    rewards, accuracy = column("overall"), column("accuracy")
    # An unscored response has reward 0, which distorts its group's mean. So all responses to its
    # prompt get advantage 0: only the KLs and entropies train on them. Dynamic sampling drops them.
    is_graded = ~torch.isin(index, index[column("unscored") > 0])
    advantages = group_advantages(rewards, index).where(is_graded, 0.0).float()
    sizes = [len(group.responses) for group in groups]
    of_groups = zip(groups, rewards.split(sizes), advantages.split(sizes), strict=True)
    for group, own_rewards, own_advantages in of_groups:
        group.rewards, group.advantages = own_rewards, own_advantages

    # Rounding may leave advantages of 1e-10 where all rewards of a group are equal.
    indices_with_advantage = index[advantages.abs() > 1e-6].unique()
    sums.update(  # a Counter adds
        responses=len(scores),
        reward=float(rewards.sum()),
        accuracy=float(accuracy.sum()),
        format=float(column("format").sum()),
        truncated=sum(int(group.truncated.sum()) for group in groups),
        response_tokens=sum(int(group.response_mask.sum()) for group in groups),
        zero_advantage_groups=len(index.unique()) - len(indices_with_advantage),
        reward_timeouts=run.grader.timeouts,  # of this call
        reward_errors=run.grader.errors,
        reward_unscored=run.grader.unscored,
    )
    if not algo.dynamic_sampling:
        return groups
    mean_accuracy = {i: accuracy[index == i].mean() for i in index[is_graded].unique().tolist()}
    mixed = {i for i, mean in mean_accuracy.items() if 0.01 < mean < 0.99}
    return [group for group in groups if group.prompt.index in mixed]


def rollout_metrics(sums: Counter) -> dict[str, float]:
    """The counts of `grade` summed over all ranks, and some of them as means per response."""
    totals = dict(zip(sums, distributed.sum_over_ranks(sums.values()), strict=True))
    n = max(totals.pop("responses"), 1.0)
    for name in ("reward", "accuracy", "format", "truncated"):
        totals[name] /= n
    return totals | {"response_length": totals["response_tokens"] / n}


# -------------------------------------------------------------------------------------- the command


@dataclass
class Config(flags.Flags):
    """Flags. Training defaults follow the paper; evaluations are smaller; toys override some."""

    algo: str = flag("papo_g", f"{', '.join([*PRESETS, *variant_names()])} or path/to/FILE.py")
    model: str = flag("toy", "toy, a local Hugging Face folder, or a hub id")
    data: str = flag("PAPOGalaxy/PAPO_ViRL39K_train", "toy, toy:grid=4,..., file, folder, hub id")
    val_data: str = flag("PAPOGalaxy/PAPO_MMK12_test", "evaluation data, as --data, or none")
    reward: str = flag("", "score with path/file.py:function, which may see the row: README")
    out: str = flag("", "folder of the run; default: runs/ALGO-MODEL-sSEED")
    resume: str = flag("", "folder of a run to continue from its newest checkpoint")
    seed: int = flag(0, "random seed")
    steps: int = flag(0, "training steps; 0: derived from --epochs", low=0)
    epochs: float = flag(2.0, "passes over the data; not with --steps")
    prompts_per_step: int = flag(384, "prompts per step, over all ranks", low=1)
    group_size: int = flag(5, "responses per prompt", low=1)
    mini_batch: int = flag(128, "prompts per update, and per round of dynamic sampling", low=1)
    max_prompt_tokens: int = flag(4096, "longest prompt in tokens; longer ones are skipped")
    max_new_tokens: int = flag(2048, "longest response in tokens", low=1)
    min_pixels: int = flag(200_704, "enlarge smaller images to this")
    max_pixels: int = flag(1_003_520, "reduce larger images to this")
    prompt_suffix: str = flag(PROMPT_SUFFIX, "appended to questions that lack it")
    temperature: float = flag(1.0, "temperature of sampling and log-probs", low=1e-6)
    top_p: float = flag(0.99, "nucleus sampling", low=1e-6, high=1)
    top_k: int = flag(0, "top-k sampling; 0: off", low=0)
    reward_deadline: float = flag(2.0, "seconds to score a response", low=1e-3, high=1e6)
    reward_budget: float = flag(60.0, "seconds to score a round", low=1e-3, high=1e6)
    reward_memory: float = flag(1.0, "GiB per scoring process (Linux)", low=1e-3, high=1e6)
    lr: float = flag(1e-6, "AdamW's learning rate, constant")
    weight_decay: float = flag(1e-2, "AdamW's weight decay")
    max_grad_norm: float = flag(1.0, "gradient norm to clip at; inf: never", low=1e-6)
    freeze_vision: bool = flag(False, "train the language model only")
    lora_rank: int = flag(0, "train LoRA adapters of this rank; 0: all weights", low=0)
    lora_alpha: float = flag(32.0, "adapters are scaled by this / lora_rank", low=1e-6)
    eval_every: int = flag(50, "steps between evaluations, also before the first; 0: never", low=0)
    eval_n: int = flag(1, "samples per question in evaluations", low=1)
    eval_rows: int = flag(500, "questions per evaluation set, the first ones; 0: all", low=0)
    save_every: int = flag(50, "steps between checkpoints; also after the last; 0: never", low=0)
    keep: int = flag(2, "how many checkpoints to keep", low=1)
    wandb: bool = flag(False, "log to Weights & Biases too")
    tensorboard: bool = flag(False, "log to TensorBoard too")
    tokens_per_forward: int = flag(16_384, "most tokens per forward, a pack of groups", low=1)
    rollout_batch: int = flag(1024, "most responses sampled at a time, per rank", low=1)
    shard_size: int = flag(0, "ranks per FSDP replica; 0: those of a machine")


def build_run(argv=None) -> Run:
    """Load what the command line names; Run.start then opens the folder."""
    # Algo and model decide which flags there are and their defaults, so they are read beforehand.
    given = flags.early_flags("algo", "model", "data", "resume", "lora_rank", argv=argv)
    saved = flags.saved_config(given["resume"]) if given.get("resume") else {}
    early = {"algo": Config.algo, "model": Config.model} | saved | given
    name, model = early["algo"], toy.model_folder(early["model"])
    # From weak to strong: the dataclasses' own defaults, these from top to bottom, given flags.
    defaults = (
        preset_settings(name, size_of(model))
        | lora.defaults(early.get("lora_rank", 0))  # the learning rate of adapters
        | toy.defaults(model, early.get("data", ""))
        | saved  # the flags of the run that is resumed
    )
    classes = (Config, algo_class(name))
    config, algo = flags.parse_flags(__doc__, *classes, defaults=defaults, argv=argv)
    config.val_data = toy.data_of(model, config.val_data)  # a toy is evaluated on its own rows
    flags.check_resumed(flags.flags_of(config, algo), saved)  # but for a few
    if algo.dynamic_sampling and MAX_ROUNDS * config.mini_batch < config.prompts_per_step:
        limit = f"{MAX_ROUNDS} rounds of mini_batch={config.mini_batch} prompts"
        raise ValueError(f"{limit} cannot fill prompts_per_step={config.prompts_per_step}")
    samples_once = type(algo).sample is Algo.sample  # a variant may sample each prompt twice
    if config.group_size < 2 and samples_once:
        raise ValueError("group_size=1: give at least 2, one response has nothing to compare with")
    # The time limit of a collective: ranks wait for one that still scores its responses.
    longest = max(config.reward_budget, SCORING_SECONDS)
    ranks = distributed.init_distributed(scoring_seconds=longest)
    encoder = Encoder(model, config.min_pixels, config.max_pixels, config.prompt_suffix)
    return Run(config, algo, encoder, ranks)


def main(argv=None) -> None:
    flags.escape_unprintable()
    with flags.one_line_errors():
        run = build_run(argv)
        run.start()
    with run:  # ends a stopped or failed run properly
        train(run)
        run.export()
        run.summarise()
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
