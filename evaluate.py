r"""Average accuracy at n samples a question, on the toy's splits, a file or a folder; PAPO-Eval's files come out.

    python evaluate.py --model runs/papo_g-toy-s0/model --data toy
    torchrun --nproc_per_node 4 evaluate.py --model DIR_OR_HUB --data questions.parquet --n 8 --out results

The paper's protocol: 8 samples a question at temperature 1, average accuracy @ 8, boxed grading without the format.
Written, one JSON line a response, loop after loop over the whole split: idx, id, prompt, predict, label (PAPO-Eval's
keys), and accuracy, format, truncated beside them.

Also here, because train.py uses them too: flags from a dataclass (`parse`), the process group (`distributed`), and
where a model's name leads (`model_folder`).
"""

from __future__ import annotations

import argparse
import dataclasses
import difflib
import json
import os
import sys
from dataclasses import dataclass, field
from pathlib import Path

import torch
import torch.distributed as dist
from tqdm import tqdm

import data
from papo import PROMPT_SUFFIX, Encoder, Policy, reduce
from reward import Grader, compute_score
from rollout import generate


def flag(default, doc: str):
    """A dataclass field that is a command-line flag with one line of help."""
    return field(default=default, metadata={"doc": doc})


@dataclass
class EvalConfig:
    model: str = flag("toy", "local Hugging Face folder, hub id, or toy")
    data: str = flag("toy", "toy, a parquet/JSON/JSONL file, a folder, or a hub id")
    n: int = flag(8, "samples a question (avg@n)")
    out: str = flag("", "folder for predictions (JSON lines) and table.txt; default: none")
    temperature: float = flag(1.0, "sampling temperature; 0: greedy")
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
    """End the program with one line on standard error (one rank's) and exit status 2."""
    if os.environ.get("RANK", "0") == "0":
        text = str(message).strip() or repr(message)
        print(f"{Path(sys.argv[0]).name}: error: {text.splitlines()[0]}", file=sys.stderr, flush=True)
    raise SystemExit(2)


def parse(doc: str, *classes, argv=None) -> dict:
    """The flags that were given, by name; each field of the dataclasses is one flag."""
    parser = Parser(description=doc.strip().splitlines()[0], allow_abbrev=False, argument_default=argparse.SUPPRESS)
    for cls in classes:
        for f in (f for f in dataclasses.fields(cls) if f.name != "name"):
            kind = type(f.default)
            how = {"action": argparse.BooleanOptionalAction} if kind is bool else {"type": kind, "metavar": ""}
            text = str(f.metadata.get("doc", "preset field"))
            shown = "" if f.default in ("", PROMPT_SUFFIX) or "preset" in text else f" [{f.default}]"
            parser.add_argument(f"--{f.name}", help=(text + shown).replace("%", "%%"), **how)
    return vars(parser.parse_args(argv))


