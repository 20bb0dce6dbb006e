r"""What a step of each method costs: its run at one seed, again, one at a time.

    python -m experiments.cost             writes cost.json; nothing else should run meanwhile
    python -m experiments.cost confirm     one group of methods alone

The seconds in results/ are of no use for this, because two runs shared the machine, and other work.
Each run also says which metrics of its result it did not repeat: on another kind of CPU, rounding
differs, and within a few steps the sampled tokens do too. What cost.json has is not run again.
Seconds compare within a group alone: another group may have run on another machine.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

from experiments import protocol, run

FILE = run.HERE / "cost.json"
METHODS = {f"variants/{name}": 10 for name in protocol.PUBLISHED}  # variant -> seed
METHODS |= {f"{task}/{name}": 20 for task in protocol.TASKS for name in protocol.COMPARED}
CONFIRMED = {name: protocol.CONFIRMING_SEEDS[0] for name in protocol.EXPERIMENTS["confirm"][0]}
GROUPS = {"methods": METHODS, "confirm": CONFIRMED}


def measure(variant: str, seed: int, work: Path) -> dict:
    """Seconds of each step, and the metrics that differ from the stored result's."""
    log = work / f"{variant}-s{seed}.log"
    log.parent.mkdir(parents=True, exist_ok=True)
    run.build_start_model(variant, seed, log)
    record = run.training_record(run.train(variant, seed, work, log))["metrics"]
    stored = json.loads(run.result_file(variant, seed).read_text())["metrics"]
    times = ("seconds", "tokens_per_second")
    compared = [metric for metric in record.keys() & stored.keys() if metric not in times]
    return {
        "seed": seed,
        "commit": run.current_commit(),
        "machine": run.machine({}),
        "seconds": record["seconds"],
        "differs": sorted(metric for metric in compared if record[metric] != stored[metric]),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description="Measure the cost of each method's step.")
    parser.add_argument("groups", nargs="*", metavar="group", help=f"{', '.join(GROUPS)}; all")
    parser.add_argument("--work", type=Path, default=run.ROOT / "runs" / "cost")
    args = parser.parse_args()
    if unknown := set(args.groups) - GROUPS.keys():
        parser.error(f"unknown group {', '.join(sorted(unknown))}; choose from {', '.join(GROUPS)}")
    run.use_own_cache()
    costs = json.loads(FILE.read_text()) if FILE.exists() else {}
    for group in args.groups or GROUPS:
        of_group = costs.setdefault(group, {})
        for variant, seed in GROUPS[group].items():
            if variant not in of_group:
                of_group[variant] = measure(variant, seed, args.work / group)
                run.write_json(FILE, costs)
                print(variant, of_group[variant])


if __name__ == "__main__":
    main()
