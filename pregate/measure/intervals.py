"""How sure a mean is."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np


def bootstrap_interval(values: Sequence[float], samples: int, seed: int) -> list[float]:
    """95 % percentile-bootstrap interval of the mean of per-example values (Efron and Tibshirani 1993, ch. 13).

    Of paired differences it is the paired bootstrap of Koehn (2004).
    """
    data = np.asarray(values, dtype=np.float64)
    generator = np.random.default_rng(seed)
    means = np.empty(samples)
    rows = max(1, 2_000_000 // max(1, len(data)))
    for start in range(0, samples, rows):
        count = min(rows, samples - start)
        means[start : start + count] = data[generator.integers(0, len(data), (count, len(data)))].mean(1)
    low, high = np.percentile(means, [2.5, 97.5])
    return [float(low), float(high)]
