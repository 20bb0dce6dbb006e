"""What a training step counts while it samples, and how that becomes metrics."""

from __future__ import annotations

from dataclasses import asdict, dataclass

import torch

from support.batch import Group
from support.distributed import sum_over_ranks


def mean_metrics(history: list[dict[str, float]]) -> dict[str, float]:
    """The mean of each metric over several updates."""
    means = {}
    for name in history[0] if history else ():
        means[name] = sum(metrics[name] for metrics in history) / len(history)
    return means


@dataclass
class RolloutStats:
    """Sums over the responses of a step on this rank. The README's glossary explains each."""

    responses: float = 0.0
    reward: float = 0.0
    accuracy: float = 0.0
    format: float = 0.0
    truncated: float = 0.0
    response_tokens: float = 0.0
    zero_advantage_groups: float = 0.0
    skipped_rows: float = 0.0
    reward_timeouts: float = 0.0
    reward_errors: float = 0.0
    reward_unscored: float = 0.0

    def add_scores(self, scores: list[dict], grader) -> None:
        """Count one round's scores and what its grader could not score."""
        self.responses += len(scores)
        rewards = torch.tensor([score["overall"] for score in scores], dtype=torch.float64)
        self.reward += rewards.sum().item()
        self.accuracy += sum(score["accuracy"] for score in scores)
        self.format += sum(score["format"] for score in scores)
        self.reward_timeouts += grader.timeouts
        self.reward_errors += grader.errors
        self.reward_unscored += grader.unscored

    def add_prompt(self, groups: list[Group]) -> None:
        """Count the groups of a prompt, usually one, that have their advantages."""
        largest = 0.0
        for group in groups:
            self.truncated += group.truncated.sum().item()
            self.response_tokens += group.response_mask.sum().item()
            largest = max(largest, group.advantages.abs().max().item())
        self.zero_advantage_groups += int(largest < 1e-6)  # equal rewards leave about 1e-10

    def metrics(self) -> dict[str, float]:
        """Over all ranks: means per response, then sums (response_tokens for tokens_per_second)."""
        names = asdict(self).keys()
        values = dict(zip(names, sum_over_ranks(asdict(self).values()), strict=True))
        n = max(values.pop("responses"), 1.0)
        for name in ("reward", "accuracy", "format", "truncated"):
            values[name] /= n
        return values | {"response_length": values["response_tokens"] / n}
