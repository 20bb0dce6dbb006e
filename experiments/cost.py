r"""What a step of each method costs: the runs of "variants" at one seed, again, one at a time.

    python -m experiments.cost         writes cost.json; nothing else should run meanwhile

The seconds in results/ are of no use for this, because two runs shared the machine, and other work.
Each run also says which metrics of its result it did not repeat: on another kind of CPU, rounding
differs, and within a few steps the sampled tokens do too.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

from experiments import protocol, run

SEED = 10
FILE = run.HERE / "cost.json"


def measure(name: str, work: Path) -> dict:
    """Seconds of each step, and the metrics that differ from the stored result's."""
    variant = f"variants/{name}"
    log = work / f"{name}.log"
    record = run.training_record(run.train(variant, SEED, work, log))["metrics"]
    stored = json.loads(run.result_file(variant, SEED).read_text())["metrics"]
    seconds = record.pop("seconds")
    return {
        "seconds": seconds,
        "differs": [metric for metric in record if record[metric] != stored[metric]],
    }


def main() -> None:
    parser = argparse.ArgumentParser(description="Measure the cost of each method's step.")
    parser.add_argument("--work", type=Path, default=run.ROOT / "runs" / "cost")
    args = parser.parse_args()
    (args.work / "variants").mkdir(parents=True, exist_ok=True)
    run.build_start_model("variants/grpo", SEED, args.work / "start.log")
    costs = {}
    for name in protocol.PUBLISHED:
        costs[name] = measure(name, args.work)
        print(name, costs[name])
        found = {"commit": run.current_commit(), "machine": run.machine(), "seed": SEED}
        FILE.write_text(json.dumps(found | {"methods": costs}) + "\n")


if __name__ == "__main__":
    main()
