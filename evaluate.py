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

import math
import sys
from collections import Counter
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch
import torch.distributed as dist
from tqdm import tqdm

import masking
from papo import Algo
from rollout import generate
from support import StepError, attribution, benchmarks, cli, distributed, predictions
from support.ask import ask, example_of
from support.batch import Prompt, seeded
from support.cli import flag
from support.protocol import compare_or_grade, protocol_line, report, with_protocol
from support.qwen_vl import PROMPT_SUFFIX, Encoder, Policy
from support.reward import compute_score
from support.saliency import saliency_for
from support.sandbox import Grader

ENCODERS = 4  # threads that prepare the next chunk's images
# Flags that change the results: a resumed evaluation must have the same values.
DECISIVE = """model data benchmarks n eval_rows reward reward_deadline seed temperature top_p top_k
max_prompt_tokens max_new_tokens min_pixels max_pixels prompt_suffix""".split()


@dataclass
class EvalConfig:
    model: str = flag("toy", "toy, a local folder, or a hub id", group="what to evaluate")
    data: str = flag("", "toy, all, general, vision_dependent, a benchmark, file, folder or hub id")
    benchmarks: str = flag("PAPO-Galaxy/PAPO_eval", "hub id or folder of the nine benchmarks")
    protocol: str = flag("", "paper or training [paper for benchmarks]")
    n: int = flag(8, "samples per question (avg@n)")
    out: str = flag("", "folder for predictions, tables, figures; also resumes an evaluation")
    baseline: str = flag("", "folder of predictions to measure Delta_rel against")
    eval_rows: int = flag(0, "use this many rows of each set, the first usable ones; 0: all")
    reward: str = flag("", "score with path/file.py:function(response, answer)")
    reward_deadline: float = flag(2.0, "seconds to score one response; a timeout has accuracy 0")
    reward_memory: float = flag(1.0, "GiB per scoring process (Linux)")
    seed: int = flag(0, "random seed")

    ask: str = flag("", "answer one question, streamed", group="instead of evaluating")
    image: tuple = flag((), "images for --ask, before the question or at its <image> markers")
    explain: bool = flag(False, "draw the image attribution of the response to --ask or --row")
    row: str = flag("0", "for --explain: ROW or SPLIT:ROW of the data")
    masks: int = flag(8, "for --explain: how many masks to average over")
    heat_patches: int = flag(256, "for --explain: maximum number of cells in the heat map")
    grade: tuple = flag((), "grade these prediction files (ours or PAPO-Eval's)")
    compare: tuple = flag((), "plot the curves of these runs in one figure")

    temperature: float = flag(
        1.0,
        "0: greedy (the default for --ask and --explain)",
        group="sampling and sizes (toys and the paper protocol differ)",
    )
    top_p: float = flag(1.0, "nucleus sampling")
    top_k: int = flag(0, "top-k sampling; 0: off")
    max_prompt_tokens: int = flag(4096, "longest prompt in tokens; longer ones are skipped")
    max_new_tokens: int = flag(2048, "longest response in tokens")
    min_pixels: int = flag(200_704, "enlarge smaller images to this")
    max_pixels: int = flag(1_003_520, "reduce larger images to this")
    prompt_suffix: str = flag(
        PROMPT_SUFFIX, "appended to questions that lack it", shown_default="the released text"
    )
    rollout_batch: int = flag(320, "maximum number of responses sampled at a time")

    def __post_init__(self):
        cli.check_counts(self, "n", "masks", "heat_patches", "max_new_tokens", "rollout_batch")
        cli.check_not_negative(self, "top_k", "eval_rows")
        cli.check_top_p(self)
        if self.temperature < 0:
            raise ValueError(f"temperature={self.temperature}: must be at least 0")

    @property
    def sampling(self) -> dict:
        """The fields of rollout.Sampling."""
        names = ("max_new_tokens", "temperature", "top_p", "top_k", "rollout_batch")
        return {name: getattr(self, name) for name in names}

    @property
    def limits(self) -> dict:
        """Deadline and memory of the Grader."""
        return {"deadline": self.reward_deadline, "memory": self.reward_memory}


def configure(given: dict) -> EvalConfig:
    """Precedence: given flags, the protocol, the toy's defaults, EvalConfig's."""
    return cli.resolve_config(EvalConfig, with_protocol(given))


# -------------------------------------------------------------------------------------------- avg@n


