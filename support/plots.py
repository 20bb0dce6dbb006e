"""Pictures of a run (its curves, several runs side by side, what a response owes to the image), tables of results, and
loggers elsewhere.

The end of the pipeline: train.py draws curves.png and asks for the collapse warning; evaluate.py draws --compare and
--explain, and prints its table. No module of ours is imported, and not pyplot, so a notebook keeps its backend. Ours,
not the paper's: t intervals over seeds, bootstrap intervals over questions, the rule in collapse_warning (it names the
signs), KL_prcp token by token (the perception gain).

    python -c "import sys, plots; print(plots.curves(sys.argv[1]))" runs/papo_g-toy-s0
"""

from __future__ import annotations

import base64
import html
import io
import json
import math
import secrets
import textwrap
from pathlib import Path

import numpy as np
from matplotlib import cm, colormaps, colors, font_manager, patches, ticker
from matplotlib.figure import Figure
from PIL import Image

from support.metrics import _series, _splits, mean_interval, read_metrics

PANELS = {  # title -> {metric: label}; a panel none of whose metrics was logged is left out
    "reward on training prompts": {"reward": "reward", "accuracy": "accuracy", "format": "format"},
    "evaluation accuracy": {},  # one line a split, found in the log
    "KL_prcp: clean view against masked view": {"kl_prcp": "KL_prcp"},
    "KL_ref: distance from the starting model": {"kl_ref": "KL_ref"},
    "entropy (minus mean log-prob)": {"entropy": "clean image", "masked_entropy": "masked image"},
    "share of tokens clipped": {"clip_frac": "PPO clip", "clip_frac_dual": "dual clip"},
    "response length": {"response_length": "tokens"},
    "responses cut off": {"truncated": "share"},
    "gradient norm": {"grad_norm": "before clipping"},
}


NOT_SETTINGS = set(
    "seed out resume steps epochs keep save_every eval_every eval_n eval_rows wandb tensorboard "
    "tokens_per_forward rollout_batch offload_optimizer".split()
)  # repetitions may differ in these


SAMPLE = [
    "set",
    "row",
    "prompt",
    "predict",
    "label",
    "accuracy",
    "format",
]  # of a decoded sample, for the loggers


WIDTH = 86  # characters a line of the perception-gain PNG


GAIN_COLOURS = colors.ListedColormap(
    colormaps["RdBu"](np.linspace(0.2, 0.8, 255))
)  # pale ends: black text reads


PAGE = """<!doctype html><html lang="en"><meta charset="utf-8"><title>What a response owes to the image</title>
<style>body{font:15px/1.5 sans-serif;max-width:70em;margin:1em auto;background:#fff;color:#111}
figure{display:inline-block;margin:0 1em 1em 0} img{max-width:22em;max-height:22em;display:block}
#r{font:15px/1.9 monospace;white-space:pre-wrap;overflow-wrap:anywhere;border:1px solid #ccc;padding:.6em}
#r span{border-right:1px solid #fff;padding:.15em 0} #r span:hover{outline:1px solid #111}</style>%s<p>%s</p>
<p>Response (hover over a token for its numbers):</p><div id="r">%s</div><p>%s</p></html>"""


def wandb_logger(folder: Path):
    """log(line of metrics, decoded samples) to Weights & Biases; `folder`: the run's."""
    import wandb

    file, config = folder / "wandb_id", json.loads((folder / "config.json").read_text())
    if not file.exists():  # a resumed run goes on with its own
        file.write_text(secrets.token_hex(6))
    wandb.init(project="papo", name=folder.name, config=config, id=file.read_text(), resume="allow")

    def log(line: dict, samples: list[dict]) -> None:
        values = {key: value for key, value in line.items() if key != "step"}
        if samples:
            values["samples"] = wandb.Table(
                columns=SAMPLE, data=[[s[key] for key in SAMPLE] for s in samples]
            )
        wandb.log(values, step=line["step"])

    return log


def tensorboard_logger(folder: Path):
    """The same for TensorBoard, whose files go into the run's folder."""
    from torch.utils.tensorboard import SummaryWriter

    writer = SummaryWriter(folder)

    def log(line: dict, samples: list[dict]) -> None:
        for key in line.keys() - {"step"}:
            writer.add_scalar(key, line[key], line["step"])
        for sample in samples:
            lines = (f"**{key}** {sample[key]}" for key in SAMPLE)
            writer.add_text(f"{sample['set']}/{sample['row']}", "\n\n".join(lines), line["step"])
        writer.flush()

    return log


