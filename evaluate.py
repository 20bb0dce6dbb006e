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

import argparse
import dataclasses
import difflib
import json
import os
import shutil
import sys
import time
from collections import Counter
from contextlib import suppress
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

import torch
import torch.distributed as dist
from mathruler.grader import extract_boxed_content
from tqdm import tqdm
from transformers import AutoConfig, TextStreamer

import checkpoint
import data
import masking
import plots
import toy
from papo import PROMPT_SUFFIX, Algo, Encoder, Example, Policy, Prompt, flag, reduce, seeded
from reward import Grader, compute_score, rewrite
from rollout import generate

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
    data: str = flag("", "toy, all, general, vision_dependent, a benchmark, a file, folder or hub id [toy or all]")
    benchmarks: str = flag("PAPO-Galaxy/PAPO_eval", "where the nine benchmarks are: hub id or folder")
    protocol: str = flag("", "paper or training (the defaults of the flags below); default: paper for benchmarks")
    n: int = flag(8, "samples a question (avg@n)")
    out: str = flag("", "folder for predictions, tables and pictures; an interrupted evaluation goes on there")
    baseline: str = flag("", "folder of predictions (ours or PAPO-Eval's) that Delta_rel is measured against")
    grade: tuple = flag((), "score these files of predictions (ours or PAPO-Eval's), without a model")
    ask: str = flag("", "one question, answered while you watch")
    image: tuple = flag((), "pictures for --ask; without <image> markers in the question they go in front")
    explain: bool = flag(False, "draw what one response owes to its image: to --ask, or to --row of the data")
    row: str = flag("0", "for --explain: ROW, or SPLIT:ROW")
    masks: int = flag(8, "for --explain: masks averaged over")
    compare: tuple = flag((), "folders of runs to lay over one another")
    temperature: float = flag(1.0, "sampling temperature; 0: greedy, the default of --ask and --explain")
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
        low = [name for name in ("n", "masks", "max_new_tokens", "rollout_batch") if getattr(self, name) < 1]
        if low or self.temperature < 0 or not 0 < self.top_p <= 1:
            given = " ".join(f"{name}={getattr(self, name)}" for name in [*low, "temperature", "top_p"])
            raise ValueError(f"{given}: counts are at least 1, temperature at least 0, top_p above 0 and at most 1")


class Parser(argparse.ArgumentParser):
    """argparse whose errors are one line that names the choices, printed by one rank."""

    def error(self, message: str):
        if message.startswith("unrecognized arguments: "):
            name = message.removeprefix("unrecognized arguments: ").split()[0].split("=")[0]
            flags = sorted(s for s in self._option_string_actions if s.startswith("--") and not s.startswith("--no-"))
            close = difflib.get_close_matches(name, flags, 1)
            hint = f"did you mean {close[0]}? " if close else ""
            message = f"unknown flag {name}: {hint}the flags are {' '.join(flags)}"
        fail(message)


def fail(message) -> None:
    """End the program with one line on standard error and exit status 2."""
    if os.environ.get("RANK", "0") != "0":  # the first rank says it and torchrun ends this one, unless it is alone
        time.sleep(3)
    text = str(message).strip() or repr(message)
    print(f"{Path(sys.argv[0]).name}: error: {text.splitlines()[0]}", file=sys.stderr, flush=True)
    raise SystemExit(2)


def parse(doc: str, *classes, argv=None) -> dict:
    """The flags that were given, by name; each field of the dataclasses is one flag."""
    about = dict(description=doc.strip().splitlines()[0], usage="%(prog)s [--flag value ...]")
    parser = Parser(**about, allow_abbrev=False, argument_default=argparse.SUPPRESS)
    for cls in classes:
        for f in (f for f in dataclasses.fields(cls) if f.name != "name"):
            kind = type(f.default)
            how = {"action": argparse.BooleanOptionalAction} if kind is bool else {"type": kind, "metavar": ""}
            how = {"nargs": "+", "metavar": ""} if kind is tuple else how
            text = f.metadata["doc"]
            shown = "" if f.default in ("", (), PROMPT_SUFFIX) else f" [{'preset' if cls is Algo else f.default}]"
            parser.add_argument(f"--{f.name}", help=(text + shown).replace("%", "%%"), **how)
    return vars(parser.parse_args(argv))


