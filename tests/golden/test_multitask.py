"""Combining the gradients of several losses, against tokenkit's functions: multitask.json.

tokenkit's pcgrad differs from the paper (arXiv 2001.06782, Algorithm 1) in three ways: it projects each tensor by
itself instead of all parameters together, measures conflicts on the gradient as it was before any projection, and
takes the other losses in a fixed order. The first two are defects: two losses that agree as a whole are projected
wherever one tensor of them disagrees, and what one projection has taken away already is taken away again. Ours is the
paper's, whose order is random for each loss. `projected(..., stale=True)` repeats both defects and gives the golden
numbers; `stale=False` is the paper's rule, which ours is compared with. What the optimizer gets is the sum over losses.
"""

import json
import re

import numpy as np
import pytest
import torch

from stages.training.aggregation import combination, dot_products, factors, flat_gradients, parse
from tests.conftest import golden_file, golden_folder
from tests.golden.compare import gradients, values


def pytest_generate_tests(metafunc):
    if "variant" in metafunc.fixturenames:
        path = golden_folder(metafunc.config) / "multitask.json"
        cases = json.loads(path.read_text(encoding="utf-8"))["pytree_cases"] if path.is_file() else []
        metafunc.parametrize("variant", cases, ids=[case["variant"] for case in cases])


@pytest.fixture(scope="module")
def arrays(golden):
    return np.load(golden_file(golden, "multitask.npz"))


@pytest.fixture(scope="module")
def model_case(golden):
    return json.loads(golden_file(golden, "multitask.json").read_text(encoding="utf-8"))["model_case"]


def leaves_of(arrays, variant, prefix):
    """Each tensor of each loss's gradient, [losses, size] float64; of a sum, one row."""
    rows = variant["n_tasks"] if not prefix.startswith("sum_") else 1
    return [arrays[f"{prefix}_{leaf}"].reshape(rows, -1).astype(np.float64) for leaf in variant["leaf_shapes"]]


def whole(leaves):
    return np.concatenate(leaves, 1)


def steps_of(name):
    """Functions of the file's name, in our spelling: "gradmag_then_gradclip_0.5" is gradmag, gradclip:0.5."""
    return [step.replace("gradclip_", "gradclip:") for step in name.split("_then_")]


def projected(rows, stale):
    """Each row without its parts against the others, in fixed order.

    `stale`: what is against the other is measured on the row as it was, as in tokenkit; else, as in Algorithm 1, on
    what the projections before have left of it.
    """
    result = rows.copy()
    for i in range(len(rows)):
        for j in range(len(rows)):
            along = (rows if stale else result)[i] @ rows[j]
            if j != i and along < 0:
                result[i] -= along / (rows[j] @ rows[j]) * rows[j]
    return result


def reference(leaves, steps, tokenkit):
    """What tokenkit's functions make of gradients, tensor by tensor; unless `tokenkit`, with the paper's pcgrad."""
    for step in steps:
        rows = whole(leaves)
        bounds = np.cumsum([leaf.shape[1] for leaf in leaves])[:-1]
        if step == "pcgrad":
            leaves = (
                [projected(leaf, stale=True) for leaf in leaves]
                if tokenkit
                else np.split(projected(rows, stale=False), bounds, 1)
            )
            continue
        norms = np.linalg.norm(rows, axis=1)
        if step == "gradmag":
            scale = 1 / (norms + 1e-8)
        else:
            limit = float(step.removeprefix("gradclip:"))
            scale = limit / np.maximum(norms, limit)
        leaves = np.split(rows * scale[:, None], bounds, 1)
    return whole(leaves)


def in_turn(count):
    return [range(count)] * count


def ours(steps, rows):
    """(each loss's new gradient, what the optimizer gets) by the product."""
    count = len(rows)
    gram, aggregation = dot_products(torch.tensor(rows)), parse("+".join(steps))
    matrix = combination(gram, np.ones(count), aggregation.functions, in_turn(count))
    return matrix @ rows, factors(aggregation, gram, np.ones(count), in_turn(count)) @ rows


def test_norms(arrays, variant):
    rows = whole(leaves_of(arrays, variant, f"grads_{variant['variant']}"))
    values(np.sqrt(np.diag(dot_products(torch.tensor(rows)))), arrays[f"norms_{variant['variant']}"])


def test_functions(arrays, variant):
    """Where no projection takes part ours are tokenkit's; where one does, ours are the paper's."""
    name = variant["variant"]
    leaves = leaves_of(arrays, variant, f"grads_{name}")
    for function in variant["functions"]:
        steps = steps_of(function)
        theirs = whole(leaves_of(arrays, variant, f"out_{name}_{function}"))
        summed = whole(leaves_of(arrays, variant, f"sum_{name}_{function}"))
        scale = whole(leaves) if "gradmag" not in steps else None
        gradients(reference(leaves, steps, tokenkit=True), theirs, function, of=scale)
        found, total = ours(steps, whole(leaves))
        right = reference(leaves, steps, tokenkit=False)
        gradients(found, right, function)
        gradients(total, right.sum(0), function)
        if "pcgrad" not in steps:
            gradients(found, theirs, function)
            gradients(total[None], summed, function)