LOGGERS = {
    "wandb": wandb_logger,
    "tensorboard": tensorboard_logger,
}  # the flag -> what makes its logger


def _config(folder: Path) -> tuple[str, dict]:
    """(algorithm name, config.json with the fields of "algo" beside the others); a folder without one names itself."""
    config = (
        json.loads((folder / "config.json").read_bytes())
        if (folder / "config.json").is_file()
        else {}
    )
    algo = config.get("algo") or folder.name
    return (
        (algo.get("name", folder.name), {**config, **algo})
        if isinstance(algo, dict)
        else (str(algo), config)
    )


def draw(panels: dict, heading: str, out, shared_legend: bool = False) -> Path:
    """Mean and 95% interval of {panel: {label: one {step: value} a run}}, three panels a row; empty ones left out."""
    panels = {title: lines for title, lines in panels.items() if any(lines.values())}
    if not panels:
        raise ValueError(f"nothing to draw in {out}: no finite metric was logged")
    rows, handles = math.ceil(len(panels) / 3), {}
    labels = [
        *dict.fromkeys(label for lines in panels.values() for label in lines)
    ]  # a colour each, in all panels
    figure = Figure(figsize=(13.8, 2.9 * rows + 0.6), layout="constrained")
    figure.suptitle(heading, fontsize=12, parse_math=False)  # a "$" in a name starts no formula
    for i, (title, lines) in enumerate(panels.items()):
        ax = figure.add_subplot(rows, 3, i + 1)
        ax.set_title(title, fontsize=9.5, parse_math=False)
        ax.set_xlabel("step", fontsize=8)
        ax.xaxis.set_major_locator(ticker.MaxNLocator(nbins=6, integer=True, min_n_ticks=1))
        ax.grid(alpha=0.3)
        for label, runs in lines.items():
            at = sorted(set().union(*runs))
            stats = [mean_interval(run[step] for run in runs if step in run) for step in at]
            mean, half = np.array(stats).reshape(-1, 2).T
            half[[any(step not in run for run in runs) for step in at]] = math.nan
            look = {"color": f"C{labels.index(label) % 10}"} if shared_legend else {}
            look["marker"] = "." if len(at) <= 60 else ""
            (line,) = ax.plot(at, mean, linewidth=1.2, label=label, **look)
            handles[label] = line
            ax.fill_between(
                at, mean - half, mean + half, color=line.get_color(), alpha=0.18, linewidth=0
            )
        if not shared_legend:
            ax.legend(fontsize=7.5, framealpha=0.6)
    if shared_legend:
        shown = {label: handles[label] for label in labels if label in handles}
        figure.legend(
            shown.values(), shown, loc="outside lower center", ncols=min(4, len(shown)), fontsize=9
        )
    figure.savefig(out, dpi=110)
    return Path(out)


def curves(run_folder, out=None) -> Path:
    """Draw one run's metrics.jsonl; out defaults to curves.png in its folder. ValueError if nothing has been logged."""
    steps, evals = read_metrics(run_folder)
    panels = {
        title: {label: [run] for key, label in keys.items() if (run := _series(steps, key))}
        for title, keys in PANELS.items()
    }
    panels["evaluation accuracy"] = {
        key[5:]: [run] for key in _splits(evals) if (run := _series(evals, key))
    }
    name, config = _config(Path(run_folder))
    words = [
        name,
        Path(str(config.get("model") or "")).name,
        f"seed {config['seed']}" if "seed" in config else "",
    ]
    return draw(panels, ", ".join(filter(None, words)), out or Path(run_folder) / "curves.png")


def _groups(folders: list[Path]) -> dict[str, list[Path]]:
    """Label -> its runs. Runs of one algorithm with different settings are NOT averaged: labels name the difference."""
    found = {}
    for folder in folders:
        name, config = _config(folder)
        kept = frozenset(
            (k, str(v)) for k, v in config.items() if k not in NOT_SETTINGS and type(v) is not dict
        )
        found.setdefault(name, {}).setdefault(kept, []).append(folder)
    return {
        " ".join(
            [name, *sorted(f"{k}={v}" for k, v in kept - frozenset.intersection(*variants))]
        ): runs
        for name, variants in found.items()
        for kept, runs in variants.items()
    }


