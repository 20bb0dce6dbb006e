r"""Train a vision-language model with PAPO, GRPO or DAPO, on one or more devices.

    torchrun train.py --algo papo_g                               the toy, on a laptop, in minutes
    torchrun --nproc_per_node 2 train.py --algo papo_g --model Qwen/Qwen2.5-VL-3B-Instruct
    torchrun train.py --resume runs/papo_g-toy-s0 --steps 100     continue a run

Read `train` first: it is the paper's loop, top to bottom. It passes on a list of Groups: one prompt
and its G responses each (support/batch.py). Every rank samples and trains on its own prompts; no
batch travels between ranks.

Differences from the released trainer:
1. No Ray and no vLLM: sampling uses the training weights themselves, gathered on every rank.
2. fp32 master weights; the release has bf16 weights with Kahan compensation.
3. A round of dynamic sampling in which no group survives adds nothing; the release keeps the whole
   round. After 20 rounds the step trains on what it has; the release raises an error.
"""

from __future__ import annotations

import itertools
import time
from collections import Counter
from dataclasses import asdict, dataclass

import torch
import torch.distributed as dist

from evaluate import mean_accuracy, predict, scoring_limit
from losses import group_advantages
from papo import PRESETS, Algo, algo_class, mini_batches, prepare, preset, update
from rollout import generate
from support import cli
from support.batch import Group, Prompt, by_prompt, set_shares
from support.cli import flag
from support.distributed import concat_over_ranks, init_distributed, sum_over_ranks
from support.qwen_vl import PROMPT_SUFFIX, Encoder
from support.run import Run, Stopped, step_errors
from support.run_folder import with_saved_config
from support.variants import sampling_pairs, variant_names

MAX_ROUNDS = 20  # of dynamic sampling, per step
# What a step counts while it samples.
SUMS = """responses reward accuracy format truncated response_tokens zero_advantage_groups
skipped_rows reward_timeouts reward_errors reward_unscored""".split()


@dataclass
class Config:
    """Flags. Training defaults follow the paper; evaluations are smaller; toys override some."""

    algo: str = flag(
        "papo_g",
        f"{', '.join([*PRESETS, *variant_names()])} or path/to/FILE.py",
        group="what to train",
    )
    model: str = flag("toy", "toy, toy:grid=4,..., a local Hugging Face folder, or a hub id")
    data: str = flag(
        "PAPOGalaxy/PAPO_ViRL39K_train",
        "toy, toy:..., a parquet, JSON or JSONL file, a folder of these, or a hub id",
    )
    val_data: str = flag("PAPOGalaxy/PAPO_MMK12_test", "evaluation data, as --data, or none")
    reward: str = flag("", "score with path/file.py:function, see README")
    out: str = flag("", "folder of the run [runs/ALGO-MODEL-sSEED]")
    resume: str = flag("", "folder of a run to continue from its newest checkpoint")
    seed: int = flag(0, "random seed")
    steps: int = flag(0, "training steps; 0: derived from --epochs")

    epochs: float = flag(2.0, "passes over the data; not with --steps", group="sizes (toys differ)")
    prompts_per_step: int = flag(384, "prompts per step, over all ranks")
    group_size: int = flag(5, "responses per prompt")
    mini_batch: int = flag(128, "prompts per optimizer step and per round of dynamic sampling")
    max_prompt_tokens: int = flag(4096, "longest prompt in tokens; longer ones are skipped")
    max_new_tokens: int = flag(2048, "longest response in tokens")
    min_pixels: int = flag(200_704, "enlarge smaller images to this")
    max_pixels: int = flag(1_003_520, "reduce larger images to this")
    prompt_suffix: str = flag(
        PROMPT_SUFFIX, "appended to questions that lack it", shown_default="the released text"
    )

    temperature: float = flag(1.0, "temperature of sampling and log-probs", group="sampling")
    top_p: float = flag(0.99, "nucleus sampling")
    top_k: int = flag(0, "top-k sampling; 0: off")
    reward_deadline: float = flag(2.0, "seconds to score one response; a timeout has accuracy 0")
    reward_budget: float = flag(60.0, "seconds to score one round; the rest stay unscored")
    reward_memory: float = flag(1.0, "GiB per scoring process (Linux)")

    lr: float = flag(1e-6, "AdamW's learning rate, constant", group="optimizer (toys differ)")
    weight_decay: float = flag(1e-2, "AdamW's weight decay")
    max_grad_norm: float = flag(1.0, "gradient norm to clip at; inf: never")
    freeze_vision: bool = flag(False, "train the language model only")

    eval_every: int = flag(
        50,
        "steps between evaluations; also before the first and after the last; 0: never",
        group="evaluate and save",
    )
    eval_n: int = flag(1, "samples per question in evaluations")
    eval_rows: int = flag(500, "questions per evaluation set, the first ones; 0: all")
    save_every: int = flag(50, "steps between checkpoints; also after the last; 0: never")
    keep: int = flag(2, "how many checkpoints to keep")
    wandb: bool = flag(False, "log to Weights & Biases too")
    tensorboard: bool = flag(False, "log to TensorBoard too")

    tokens_per_forward: int = flag(16_384, "most tokens per packed row", group="memory")
    rollout_batch: int = flag(1024, "maximum number of responses sampled at a time, per rank")
    shard_size: int = flag(0, "ranks that split one copy of the weights; 0: those of a machine")

    def __post_init__(self):
        cli.check_counts(self, "prompts_per_step", "group_size", "mini_batch", "max_new_tokens")
        cli.check_counts(self, "eval_n", "keep", "tokens_per_forward", "rollout_batch")
        cli.check_not_negative(self, "steps", "top_k", "eval_every", "eval_rows", "save_every")
        cli.check_positive(self, "temperature", "max_grad_norm")
        cli.check_top_p(self)