def test_projection_of_one_tensor(arrays, variant):
    """Ours in each tensor by itself: the paper's, and where nothing is taken away twice tokenkit's."""
    if "pcgrad" not in variant["functions"]:
        pytest.skip("the file has no pcgrad")
    for leaf, rows in zip(
        variant["leaf_shapes"], leaves_of(arrays, variant, f"grads_{variant['variant']}"), strict=True
    ):
        found, _ = ours(["pcgrad"], rows)
        right, twice = projected(rows, stale=False), projected(rows, stale=True)
        gradients(found, right, leaf, of=rows)
        expected = arrays[f"out_{variant['variant']}_pcgrad_{leaf}"].reshape(rows.shape)
        same = (right == twice).all(1)
        gradients(found[same], expected[same], leaf, of=rows[same])


TERMS = {
    "mean((o-y)^2)": lambda at: (at["o"] - at["y"]).square().mean(),
    "mean NLL of class under softmax(o)": lambda at: torch.nn.functional.cross_entropy(at["o"], at["class"].long()),
    "mean(h^2)": lambda at: at["h"].square().mean(),
    "mean|o|": lambda at: at["o"].abs().mean(),
}


def model_losses(arrays, case):
    """The two-layer model of multitask.json: its parameters by name, its losses, those of its last layer."""
    assert case["forward"] == "h=tanh(x@w1+b1); o=h@w2+b2"
    at = {name: torch.tensor(arrays[f"model_{name}"]) for name in ("w1", "b1", "w2", "b2", "x", "y", "class")}
    weights = {name: at[name].requires_grad_() for name in ("w1", "b1", "w2", "b2")}
    at["h"] = torch.tanh(at["x"] @ weights["w1"] + weights["b1"])
    at["o"] = at["h"] @ weights["w2"] + weights["b2"]
    losses = []
    for text in case["losses"]:
        parts = [re.fullmatch(r"(?:([\d.]+)\*)?(.+)", part).groups() for part in text.split("+")]
        losses.append(sum(float(factor or 1) * TERMS[term](at) for factor, term in parts))
    values([loss.item() for loss in losses], arrays["model_losses"])
    return weights, losses, [weights[name] for name in case["last_layer"]]


def test_gradients_of_each_loss(arrays, model_case):
    weights, losses, _ = model_losses(arrays, model_case)
    expected = {leaf: arrays[f"model_per_loss_grad_{leaf}"].reshape(len(losses), -1) for leaf in weights}
    for leaf, weight in weights.items():
        gradients(flat_gradients(losses, [weight]), expected[leaf], leaf)
    gradients(flat_gradients(losses, list(weights.values())), whole(list(expected.values())))


def test_factors_are_inverse_norms(arrays, variant):
    """A loss without gradient has no weight; tokenkit's, 1e8, is harmless only where all of it is zero."""
    rows = whole(leaves_of(arrays, variant, f"grads_{variant['variant']}"))
    gram, count = dot_products(torch.tensor(rows)), len(rows)
    inverse = arrays[f"inv_norms_{variant['variant']}"].astype(np.float64)
    expected = np.where(np.abs(rows).max(1) > 0, inverse, 0)
    for name, right in (
        ("approx_gradmag", expected),
        ("approx_gradmag_preserve_mag", expected / expected.sum()),
    ):
        found = factors(parse(name), gram, np.ones(count), in_turn(count))
        values(found, right, name)


@pytest.mark.parametrize("name", ["approx_gradmag", "approx_gradmag_preserve_mag"])
def test_factors_from_the_last_layer(arrays, model_case, name):
    weights, losses, last = model_losses(arrays, model_case)
    gram = dot_products(flat_gradients(losses, last))
    found = factors(parse(name), gram, np.ones(len(losses)), in_turn(len(losses)))
    values(found, arrays[f"model_{name}_weights"])
    total = sum(float(factor) * loss for factor, loss in zip(found, losses, strict=True))
    values(total.item(), arrays[f"model_{name}_loss"])
    for leaf, gradient in zip(weights, torch.autograd.grad(total, list(weights.values())), strict=True):
        gradients(gradient, arrays[f"model_{name}_grad_{leaf}"], leaf)


def test_none_is_a_sum_where_tokenkit_has_a_mean(arrays, model_case):
    weights, losses, last = model_losses(arrays, model_case)
    gram = dot_products(flat_gradients(losses, last))
    found = factors(parse("none"), gram, np.ones(len(losses)), in_turn(len(losses)))
    total = sum(float(factor) * loss for factor, loss in zip(found, losses, strict=True))
    values(total.item() / len(losses), arrays["model_none_loss"])
    for leaf, gradient in zip(weights, torch.autograd.grad(total, list(weights.values())), strict=True):
        gradients(gradient / len(losses), arrays[f"model_none_grad_{leaf}"], leaf)
