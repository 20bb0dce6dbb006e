r"""Train a vision-language model with PAPO, or one of its relatives, on one or many devices.

    torchrun train.py --algo papo_g                               the toy, on a laptop, in minutes
    torchrun --nproc_per_node 2 train.py --algo papo_g --model Qwen/Qwen2.5-VL-3B-Instruct
    torchrun train.py --resume runs/papo_g-toy-s0 --steps 100     continue a run

Read `train` first: it is the paper's loop, top to bottom. Every rank runs it on its own share of
the prompts, from sampling to the update; no batch travels between ranks.

Differences from the released trainer:
1. No Ray and no vLLM: the weights that train are gathered in bf16 while the model samples.
2. fp32 master weights, where the release has bf16 weights with Kahan compensation.
3. Dynamic sampling: a round in which no group survives adds nothing (there it is kept whole), and
   after 20 rounds the step trains on the groups it has (there: an error).
"""

from __future__ import annotations

import dataclasses
import itertools
import sys
from dataclasses import asdict, dataclass

import torch
import torch.distributed as dist

from evaluate import mean_accuracy, predict
from losses import group_advantages
from papo import Algo, mini_batches, prepare, preset, update
from rollout import generate
from support import cli
from support.batch import Group
from support.cli import flag
from support.distributed import concat_over_ranks, init_distributed, sum_over_ranks
from support.phases import out_of_memory_message, phase
from support.qwen_vl import PROMPT_SUFFIX, Encoder
from support.run import Run, Stopped, with_saved_config
from support.sandbox import RewardError
from support.stats import RolloutStats

MAX_ROUNDS = 20  # of dynamic sampling per step


@dataclass
class Config:
    """The defaults are the paper's. A toy has its own (support/toy.py); Algo's flags follow."""

    algo: str = flag(
        "papo_g",
        "grpo, dapo, papo_g, papo_d, grpo_no_kl_ref or papo_g_no_kl_ref",
        group="what to train",
    )
    model: str = flag("toy", "toy, toy:grid=4,..., a local Hugging Face folder, or a hub id")
    data: str = flag(
        "PAPOGalaxy/PAPO_ViRL39K_train",
        "toy, toy:..., a parquet, JSON or JSONL file, a folder of these, or a hub id",
    )
    val_data: str = flag("PAPOGalaxy/PAPO_MMK12_test", "the same, for evaluation; or none")
    reward: str = flag("", "path/file.py:function(response, answer) instead of the released rule")
    out: str = flag("", "folder of the run [runs/ALGO-MODEL-sSEED]")
    resume: str = flag("", "folder of a run to continue from its newest checkpoint")
    seed: int = flag(0, "random seed")
    steps: int = flag(0, "training steps; 0: as many as the epochs give")

    epochs: float = flag(2.0, "passes over the data, where steps is 0", group="sizes")
    prompts_per_step: int = flag(384, "prompts per step, over all ranks")
    group_size: int = flag(5, "responses per prompt")
    mini_batch: int = flag(
        128, "prompts per optimizer step, over all ranks; also per round of dynamic sampling"
    )
    max_prompt_tokens: int = flag(4096, "longer prompts are left out")
    max_new_tokens: int = flag(2048, "longest response")
    min_pixels: int = flag(200_704, "smaller images are enlarged")
    max_pixels: int = flag(1_003_520, "larger images are reduced")
    prompt_suffix: str = flag(
        PROMPT_SUFFIX, "appended to questions that lack it", shown_default="the released text"
    )

    temperature: float = flag(1.0, "temperature of sampling and log-probs", group="sampling")
    top_p: float = flag(0.99, "nucleus sampling")
    top_k: int = flag(0, "top-k sampling; 0: off")
    reward_deadline: float = flag(2.0, "seconds to score one response; then it gets accuracy 0")
    reward_budget: float = flag(60.0, "seconds to score a round of sampling; the rest go unscored")
    reward_memory: float = flag(1.0, "GiB per scoring process (Linux)")

    lr: float = flag(1e-6, "AdamW's learning rate, constant", group="optimizer")
    weight_decay: float = flag(1e-2, "AdamW's weight decay")
    max_grad_norm: float = flag(1.0, "gradient clipping")
    freeze_vision: bool = flag(False, "train the language model only")

    eval_every: int = flag(
        50,
        "steps between evaluations, also before the first; 0: never",
        group="evaluate, save, log",
    )
    eval_n: int = flag(1, "samples per question in evaluations")
    eval_rows: int = flag(500, "questions of each evaluation set")
    save_every: int = flag(50, "steps between checkpoints, also after the last; 0: never")
    keep: int = flag(2, "how many checkpoints to keep")
    wandb: bool = flag(False, "log to Weights & Biases too")
    tensorboard: bool = flag(False, "log to TensorBoard too")

    tokens_per_forward: int = flag(
        16_384, "tokens per packed row in log-probs and updates", group="memory"
    )
    rollout_batch: int = flag(320, "responses that a rank samples at a time")
    offload_optimizer: bool = flag(False, "keep AdamW's state in host memory while sampling")

    def __post_init__(self):
        counts = ("prompts_per_step", "group_size", "mini_batch", "max_new_tokens", "keep")
        cli.check_counts(self, *counts, "tokens_per_forward")
        cli.check_top_p(self)
        if not self.temperature > 0:
            raise ValueError(f"temperature={self.temperature}: must be above 0")


# ----------------------------------------------------------------------------------------- the loop


