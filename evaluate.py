r"""Evaluate by the paper's protocol, grade files again, ask, explain a response, compare runs.

    python evaluate.py --model runs/papo_g-toy-s0/model
    torchrun --nproc_per_node 2 evaluate.py --model MODEL --data all
    python evaluate.py --grade predictions/*.jsonl
    python evaluate.py --model MODEL --ask "How many red dots are there?" --image dots.png
    python evaluate.py --model MODEL --explain --row SET:NUMBER
    python evaluate.py --compare runs/grpo-toy-s0 runs/papo_g-toy-s0

The paper's protocol: 8 samples per question at temperature 1, and their average accuracy (avg@8),
graded on the boxed answer alone. support/protocol.py has its other settings, predictions.py the
table. PAPO-Eval, the authors' program, samples with vLLM, truncates prompts at 9,216 tokens, aborts
at a broken image, and accepts a response without a box if the answer is "None". Here overlong and
broken rows are skipped and counted. Under torchrun, --n needs a `--` before evaluate.py, else
torchrun takes it for its own.
"""

from __future__ import annotations

import itertools
import math
import sys
from collections import Counter
from collections.abc import Iterator
from dataclasses import fields, replace
from pathlib import Path

import torch
import torch.distributed as dist
from tqdm import tqdm

from papo import Algo, algo_class
from rollout import Sampling, generate
from support import StepError, curves, distributed, pages, predictions, toy
from support import config as flags
from support.ask import ask, prompt_of
from support.batch import Prompt, seeded
from support.data import encode_ahead, eval_sets
from support.protocol import EvalConfig, configure, protocol_line
from support.qwen_vl import Encoder, Policy
from support.reward import compute_score
from support.saliency import saliency_for
from support.sandbox import Grader

MOST_PROMPTS = 256  # per chunk: the next one is encoded ahead, so two are in host memory
SCORING_SECONDS = 1200  # to score a chunk; an evaluation that takes longer ends


