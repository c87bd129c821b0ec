"""What the records of a study say about its arms: means over seeds, paired differences with intervals, routes.

Knows records as plain dicts, and numpy; knows nothing about tables or plots. S seeds, N examples.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from studies.accuracy.arms_and_seeds import ARMS, AS_IT_IS, CHANGES, CONVENTIONAL, OTHER_SEED, PRETRAINING, TAUGHT

Record = Mapping[str, Any]
SAMPLES = 10_000
ORDER = [
    *((arm, "") for arm in ARMS),
    *(("pre_gated", variant) for variant in ("n2", "n3")),
    TAUGHT,
    (CONVENTIONAL, OTHER_SEED),
    *((CONVENTIONAL, variant) for variant in AS_IT_IS),
    *CHANGES,
]
"""(arm, variant) in the order of tables."""


@dataclass(frozen=True)
class Difference:
    """Mean over seeds and examples of an arm's score minus another's, in points, its 95 % interval, and each seed's
    mean."""

    mean: float
    low: float
    high: float
    by_seed: dict[int, float]


@dataclass(frozen=True)
class ArmSummary:
    """One arm, or one variant of it, on one task. Scores in percent, by seed; `difference` from arm (a)."""

    arm: str
    variant: str
    lookahead: int
    metric: str
    by_seed: dict[int, dict[str, float]]
    difference: Difference | None
    train_seconds: float
    calibration_seconds: float | None
    records: list[Record]

    @property
    def primary(self) -> list[float]:
        return [scores[self.metric] for scores in self.by_seed.values()]

    def mean(self, metric: str) -> float:
        return float(np.mean([scores[metric] for scores in self.by_seed.values()]))


def paired_bootstrap(differences_SN: np.ndarray, samples: int = SAMPLES, seed: int = 0) -> tuple[float, float]:
    """95 % percentile interval of the mean over `bootstrap_means`."""
    low, high = np.percentile(bootstrap_means(differences_SN, samples, seed), [2.5, 97.5])
    return float(low), float(high)


def bootstrap_means(differences_SN: np.ndarray, samples: int = SAMPLES, seed: int = 0) -> np.ndarray:
    """Means of so many tables of drawn seeds and examples, each drawn with replacement and independently.

    All seeds are scored on the same examples, so one draw of examples serves all drawn seeds (the two-way bootstrap of
    Owen 2007, "The pigeonhole bootstrap", whose variances these are). With S seeds it counts the variance between seeds
    (S-1)/S times, that between examples once, and what neither explains, the luck of single predictions, (3S-2)/S
    times: with three seeds 2/3, 1 and 7/3. Where seeds hardly differ beyond that luck the interval is too wide, and
    where they differ much it is too narrow.
    """
    generator = np.random.default_rng(seed)
    num_seeds, num_examples = differences_SN.shape
    means = np.empty(samples)
    chunk = max(1, 4_000_000 // num_examples)
    for start in range(0, samples, chunk):
        count = min(chunk, samples - start)
        weights = generator.multinomial(num_examples, np.full(num_examples, 1 / num_examples), size=count)
        by_seed = weights @ differences_SN.T / num_examples
        drawn = generator.integers(0, num_seeds, (count, num_seeds))
        means[start : start + count] = np.take_along_axis(by_seed, drawn, 1).mean(1)
    return means


def difference(records: Sequence[Record], base: Sequence[Record]) -> Difference | None:
    """Of the seeds that both have; None if there is none. Raises `ValueError` if their examples differ in number."""
    bases = {record["seed"]: record["example_scores"] for record in base}
    rows = {r["seed"]: (r["example_scores"], bases[r["seed"]]) for r in records if r["seed"] in bases}
    if not rows:
        return None
    lengths = {len(scores) for pair in rows.values() for scores in pair}
    if len(lengths) > 1:
        raise ValueError(f"Cells of {records[0]['task']} were scored on {sorted(lengths)} examples.")
    table_SN = np.array([np.subtract(*pair) for pair in rows.values()], dtype=np.float64)
    low, high = paired_bootstrap(table_SN)
    return Difference(float(table_SN.mean()), low, high, dict(zip(rows, table_SN.mean(1).tolist(), strict=True)))


def tasks_of(records: Iterable[Record]) -> list[str]:
    return list(dict.fromkeys(r["task"] for r in records if r["task"] != PRETRAINING and "metric" in r))


def summaries(records: Sequence[Record], task: str) -> list[ArmSummary]:
    """Every arm and variant of `task` that has a record, in the order of tables."""
    groups: dict[tuple[str, str], list[Record]] = {}
    for record in sorted((r for r in records if r["task"] == task), key=lambda r: r["seed"]):
        groups.setdefault((record["arm"], record["variant"]), []).append(record)
    base = groups.get((CONVENTIONAL, ""), [])
    found = []
    for key in sorted(groups, key=lambda key: ORDER.index(key) if key in ORDER else len(ORDER)):
        mine = groups[key]
        fitted = [r["calibration_seconds"] for r in mine if "calibration_seconds" in r]
        found.append(
            ArmSummary(
                *key,
                lookahead=mine[0]["lookahead"],
                metric=mine[0]["metric"],
                by_seed={r["seed"]: r["scores"] for r in mine},
                difference=difference(mine, base) if key[0] != CONVENTIONAL else None,
                train_seconds=float(np.mean([r["train_seconds"] for r in mine])),
                calibration_seconds=float(np.mean(fitted)) if fitted else None,
                records=mine,
            )
        )
    return found


def verdict(arm: ArmSummary) -> str:
    """One line on an arm against (a): what its interval says, and no more."""
    if arm.difference is None:
        return "no conventional model of the same seed to compare with"
    mean, low, high = arm.difference.mean, arm.difference.low, arm.difference.high
    bounds = f"[{low:+.1f}, {high:+.1f}]".replace("-", "−")
    if len(arm.difference.by_seed) == 1:
        bounds += " (one seed)"
    if high < 0:
        return f"worse by {-mean:.1f} points {bounds}"
    better = f", and better by {mean:.1f}" if low > 0 else ""
    return f"not worse than conventional beyond its interval{better} {bounds}"


def by_block(records: Iterable[Record], figure: str, model: str | None = None) -> dict[str, list[float | None]]:
    """A figure of the routing section, mean over `records`, for each stack and block; {} where none has it.

    `model`: pre_gated (the checkpoint) or reference, for figures that each model has.
    """
    found: list[Mapping[str, Sequence[float | None]]] = []
    for record in records:
        section = (record.get("routing") or {}).get(figure) or {}
        section = section.get(model) if model else section
        found += [section] if section else []
    if not found:
        return {}
    return {
        stack: [_mean(one[stack][block] for one in found) for block in range(len(found[0][stack]))]
        for stack in found[0]
    }


def _mean(values: Iterable[float | None]) -> float | None:
    known = [value for value in values if value is not None]
    return float(np.mean(known)) if known else None


def overall(figure: Mapping[str, Sequence[float | None]]) -> float | None:
    """The mean over all blocks of all stacks."""
    return _mean(value for blocks in figure.values() for value in blocks)


@dataclass(frozen=True)
class Recovery:
    """What calibration wins back of the routing agreement that the untrained shift loses, over all blocks and seeds,
    and the seconds it takes as a share of fine-tuning's; None for what was not measured."""

    shifted: float
    calibrated: float
    share: float | None
    time_share: float | None


