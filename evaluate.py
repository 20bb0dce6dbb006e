r"""Where a result is believed: avg@n by the paper's protocol, PAPO-Eval's files, and what a response owes to its image.

    python evaluate.py --model runs/papo_g-toy-s0/model
    torchrun --nproc_per_node 2 -- evaluate.py --model DIR_OR_HUB --data all --n 8 --out results --baseline results_grpo
    python evaluate.py --grade predictions/*.jsonl
    python evaluate.py --ask "How many red dots are there?" --image dots.png
    python evaluate.py --model runs/papo_g-toy-s0/model --explain --row vision_dependent:3
    python evaluate.py --compare runs/grpo-toy-s0 runs/papo_g-toy-s0

The last step of the pipeline: models come from train.py, rows from data.py, responses from rollout.py, scores from
reward.py. (Without its "--" torchrun may take --n for one of its own flags.) The paper's protocol: 8 samples a question
at temperature 1; average accuracy @ 8; boxed grading without the format; averages are plain means over benchmarks, and
Delta_rel is the mean over benchmarks of the relative gain.

Against PAPO-Eval: it samples with vLLM and cuts prompts at 9,216 tokens (we leave such rows out, counted); a broken
picture ends it (we leave the row out); it calls an unboxed response right where the answer is the word None. Ours
alone: pass@n, the bootstrap interval, the shares of unboxed and truncated responses.

Also here, because train.py uses them too: flags from a dataclass (`parse`, `settle`), and where a
model's name leads (`model_folder`).
"""

from __future__ import annotations

import json
import sys
from collections import Counter
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path

import torch
import torch.distributed as dist
from tqdm import tqdm
from transformers import (
    TextStreamer,
)

import masking
from papo import Algo
from rollout import generate
from support import benchmarks, data, distributed, metrics, plots, predictions
from support.batch import Example, Prompt, seeded
from support.cli import data_of, exit_with_error, flag, model_folder, parse_flags, resolve_config
from support.distributed import (
    reduce,
)
from support.qwen_vl import PROMPT_SUFFIX, Encoder, Policy
from support.reward import compute_score
from support.sandbox import Grader

# What PAPO-Eval samples with: its script's settings and, for top_k and pixels, its program's defaults.
PROTOCOLS = {
    "paper": dict(n=8, temperature=1.0, top_p=1.0, top_k=50, max_new_tokens=2048, max_prompt_tokens=9216,
                  min_pixels=1024, max_pixels=589_824),
    "training": {},  # EvalConfig's own defaults: the sizes of training
}  # fmt: skip


HEAT = "drop of the response's log-prob when a patch alone is black"