def predict(
    policy: Policy, rows, indices, grader, n: int, sampling: Sampling, seed: int, **options
) -> Iterator[list[predictions.Question]]:
    """Sample and grade n responses to each row, on all ranks; yields questions chunk by chunk.

    rows: data.Rows. indices: which of them, dealt to the ranks in turn. options: of generate. A
    Question is the list of the n records of a row. A record is a dict with PAPO-Eval's keys (id,
    prompt, predict, label), ours (row, and loop: the sample's number) and the scores. A row
    that cannot be encoded is skipped and named. Every rank gets all questions and must exhaust the
    iterator: a chunk is a collective.
    """
    own = indices[distributed.rank() :: distributed.world_size()]
    longest_share = math.ceil(len(indices) / distributed.world_size())
    size = max(1, min(sampling.rollout_batch // n, MOST_PROMPTS))
    # As many chunks on every rank; the last may be empty.
    starts = range(0, longest_share, size)
    # (Prompt.index, row) of each prompt: here the same number.
    chunks = [[(i, i) for i in own[start : start + size]] for start in starts]
    encoded = encode_ahead(rows, policy.encoder.encode, chunks)
    bar = {"total": len(chunks), "leave": False, "disable": distributed.rank() > 0}
    for prompts in tqdm(encoded, rows.name, **bar):
        groups = generate(policy, prompts, n, sampling, key=("eval", seed), **options)
        scores = grader.of_groups(groups, budget=SCORING_SECONDS)
        if grader.unscored:
            problem = f"{grader.unscored} responses were not scored in {SCORING_SECONDS} s"
            raise StepError(f"{problem}: lower --rollout_batch or --reward_deadline")
        of_groups = [scores[start : start + n] for start in range(0, len(scores), n)]
        tokenizer = policy.encoder.tokenizer
        questions = [
            predictions.make_question(tokenizer, *each)
            for each in zip(groups, of_groups, strict=True)
        ]
        # Ranks that are done wait here for those that still score.
        questions = distributed.concat_over_ranks(questions)
        yield sorted(questions, key=lambda question: question[0]["row"])


def validate(run) -> None:
    """In training: log avg@n of each evaluation set, and responses to look at, if it is time."""
    if not run.evaluation_is_due():
        return
    config, results = run.config, {}
    n, seed, stop = config.eval_n, config.seed, run.stop_requested
    sampling = replace(Sampling.of(config), top_p=1.0, top_k=0)  # pi itself
    for name, rows in run.eval_sets.items():
        indices = range(len(rows))
        chunks = predict(run.policy, rows, indices, run.grader, n, sampling, seed, stop=stop)
        results[name] = list(itertools.chain.from_iterable(chunks))
        run.raise_if_stopped()
    run.log_evaluation(results)


def evaluate(policy: Policy, sets: dict, config: EvalConfig) -> None:
    """Evaluate every set; the first rank prints the table. What --out holds already is not sampled
    again. --baseline: prediction files to compare with."""
    results, baseline, notes = {}, None, [protocol_line(config)]
    is_first = distributed.rank() == 0
    if is_first:
        print("\n".join(rows.summary() for rows in sets.values()))
    with flags.one_line_errors():
        distributed.from_first_rank(lambda: predictions.open_output(config))
        grader = make_grader(config)
        if config.baseline and is_first:
            baseline = predictions.grade_files([config.baseline], grader, names=sets)
    with grader:
        for name, rows in sets.items():
            results[name], left_out = evaluate_set(policy, name, rows, grader, config)
            if left_out:
                notes.append(f"{name}: left out: {dict(left_out)}")
    if is_first:
        predictions.report(results, baseline, notes, config.out)


def evaluate_set(policy: Policy, name: str, rows, grader: Grader, config: EvalConfig):
    """Evaluate one set. Returns its questions, and the number of rows left out by kind."""
    out = config.out if distributed.rank() == 0 else ""  # "" writes nothing
    questions = distributed.from_first_rank(lambda: predictions.answered(out, name))
    saved = {question[0]["row"] for question in questions}
    unanswered = [i for i in range(len(rows)) if i not in saved]
    sampling = Sampling.of(config)
    for chunk in predict(policy, rows, unanswered, grader, config.n, sampling, config.seed):
        predictions.append(out, name, chunk)
        questions += chunk
    questions.sort(key=lambda question: question[0]["row"])
    predictions.finish(out, name, questions)
    # unusable: found at loading, the same on all ranks; skipped: by this rank while encoding
    skipped = sum(distributed.gather_over_ranks(rows.skipped), Counter())
    return questions, rows.unusable + skipped


def make_grader(config: EvalConfig) -> Grader:
    function = config.reward or compute_score
    return Grader(function, deadline=config.reward_deadline, memory=config.reward_memory)


# ---------------------------------------------------------------------------- one example, up close


def explain(policy: Policy, prompt: Prompt, config: EvalConfig) -> None:
    """Sample a response, and write a page: how much likelier each token is under the image than
    under masked images, and how much of that a token owes to each part of the image."""
    algo = algo_of(config.model)  # for its views
    policy.saliency = saliency_for(algo.mask_strategy, config.data)
    views = [
        algo.view("mask", prompt, policy, seeded("explain", config.seed, number))
        for number in range(config.masks)
    ]
    if all(torch.equal(view, views[0]) for view in views):
        views = views[:1]  # a fixed view, such as that of images_aug
    key = ("explain", config.seed)
    [group] = generate(policy, [prompt], 1, Sampling.of(config), key=key)
    page = Path(config.out or "explained", "explanation.html")
    pages.explain(policy, group, views, config.heat_patches, page)
    print(f"question: {prompt.example.question.replace('<image>', '')}")
    print(f"response: {group.responses[0]}\n{page}")


def algo_of(model: str) -> Algo:
    """The algorithm and settings of the run that a model/ folder lies in, papo_g's where there is
    none. Plain Algo for a variant whose views may need image_columns: evaluations load none.
    """
    run = Path(model).parent
    saved = flags.saved_config(run) if (run / "config.json").is_file() else {}
    name = saved.get("algo", "papo_g")
    if name.endswith(".py"):
        sys.path.append(str(Path(name).parent))  # for neighbours that the file imports
        name = str(run / Path(name).name)  # the run's copy of it
    kind = algo_class(name)
    if kind.image_columns:
        kind = Algo
    return kind(**{field.name: saved[field.name] for field in fields(kind) if field.name in saved})


# -------------------------------------------------------------------------------------- the command


def load(config: EvalConfig) -> tuple[Policy, dict]:
    """The model, and the evaluation sets by name."""
    _, world, device = distributed.init_distributed(scoring_seconds=SCORING_SECONDS)
    if world > 1 and (config.ask or config.explain):
        raise ValueError("--ask and --explain run in one process, without torchrun")
    source = toy.model_folder(config.model)
    encoder = Encoder(source, config.min_pixels, config.max_pixels, config.prompt_suffix)
    limits = {"limit": config.eval_rows, "max_prompt_tokens": config.max_prompt_tokens}
    limits |= {"source": config.benchmarks, "length": encoder.prompt_length}
    sets = {} if config.ask else eval_sets(config.data, **limits)
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    with distributed.one_rank_at_a_time():  # host memory holds one whole copy at a time
        policy = Policy.load(source, encoder, dtype, device, config.temperature or 1.0)
    return policy, sets


def grade(config: EvalConfig) -> None:
    """Grade the prediction files of --grade again, and print their table."""
    with make_grader(config) as grader:
        results = predictions.grade_files(config.grade, grader)
        baseline = None
        if config.baseline:
            baseline = predictions.grade_files([config.baseline], grader, names=results)
    predictions.report(results, baseline, [], config.out)


def main(argv=None) -> None:
    flags.escape_unprintable()
    with flags.one_line_errors():
        config = configure(__doc__, argv)
        if config.compare:
            table, figure = curves.compare(config.compare, config.out)
            print(table, figure, sep="\n")
            return
        if config.grade:
            return grade(config)
        policy, sets = load(config)
        prompt = prompt_of(config, sets, policy) if config.ask or config.explain else None
    try:
        if config.explain:
            explain(policy, prompt, config)
        elif config.ask:
            ask(policy, prompt, config)
        else:
            evaluate(policy, sets, config)
    except KeyboardInterrupt:
        advice = f"; --out {config.out} resumes it" if config.out and not prompt else ""
        flags.exit_with_error(f"interrupted{advice}")
    except (StepError, OSError) as error:
        flags.exit_with_error(error)
    finally:
        dist.destroy_process_group()


if __name__ == "__main__":
    main()
