r"""Evaluate by the paper's protocol, ask one question, or draw a response's image attribution.

    python evaluate.py --model runs/papo_g-toy-s0/model
    torchrun --nproc_per_node 2 -- evaluate.py --model DIR_OR_HUB --data all --n 8 --out results
    python evaluate.py --grade predictions/*.jsonl
    python evaluate.py --model MODEL --ask "How many red dots are there?" --image dots.png
    python evaluate.py --model MODEL --explain --row vision_dependent:3
    python evaluate.py --compare runs/grpo-toy-s0 runs/papo_g-toy-s0

The paper's protocol: 8 samples per question at temperature 1, and their average accuracy (avg@8),
graded on the boxed answer alone; support/protocol.py has its other settings. Averages are plain
means over benchmarks; Delta_rel is the mean over benchmarks of the relative gain over a baseline.

PAPO-Eval, the authors' program, samples with vLLM, truncates prompts at 9,216 tokens, aborts at a
broken image, and accepts a response without a box if the answer is "None". Here overlong and broken
rows are skipped and counted. Pass@n and the bootstrap interval are ours.
"""

from __future__ import annotations

import itertools
import math
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import torch
import torch.distributed as dist
from tqdm import tqdm

import masking
from papo import Algo
from rollout import Sampling, generate
from support import StepError, attribution, benchmarks, distributed, predictions, toy
from support import config as flags
from support.ask import ask, example_of
from support.batch import Prompt, seeded
from support.data import encode_ahead
from support.protocol import (
    CHANGES_RESULTS,
    EvalConfig,
    compare_or_grade,
    configure,
    protocol_line,
    report,
)
from support.qwen_vl import Encoder, Policy
from support.reward import compute_score
from support.saliency import saliency_for
from support.sandbox import Grader

MOST_PROMPTS = 256  # per chunk: the next one is encoded ahead, so two are in host memory


# -------------------------------------------------------------------------------------------- avg@n