def recovery(arms: Sequence[ArmSummary]) -> Recovery | None:
    """From the seeds that both arms have; None without a record of both."""
    named = {(arm.arm, arm.variant): arm for arm in arms}
    shifted, calibrated = named.get(("shifted", "")), named.get(("calibrated", ""))
    if shifted is None or calibrated is None:
        return None
    seeds = set(shifted.by_seed) & set(calibrated.by_seed)

    def agreement(arm: ArmSummary) -> float | None:
        return overall(by_block((r for r in arm.records if r["seed"] in seeds), "agreement"))

    before, after = agreement(shifted), agreement(calibrated)
    if before is None or after is None:
        return None
    tuned = named.get(("pre_gated", "")) or named.get((CONVENTIONAL, ""))
    seconds = calibrated.calibration_seconds
    return Recovery(
        before,
        after,
        (after - before) / (1 - before) if before < 1 else None,
        seconds / tuned.train_seconds if seconds is not None and tuned and tuned.train_seconds else None,
    )


def mean_curve(arm: ArmSummary) -> list[tuple[float, float, float, float]]:
    """(step, mean, lowest, highest) of the primary metric over the seeds, at the steps that all have."""
    curves = [{p["step"]: p[arm.metric] for p in r.get("curve", ()) if arm.metric in p} for r in arm.records]
    shared = sorted(set.intersection(*map(set, curves))) if curves else []
    points = [(step, [curve[step] for curve in curves]) for step in shared]
    return [(step, float(np.mean(values)), min(values), max(values)) for step, values in points]
