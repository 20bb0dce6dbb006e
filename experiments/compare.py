r"""Train GRPO and PAPO from the same starts, side by side, and draw how they differ.

    python -m experiments.compare        two runs at a time; writes docs/compare.png

The setting is that of the experiments (protocols.md) with gamma 0.1, at two of their seeds. The
figure has both methods' accuracy over the steps, and what each reads in one image at the end. One
pair of runs proves nothing: the last line says how often a pair comes out the other way round.
"""

from __future__ import annotations

import argparse
import json
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from matplotlib.figure import Figure
from PIL import Image

from experiments import measures, run, tasks
from experiments.protocol import EIGHT_SEEDS
from rollout import Sampling, generate
from support import toy
from support.qwen_vl import Encoder, Policy

METHODS = {"grpo": "GRPO", "gamma_0.1": "PAPO_G, gamma 0.1"}
SEEDS = (10, 11)
TASK = tasks.Dots()
SPLIT = "vision_dependent"


def train_all(work: Path) -> dict[tuple[str, int], Path]:
    """The folders of all runs, two at a time; finished ones are not run again."""

    def build(seed: int) -> Path:
        return run.build_start_model("grpo", seed, work / "start.log")

    def train(job: tuple[str, int]) -> Path:
        method, seed = job
        return run.train(method, seed, work, work / f"{method}-s{seed}.log")

    jobs = [(method, seed) for seed in SEEDS for method in METHODS]
    with ThreadPoolExecutor(2) as pool:
        list(pool.map(build, SEEDS))
        folders = list(pool.map(train, jobs))
    return dict(zip(jobs, folders, strict=True))


def accuracy_curve(folder: Path) -> dict[int, float]:
    """Step -> accuracy in %, the mean of both splits."""
    return measures.overall_curve(run.training_record(folder))


def read_images(folder: Path, n: int) -> list[list[str]]:
    """The colours that a run's model names for the cells of the first n images, in one sample each.

    Every run draws with the same random numbers.
    """
    config = json.loads((folder / "config.json").read_text())
    name = str(folder / "model")
    encoder = Encoder(name, config["min_pixels"], config["max_pixels"], toy.SUFFIX)
    policy = Policy.load(name, encoder)
    examples = [toy.example(SPLIT, row, setting=TASK.setting) for row in range(n)]
    prompts = [encoder.encode(example, row) for row, example in enumerate(examples)]
    groups = generate(policy, prompts, 1, Sampling(config["max_new_tokens"]), key=(0, 0))
    return [tasks.read_cells(TASK, group.responses[0]) for group in groups]


def first_difference(folders: list[Path], n: int = 64) -> tuple[int, list[list[str]]]:
    """The first image that the runs read differently, else the last, and their readings of it."""
    one, other = [read_images(folder, n) for folder in folders]
    differ = [row for row in range(n) if one[row] != other[row]]
    row = differ[0] if differ else n - 1
    return row, [one[row], other[row]]


def draw_reading(
    axis, image: Image.Image, cells: list[str], reading: list[str], title: str
) -> None:
    """The image with the word that was read in each cell: red where it is wrong."""
    axis.imshow(image, interpolation="nearest")
    axis.set_axis_off()
    wrong = 0
    for i, (true, read) in enumerate(zip(cells, reading, strict=True)):
        row, column = divmod(i, TASK.setting.grid)
        x, y = (column + 0.5) * TASK.setting.cell, (row + 0.92) * TASK.setting.cell
        colour = "black" if read == true else "red"
        weight = "normal" if read == true else "bold"
        axis.text(x, y, read or "?", color=colour, weight=weight, ha="center", fontsize=8)
        wrong += read != true
    axis.set_title(f"{title}: {wrong} of {len(cells)} cells misread", fontsize=10)


def draw(folders: dict[tuple[str, int], Path], out: Path) -> None:
    figure = Figure(figsize=(13, 4), layout="constrained")
    curves, *images = figure.subplots(1, 3)
    for index, (method, label) in enumerate(METHODS.items()):
        for seed, line in zip(SEEDS, ("-", "--"), strict=True):
            curve = accuracy_curve(folders[method, seed])
            style = {"color": f"C{index}", "linestyle": line, "marker": ".", "linewidth": 1.2}
            curves.plot(curve.keys(), curve.values(), label=f"{label}, seed {seed}", **style)
    curves.set_title("accuracy in %", fontsize=10)
    curves.set_xlabel("step")
    curves.grid(alpha=0.3)
    curves.legend(loc="lower right", fontsize=9)
    row, readings = first_difference([folders[method, SEEDS[0]] for method in METHODS])
    scene = toy.make_scene(SPLIT, row, setting=TASK.setting)
    for axis, label, reading in zip(images, METHODS.values(), readings, strict=True):
        draw_reading(axis, scene.image, scene.cells, reading, label)
    figure.savefig(out, dpi=110)


def other_way_round() -> str:
    """At how many seeds of the experiments PAPO ended below GRPO, and by how much it differs."""
    found = measures.at_seeds(measures.load(), EIGHT_SEEDS)
    gains = measures.paired(found, "variants/papo_g_x5", "variants/grpo", measures.accuracy_gain)
    below = sum(gain < 0 for gain in gains)
    difference = measures.interval(gains, sign=True)
    return (
        f"in the experiments PAPO at gamma 0.1 ended below GRPO at {below} of {len(gains)} seeds; "
        f"overall accuracy differs by {difference} points"
    )


def main() -> None:
    parser = argparse.ArgumentParser(description="Compare GRPO and PAPO on two seeds.")
    parser.add_argument("--work", type=Path, default=run.ROOT / "runs" / "compare")
    parser.add_argument("--out", type=Path, default=run.ROOT / "docs" / "compare.png")
    args = parser.parse_args()
    run.use_own_cache()
    args.work.mkdir(parents=True, exist_ok=True)
    folders = train_all(args.work)
    for (method, seed), folder in folders.items():
        curve = accuracy_curve(folder)
        steps = ", ".join(f"{step}: {accuracy:.0f}" for step, accuracy in curve.items())
        print(f"{METHODS[method]}, seed {seed}, accuracy in % after step {steps}")
    draw(folders, args.out)
    print(args.out)
    print(other_way_round())


if __name__ == "__main__":
    main()