def distributed() -> tuple[int, int, torch.device]:
    """(rank, world size, device) of this process; joins the process group torchrun describes, or one of its own."""
    cuda = torch.cuda.is_available()
    device = torch.device("cuda", int(os.environ.get("LOCAL_RANK", "0"))) if cuda else torch.device("cpu")
    if cuda:
        torch.cuda.set_device(device)
    elif not os.environ.get("PAPO_THREADS"):  # torchrun sets OMP_NUM_THREADS=1, which leaves cores idle
        torch.set_num_threads(max(1, (os.cpu_count() or 1) // int(os.environ.get("LOCAL_WORLD_SIZE", "1"))))
    alone = {} if "RANK" in os.environ else dict(store=dist.HashStore(), rank=0, world_size=1)  # plain python
    dist.init_process_group("cpu:gloo,cuda:nccl" if cuda else "gloo", **alone)
    return dist.get_rank(), dist.get_world_size(), device


def model_folder(name: str, seed: int = 0) -> str:
    """Where a model's name leads: "toy" is made (once, by the first rank) and becomes a folder like any other."""
    if name != "toy":
        return name
    import toy

    if dist.is_initialized() and dist.get_rank() > 0:
        dist.barrier()
        return str(toy.build(seed))
    folder = str(toy.build(seed))
    if dist.is_initialized():
        dist.barrier()
    return folder


def predict(policy: Policy, rows, grader, n: int, rank=0, world=1, seed=0, progress="", **sampling) -> list[dict]:
    """n graded responses to each of this rank's rows (every world-th): dicts with PAPO-Eval's keys and the scores.

    Rows that turn out broken are left out and named. All ranks make the same number of generate() calls, because
    a sharded model is gathered in each.
    """
    chunk = max(1, sampling.get("rollout_batch", 64) // n)
    records = []
    rounds = range(0, -(-len(rows) // world), chunk)
    for start in tqdm(rounds, desc=progress, leave=False, disable=not progress):
        prompts = []
        for number in range(len(rows))[rank::world][start : start + chunk]:
            try:
                prompts.append(policy.encoder.encode(rows[number], number))
            except ValueError as error:
                rows.skipped[getattr(error, "kind", "not encodable")] += 1
                print(f"{rows.name}: row {number} left out: {error}", file=sys.stderr)
        groups = generate(policy, prompts, n, key=("eval", seed), **sampling)
        texts = [text for group in groups for text in group.responses]
        scores = iter(grader(texts, [g.prompt.example.answer for g in groups for _ in range(n)]))
        for group in groups:
            prompt = policy.encoder.tokenizer.decode(group.prompt.input_ids)
            for loop in range(n):
                score = next(scores)
                records.append({
                    "idx": group.prompt.index, "id": group.prompt.example.id or str(group.prompt.index),
                    "loop": loop, "prompt": prompt, "predict": group.responses[loop],
                    "label": group.prompt.example.answer, "accuracy": score["accuracy"], "format": score["format"],
                    "truncated": bool(group.truncated[loop]),
                })  # fmt: skip
    return records


def mean_accuracy(records: list[dict]) -> float:
    """avg@n in [0, 1] over the records of all ranks; all ranks call it."""
    total, count = reduce([sum(r["accuracy"] for r in records), len(records)])
    return total / max(count, 1.0)


def gather_records(records: list[dict]) -> list[dict]:
    """The records of all ranks, loop after loop over the whole split, as PAPO-Eval writes them."""
    parts = [None] * dist.get_world_size()
    dist.all_gather_object(parts, records)
    return sorted((r for part in parts for r in part), key=lambda r: (r["loop"], r["idx"]))


def table(results: dict[str, list[dict]], n: int) -> str:
    """A plain-text table: a row a split, and the mean over splits."""
    lines = [f"{'split':<24} {'questions':>9} {f'avg@{n} %':>9} {'format %':>9} {'truncated %':>11}"]
    rows = []
    for name, records in results.items():
        means = [100 * sum(r[k] for r in records) / max(len(records), 1) for k in ("accuracy", "format", "truncated")]
        rows.append(means)
        lines.append(f"{name:<24} {len(records) // n:>9} {means[0]:>9.2f} {means[1]:>9.2f} {means[2]:>11.2f}")
    if len(rows) > 1:
        means = [sum(column) / len(rows) for column in zip(*rows, strict=True)]
        lines.append(f"{'mean over splits':<24} {'':>9} {means[0]:>9.2f} {means[1]:>9.2f} {means[2]:>11.2f}")
    return "\n".join(lines)


def settle(cls, given: dict):
    """The config of a command: given flags over the toy's own defaults (where the data is the toy) over cls's."""
    defaults = {}
    if given.get("data", "toy" if given.get("model", "toy") == "toy" else "") == "toy":
        import toy

        defaults = toy.OVERRIDES | {"data": "toy", "val_data": "toy"}
    names = {f.name for f in dataclasses.fields(cls)}
    return cls(**{k: v for k, v in (defaults | given).items() if k in names})


def main(argv=None) -> None:
    given = parse(__doc__, EvalConfig, argv=argv)
    config = settle(EvalConfig, given | {"data": given.get("data", "toy"), "eval_rows": given.get("eval_rows", 0)})
    rank, world, device = distributed()
    try:
        name = model_folder(config.model)
        encoder = Encoder(name, config.min_pixels, config.max_pixels, config.prompt_suffix)
        limit = config.eval_rows or None
        sets = data.eval_sets(
            config.data, limit=limit, length=encoder.prompt_length, max_prompt_tokens=config.max_prompt_tokens
        )
        dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
        policy = Policy.load(name, encoder, dtype, device, config.temperature)
        grader = Grader(config.reward or compute_score)
    except (ValueError, OSError) as error:
        fail(error)
    sampling = {k: getattr(config, k) for k in ("temperature", "top_p", "top_k", "max_new_tokens", "rollout_batch")}
    results = {}
    for split, rows in sets.items():
        progress = split if rank == 0 else ""
        records = predict(policy, rows, grader, config.n, rank, world, config.seed, progress, **sampling)
        results[split] = gather_records(records)
    grader.close()
    if rank == 0:
        print(text := table(results, config.n))
        if config.out:
            out = Path(config.out)
            out.mkdir(parents=True, exist_ok=True)
            for split, records in results.items():
                lines = [json.dumps(record, ensure_ascii=False) + "\n" for record in records]
                (out / f"{split}.jsonl").write_text("".join(lines), encoding="utf-8")
            (out / "table.txt").write_text(text + "\n")
            print(f"predictions in {out}")
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
