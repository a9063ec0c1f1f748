"""Paired bootstrap over documents (and seeds): is a difference between two models more than noise?"""

from dataclasses import dataclass

import numpy as np

from stages.core.seeds import seed_of

RESAMPLES = 10_000
LEVEL = 0.95
BLOCK = 1 << 22  # resampled values held at once


@dataclass(frozen=True)
class Interval:
    """An estimate with its percentile interval at LEVEL and the two-sided bootstrap p of "it is zero"."""

    value: float
    low: float
    high: float
    p: float

    @property
    def verdict(self) -> str:
        """Return "difference" when the interval excludes zero and the units are enough to tell, else "within noise"."""
        return "difference" if (self.low > 0 or self.high < 0) and self.p <= 1 - LEVEL else "within noise"


def named_generator(seed: int, name: str) -> np.random.Generator:
    """Return a generator whose stream depends on `seed` and `name` only."""
    return np.random.default_rng(seed_of(seed, name))


def ratio(
    values: np.ndarray, sizes: np.ndarray, generator: np.random.Generator, resamples: int = RESAMPLES
) -> Interval:
    """Return the interval of (sum of values) / (sum of sizes), both [seeds, documents], over both axes.

    Documents are drawn with replacement, the same for every seed, and seeds likewise where there are several. For a
    difference of two models give the difference of their bits per document as `values`: it is paired by document.
    """
    seeds, documents = values.shape
    estimates = np.empty(resamples)
    step = max(1, BLOCK // max(1, documents * seeds))
    for start in range(0, resamples, step):
        count = min(step, resamples - start)
        chosen = generator.integers(documents, size=(count, documents))
        top, bottom = values[:, chosen].sum(2), sizes[:, chosen].sum(2)  # [seeds, count]
        if seeds > 1:
            drawn = generator.integers(seeds, size=(seeds, count))
            top, bottom = np.take_along_axis(top, drawn, 0), np.take_along_axis(bottom, drawn, 0)
        estimates[start : start + count] = top.sum(0) / bottom.sum(0)
    low, high = np.quantile(estimates, _tails(documents))
    rarer = min(np.count_nonzero(estimates <= 0), np.count_nonzero(estimates >= 0))
    # However alike few documents are, signs alone cannot say more than this (sign test).
    p = max(2 * (1 + rarer) / (1 + resamples), 2.0 ** (1 - documents))
    return Interval(float(values.sum() / sizes.sum()), float(low), float(high), float(min(1.0, p)))


def _tails(units: int) -> tuple[float, float]:
    """Return the two quantiles of an interval at LEVEL from `units` units: expanded percentiles.

    The plain percentiles are too narrow for few units (Hesterberg 2015, arXiv 1411.5279, section 4.2).
    """
    from scipy.stats import norm, t

    if units < 2:
        return 0.0, 1.0
    tail = float(norm.cdf(np.sqrt(units / (units - 1)) * t.ppf((1 - LEVEL) / 2, units - 1)))
    return tail, 1 - tail
