"""Paired bootstrap over documents (and seeds): is a difference between two models more than noise?"""

from collections.abc import Callable
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


Sums = tuple[np.ndarray, np.ndarray]  # values and weights, each [seeds, documents]


def difference(
    a: Sums,
    b: Sums,
    formula: Callable[[np.ndarray], np.ndarray],
    generator: np.random.Generator,
    resamples: int = RESAMPLES,
) -> Interval | None:
    """Return the interval of formula(mean of a) - formula(mean of b), paired by document and by seed.

    A mean is the sum of values / the sum of weights. Documents are drawn with replacement, the same for a, b and every
    seed, and seeds likewise where there are several. None where that gives no finite numbers.
    """
    seeds, documents = a[0].shape
    estimates = np.empty(resamples)
    step = max(1, BLOCK // max(1, documents * seeds))

    def statistic(chosen: np.ndarray | slice) -> np.ndarray:
        means = [values[:, chosen].sum(-1) / weights[:, chosen].sum(-1) for values, weights in (a, b)]
        return formula(means[0]) - formula(means[1])

    with np.errstate(all="ignore"):
        for start in range(0, resamples, step):
            count = min(step, resamples - start)
            chosen = generator.integers(documents, size=(count, documents))
            drawn = statistic(chosen)
            if seeds > 1:
                drawn = np.take_along_axis(drawn, generator.integers(seeds, size=(seeds, count)), 0)
            estimates[start : start + count] = drawn.mean(0)
        value = float(statistic(slice(None)).mean())
    if not np.isfinite(estimates).all():
        return None
    low, high = np.quantile(estimates, _tails(documents))
    rarer = min(np.count_nonzero(estimates <= 0), np.count_nonzero(estimates >= 0))
    # However alike few documents are, signs alone cannot say more than this (sign test).
    p = max(2 * (1 + rarer) / (1 + resamples), 2.0 ** (1 - documents))
    return Interval(value, float(low), float(high), float(min(1.0, p)))


def _tails(units: int) -> tuple[float, float]:
    """Return the two quantiles of an interval at LEVEL from `units` units: expanded percentiles.

    The plain percentiles are too narrow for few units (Hesterberg 2015, arXiv 1411.5279, section 4.2).
    """
    from scipy.stats import norm, t

    if units < 2:
        return 0.0, 1.0
    tail = float(norm.cdf(np.sqrt(units / (units - 1)) * t.ppf((1 - LEVEL) / 2, units - 1)))
    return tail, 1 - tail