def train(run: Run) -> None:
    """Sample, grade, record what the update compares with, update."""
    config, policy = run.config, run.policy
    evaluate_if_due(run)
    for step in run.steps():
        algo = run.algo.annealed(run.progress)

        # 1. Sample G responses per prompt, grade them, compare each with its own group.
        groups, metrics = collect(run, step)
        batches = mini_batches(groups, config.mini_batch)

        # 2. While the policy is still the one that sampled: mask the images, and record the old,
        #    reference and masked log-probs that the objective needs.
        metrics |= prepare(policy, run.reference, batches, algo, key=(config.seed, step))

        # 3. One optimizer step per mini-batch of prompts on losses.papo_loss:
        #    L = L_pg + beta KL_ref - gamma KL_prcp + eta1 H + eta2 H_mask
        metrics |= update(policy, run.optimizer, batches, algo, config.max_grad_norm)

        # 4. Log; save a checkpoint and evaluate where they are due.
        run.finish_step(metrics, groups)
        evaluate_if_due(run)


@phase("rollout")
def collect(run: Run, step: int) -> tuple[list[Group], dict[str, float]]:
    """Sample and grade one step's groups on this rank.

    Without dynamic sampling one round gives the step's prompts. With it (DAPO), rounds of
    `mini_batch` prompts go on until `prompts_per_step` groups are left whose mean accuracy lies
    strictly inside (0.01, 0.99), or for MAX_ROUNDS; the surplus is cut in the order of sampling.
    Returns the groups to train on and the step's rollout metrics over all ranks.
    """
    config, stats = run.config, RolloutStats()
    skipped_before = run.stream.skipped.total()
    kept: list[Group] = []
    for round_index in range(MAX_ROUNDS):
        with run.sampling():
            groups = generate(
                run.policy,
                run.next_prompts(round_index),
                config.group_size,
                key=(config.seed, step),
                max_new_tokens=config.max_new_tokens,
                top_p=config.top_p,
                top_k=config.top_k,
                rollout_batch=config.rollout_batch,
                progress=run.rank == 0,
                stop=lambda: run.stop_requested,
            )
        run.raise_if_stopped()
        kept += score(run, groups, stats)
        [n_kept] = sum_over_ranks([len(kept)])
        if n_kept >= config.prompts_per_step or not run.algo.dynamic_sampling:
            break
    if n_kept > config.prompts_per_step:
        kept = cut_surplus(kept, config.prompts_per_step)
    stats.skipped_rows = run.stream.skipped.total() - skipped_before
    metrics = stats.metrics() | {
        "unusable_rows": run.rows.skipped.total(),
        "groups_kept": min(int(n_kept), config.prompts_per_step),
        "rounds": round_index + 1,
    }
    return kept, metrics


def score(run: Run, groups: list[Group], stats: RolloutStats) -> list[Group]:
    """Grade groups and set their advantages; returns those to train on."""
    size = run.config.group_size
    responses = [text for group in groups for text in group.responses]
    answers = [group.prompt.example.answer for group in groups for _ in group.responses]
    scores = run.grader(responses, answers)
    stats.add_scores(scores, run.grader)
    rewards = torch.tensor([score["overall"] for score in scores], dtype=torch.float64)
    advantages = group_advantages(rewards, size)

    kept = []
    for i, group in enumerate(groups):
        in_group = slice(i * size, (i + 1) * size)
        correct = [score["accuracy"] for score in scores[in_group]]
        # An ungraded response has reward 0, which the others must not be compared with.
        fully_graded = not any("unscored" in score for score in scores[in_group])
        group.rewards = rewards[in_group]
        group.advantages = advantages[in_group].float() * fully_graded
        stats.add_group(group)
        informative = fully_graded and 0.01 < sum(correct) / size < 0.99
        if informative or not run.algo.dynamic_sampling:
            kept.append(group)
    return kept


def cut_surplus(groups: list[Group], n: int) -> list[Group]:
    """This rank's groups among the first n of all ranks, in the order of sampling."""
    indices = concat_over_ranks([group.prompt.index for group in groups])
    first_cut = sorted(indices)[n]
    return [group for group in groups if group.prompt.index < first_cut]


def evaluate_if_due(run: Run) -> None:
    """Log avg@n of each evaluation set, and a few decoded responses, if an evaluation is due."""
    if not run.evaluation_is_due():
        return
    config, accuracies, samples = run.config, {}, []
    for name, rows in run.eval_sets.items():
        with run.sampling():
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
            records = list(itertools.chain.from_iterable(chunks))
        accuracies[name] = mean_accuracy(records)
        samples += [{"set": name} | record for record in records[:4]]
    run.raise_if_stopped()
    run.log_evaluation(accuracies, samples)


# -------------------------------------------------------------------------------------- the command


def build_run(argv=None) -> Run:
    """The run that the command line describes, loaded but not started."""
    defaults = asdict(Config()) | asdict(Algo())
    given = with_saved_config(cli.parse_flags(__doc__, Config, Algo, argv=argv), defaults)
    config = cli.resolve_config(Config, given)
    ranks = init_distributed()
    source = cli.model_folder(config.model, config.seed)
    encoder = Encoder(source, config.min_pixels, config.max_pixels, config.prompt_suffix)
    algo_fields = {field.name for field in dataclasses.fields(Algo)} - {"name"}
    algo_flags = {name: value for name, value in given.items() if name in algo_fields}
    algo = dataclasses.replace(preset(config.algo, encoder.size), **algo_flags)
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
        with cli.one_line_errors():
            run = build_run(argv)
            run.start()
        train(run)
        finish(run)
    except Stopped:
        if run.config.save_every:
            run.save()
        if run.rank == 0:
            print(f"stopped after step {run.step}: --resume {run.folder} continues")
    except RewardError as error:
        cli.exit_with_error(error)
    except torch.OutOfMemoryError as error:
        sys.exit(f"rank {dist.get_rank()}: {out_of_memory_message(error)}")
    finally:
        if run:
            run.close()
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