def model_folder(name: str, seed: int = 0) -> str:
    """Where a model's name leads: a toy is made (once, by the first rank) and becomes a folder like any other."""
    if not (setting := toy.setting_of(name)):
        return name
    checkpoint.on_first_rank(lambda: toy.build(seed, setting=setting))
    return str(toy.build(seed, setting=setting))


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
                print(f"{rows.name}: row {rows.numbers[number]} is left out: {error}", file=sys.stderr)
        groups = generate(policy, prompts, n, key=("eval", seed), **sampling)
        texts = [text for group in groups for text in group.responses]
        scores = iter(grader(texts, [g.prompt.example.answer for g in groups for _ in range(n)]))
        new = []
        for group in groups:
            example = group.prompt.example
            prompt = policy.encoder.tokenizer.decode(group.prompt.input_ids, skip_special_tokens=True)
            for loop in range(n):
                score = next(scores)
                new.append({
                    "idx": group.prompt.index, "id": example.id or str(group.prompt.index), "prompt": prompt,
                    "predict": group.responses[loop], "label": example.answer, "row": group.prompt.index, "loop": loop,
                    "accuracy": score["accuracy"], "format": score["format"],
                    "unboxed": boxed(group.responses[loop]) is None, "truncated": bool(group.truncated[loop]),
                })  # fmt: skip
        save(new)
        records += new
    return records


def mean_accuracy(records: list[dict]) -> float:
    """avg@n in [0, 1] over the records of all ranks; all ranks call it."""
    total, count = reduce([sum(r["accuracy"] for r in records), len(records)])
    return total / max(count, 1.0)


# ------------------------------------------------------------------------------------------- predictions in files


def boxed(text: str) -> str | None:
    """What the last box of a response holds, read as the grader reads it; None where there is no whole box."""
    content = extract_boxed_content(rewrite(text))
    return None if content == "None" else content


def grade_files(paths, config: EvalConfig, names=()) -> dict[str, list[dict]]:
    """Name -> records, graded anew, of files of predictions or folders of such: all, or `names`.

    ValueError, in one line, where one of these is missing or a question's count is no multiple of n.
    """
    files = [file for p in map(Path, paths) for file in (sorted(p.glob("*.jsonl")) if p.is_dir() else [p])]
    found = {data.ALIASES.get(file.stem, file.stem): file for file in files}
    if not files or len(found) < len(files) or not {*names} <= {*found}:
        wanted, there = ", ".join(names or found or ["a set"]), ", ".join(file.name for file in files)
        raise ValueError(f"{' '.join(map(str, paths))}: one NAME.jsonl for {wanted} expected, found {there or 'none'}")
    results = {name: data.read_predictions(found[name]) for name in names or found}
    with Grader(config.reward or compute_score, budget=1e6) as grader:
        for name, records in results.items():
            plots.in_questions(name, records, config.n)
            scores = grader([r["predict"] for r in records], [r["label"] for r in records])
            for record, score in zip(records, scores, strict=True):
                record |= score | {"unboxed": boxed(record["predict"]) is None}
    return results


def claim(out: Path, config: EvalConfig) -> None:
    """Make --out this evaluation's, or go on with it; ValueError where it holds one with other settings."""
    free = "out baseline grade ask image explain row masks compare protocol rollout_batch".split()
    settings = {k: v for k, v in dataclasses.asdict(config).items() if k not in free}
    for name in ("model", "data", "benchmarks"):  # the same name, but other files?
        path = Path(getattr(config, name)).expanduser()
        files = [f for f in (sorted(path.glob("*")) if path.is_dir() else [path]) if f.is_file()]
        settings[f"files of {name}"] = [[f.name, f.stat().st_size, f.stat().st_mtime] for f in files]
    out.mkdir(parents=True, exist_ok=True)
    file = out / "evaluation.json"
    if not file.exists() and (others := sorted(p.name for p in out.glob("*.json*"))):
        raise ValueError(f"--out {out} holds {others[0]} and no evaluation: choose another folder")
    saved = json.loads(file.read_text()) if file.exists() else settings
    if changed := [f"{name} {str(saved.get(name))[:60]}" for name in settings if settings[name] != saved.get(name)]:
        raise ValueError(f"--out {out} holds an evaluation with {', '.join(changed)}: choose another folder")
    file.write_text(json.dumps(settings, indent=1) + "\n")