# ----------------------------------------------------------------------------------------- the loop


def train(run: Run) -> None:
    """The loop: sample, grade, record log-probs, update."""
    config, policy = run.config, run.policy
    evaluate_if_due(run)
    for step in run.steps():
        algo = run.algo.annealed(step, run.last_step)

        # 1. Sample G responses per prompt, grade them, compute group-relative advantages.
        groups, metrics = collect(run, algo, step)
        batches = mini_batches(groups, config.mini_batch)
        update_start = time.time()

        # 2. Before the first update changes the policy: mask the images, and record the old,
        #    reference and masked log-probs that the objective needs.
        metrics |= prepare(policy, run.reference, batches, algo, key=(config.seed, step))

        # 3. One optimizer step per mini-batch of prompts on losses.papo_loss:
        #    L = L_pg + beta KL_ref - gamma KL_prcp + eta1 H + eta2 H_mask
        metrics |= update(policy, run.optimizer, batches, algo, config.max_grad_norm)
        metrics["seconds_update"] = time.time() - update_start

        # 4. Log; save a checkpoint and evaluate when due.
        run.finish_step(metrics, groups)
        del groups, batches  # their pixels, before the next step's are sampled
        evaluate_if_due(run)


def collect(run: Run, algo: Algo, step: int) -> tuple[list[Group], dict[str, float]]:
    """Sample and grade one step's groups on this rank.

    Without dynamic sampling one round has all prompts of the step. With it (DAPO) a round samples
    `mini_batch` prompts and keeps the groups whose mean accuracy is strictly between 0.01 and 0.99.
    Rounds stop at `prompts_per_step` kept prompts or after MAX_ROUNDS; surplus prompts are dropped,
    last sampled first. Returns the groups to train on and rollout metrics over all ranks.
    """
    config, sums, start = run.config, Counter(), time.time()
    skipped_before = run.stream.skipped.total()
    kept: list[Group] = []
    for round_index in range(MAX_ROUNDS):
        groups = sample(run, algo, run.next_prompts(round_index), key=(config.seed, step))
        kept += grade(run, algo, groups, sums)
        n_kept = int(sum_over_ranks([len(by_prompt(kept))])[0])
        if n_kept >= config.prompts_per_step or not algo.dynamic_sampling:
            break
    if n_kept > config.prompts_per_step:
        indices = set(concat_over_ranks([group.prompt.index for group in kept]))
        first_dropped = sorted(indices)[config.prompts_per_step]
        kept = [group for group in kept if group.prompt.index < first_dropped]
    sums["skipped_rows"] = run.stream.skipped.total() - skipped_before
    metrics = means_over_ranks(sums) | {
        "unusable_rows": run.rows.skipped.total(),
        "groups_kept": min(n_kept, config.prompts_per_step),
        "rounds": round_index + 1,
        "seconds_rollout": time.time() - start,
    }
    return kept, metrics


def means_over_ranks(sums: Counter) -> dict[str, float]:
    """Over all ranks: means per response, then the other sums."""
    totals = dict(zip(SUMS, sum_over_ranks([sums[name] for name in SUMS]), strict=True))
    n = max(totals.pop("responses"), 1.0)
    for name in ("reward", "accuracy", "format", "truncated"):
        totals[name] /= n
    return totals | {"response_length": totals["response_tokens"] / n}


def sample(run: Run, algo: Algo, prompts: list[Prompt], key: tuple) -> list[Group]:
    """Sample the groups of these prompts, one for each pair of `Algo.images`, in their order."""
    config = run.config
    pairs = sampling_pairs(algo, prompts, run.policy, config.group_size, key)
    groups = generate(
        run.policy,
        [sampled for sampled, _ in pairs],
        config.group_size,
        key=key,
        max_new_tokens=config.max_new_tokens,
        top_p=config.top_p,
        top_k=config.top_k,
        rollout_batch=config.rollout_batch,
        progress=run.rank == 0,
        stop=lambda: run.stop_requested,
    )
    run.raise_if_stopped()
    for group, (_, trained) in zip(groups, pairs, strict=True):
        group.prompt = trained
    return groups