def predict(
    policy: Policy,
    rows,
    grader,
    n: int,
    sampling: Sampling,
    *,
    indices=None,
    seed=0,
    title="",
    **options,
) -> Iterator[list[dict]]:
    """Sample and grade n responses to each of this rank's rows; yields records chunk by chunk.

    rows: data.Rows. indices: of rows (default: all), dealt to the ranks in turn. title: of the
    progress bar. options: of rollout.generate. A record has PAPO-Eval's keys (idx, id, prompt,
    predict, label), ours (row, and loop, the sample's number) and the scores. A row that cannot be
    encoded is skipped and named. Every rank must exhaust the iterator: a chunk is a collective.
    """
    indices = list(range(len(rows)) if indices is None else indices)
    rank = dist.get_rank() if dist.is_initialized() else 0
    own = indices[rank :: distributed.world_size()]
    longest_share = math.ceil(len(indices) / distributed.world_size())
    size = max(1, min(sampling.rollout_batch // n, MOST_PROMPTS))
    # As many chunks on every rank; the last may be empty.
    chunks = [own[start : start + size] for start in range(0, longest_share, size)]
    encoded = encode_ahead(rows, policy.encoder.encode, chunks)  # Prompt.index is the row's
    for prompts in tqdm(encoded, title, len(chunks), leave=False, disable=not title):
        groups = generate(policy, prompts, n, sampling, key=("eval", seed), **options)
        responses = [text for group in groups for text in group.responses]
        examples = [group.prompt.example for group in groups for _ in group.responses]
        answers = [example.answer for example in examples]
        budget = scoring_limit(grader.deadline, len(responses))
        scores = grader(responses, answers, examples, budget=budget)
        distributed.wait_for_all()  # before the next chunk: some ranks may still score
        yield predictions.make_records(policy.encoder.tokenizer, groups, scores)


def scoring_limit(deadline: float, responses: int) -> float:
    """Seconds for one process to score so many responses in the worst case: a minute to start; per
    response its deadline, and as long again to replace the process."""
    return 60 + 2 * deadline * responses


def mean_accuracy(records: list[dict]) -> float:
    """avg@n in [0, 1] over the records of all ranks; all ranks call it."""
    correct = sum(record["accuracy"] for record in records)
    all_correct, total = distributed.sum_over_ranks([correct, len(records)])
    return all_correct / max(total, 1.0)


def validate(run) -> None:
    """In training: log avg@n of each evaluation set, and responses to look at, if it is time."""
    if not run.evaluation_is_due():
        return
    config, accuracies, records = run.config, {}, {}
    sampling = Sampling(
        config.max_new_tokens, config.temperature, rollout_batch=config.rollout_batch
    )
    for name, rows in run.eval_sets.items():
        title = f"evaluate {name}" if run.rank == 0 else ""
        options = {"title": title, "stop": lambda: run.stop_requested}
        chunks = predict(
            run.policy, rows, run.grader, config.eval_n, sampling, seed=config.seed, **options
        )
        records[name] = list(itertools.chain.from_iterable(chunks))
        run.raise_if_stopped()
        accuracies[name] = mean_accuracy(records[name])
    run.log_evaluation(accuracies, records)


def evaluate(policy: Policy, sets: dict, config: EvalConfig) -> None:
    """Evaluate every set; the first rank prints the table.

    With --out, records are saved after each chunk, and a resumed run skips answered questions.
    """
    limits = {"deadline": config.reward_deadline, "memory": config.reward_memory}
    out, is_first = Path(config.out), dist.get_rank() == 0
    baseline = None
    with flags.one_line_errors():
        if config.out:
            settings = {name: getattr(config, name) for name in CHANGES_RESULTS}
            distributed.on_first_rank(lambda: predictions.open_output(out, settings))
        if config.baseline and is_first:
            options = {"n": config.n, "reward": config.reward, **limits}
            baseline = predictions.grade_files([config.baseline], sets, **options)
        workers = 1 if distributed.world_size() > 1 else None  # None: by the number of cores
        budget = scoring_limit(config.reward_deadline, config.rollout_batch)
        grader = Grader(config.reward or compute_score, workers, budget=budget, **limits)
    results, notes = {}, [protocol_line(config)]
    with grader:
        for name, rows in sets.items():
            results[name], skipped = evaluate_set(policy, name, rows, grader, config)
            if skipped:
                kinds = ", ".join(f"{kind} {number}" for kind, number in sorted(skipped.items()))
                notes.append(f"{name}: {skipped.total()} rows left out ({kinds})")
    if is_first:
        report(config, results, baseline, notes)


def evaluate_set(policy: Policy, name: str, rows, grader, config) -> tuple[list[dict], Counter]:
    """Evaluate one set. Returns all ranks' records, and the number of skipped rows by kind."""
    rank, out = dist.get_rank(), Path(config.out)
    saved, skipped_at_load = [], Counter(rows.skipped)  # which grows while rows are encoded
    if config.out:
        saved = distributed.on_first_rank(lambda: predictions.load_partial(out, name, config.n))
    answered = {record["row"] for record in saved}
    unanswered = [i for i in range(len(rows)) if i not in answered]
    options = {"seed": config.seed, "title": name if rank == 0 else ""}
    own = []
    for records in predict(
        policy, rows, grader, config.n, Sampling.of(config), indices=unanswered, **options
    ):
        if config.out:
            predictions.append_partial(out, name, rank, records)
        own += records
    # Rows skipped at load are the same on all ranks: they count once.
    everyone = distributed.gather_over_ranks((own, rows.skipped - skipped_at_load))
    records = saved + [record for theirs, _ in everyone for record in theirs]
    records.sort(key=lambda record: (record["loop"], record["row"]))
    if config.out and rank == 0:
        predictions.write_predictions(out, name, records)
    return records, sum((skipped for _, skipped in everyone), skipped_at_load)


# ---------------------------------------------------------------------------- one example, up close


def explain(policy: Policy, prompt: Prompt, config: EvalConfig) -> None:
    """Sample a response, and draw how much likelier its tokens are than under masked images, and
    than with single cells of the image black."""
    algo = Algo(**attribution.mask_settings(config.model))  # those of its run, if known
    saliency = saliency_for(algo.mask_strategy, config.data)
    # images_aug is a fixed view: one pass is enough.
    n_masks = 1 if "images_aug" in prompt.more_pixel_values else config.masks
    views = []
    for number in range(n_masks):
        generator = seeded("explain", config.seed, number)
        views.append(masking.mask_prompt(prompt, algo, policy.encoder, generator, saliency))
    key = ("explain", config.seed)
    [group] = generate(policy, [prompt], 1, Sampling.of(config), key=key)
    attribution.explain(policy, group, views, config.heat_patches, config.out or "explained")


# -------------------------------------------------------------------------------------- the command


def load(config: EvalConfig) -> tuple[Policy, dict]:
    """The model, and the evaluation sets by name."""
    slowest = scoring_limit(config.reward_deadline, config.rollout_batch)
    _, world, device = distributed.init_distributed(scoring_seconds=slowest)
    if world > 1 and (config.ask or config.explain):
        raise ValueError("--ask and --explain run in one process, without torchrun")
    source = toy.model_folder(config.model)
    encoder = Encoder(source, config.min_pixels, config.max_pixels, config.prompt_suffix)
    sets = {}
    if not config.ask:
        limits = {"limit": config.eval_rows, "max_prompt_tokens": config.max_prompt_tokens}
        sets = benchmarks.eval_sets(
            config.data, source=config.benchmarks, length=encoder.prompt_length, **limits
        )
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    with distributed.one_rank_at_a_time():  # host memory holds one whole copy at a time
        policy = Policy.load(source, encoder, dtype, device, config.temperature or 1.0)
    return policy, sets


def main(argv=None) -> None:
    with flags.one_line_errors():
        config = configure(__doc__, argv)
        if config.compare or config.grade:
            return compare_or_grade(config)
    try:
        with flags.one_line_errors():
            policy, sets = load(config)
            prompt = None
            if config.ask or config.explain:
                prompt = policy.encoder.encode(example_of(config, sets))
            if config.explain and prompt.pixel_values is None:
                raise ValueError("--explain: the example has no image")
        if config.explain:
            explain(policy, prompt, config)
        elif config.ask:
            ask(policy, prompt, config)
        else:
            evaluate(policy, sets, config)
    except KeyboardInterrupt:
        is_resumable = config.out and not (config.ask or config.explain)
        advice = f"; --out {config.out} resumes it" if is_resumable else ""
        flags.exit_with_error(f"interrupted{advice}")
    except (StepError, OSError) as error:
        flags.exit_with_error(error)
    except torch.OutOfMemoryError as error:
        advice = "lower --rollout_batch, --max_new_tokens or --max_pixels"
        flags.exit_with_error(f"out of memory: {advice}. {error}")
    finally:
        if dist.is_initialized():
            dist.destroy_process_group()


if __name__ == "__main__":
    main()