def kept(out: Path, name: str, n: int) -> list[dict]:
    """The records that --out keeps of a set, of questions with all n: what there is after an interruption."""
    found = {}
    for file in (out / f"{name}.jsonl", *(out / "partial" / name).glob("*.jsonl")):
        for line in file.read_text(encoding="utf-8", errors="replace").split("\n") if file.exists() else []:
            with suppress(json.JSONDecodeError):  # a killed run's last line
                record = json.loads(line)
                found[record["row"], record["loop"]] = record
    counts = Counter(row for row, _ in found)
    return [record for (row, _), record in found.items() if counts[row] == n]


def keep(out: Path, name: str, rank: int, records: list[dict]) -> None:
    """Append to this rank's part: on the disk before the next question is asked."""
    file = out / "partial" / name / f"{rank}.jsonl"
    file.parent.mkdir(parents=True, exist_ok=True)
    with open(file, "a", encoding="utf-8") as part:
        part.write("\n" + "".join(json.dumps(r, ensure_ascii=False) + "\n" for r in records))  # "\n": after a torn line
        part.flush()
        os.fsync(part.fileno())


def finish(out: Path, name: str, records: list[dict]) -> None:
    """Write NAME.jsonl as PAPO-Eval does, loop after loop over the whole set, idx counting the lines."""
    half = out / f".{name}.half"
    lines = (json.dumps(r | {"idx": i}, ensure_ascii=False) + "\n" for i, r in enumerate(records))
    half.write_text("".join(lines), encoding="utf-8")
    os.replace(half, out / f"{name}.jsonl")
    shutil.rmtree(out / "partial" / name, ignore_errors=True)


# ------------------------------------------------------------------------------------------- one example, looked at


def asked(config: EvalConfig, sets) -> Example:
    """The example of --ask and --image, or of --row; ValueError in one line if there is none."""
    if config.ask:
        marks = "" if "<image>" in config.ask else "<image>" * len(config.image)
        return Example(marks + config.ask, "", [data.read_image(path, Path()) for path in config.image])
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
    inputs = {"input_ids": prompt.input_ids[None], "mm_token_type_ids": prompt.image_mask[None].int()}
    inputs |= {"attention_mask": torch.ones_like(prompt.input_ids[None])}
    if prompt.pixel_values is not None:
        inputs |= {"pixel_values": prompt.pixel_values, "image_grid_thw": prompt.image_grid_thw}
    how = dict(temperature=config.temperature, top_p=config.top_p, top_k=config.top_k) if config.temperature else {}
    torch.manual_seed(config.seed)
    response = policy.model.generate(
        **{name: value.to(policy.device) for name, value in inputs.items()}, **how, do_sample=bool(how),
        max_new_tokens=config.max_new_tokens, suppress_tokens=policy.suppressed_ids, repetition_penalty=1.0,
        streamer=TextStreamer(policy.encoder.tokenizer, skip_prompt=True, skip_special_tokens=True),
    )[0, len(prompt) :]  # fmt: skip
    found = boxed(policy.encoder.tokenizer.decode(response, skip_special_tokens=True))
    print(f"boxed: {found}" if found is not None else "boxed: nothing, the response holds no \\boxed{...}")


