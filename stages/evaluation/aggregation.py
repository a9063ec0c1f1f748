"""How the values of documents become a metric, for the metrics that can be drawn again document by document."""

import math
from collections.abc import Callable

import numpy as np

# Of the mean of values over documents, sum(value) / sum(weight). A weight is 1, or what the task counts of a document.
FORMULAS: dict[str, Callable[[np.ndarray], np.ndarray]] = {
    "mean": lambda mean: mean,
    "perplexity": lambda mean: np.exp(-mean),
    "bits_per_byte": lambda mean: -mean / np.log(2),
}
DRAWS = 8


def formula_of(values: np.ndarray, weights: np.ndarray, aggregate: Callable[[np.ndarray], float]) -> str | None:
    """Return the name of the formula that `aggregate` computes, None where it is none of them.

    `values` and `weights` are those of each document; `aggregate` takes the numbers of documents, with repetition. A
    formula is found by what it computes: the same of all documents and of random draws of them.
    """
    everyone = np.arange(len(values))
    draws = [everyone, *np.random.default_rng(0).integers(len(values), size=(DRAWS, len(values)))]
    wanted = [aggregate(draw) for draw in draws]
    with np.errstate(all="ignore"):
        means = [values[draw].sum() / weights[draw].sum() for draw in draws]
        for name, formula in FORMULAS.items():
            if all(same(formula(mean), value) for mean, value in zip(means, wanted, strict=True)):
                return name
    return None


def same(one: float, other: float) -> bool:
    """Return whether two finite figures are the same but for rounding."""
    return math.isfinite(one) and math.isclose(one, other, rel_tol=1e-9, abs_tol=1e-12)
