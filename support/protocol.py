"""The flags of evaluate.py and the paper's protocol."""

from __future__ import annotations

from dataclasses import dataclass

from support import tables, toy
from support.config import Flags, early_flags, flag, parse_flags
from support.qwen_vl import PROMPT_SUFFIX

# Settings that PAPO-Eval samples with: its script's, and its program's top_k and pixel defaults.
PAPER_PROTOCOL = {
    "n": 8,
    "temperature": 1.0,
    "top_p": 1.0,
    "top_k": 50,
    "max_new_tokens": 2048,
    "max_prompt_tokens": 9216,
    "min_pixels": 1024,
    "max_pixels": 589_824,
}
PROTOCOLS = {"paper": PAPER_PROTOCOL, "training": {}}  # training: EvalConfig's own defaults


@dataclass
class EvalConfig(Flags):
    """Flags. The paper's protocol and toys override some."""

    model: str = flag("toy", "toy, a local folder, or a hub id")
    data: str = flag("", "toy, all, general, vision_dependent, a benchmark, file, folder or hub id")
    benchmarks: str = flag(tables.HUB, "hub id or folder of the nine benchmarks")
    protocol: str = flag("", "paper or training; default: paper for benchmarks")
    n: int = flag(8, "samples per question (avg@n); for --grade what the files hold", low=1)
    out: str = flag("", "folder for predictions, tables, figures; also resumes an evaluation")
    baseline: str = flag("", "folder of predictions to measure Delta_rel against")
    eval_rows: int = flag(0, "use this many rows of each set, the first usable ones; 0: all", low=0)
    reward: str = flag("", "score with path/file.py:function(response, answer)")
    reward_deadline: float = flag(
        2.0, "seconds to score a response; else accuracy 0", low=1e-3, high=1e6
    )
    reward_memory: float = flag(1.0, "GiB per scoring process (Linux)", low=1e-3, high=1e6)
    seed: int = flag(0, "random seed")
    ask: str = flag("", "answer one question, streamed")
    image: list[str] = flag([], "images for --ask, before the question or at its <image> markers")
    explain: bool = flag(False, "draw the image attribution of the response to --ask or --row")
    row: str = flag("0", "for --explain: ROW or SPLIT:ROW of the data")
    masks: int = flag(8, "for --explain: how many masks to average over", low=1)
    heat_patches: int = flag(256, "for --explain: maximum number of cells in the heat map", low=1)
    grade: list[str] = flag([], "grade these prediction files (ours or PAPO-Eval's)")
    compare: list[str] = flag([], "plot the curves of these runs in one figure")
    temperature: float = flag(1.0, "0: greedy (the default for --ask and --explain)", low=0)
    top_p: float = flag(1.0, "nucleus sampling", low=1e-6, high=1)
    top_k: int = flag(0, "top-k sampling; 0: off", low=0)
    max_prompt_tokens: int = flag(4096, "longest prompt in tokens; longer ones are skipped")
    max_new_tokens: int = flag(2048, "longest response in tokens", low=1)
    min_pixels: int = flag(200_704, "enlarge smaller images to this")
    max_pixels: int = flag(1_003_520, "reduce larger images to this")
    prompt_suffix: str = flag(PROMPT_SUFFIX, "appended to questions that lack it")
    rollout_batch: int = flag(320, "most responses sampled at a time, and lost by a kill", low=1)


def configure(doc: str, argv=None) -> EvalConfig:
    """Precedence: given flags, the protocol, the toy's defaults, EvalConfig's."""
    early = early_flags("model", "data", "protocol", "ask", "explain", argv=argv)
    model = toy.model_folder(early.get("model", EvalConfig.model))
    defaults = toy.defaults(model, early.get("data", "")) | {"eval_rows": 0}
    data = toy.data_of(model, early.get("data", "")) or "all"
    default = "paper" if tables.benchmark_names(data) else "training"
    protocol = early.get("protocol") or default
    if protocol not in PROTOCOLS:
        raise ValueError(f"--protocol {protocol}: choose one of {', '.join(PROTOCOLS)}")
    defaults |= PROTOCOLS[protocol] | {"data": data, "protocol": protocol}
    if "ask" in early or "explain" in early:
        defaults["temperature"] = 0.0
    [config] = parse_flags(doc, EvalConfig, defaults=defaults, argv=argv)
    config.data = data
    return config


def protocol_line(config: EvalConfig) -> str:
    """The settings behind the numbers of a table."""
    settings = []
    for name in PAPER_PROTOCOL:
        value = getattr(config, name)
        changed = PROTOCOLS[config.protocol].get(name, value) != value
        settings.append(f"{name} {value}" + (" (CHANGED)" if changed else ""))
    return f"protocol {config.protocol}: {', '.join(settings)}; the box decides, not the format"