@torch.no_grad()
def explain(policy: Policy, prompt: Prompt, config: EvalConfig) -> None:
    """Draw what a response owes to the image: word by word (over random masks), and patch by patch.

    Perception gain of a token: its log-prob given the image minus its mean log-prob over masked views. Heat of a merged
    patch (one image token): by how much the log-prob of the whole response drops when it alone is black.
    """
    encoder, example, out = policy.encoder, prompt.example, Path(config.out or "explained")
    out.mkdir(parents=True, exist_ok=True)
    how = {name: getattr(config, name) for name in ("max_new_tokens", "temperature", "top_p", "top_k")}
    [group] = generate(policy, [prompt], 1, key=("explain", config.seed), **how)

    def log_probs(view=None):  # [T]
        return policy.log_probs([replace(group, masked_pixel_values=view)], masked=view is not None)[0].cpu()

    generators = (seeded("explain", config.seed, number) for number in range(config.masks))
    views, hits = zip(*(masking.mask_prompt(prompt, Algo(), encoder, g) for g in generators), strict=True)
    clean, masked = log_probs(), torch.stack([log_probs(view) for view in views]).mean(0)
    drops = []
    for start in tqdm(range(0, len(prompt.pixel_values), encoder.merged), desc="patches", leave=False):
        view = prompt.pixel_values.clone()
        view[start : start + encoder.merged] = encoder.black
        drops.append((clean - log_probs(view)).sum())
    m = encoder.images.merge_size
    shapes = [(h // m, w // m) for _, h, w in prompt.image_grid_thw.tolist()]
    parts = zip(example.images, hits[0].split([h * w * m * m for h, w in shapes]), shapes, strict=True)
    pictures = example.images_aug or [  # undoing the order of the merger
        plots.blacken(image, hit.view(h, w, m, m).transpose(1, 2).reshape(h * m, w * m)) for image, hit, (h, w) in parts
    ]
    tokens = [encoder.tokenizer.decode([token]) for token in group.tokens[0].tolist()]
    files = [out / "perception_gain.png", out / "perception_gain.html"]
    texts = dict(question=example.question.replace("<image>", ""), answer=example.answer)
    plots.perception_gain(example.images, pictures, tokens, clean, masked, *files, **texts)
    for i, heat in enumerate(torch.stack(drops).split([h * w for h, w in shapes])):
        files.append(plots.heat_map(example.images[i], heat.view(shapes[i]), out / f"heat_map{i}.png", HEAT))
    print(f"question: {texts['question']}\nresponse: {group.responses[0]}\nboxed: {boxed(group.responses[0])}")
    print(f"perception gain: {(clean - masked).mean():.3f} a token, mean over {config.masks} masks", *files, sep="\n")


# ------------------------------------------------------------------------------------------- the command


def data_of(given: dict) -> str:
    """The data that the flags mean: where they name none, a toy's for a model of that name or with so few words."""
    model = given.get("model", "toy")
    if given.get("data") or toy.setting_of(model):
        return given.get("data") or model
    few = Path(model).is_dir() and AutoConfig.from_pretrained(model).get_text_config().vocab_size < 1000
    return "toy" if few else ""


def settle(cls, given: dict):
    """The config of a command: given flags over the toy's own defaults (where the data is the toy) over cls's."""
    defaults, spec = {}, data_of(given)
    if setting := toy.setting_of(spec):
        defaults = toy.overrides(setting) | {"data": spec, "val_data": spec}
    names = {f.name for f in dataclasses.fields(cls)}
    return cls(**{k: v for k, v in (defaults | given).items() if k in names})


def configure(given: dict) -> EvalConfig:
    """The config of a command: given flags over the protocol's over the toy's (for its data) over EvalConfig's own."""
    spec = data_of(given) or "all"
    protocol = given.get("protocol") or ("paper" if data.benchmark_names(spec) else "training")
    if protocol not in PROTOCOLS:
        raise ValueError(f"--protocol {protocol}: choose one of {', '.join(PROTOCOLS)}")
    lookat = {"temperature": 0.0} if given.get("ask") or given.get("explain") else {}
    fixed = {"data": spec, "protocol": protocol, "eval_rows": given.get("eval_rows", 0)}
    return settle(EvalConfig, PROTOCOLS[protocol] | lookat | given | fixed)


def protocol_line(config: EvalConfig) -> str:
    """What the numbers of a table mean."""
    rules, values = PROTOCOLS[config.protocol], {name: getattr(config, name) for name in PROTOCOLS["paper"]}
    said = [f"{name} {value}" + " (CHANGED)" * (rules.get(name, value) != value) for name, value in values.items()]
    return f"protocol {config.protocol}: {', '.join(said)}; the box decides, the format does not count"


def report(config: EvalConfig, results: dict, baseline: dict | None, notes: list[str]) -> None:
    """Print the table with its notes; into --out, too."""
    known = data.BENCHMARKS["all"]
    every = known if {*results} <= {*known} else tuple(results)
    groups = {"general": data.GENERAL, "vision-dependent": data.VISION, "overall": every}
    rows = plots.summarise(results, config.n, groups, baseline)
    if {*results} & {*known}:
        notes.append("the benchmarks' splits hold no free-form questions: PAPO-Eval's authors filtered them out")
    notes.append("interval: bootstrap over questions; unboxed: no whole \\boxed{...}; truncated: cut at max_new_tokens")
    print(text := "\n".join([plots.table(rows, config.n), *notes]))
    if config.out:
        (Path(config.out) / "table.txt").write_text(text + "\n", encoding="utf-8")
        (Path(config.out) / "table.json").write_text(json.dumps(rows, indent=1).replace("NaN", "null") + "\n")


def without_model(config: EvalConfig) -> None:
    """--compare and --grade."""
    Path(config.out).mkdir(parents=True, exist_ok=True)
    if config.compare:
        return print(*reversed(plots.compare(config.compare, Path(config.out) / "compare.png")), sep="\n")
    results = grade_files(config.grade, config)
    report(config, results, config.baseline and grade_files([config.baseline], config, results), [])


def evaluate(policy: Policy, sets: dict, grader, baseline, config: EvalConfig, rank: int, world: int) -> None:
    """avg@n of each set, questions shared out to the ranks, and the table on the first."""
    how = {k: getattr(config, k) for k in ("temperature", "top_p", "top_k", "max_new_tokens", "rollout_batch")}
    results, notes, out = {}, [protocol_line(config)], Path(config.out)
    for name, rows in sets.items():
        had = checkpoint.on_first_rank(lambda name=name: kept(out, name, config.n)) if config.out else []
        how |= {"done": {r["row"] for r in had}, "progress": name if rank == 0 else ""}
        if config.out:
            how["save"] = partial(keep, out, name, rank)
        before, parts = Counter(rows.skipped), [None] * world
        new = predict(policy, rows, grader, config.n, rank, world, config.seed, **how)
        dist.all_gather_object(parts, (new, rows.skipped - before))
        results[name] = sorted(had + [r for part, _ in parts for r in part], key=lambda r: (r["loop"], r["row"]))
        if config.out and rank == 0:
            finish(out, name, results[name])
        if skipped := sum((s for _, s in parts), before):
            kinds = ", ".join(f"{kind} {count}" for kind, count in sorted(skipped.items()))
            notes.append(f"{name}: {skipped.total()} rows left out ({kinds})")
    if rank == 0:
        report(config, results, baseline, notes)


def run(config: EvalConfig, rank: int, world: int, device: torch.device) -> None:
    """Everything that needs a model."""
    look = bool(config.ask or config.explain)
    try:
        if look and world > 1:
            raise ValueError("--ask and --explain run in one process, without torchrun")
        name = model_folder(config.model)
        encoder = Encoder(name, config.min_pixels, config.max_pixels, config.prompt_suffix)
        how = dict(limit=config.eval_rows, length=encoder.prompt_length, max_prompt_tokens=config.max_prompt_tokens)
        sets = {} if config.ask else data.eval_sets(config.data, place=config.benchmarks, **how)
        prompt = encoder.encode(asked(config, sets)) if look else None
        if config.explain and prompt.pixel_values is None:
            raise ValueError("--explain: the example has no image to owe anything to")
        if config.out and not look:
            checkpoint.on_first_rank(lambda: claim(Path(config.out), config))
        baseline = grade_files([config.baseline], config, sets) if config.baseline and rank == 0 and not look else None
        dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
        policy = Policy.load(name, encoder, dtype, device, config.temperature or 1.0)
        grader = None if look else Grader(config.reward or compute_score, 1 if world > 1 else None, budget=1e6)
    except (ValueError, OSError) as error:
        fail(error)
    if look:
        return explain(policy, prompt, config) if config.explain else answer(policy, prompt, config)
    with grader:
        evaluate(policy, sets, grader, baseline, config, rank, world)


def main(argv=None) -> None:
    given = parse(__doc__, EvalConfig, argv=argv)
    try:
        config = configure(given)
        if config.compare or config.grade:
            return without_model(config)
    except (ValueError, OSError) as error:
        fail(error)
    rank, world, device = checkpoint.distributed()
    try:
        run(config, rank, world, device)
    except KeyboardInterrupt:
        fail(f"interrupted: the same command goes on in {config.out}" if config.out else "interrupted")
    finally:
        dist.destroy_process_group()


if __name__ == "__main__":
    main()
