"""Intervals of paired differences on numbers whose mean is known."""

import numpy as np

from stages.evaluation.aggregation import FORMULAS
from stages.summary import bootstrap


def interval(values, sizes, generator, resamples=10_000):
    """The interval of sum(values) / sum(sizes): of a difference from nothing."""
    nothing = np.zeros_like(values)
    return bootstrap.difference((values, sizes), (nothing, sizes), FORMULAS["mean"], generator, resamples)


def test_interval_covers_the_truth():
    rng = np.random.default_rng(3)
    sizes = np.full((1, 60), 100.0)
    hits = 0
    for trial in range(60):
        found = interval(rng.normal(0.02, 0.1, (1, 60)) * 100, sizes, bootstrap.named_generator(trial, "x"), 1000)
        hits += found.low <= 0.02 <= found.high
    assert 50 <= hits <= 60


def test_few_documents_are_noise():
    values, sizes = np.array([[-1.0, -1.01, -0.99, -1.0]]), np.ones((1, 4))
    few = interval(values, sizes, bootstrap.named_generator(0, "x"))
    assert few.high < 0 and few.p == 0.125 and few.verdict == "within noise"
    many = interval(np.tile(values, 3), np.ones((1, 12)), bootstrap.named_generator(0, "x"))
    assert many.verdict == "difference"


def test_bootstrap_is_seeded_and_p_agrees_with_the_interval():
    values, sizes = np.linspace(-1, 1.6, 30)[None], np.ones((1, 30))
    one, two = (interval(values, sizes, bootstrap.named_generator(0, "x")) for _ in range(2))
    assert one == two and one != interval(values, sizes, bootstrap.named_generator(1, "x"))
    assert (one.p < 0.05) == (one.verdict == "difference")
    assert interval(np.abs(values) + 1, sizes, bootstrap.named_generator(0, "x")).p < 0.001


def test_a_perplexity_is_drawn_as_a_perplexity():
    """Against the same draws, aggregated one by one."""
    random = np.random.default_rng(5)
    weights = random.integers(1, 9, (1, 20)).astype(float)
    a, b = (-weights * random.normal(mean, 0.3, (1, 20)) for mean in (1.0, 1.4))
    found = bootstrap.difference((a, weights), (b, weights), FORMULAS["perplexity"], np.random.default_rng(1), 500)
    draws = np.random.default_rng(1).integers(20, size=(500, 20))
    ratio = [[-side[0, draw].sum() / weights[0, draw].sum() for draw in draws] for side in (a, b)]
    wanted = np.exp(ratio[0]) - np.exp(ratio[1])
    low, high = np.quantile(wanted, bootstrap._tails(20))
    np.testing.assert_allclose((found.low, found.high), (low, high), rtol=1e-9)
    np.testing.assert_allclose(found.value, np.exp(-a.sum() / weights.sum()) - np.exp(-b.sum() / weights.sum()))
    assert found.high < 0 and found.verdict == "difference"


def test_seeds_are_drawn_with_their_documents():
    random = np.random.default_rng(2)
    a, b, sizes = random.random((3, 30)), random.random((3, 30)), np.ones((3, 30))
    found = bootstrap.difference((a, sizes), (b, sizes), FORMULAS["mean"], np.random.default_rng(0), 2000)
    assert found.low < found.value < found.high
    np.testing.assert_allclose(found.value, (a - b).mean())


def test_what_overflows_has_no_interval():
    a, b, sizes = np.full((1, 10), -800.0), np.full((1, 10), -700.0), np.ones((1, 10))
    assert bootstrap.difference((a, sizes), (b, sizes), FORMULAS["perplexity"], np.random.default_rng(0), 100) is None