def predict(
    policy: Policy, rows, grader, n: int, *, numbers=None, seed=0, progress="", **sampling
) -> Iterator[list[dict]]:
    """Sample and grade n responses to each of this rank's rows; yields records chunk by chunk.

    rows: data.Rows. numbers: indices of rows (default: all), dealt to the ranks in turn. sampling:
    the fields of rollout.Sampling, and `stop`. A record has PAPO-Eval's keys and the scores. A row
    that cannot be encoded is skipped and named. Every rank must exhaust the iterator, since each
    chunk is a collective.
    """
    numbers = list(range(len(rows)) if numbers is None else numbers)
    rank = dist.get_rank() if dist.is_initialized() else 0
    mine = numbers[rank :: distributed.world_size()]
    longest_share = math.ceil(len(numbers) / distributed.world_size())
    chunk_size = max(1, sampling.get("rollout_batch", 320) // n)
    starts = range(0, longest_share, chunk_size)
    with ThreadPoolExecutor(ENCODERS) as pool:

        def encode_chunk(start: int) -> list[tuple[int, Future]]:
            chunk = mine[start : start + chunk_size]
            encode = policy.encoder.encode
            return [(i, pool.submit(lambda i=i: encode(rows[i], i))) for i in chunk]

        following = encode_chunk(0)
        for start in tqdm(starts, desc=progress, leave=False, disable=not progress):
            encoded, following = following, encode_chunk(start + chunk_size)  # meanwhile
            prompts = []
            for number, future in encoded:
                try:
                    prompts.append(future.result())
                except ValueError as error:
                    rows.skipped[getattr(error, "kind", "not encodable")] += 1
                    row = rows.numbers[number]
                    print(f"{rows.name}: row {row} is left out: {error}", file=sys.stderr)
            groups = generate(policy, prompts, n, key=("eval", seed), **sampling)
            responses = [text for group in groups for text in group.responses]
            answers = [group.prompt.example.answer for group in groups for _ in group.responses]
            budget = scoring_limit(grader.deadline, len(responses))
            scores = grader(responses, answers, budget=budget)
            yield predictions.make_records(policy.encoder.tokenizer, groups, scores)


def scoring_limit(deadline: float, responses: int) -> float:
    """Seconds within which one process scores so many responses, though each takes its deadline and
    the process must be replaced."""
    return 60 + 2 * deadline * responses


def mean_accuracy(records: list[dict]) -> float:
    """avg@n in [0, 1] over the records of all ranks; all ranks call it."""
    correct = sum(record["accuracy"] for record in records)
    all_correct, total = distributed.sum_over_ranks([correct, len(records)])
    return all_correct / max(total, 1.0)


def evaluate(policy: Policy, sets: dict, grader, baseline, config: EvalConfig) -> None:
    """Evaluate every set; the first rank prints the table.

    With --out, records are saved after each chunk, and a resumed run skips answered questions.
    """
    results, notes = {}, [protocol_line(config)]
    with grader:
        for name, rows in sets.items():
            results[name], skipped = evaluate_set(policy, name, rows, grader, config)
            if skipped:
                kinds = ", ".join(f"{kind} {number}" for kind, number in sorted(skipped.items()))
                notes.append(f"{name}: {skipped.total()} rows left out ({kinds})")
    if dist.get_rank() == 0:
        report(config, results, baseline, notes)


def evaluate_set(policy: Policy, name: str, rows, grader, config) -> tuple[list[dict], Counter]:
    """Evaluate one set. Returns all ranks' records, and the number of skipped rows by kind."""
    rank, out = dist.get_rank(), Path(config.out)
    records, mine, skipped_at_load = [], [], Counter(rows.skipped)
    if config.out:
        records = distributed.on_first_rank(lambda: predictions.load_partial(out, name, config.n))
    answered = {record["row"] for record in records}
    how = {
        "numbers": [i for i in range(len(rows)) if i not in answered],
        "seed": config.seed,
        "progress": name if rank == 0 else "",
    }
    for new in predict(policy, rows, grader, config.n, **how, **config.sampling):
        if config.out:
            predictions.append_partial(out, name, rank, new)
        mine += new
    skipped, newly_skipped = skipped_at_load, rows.skipped - skipped_at_load
    for theirs, also_skipped in distributed.gather_over_ranks((mine, newly_skipped)):
        records = records + theirs
        skipped = skipped + also_skipped
    records.sort(key=lambda record: (record["loop"], record["row"]))
    if config.out and rank == 0:
        predictions.write_predictions(out, name, records)
    return records, skipped


# ---------------------------------------------------------------------------- one example, up close


@torch.no_grad()
def explain(policy: Policy, prompt: Prompt, config: EvalConfig) -> None:
    """Draw each token's log-prob under the image minus its mean under masked views; and, for each
    cell of the image, the drop in the tokens' log-probs when only that cell is black."""
    encoder = policy.encoder
    [group] = generate(policy, [prompt], 1, key=("explain", config.seed), **config.sampling)
    algo = Algo(**attribution.mask_settings(config.model))
    policy.saliency = saliency_for(algo.mask_strategy, config.data)
    # Images masked beforehand leave nothing to draw anew.
    n_masks = 1 if "images_aug" in prompt.more_pixel_values else config.masks
    views, patch_masks = [], []
    for number in range(n_masks):
        generator = seeded("explain", config.seed, number)
        view, patch_mask = masking.mask_prompt(prompt, algo, encoder, generator, policy.saliency)
        views.append(view)
        patch_masks.append(patch_mask)
    [clean] = attribution.log_probs(policy, group, [prompt.pixel_values])  # [T]
    progress = tqdm(views, desc="masks", leave=False)
    masked = attribution.log_probs(policy, group, progress).mean(0)
    drops = attribution.cell_drops(policy, group, clean, config.heat_patches)
    out = config.out or "explained"
    attribution.draw(encoder, group, patch_masks[0], clean, masked, drops, out)
    print(f"perception gain: {(clean - masked).mean():.3f} per token, over {n_masks} masks")


# -------------------------------------------------------------------------------------- the command


def set_up(config: EvalConfig) -> Callable[[], None]:
    """Load what --ask, --explain or an evaluation needs; returns a function that runs it."""
    slowest = scoring_limit(config.reward_deadline, config.rollout_batch)
    rank, world, device = distributed.init_distributed(scoring_seconds=slowest)
    name = cli.model_folder(config.model)
    encoder = Encoder(name, config.min_pixels, config.max_pixels, config.prompt_suffix)
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    sets = {}
    if not config.ask:
        row_limits = {"limit": config.eval_rows, "max_prompt_tokens": config.max_prompt_tokens}
        source, length = config.benchmarks, encoder.prompt_length
        sets = benchmarks.eval_sets(config.data, source=source, length=length, **row_limits)
    if config.ask or config.explain:
        if world > 1:
            raise ValueError("--ask and --explain run in one process, without torchrun")
        prompt = encoder.encode(example_of(config, sets))
        if config.explain and prompt.pixel_values is None:
            raise ValueError("--explain: the example has no image")
        policy = Policy.load(name, encoder, dtype, device, config.temperature or 1.0)
        return partial(explain if config.explain else ask, policy, prompt, config)
    if config.out:
        settings = {name: getattr(config, name) for name in DECISIVE}
        inputs = {name: settings[name] for name in ("model", "data", "benchmarks")}
        out = Path(config.out)
        distributed.on_first_rank(lambda: predictions.open_output(out, settings, inputs))
    baseline = None
    if config.baseline and rank == 0:
        how = {"n": config.n, "reward": config.reward, **config.limits}
        baseline = predictions.grade_files([config.baseline], sets, **how)
    with distributed.one_rank_at_a_time():  # host memory holds one whole copy at a time
        policy = Policy.load(name, encoder, dtype, device, config.temperature or 1.0)
    workers = 1 if world > 1 else None
    grader = Grader(config.reward or compute_score, workers, budget=slowest, **config.limits)
    return partial(evaluate, policy, sets, grader, baseline, config)


def main(argv=None) -> None:
    config = None
    try:
        with cli.one_line_errors():
            config = configure(cli.parse_flags(__doc__, EvalConfig, argv=argv))
            if config.compare or config.grade:
                return compare_or_grade(config)
            work = set_up(config)
        work()
    except KeyboardInterrupt:
        resumable = config and config.out and not (config.ask or config.explain or config.grade)
        resume = f"; --out {config.out} resumes it" if resumable else ""
        cli.exit_with_error(f"interrupted{resume}")
    except (StepError, OSError) as error:
        cli.exit_with_error(error)
    except torch.OutOfMemoryError as error:
        advice = "lower --rollout_batch, --max_new_tokens or --max_pixels"
        cli.exit_with_error(f"out of memory: {advice}. {error}")
    finally:
        if dist.is_initialized():
            dist.destroy_process_group()


if __name__ == "__main__":
    main()