@dataclass
class EvalConfig:
    model: str = flag("toy", "toy, a local Hugging Face folder, or a hub id")
    data: str = flag(
        "",
        "toy, all, general, vision_dependent, a benchmark, a file, folder or hub id [toy or all]",
    )
    benchmarks: str = flag(
        "PAPO-Galaxy/PAPO_eval", "where the nine benchmarks are: hub id or folder"
    )
    protocol: str = flag(
        "", "paper or training (the defaults of the flags below); default: paper for benchmarks"
    )
    n: int = flag(8, "samples a question (avg@n)")
    out: str = flag(
        "", "folder for predictions, tables and pictures; an interrupted evaluation goes on there"
    )
    baseline: str = flag(
        "", "folder of predictions (ours or PAPO-Eval's) that Delta_rel is measured against"
    )
    grade: tuple = flag(
        (), "score these files of predictions (ours or PAPO-Eval's), without a model"
    )
    ask: str = flag("", "one question, answered while you watch")
    image: tuple = flag(
        (), "pictures for --ask; without <image> markers in the question they go in front"
    )
    explain: bool = flag(
        False, "draw what one response owes to its image: to --ask, or to --row of the data"
    )
    row: str = flag("0", "for --explain: ROW, or SPLIT:ROW")
    masks: int = flag(8, "for --explain: masks averaged over")
    compare: tuple = flag((), "folders of runs to lay over one another")
    temperature: float = flag(
        1.0, "sampling temperature; 0: greedy, the default of --ask and --explain"
    )
    top_p: float = flag(1.0, "nucleus sampling")
    top_k: int = flag(0, "0: off")
    eval_rows: int = flag(0, "the first so many usable rows of each set; 0: all")
    max_prompt_tokens: int = flag(4096, "longer prompts are left out")
    max_new_tokens: int = flag(2048, "longest response")
    min_pixels: int = flag(200_704, "smaller images are enlarged")
    max_pixels: int = flag(1_003_520, "larger images are reduced")
    prompt_suffix: str = flag(PROMPT_SUFFIX, "appended to questions that lack it")
    rollout_batch: int = flag(64, "responses sampled at a time")
    reward: str = flag("", "path/file.py:function(response, answer) instead of the released rule")
    seed: int = flag(0, "of the sampling")

    def __post_init__(self):
        low = [
            name
            for name in ("n", "masks", "max_new_tokens", "rollout_batch")
            if getattr(self, name) < 1
        ]
        if low or self.temperature < 0 or not 0 < self.top_p <= 1:
            given = " ".join(
                f"{name}={getattr(self, name)}" for name in [*low, "temperature", "top_p"]
            )
            raise ValueError(
                f"{given}: counts are at least 1, temperature at least 0, top_p above 0 and at most 1"
            )