def grade(run: Run, algo: Algo, groups: list[Group], sums: Counter) -> list[Group]:
    """Grade the groups, set their advantages, and return those to train on.

    All responses to a prompt are compared, even if a variant has several groups per prompt.
    """
    responses = [text for group in groups for text in group.responses]
    answers = [group.prompt.example.answer for group in groups for _ in group.responses]
    scores = run.grader(responses, answers)
    run.raise_if_stopped()
    for name, key in (("reward", "overall"), ("accuracy", "accuracy"), ("format", "format")):
        sums[name] += sum(score[key] for score in scores)
    sums["responses"] += len(scores)
    sums["reward_timeouts"] += run.grader.timeouts
    sums["reward_errors"] += run.grader.errors
    sums["reward_unscored"] += run.grader.unscored
    remaining = iter(scores)
    kept = []
    for same_prompt in by_prompt(groups):
        size = sum(len(group.tokens) for group in same_prompt)
        its_scores = list(itertools.islice(remaining, size))
        accuracy = sum(score["accuracy"] for score in its_scores) / size
        rewards = torch.tensor([score["overall"] for score in its_scores], dtype=torch.float64)
        advantages = group_advantages(rewards, size).float()
        fully_graded = not any("unscored" in score for score in its_scores)
        if not fully_graded:  # an unscored response counts as 0, which distorts the mean
            advantages = torch.zeros(size)
        set_shares(same_prompt, "rewards", rewards)
        set_shares(same_prompt, "advantages", advantages)
        for group in same_prompt:
            sums["truncated"] += int(group.truncated.sum())
            sums["response_tokens"] += int(group.response_mask.sum())
        # Equal rewards leave about 1e-10.
        sums["zero_advantage_groups"] += bool(advantages.abs().max() < 1e-6)
        is_mixed = fully_graded and 0.01 < accuracy < 0.99
        if is_mixed or not algo.dynamic_sampling:
            kept += same_prompt
    return kept


def evaluate_if_due(run: Run) -> None:
    """Log avg@n of each evaluation set, and a few responses to look at, if it is time."""
    if not run.evaluation_is_due():
        return
    config, accuracies, records = run.config, {}, {}
    for name, rows in run.eval_sets.items():
        chunks = predict(
            run.policy,
            rows,
            run.grader,
            config.eval_n,
            seed=config.seed,
            progress=f"evaluate {name}" if run.rank == 0 else "",
            max_new_tokens=config.max_new_tokens,
            rollout_batch=config.rollout_batch,
            stop=lambda: run.stop_requested,
        )
        records[name] = list(itertools.chain.from_iterable(chunks))
        run.raise_if_stopped()
        accuracies[name] = mean_accuracy(records[name])
    run.log_evaluation(accuracies, records)


# -------------------------------------------------------------------------------------- the command


def build_run(argv=None) -> Run:
    """Build the run from the command line. It is loaded but not started."""
    early = with_saved_config(cli.early_flags("algo", "resume", argv=argv), {})
    name = early.get("algo", Config.algo)
    objective = algo_class(name)  # which has flags, too
    defaults = asdict(Config()) | asdict(objective(name=name))
    given = with_saved_config(cli.parse_flags(__doc__, Config, objective, argv=argv), defaults)
    config = cli.resolve_config(Config, given)
    of_evaluations = scoring_limit(config.reward_deadline, config.rollout_batch)
    slowest = max(config.reward_budget, of_evaluations)
    ranks = init_distributed(scoring_seconds=slowest)
    source = cli.model_folder(config.model, config.seed)
    encoder = Encoder(source, config.min_pixels, config.max_pixels, config.prompt_suffix)
    algo = cli.with_flags(preset(config.algo, encoder.size), given)
    if algo.dynamic_sampling and MAX_ROUNDS * config.mini_batch < config.prompts_per_step:
        limit = f"{MAX_ROUNDS} rounds of mini_batch={config.mini_batch} prompts"
        raise ValueError(f"{limit} cannot fill prompts_per_step={config.prompts_per_step}")
    return Run(config, algo, encoder, ranks)


def finish(run: Run) -> None:
    """Export the model, sample one response to show, draw the curves, print a summary."""
    run.export()
    key = ("sample", run.config.seed)
    longest = run.config.max_new_tokens
    [sample] = generate(run.policy, [run.sample_prompt()], 1, key=key, max_new_tokens=longest)
    run.summarise(sample)


def main(argv=None) -> None:
    run = None
    try:
        with step_errors():
            with cli.one_line_errors():
                run = build_run(argv)
                run.start()
            train(run)
            finish(run)
    except Stopped:
        run.stop_early()
    finally:
        if run:
            run.close()
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
