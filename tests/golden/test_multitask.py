"""Combining the gradients of several losses, against tokenkit's functions: multitask.json.

tokenkit's pcgrad differs from the paper (arXiv 2001.06782, Algorithm 1) in three ways: it projects each tensor by
itself instead of all parameters together, measures conflicts on the gradient as it was before any projection, and
takes the other losses in a fixed order. The first two are defects: two losses that agree as a whole are projected
wherever one tensor of them disagrees, and what one projection has taken away already is taken away again. Ours is the
paper's, whose order is random for each loss. `projected(..., stale=True)` repeats the second defect on one tensor at a
time and gives the golden numbers; `stale=False` is the paper's rule. What the optimizer gets is the sum over losses.
"""

import json

import numpy as np
import pytest
import torch

from stages.training.aggregation import combination, dot_products, factors, flat_gradients, parse
from tests.conftest import golden_file

CLOSE = {"rtol": 1e-4, "atol": 1e-6}
LEAVES = ("a", "b", "c")
TEXTS = {
    "gradmag": "gradmag",
    "gradclip_0.5": "gradclip:0.5",
    "gradclip_5.0": "gradclip:5.0",
    "gradmag_then_gradclip_0.5": "gradmag+gradclip:0.5",
}
IN_TURN = [range(3)] * 3


@pytest.fixture(scope="module")
def arrays(golden):
    return np.load(golden_file(golden, "multitask.npz"))


@pytest.fixture(scope="module")
def case(golden):
    return json.loads(golden_file(golden, "multitask.json").read_text())


def together(arrays, prefix):
    """The leaves of each of three gradients laid end to end, [3, parameters]."""
    return torch.tensor(np.concatenate([arrays[f"{prefix}_{leaf}"].reshape(3, -1) for leaf in LEAVES], 1))


def ours(text, rows):
    """Each loss's new gradient."""
    matrix = combination(dot_products(rows), np.ones(3), parse(text).functions, IN_TURN)
    return matrix @ rows.double().numpy()


def projected(rows, stale):
    """Each row [3, parameters] without its parts against the others, in fixed order.

    `stale`: what is against the other is measured on the row as it was, as in tokenkit; else, as in Algorithm 1, on
    what the projections before have left of it.
    """
    rows = rows.double().numpy()
    result = rows.copy()
    for i in range(3):
        for j in range(3):
            along = (rows if stale else result)[i] @ rows[j]
            if j != i and along < 0:
                result[i] -= along / (rows[j] @ rows[j]) * rows[j]
    return result