def compare(run_folders, out) -> tuple[Path, str]:
    """Lay runs over one another: (path of the picture, plain-text table with each run's own first and last value).

    Runs whose config.json agrees up to the seed are one group: its mean over the runs that logged a step is drawn, with
    a 95% t interval where all of them (two or more) did.
    """
    logs = {
        label: [read_metrics(x) for x in runs]
        for label, runs in _groups([Path(x) for x in run_folders]).items()
    }
    splits = _splits(line for runs in logs.values() for _, evals in runs for line in evals)
    keys = splits + [
        "reward",
        "kl_prcp",
        "kl_ref",
        "entropy",
        "masked_entropy",
        "clip_frac",
        "response_length",
    ]
    panels = {
        key: {
            label: [s for log in runs if (s := _series(log[key in splits], key))]
            for label, runs in logs.items()
        }
        for key in keys
    }
    rows = [["runs", "measure", "seeds", "first", "at step", "last", "at step"]]
    for label, key in ((label, key) for label in logs for key in [*splits, "reward", "kl_prcp"]):
        if runs := panels[key][label]:
            rows.append([label, key, str(len(runs)), *_ends(runs, min), *_ends(runs, max)])
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    table = "\n".join("  ".join(map(str.ljust, row, widths)).rstrip() for row in rows)
    return draw(panels, "mean over seeds; band: 95% interval", out, shared_legend=True), table


def _ends(runs: list[dict[int, float]], pick) -> list[str]:
    """["mean +- half interval", "step or range of steps"] at each run's first (pick=min) or last (pick=max) step."""
    at, (mean, half) = sorted(map(pick, runs)), mean_interval(run[pick(run)] for run in runs)
    return [
        f"{mean:.3f}" + (f" +- {half:.3f}" if math.isfinite(half) else ""),
        f"{at[0]}-{at[-1]}" if at[0] < at[-1] else f"{at[0]}",
    ]


def blacken(image, hit):
    """The image at the size of its patch grid hit[h, w] (14 pixels a patch), the patches that are hit in black."""
    black = Image.fromarray(255 * np.asarray(hit, dtype=np.uint8))
    picture = image.resize((14 * black.width, 14 * black.height))
    picture.paste((0, 0, 0), None, black.resize(picture.size, Image.Resampling.NEAREST))
    return picture


def _shown(token: str) -> str:
    """A token with its invisible characters made visible; next to letters the background alone shows a space."""
    text = token.replace("\n", "↵").replace("\t", "⇥") or "∅"
    text = text if text.strip(" ↵⇥") else text.replace(" ", "␣")
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in text)


def _gain_png(views, heading: str, tokens: list[str], fills, legend: str, limit: float, out):
    """Pictures on the left; on the right the tokens on their fills [T, RGBA], in cells of one character each."""
    pieces = [
        (y, 0, line, "white") for y, line in enumerate(textwrap.wrap(heading, WIDTH))
    ]  # row, column, text, fill
    row, column = len(pieces) + 1, 0
    for token, fill in zip(tokens, fills, strict=True):
        for piece in textwrap.wrap(_shown(token), WIDTH, drop_whitespace=False):
            if column + len(piece) > WIDTH:
                row, column = row + 1, 0
            pieces.append((row, column, piece, fill))
            column += len(piece)
        if "\n" in token:
            row, column = row + 1, 0
    wide, high = 0.0836 * WIDTH, 0.21 * (row + 1)  # inches; a 10-pt character is 0.0836 wide
    size = wide + 3.4, max(high + 1.6, 3 * len(views)) + 0.2
    figure = Figure(figsize=size)

    def box(left, top, width, height):  # inches from the top left corner -> axes
        return figure.add_axes(
            (left / size[0], 1 - (top + height) / size[1], width / size[0], height / size[1])
        )

    for i, (name, view) in enumerate(views):
        ax = box(0.1, 3 * i + 0.3, 2.9, 2.6)
        ax.imshow(view)
        ax.set(title=name, xticks=[], yticks=[])
    ax = box(3.2, 0.1, wide, high)
    ax.set(xlim=(0, WIDTH), ylim=(row + 1, 0))
    ax.axis("off")
    glyphs = font_manager.get_font(font_manager.findfont("DejaVu Sans Mono")).get_charmap()
    for y, x, text, fill in pieces:
        ax.add_patch(patches.Rectangle((x, y), len(text), 1, facecolor=fill, edgecolor="white"))
        text = "".join(c if ord(c) in glyphs else "□" for c in text)
        ax.text(x, y + 0.72, text, fontsize=10, family="DejaVu Sans Mono", parse_math=False)
    bar = cm.ScalarMappable(colors.Normalize(-limit, limit), GAIN_COLOURS)
    bar = figure.colorbar(bar, cax=box(3.3, high + 0.3, 4, 0.2), orientation="horizontal")
    bar.ax.text(
        0, -1.6, textwrap.fill(legend, 100), transform=bar.ax.transAxes, va="top", fontsize=9
    )
    figure.savefig(out, dpi=110)


