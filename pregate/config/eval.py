"""The settings of an evaluation."""

from __future__ import annotations

from dataclasses import dataclass

from pregate.config.validators import at_least, setting


@dataclass
class EvalConfig:
    """What is scored, and how. `split`: null is `task.eval_split`. `examples`: the first so many of it.

    `batch_size` is that of validation in training too. `agreement_examples`: on how many examples routes are compared
    with those of the reference. `bootstrap_samples`: of the 95 % intervals. `report`: whether `report.html` is written.
    """

    split: str | None = None
    examples: int | None = setting(None, at_least(1, ", or null for the whole split"))
    batch_size: int = setting(16, at_least(1))
    num_beams: int = setting(1, at_least(1))
    max_new_tokens: int | None = setting(None, at_least(1, ", or null for task.max_target_tokens"))
    agreement_examples: int = setting(64, at_least(0))
    bootstrap_samples: int = setting(2000, at_least(1))
    report: bool = True
