"""Intervals of paired differences on numbers whose mean is known."""

import numpy as np

from stages.summary import bootstrap


def test_interval_covers_the_truth():
    rng = np.random.default_rng(3)
    sizes = np.full((1, 60), 100.0)
    hits = 0
    for trial in range(60):
        found = bootstrap.ratio(
            rng.normal(0.02, 0.1, (1, 60)) * 100, sizes, bootstrap.named_generator(trial, "x"), 1000
        )
        hits += found.low <= 0.02 <= found.high
    assert 50 <= hits <= 60


def test_few_documents_are_noise():
    values, sizes = np.array([[-1.0, -1.01, -0.99, -1.0]]), np.ones((1, 4))
    few = bootstrap.ratio(values, sizes, bootstrap.named_generator(0, "x"))
    assert few.high < 0 and few.p == 0.125 and few.verdict == "within noise"
    many = bootstrap.ratio(np.tile(values, 3), np.ones((1, 12)), bootstrap.named_generator(0, "x"))
    assert many.verdict == "difference"


def test_bootstrap_is_seeded_and_p_agrees_with_the_interval():
    values, sizes = np.linspace(-1, 1.6, 30)[None], np.ones((1, 30))
    one, two = (bootstrap.ratio(values, sizes, bootstrap.named_generator(0, "x")) for _ in range(2))
    assert one == two and one != bootstrap.ratio(values, sizes, bootstrap.named_generator(1, "x"))
    assert (one.p < 0.05) == (one.verdict == "difference")
    assert bootstrap.ratio(np.abs(values) + 1, sizes, bootstrap.named_generator(0, "x")).p < 0.001