def perception_gain(
    image,
    masked_images,
    tokens: list[str],
    log_probs,
    masked_log_probs,
    out_png,
    out_html,
    *,
    question: str = "",
    answer: str = "",
) -> tuple[Path, Path]:
    """Draw what each token of a response owes to the image: a PNG, and one self-contained HTML page with the numbers.

    image: PIL image or a list of them; masked_images: a list; log_probs, masked_log_probs [T]: log pi(o_t) in nats,
    clean and masked view (over several masks, the mean). The gain is their difference; colours end at its
    95th percentile in size, at least 0.5. ValueError for unequal lengths or a non-finite value.
    """
    if not 0 < len(tokens) == len(log_probs) == len(masked_log_probs):
        raise ValueError(
            f"{len(tokens)} tokens but {len(log_probs)} and {len(masked_log_probs)} log-probs"
        )
    clean, masked = np.asarray(log_probs, dtype=float), np.asarray(masked_log_probs, dtype=float)
    gains = clean - masked
    if not np.isfinite(gains).all():
        raise ValueError(f"token {np.argmin(np.isfinite(gains))} has a log-prob that is not finite")
    limit = max(0.5, float(np.percentile(np.abs(gains), 95)))
    fills = GAIN_COLOURS(0.5 + 0.5 * np.clip(gains / limit, -1, 1))
    legend = (
        "Perception gain: a token's log-prob with the image minus that with it masked. Blue: the image made "
        "it likelier (0.7: twice as likely). White: no difference. Red: likelier without. All tokens: log-prob "
        f"{clean.sum():.2f} with the image, {masked.sum():.2f} with it masked, gain {gains.sum():.2f}. The mean, "
        f"{gains.mean():.3f} a token, is the plainest estimate of KL_prcp, which PAPO raises."
    )
    heading = f"Question: {question} True answer: {answer}"
    views = [
        ("the image", x.convert("RGB")) for x in (image if isinstance(image, list) else [image])
    ]
    views += [("masked", x.convert("RGB")) for x in masked_images]
    spans = figures = ""
    for token, fill, a, b in zip(tokens, fills, clean, masked, strict=True):
        tip = (
            f"token {token!r}\nlog-prob with the image {a:+.3f} (p = {math.exp(a):.2%})\n"
            f"log-prob with it masked {b:+.3f} (p = {math.exp(b):.2%})\ngain {a - b:+.3f}"
        )
        spans += (
            f'<span style="background:{colors.to_hex(fill)}" title="{html.escape(tip)}">'
            f"{html.escape(_shown(token))}</span>" + "\n" * ("\n" in token)
        )
    for name, view in views:
        view.save(buffer := io.BytesIO(), format="PNG")
        figures += (
            f'<figure><img alt="{name}" src="data:image/png;base64,'
            f'{base64.b64encode(buffer.getvalue()).decode()}"><figcaption>{name}</figcaption></figure>'
        )
    Path(out_html).write_text(
        PAGE % (figures, html.escape(heading), spans, legend), encoding="utf-8"
    )
    _gain_png(views, heading, tokens, fills, legend, limit, out_png)
    return Path(out_png), Path(out_html)


def heat_map(image, heat, out_png, title: str = "") -> Path:
    """The picture beside itself under heat [rows, columns], one value a patch; colours centre on 0 if signs differ."""
    heat = np.asarray(heat, dtype=float)
    if heat.ndim != 2:
        raise ValueError(f"heat must be [rows, columns] of patches, got shape {heat.shape}")
    figure = Figure(figsize=(9, min(9, 4 * image.height / image.width + 0.6)), layout="constrained")
    figure.suptitle(title, fontsize=11, parse_math=False)
    for ax, mode in zip(
        figure.subplots(1, 2), ("RGB", "L"), strict=True
    ):  # pale and grey under the heat
        ax.imshow(image.convert(mode).convert("RGB"), alpha=1 if mode == "RGB" else 0.4)
        ax.axis("off")
    look = (
        {"cmap": "RdBu", "norm": colors.CenteredNorm()}
        if heat.min() < 0 < heat.max()
        else {"cmap": "inferno"}
    )
    drawn = ax.imshow(
        heat, extent=(-0.5, image.width - 0.5, image.height - 0.5, -0.5), alpha=0.7, **look
    )
    figure.colorbar(drawn, ax=ax)
    figure.savefig(out_png, dpi=110)
    return Path(out_png)