@pytest.mark.parametrize("variant", ["random", "conflict", "zero"])
def test_functions(arrays, case, variant):
    assert variant in [one["variant"] for one in case["pytree_cases"]]
    rows = together(arrays, f"grads_{variant}")
    np.testing.assert_allclose(np.sqrt(np.diag(dot_products(rows))), arrays[f"norms_{variant}"], **CLOSE)
    for name, text in TEXTS.items():
        found = ours(text, rows)
        np.testing.assert_allclose(found, together(arrays, f"out_{variant}_{name}"), **CLOSE, err_msg=name)
        weights = factors(parse(text), dot_products(rows), np.ones(3), IN_TURN)
        summed = np.concatenate([arrays[f"sum_{variant}_{name}_{leaf}"].ravel() for leaf in LEAVES])
        np.testing.assert_allclose(weights @ rows.double().numpy(), summed, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("variant", ["random", "conflict", "zero"])
def test_pcgrad(arrays, variant):
    differ = set()
    per_leaf = []
    for leaf in LEAVES:
        rows = torch.tensor(arrays[f"grads_{variant}_{leaf}"].reshape(3, -1))
        expected = arrays[f"out_{variant}_pcgrad_{leaf}"].reshape(3, -1)
        per_leaf.append(projected(rows, stale=True))
        np.testing.assert_allclose(per_leaf[-1], expected, rtol=1e-4, atol=1e-5)
        np.testing.assert_allclose(ours("pcgrad", rows), projected(rows, stale=False), rtol=1e-4, atol=1e-5)
        close = np.isclose(ours("pcgrad", rows), expected, rtol=1e-4, atol=1e-5).all(1)
        differ |= {(leaf, task) for task in np.flatnonzero(~close).tolist()}
    # Only losses in conflict with both others can differ. Task 1 of `conflict` in leaf c: g1.g2 = -0.262, but the first
    # projection leaves (g1 + 0.818 g0).g2 = +0.085: nothing more to take away.
    known = {"random": {("a", 0), ("c", 0)}, "conflict": {("a", 0), ("b", 1), ("c", 1)}, "zero": set()}
    assert differ == known[variant]
    # The composition is tokenkit's projection of each tensor, then gradmag over all of them.
    rows = torch.tensor(np.concatenate(per_leaf, 1))
    expected = together(arrays, f"out_{variant}_pcgrad_then_gradmag")
    np.testing.assert_allclose(ours("gradmag", rows), expected, rtol=1e-4, atol=1e-5)
    # Ours, over all parameters at once.
    whole = together(arrays, f"grads_{variant}")
    np.testing.assert_allclose(ours("pcgrad", whole), projected(whole, stale=False), rtol=1e-4, atol=1e-5)
    composed = ours("gradmag", torch.tensor(projected(whole, stale=False)))
    np.testing.assert_allclose(ours("pcgrad+gradmag", whole), composed, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("variant", ["random", "conflict", "zero"])
def test_sums_after_pcgrad(arrays, variant):
    """tokenkit's sums are those of its projections of each tensor; ours those of Algorithm 1 over all parameters."""
    leaves = [torch.tensor(arrays[f"grads_{variant}_{leaf}"].reshape(3, -1)) for leaf in LEAVES]
    whole = torch.cat(leaves, 1)
    theirs = torch.tensor(np.concatenate([projected(rows, stale=True) for rows in leaves], 1))
    right = torch.tensor(projected(whole, stale=False))
    for name, text in (("pcgrad", "none"), ("pcgrad_then_gradmag", "gradmag")):
        expected = np.concatenate([arrays[f"sum_{variant}_{name}_{leaf}"].ravel() for leaf in LEAVES])
        np.testing.assert_allclose(ours(text, theirs).sum(0), expected, rtol=1e-4, atol=1e-5)
        aggregation = parse("pcgrad" if text == "none" else "pcgrad+gradmag")
        found = factors(aggregation, dot_products(whole), np.ones(3), IN_TURN) @ whole.double().numpy()
        np.testing.assert_allclose(found, ours(text, right).sum(0), rtol=1e-4, atol=1e-5)
        if all((rows @ rows.T >= 0).all() for rows in [whole, *leaves]):  # nothing in conflict: both are one
            np.testing.assert_allclose(found, expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("variant", ["random", "conflict", "zero"])
def test_nothing_is_left_against_the_loss_taken_last(arrays, variant):
    """By definition a projected gradient is never against the loss taken last.

    Task 0 of our own file's `random` is against both others. tokenkit takes both parts away in every tensor where they
    are, and so leaves it with g0.g2 = 26.65, as if it had agreed with task 2; the right projection leaves 0.
    """
    rows = together(arrays, f"grads_{variant}").double().numpy()
    found = ours("pcgrad", torch.tensor(rows))
    for task, last in ((0, 2), (1, 2), (2, 1)):
        assert found[task] @ rows[last] > -1e-6


def model_losses(arrays, case):
    """The two-layer model of multitask.json: its parameters by name, and its three losses."""
    at = {name: torch.tensor(arrays[f"model_{name}"]) for name in ("w1", "b1", "w2", "b2", "x", "y", "class")}
    weights = {name: at[name].requires_grad_() for name in ("w1", "b1", "w2", "b2")}
    hidden = torch.tanh(at["x"] @ weights["w1"] + weights["b1"])
    output = hidden @ weights["w2"] + weights["b2"]
    losses = [
        (output - at["y"]).square().mean(),
        30 * torch.nn.functional.cross_entropy(output, at["class"].long()),
        0.1 * hidden.square().mean() + 0.02 * output.abs().mean(),
    ]
    np.testing.assert_allclose([loss.item() for loss in losses], arrays["model_losses"], **CLOSE)
    return weights, losses, [weights[name] for name in case["model_case"]["last_layer"]]


def test_gradients_of_each_loss(arrays, case):
    weights, losses, _ = model_losses(arrays, case)
    for leaf, weight in weights.items():
        expected = arrays[f"model_per_loss_grad_{leaf}"].reshape(3, -1)
        np.testing.assert_allclose(flat_gradients(losses, [weight]), expected, rtol=1e-3, atol=1e-6, err_msg=leaf)
    together = np.concatenate([arrays[f"model_per_loss_grad_{leaf}"].reshape(3, -1) for leaf in weights], 1)
    np.testing.assert_allclose(flat_gradients(losses, list(weights.values())), together, rtol=1e-3, atol=1e-6)


@pytest.mark.parametrize("variant", ["random", "conflict"])
def test_factors_are_inverse_norms(arrays, variant):
    rows = together(arrays, f"grads_{variant}")
    found = factors(parse("approx_gradmag"), dot_products(rows), np.ones(3), IN_TURN)
    np.testing.assert_allclose(found, arrays[f"inv_norms_{variant}"], **CLOSE)
    scaled = factors(parse("approx_gradmag_preserve_mag"), dot_products(rows), np.ones(3), IN_TURN)
    expected = arrays[f"inv_norms_{variant}"]
    np.testing.assert_allclose(scaled, expected / expected.sum(), **CLOSE)


@pytest.mark.parametrize("name", ["approx_gradmag", "approx_gradmag_preserve_mag"])
def test_factors_from_the_last_layer(arrays, case, name):
    weights, losses, last = model_losses(arrays, case)
    gram = dot_products(flat_gradients(losses, last))
    found = factors(parse(name), gram, np.ones(3), IN_TURN)
    np.testing.assert_allclose(found, arrays[f"model_{name}_weights"], **CLOSE)
    total = sum(float(factor) * loss for factor, loss in zip(found, losses, strict=True))
    np.testing.assert_allclose(total.item(), arrays[f"model_{name}_loss"], **CLOSE)
    for leaf, gradient in zip(weights, torch.autograd.grad(total, list(weights.values())), strict=True):
        np.testing.assert_allclose(gradient, arrays[f"model_{name}_grad_{leaf}"], rtol=1e-3, atol=1e-6, err_msg=leaf)


def test_none_is_a_sum_where_tokenkit_has_a_mean(arrays, case):
    weights, losses, _ = model_losses(arrays, case)
    np.testing.assert_allclose(sum(losses).item() / 3, arrays["model_none_loss"], **CLOSE)
    for leaf, gradient in zip(weights, torch.autograd.grad(sum(losses), list(weights.values())), strict=True):
        np.testing.assert_allclose(gradient / 3, arrays[f"model_none_grad_{leaf}"], rtol=1e-3, atol=1e-6)


def test_a_loss_without_gradient_has_no_weight(arrays):
    """tokenkit's factor for it is 1e8, harmless only where the gradient is zero everywhere."""
    rows = together(arrays, "grads_zero")
    np.testing.assert_allclose(arrays["inv_norms_zero"][0], 1e8)
    found = factors(parse("approx_gradmag"), dot_products(rows), np.ones(3), IN_TURN)
    assert found[0] == 0
    np.testing.assert_allclose(found[1:], arrays["inv_norms_zero"][1:], **CLOSE)