def predict(
    policy: Policy, rows, grader, n: int, rank=0, world=1, seed=0, progress="", done=(), save=lambda records: None,
    **sampling,
) -> list[dict]:  # fmt: skip
    """n graded responses to each of this rank's rows (every world-th): dicts with PAPO-Eval's keys and the scores.

    Rows that turn out broken are left out and named; those in `done` are not asked. `save` is handed the new records
    as they come. All ranks make the same number of generate() calls, because a sharded model is gathered in each.
    """
    chunk = max(1, sampling.get("rollout_batch", 64) // n)
    todo, records = [i for i in range(len(rows)) if i not in done], []
    rounds = range(0, -(-len(todo) // world), chunk)
    for start in tqdm(rounds, desc=progress, leave=False, disable=not progress):
        prompts = []
        for number in todo[rank::world][start : start + chunk]:
            try:
                prompts.append(policy.encoder.encode(rows[number], number))
            except ValueError as error:
                rows.skipped[getattr(error, "kind", "not encodable")] += 1
                print(
                    f"{rows.name}: row {rows.numbers[number]} is left out: {error}", file=sys.stderr
                )
        groups = generate(policy, prompts, n, key=("eval", seed), **sampling)
        texts = [text for group in groups for text in group.responses]
        scores = iter(grader(texts, [g.prompt.example.answer for g in groups for _ in range(n)]))
        new = []
        for group in groups:
            example = group.prompt.example
            prompt = policy.encoder.tokenizer.decode(
                group.prompt.input_ids, skip_special_tokens=True
            )
            for loop in range(n):
                score = next(scores)
                new.append({
                    "idx": group.prompt.index, "id": example.id or str(group.prompt.index), "prompt": prompt,
                    "predict": group.responses[loop], "label": example.answer, "row": group.prompt.index, "loop": loop,
                    "accuracy": score["accuracy"], "format": score["format"],
                    "unboxed": predictions.boxed(group.responses[loop]) is None, "truncated": bool(group.truncated[loop]),
                })  # fmt: skip
        save(new)
        records += new
    return records


def mean_accuracy(records: list[dict]) -> float:
    """avg@n in [0, 1] over the records of all ranks; all ranks call it."""
    total, count = reduce([sum(r["accuracy"] for r in records), len(records)])
    return total / max(count, 1.0)


def asked(config: EvalConfig, sets) -> Example:
    """The example of --ask and --image, or of --row; ValueError in one line if there is none."""
    if config.ask:
        marks = "" if "<image>" in config.ask else "<image>" * len(config.image)
        return Example(
            marks + config.ask, "", [data.read_image(path, Path()) for path in config.image]
        )
    name, _, row = config.row.rpartition(":")
    rows = sets.get(name or next(iter(sets)), ())
    if not row.isdigit() or int(row) >= len(rows):
        choices = ", ".join(f"{split}:0 to {split}:{len(rows) - 1}" for split, rows in sets.items())
        raise ValueError(f"--row {config.row}: choose one of {choices}")
    return rows[int(row)]


@torch.no_grad()
def answer(policy: Policy, prompt: Prompt, config: EvalConfig) -> None:
    """Print the response while it is generated (transformers' own generate and streamer), then what is in its box."""
    # without the token types Qwen2.5-VL falls back, silently, to one-dimensional positions
    inputs = {
        "input_ids": prompt.input_ids[None],
        "mm_token_type_ids": prompt.is_image_token[None].int(),
    }
    inputs |= {"attention_mask": torch.ones_like(prompt.input_ids[None])}
    if prompt.pixel_values is not None:
        inputs |= {"pixel_values": prompt.pixel_values, "image_grid_thw": prompt.image_grid_thw}
    how = (
        dict(temperature=config.temperature, top_p=config.top_p, top_k=config.top_k)
        if config.temperature
        else {}
    )
    torch.manual_seed(config.seed)
    response = policy.model.generate(
        **{name: value.to(policy.device) for name, value in inputs.items()}, **how, do_sample=bool(how),
        max_new_tokens=config.max_new_tokens, suppress_tokens=policy.suppressed_ids, repetition_penalty=1.0,
        streamer=TextStreamer(policy.encoder.tokenizer, skip_prompt=True, skip_special_tokens=True),
    )[0, len(prompt) :]  # fmt: skip
    found = predictions.boxed(policy.encoder.tokenizer.decode(response, skip_special_tokens=True))
    print(
        f"boxed: {found}"
        if found is not None
        else "boxed: nothing, the response holds no \\boxed{...}"
    )


@torch.no_grad()
def explain(policy: Policy, prompt: Prompt, config: EvalConfig) -> None:
    """Draw what a response owes to the image: word by word (over random masks), and patch by patch.

    Perception gain of a token: its log-prob given the image minus its mean log-prob over masked views. Heat of a merged
    patch (one image token): by how much the log-prob of the whole response drops when it alone is black.
    """
    encoder, example, out = policy.encoder, prompt.example, Path(config.out or "explained")
    out.mkdir(parents=True, exist_ok=True)
    how = {
        name: getattr(config, name) for name in ("max_new_tokens", "temperature", "top_p", "top_k")
    }
    [group] = generate(policy, [prompt], 1, key=("explain", config.seed), **how)

    def log_probs(view=None):  # [T]
        return policy.log_probs(
            [replace(group, masked_pixel_values=view)], masked=view is not None
        )[0].cpu()

    generators = (seeded("explain", config.seed, number) for number in range(config.masks))
    views, hits = zip(
        *(masking.mask_prompt(prompt, Algo(), encoder, g) for g in generators), strict=True
    )
    clean, masked = log_probs(), torch.stack([log_probs(view) for view in views]).mean(0)
    drops = []
    for start in tqdm(
        range(0, len(prompt.pixel_values), encoder.patches_per_token), desc="patches", leave=False
    ):
        view = prompt.pixel_values.clone()
        view[start : start + encoder.patches_per_token] = encoder.black_patch
        drops.append((clean - log_probs(view)).sum())
    m = encoder.images.merge_size
    shapes = [(h // m, w // m) for _, h, w in prompt.image_grid_thw.tolist()]
    parts = zip(
        example.images, hits[0].split([h * w * m * m for h, w in shapes]), shapes, strict=True
    )
    pictures = example.images_aug or [  # undoing the order of the merger
        plots.black_out_patches(image, hit.view(h, w, m, m).transpose(1, 2).reshape(h * m, w * m))
        for image, hit, (h, w) in parts
    ]
    tokens = [encoder.tokenizer.decode([token]) for token in group.tokens[0].tolist()]
    texts = dict(question=example.question.replace("<image>", ""), answer=example.answer)
    gains = plots.perception_gain(example.images, pictures, tokens, clean, masked, out, **texts)
    files = list(gains)
    for i, heat in enumerate(torch.stack(drops).split([h * w for h, w in shapes])):
        files.append(
            plots.heat_map(example.images[i], heat.view(shapes[i]), out / f"heat_map{i}.png", HEAT)
        )
    print(
        f"question: {texts['question']}\nresponse: {group.responses[0]}\nboxed: {predictions.boxed(group.responses[0])}"
    )
    print(
        f"perception gain: {(clean - masked).mean():.3f} a token, mean over {config.masks} masks",
        *files,
        sep="\n",
    )


def configure(given: dict) -> EvalConfig:
    """The config of a command: given flags over the protocol's over the toy's (for its data) over EvalConfig's own."""
    spec = data_of(given) or "all"
    protocol = given.get("protocol") or (
        "paper" if benchmarks.benchmark_names(spec) else "training"
    )
    if protocol not in PROTOCOLS:
        raise ValueError(f"--protocol {protocol}: choose one of {', '.join(PROTOCOLS)}")
    lookat = {"temperature": 0.0} if given.get("ask") or given.get("explain") else {}
    fixed = {"data": spec, "protocol": protocol, "eval_rows": given.get("eval_rows", 0)}
    return resolve_config(EvalConfig, PROTOCOLS[protocol] | lookat | given | fixed)


def protocol_line(config: EvalConfig) -> str:
    """What the numbers of a table mean."""
    rules, values = (
        PROTOCOLS[config.protocol],
        {name: getattr(config, name) for name in PROTOCOLS["paper"]},
    )
    said = [
        f"{name} {value}" + " (CHANGED)" * (rules.get(name, value) != value)
        for name, value in values.items()
    ]
    return (
        f"protocol {config.protocol}: {', '.join(said)}; the box decides, the format does not count"
    )


def report(config: EvalConfig, results: dict, baseline: dict | None, notes: list[str]) -> None:
    """Print the table with its notes; into --out, too."""
    known = benchmarks.BENCHMARKS["all"]
    every = known if {*results} <= {*known} else tuple(results)
    groups = {
        "general": benchmarks.GENERAL,
        "vision-dependent": benchmarks.VISION,
        "overall": every,
    }
    rows = metrics.summarise(results, config.n, groups, baseline)
    if {*results} & {*known}:
        notes.append(
            "the benchmarks' splits hold no free-form questions: PAPO-Eval's authors filtered them out"
        )
    notes.append(
        "interval: bootstrap over questions; unboxed: no whole \\boxed{...}; truncated: cut at max_new_tokens"
    )
    print(text := "\n".join([metrics.table(rows, config.n), *notes]))
    if config.out:
        (Path(config.out) / "table.txt").write_text(text + "\n", encoding="utf-8")
        (Path(config.out) / "table.json").write_text(
            json.dumps(rows, indent=1).replace("NaN", "null") + "\n"
        )


def without_model(config: EvalConfig) -> None:
    """--compare and --grade."""
    Path(config.out).mkdir(parents=True, exist_ok=True)
    if config.compare:
        return print(
            *reversed(plots.compare(config.compare, Path(config.out) / "compare.png")), sep="\n"
        )
    how = {"n": config.n, "reward": config.reward}
    results = predictions.grade_files(config.grade, **how)
    baseline = config.baseline and predictions.grade_files([config.baseline], results, **how)
    report(config, results, baseline, [])


def evaluate(
    policy: Policy, sets: dict, grader, baseline, config: EvalConfig, rank: int, world: int
) -> None:
    """avg@n of each set, questions shared out to the ranks, and the table on the first."""
    how = {
        k: getattr(config, k)
        for k in ("temperature", "top_p", "top_k", "max_new_tokens", "rollout_batch")
    }
    results, notes, out = {}, [protocol_line(config)], Path(config.out)
    for name, rows in sets.items():
        had = (
            distributed.on_first_rank(
                lambda name=name: predictions.load_partial(out, name, config.n)
            )
            if config.out
            else []
        )
        how |= {"done": {r["row"] for r in had}, "progress": name if rank == 0 else ""}
        if config.out:
            how["save"] = partial(predictions.append_partial, out, name, rank)
        before, parts = Counter(rows.skipped), [None] * world
        new = predict(policy, rows, grader, config.n, rank, world, config.seed, **how)
        dist.all_gather_object(parts, (new, rows.skipped - before))
        results[name] = sorted(
            had + [r for part, _ in parts for r in part], key=lambda r: (r["loop"], r["row"])
        )
        if config.out and rank == 0:
            predictions.write_predictions(out, name, results[name])
        if skipped := sum((s for _, s in parts), before):
            kinds = ", ".join(f"{kind} {count}" for kind, count in sorted(skipped.items()))
            notes.append(f"{name}: {skipped.total()} rows left out ({kinds})")
    if rank == 0:
        report(config, results, baseline, notes)


def open_output(config: EvalConfig) -> None:
    """Start the evaluation in --out, or resume the one there; ValueError if its settings differ."""
    free = "out baseline grade ask image explain row masks compare protocol rollout_batch".split()
    settings = {name: value for name, value in asdict(config).items() if name not in free}
    inputs = {name: settings[name] for name in ("model", "data", "benchmarks")}
    predictions.open_output(Path(config.out), settings, inputs)


def run(config: EvalConfig, rank: int, world: int, device: torch.device) -> None:
    """Everything that needs a model."""
    look = bool(config.ask or config.explain)
    try:
        if look and world > 1:
            raise ValueError("--ask and --explain run in one process, without torchrun")
        name = model_folder(config.model)
        encoder = Encoder(name, config.min_pixels, config.max_pixels, config.prompt_suffix)
        how = dict(
            limit=config.eval_rows,
            length=encoder.prompt_length,
            max_prompt_tokens=config.max_prompt_tokens,
        )
        sets = (
            {} if config.ask else benchmarks.eval_sets(config.data, source=config.benchmarks, **how)
        )
        prompt = encoder.encode(asked(config, sets)) if look else None
        if config.explain and prompt.pixel_values is None:
            raise ValueError("--explain: the example has no image to owe anything to")
        if config.out and not look:
            distributed.on_first_rank(lambda: open_output(config))
        baseline = (
            predictions.grade_files([config.baseline], sets, n=config.n, reward=config.reward)
            if config.baseline and rank == 0 and not look
            else None
        )
        dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
        policy = Policy.load(name, encoder, dtype, device, config.temperature or 1.0)
        grader = (
            None
            if look
            else Grader(config.reward or compute_score, 1 if world > 1 else None, budget=1e6)
        )
    except (ValueError, OSError) as error:
        exit_with_error(error)
    if look:
        return explain(policy, prompt, config) if config.explain else answer(policy, prompt, config)
    with grader:
        evaluate(policy, sets, grader, baseline, config, rank, world)


def main(argv=None) -> None:
    given = parse_flags(__doc__, EvalConfig, argv=argv)
    try:
        config = configure(given)
        if config.compare or config.grade:
            return without_model(config)
    except (ValueError, OSError) as error:
        exit_with_error(error)
    rank, world, device = distributed.init_distributed()
    try:
        run(config, rank, world, device)
    except KeyboardInterrupt:
        exit_with_error(
            f"interrupted: the same command goes on in {config.out}"
            if config.out
            else "interrupted"
        )
    finally:
        dist.destroy_process_group()


if __name__ == "__main__":
    main()
