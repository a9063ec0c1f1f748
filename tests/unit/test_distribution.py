"""Chosen log-probabilities and dense losses in blocks, against the plain computation with all logits."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from stages.vocabulary.blocks import Shape
from stages.vocabulary.dense import dense_loss
from stages.vocabulary.distribution import head_distribution
from stages.vocabulary.head import Head
from stages.vocabulary.standardised import moments_and_columns, standardised_logprob


def made(rows=7, size=5, vocab=23, padding=3, seed=0):
    generator = torch.Generator().manual_seed(seed)
    draw = lambda *shape: torch.randn(*shape, generator=generator, dtype=torch.float64)  # noqa: E731
    return draw(rows, size).requires_grad_(), draw(vocab + padding, size).requires_grad_(), draw(vocab + padding)


def logits_of(hidden, weight, bias, shape):
    logits = (hidden @ weight.T + (0 if bias is None else bias))[:, : shape.vocab] * shape.scale
    return logits if shape.softcap is None else torch.tanh(logits / shape.softcap) * shape.softcap


@given(
    seed=st.integers(0, 2**16),
    temperature=st.sampled_from([0.5, 1.0, 3.0]),
    shape=st.sampled_from([Shape(23), Shape(20, 0.7), Shape(23, 2.0, 4.0)]),
    with_bias=st.booleans(),
)
@settings(max_examples=25, deadline=None)
def test_chosen_values_and_gradients(seed, temperature, shape, with_bias):
    hidden, weight, bias = made(seed=seed)
    bias = bias.requires_grad_() if with_bias else None
    leaves = [leaf for leaf in (hidden, weight, bias) if leaf is not None]
    candidates = torch.randint(0, shape.vocab, (7, 4), generator=torch.Generator().manual_seed(seed))
    found = head_distribution(hidden, weight, candidates, 3, shape, bias, temperature, block=3)
    expected = torch.log_softmax(logits_of(hidden, weight, bias, shape) / temperature, -1)
    assert (found.top_ids == expected.topk(3, -1).indices).all()
    pairs = ((found.candidates, expected.gather(1, candidates)), (found.top, expected.topk(3, -1).values))
    slopes = [torch.randn(value.shape, generator=torch.Generator().manual_seed(seed + 1)) for value, _ in pairs]
    for value, right in pairs:
        torch.testing.assert_close(value.double(), right, rtol=1e-5, atol=1e-5)
    ours = torch.autograd.grad(sum((v * s).sum() for (v, _), s in zip(pairs, slopes, strict=True)), leaves)
    right = torch.autograd.grad(sum((r * s).sum() for (_, r), s in zip(pairs, slopes, strict=True)), leaves)
    for a, b in zip(ours, right, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("shape", [Shape(23), Shape(20, 0.7), Shape(23, 2.0, 4.0)])
@pytest.mark.parametrize("block", [1, 3, 100])
def test_dense_values_and_gradients(shape, block):
    hidden, weight, bias = made()
    bias.requires_grad_()
    target = torch.softmax(torch.randn(7, shape.vocab, dtype=torch.float64), -1)

    def divergence(logits, constants):
        return (constants["target"] * -torch.log_softmax(logits, -1)).sum()

    found = dense_loss(divergence, hidden, weight, shape, {"target": target}, bias, block)
    right = divergence(logits_of(hidden, weight, bias, shape), {"target": target})
    torch.testing.assert_close(found.double(), right, rtol=1e-5, atol=1e-5)
    leaves = (hidden, weight, bias)
    for a, b in zip(torch.autograd.grad(3 * found, leaves), torch.autograd.grad(3 * right, leaves), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)


def test_padding_columns_take_no_part():
    hidden, weight, _ = made()
    shape = Shape(23)
    candidates = torch.arange(7)[:, None]
    before = head_distribution(hidden, weight, candidates, 3, shape)
    with torch.no_grad():
        weight[23:] = 1e6
    after = head_distribution(hidden, weight, candidates, 3, shape)
    assert all((a == b).all() for a, b in zip(before, after, strict=True))
    after.candidates.sum().backward()
    assert (weight.grad[23:] == 0).all() and weight.grad[:23].abs().sum() > 0


@pytest.mark.parametrize("shape", [Shape(23), Shape(20, 0.7), Shape(23, 2.0, 4.0)])
@pytest.mark.parametrize("block", [2, 100])
def test_standardised_values_and_gradients(shape, block, monkeypatch):
    for module in ("head", "standardised"):
        monkeypatch.setattr(f"stages.vocabulary.{module}.block_size", lambda vocab, device: block)
    hidden, weight, bias = made()
    layer = torch.nn.Linear(5, len(weight))
    with torch.no_grad():
        layer.weight.copy_(weight), layer.bias.copy_(bias)
    sizes = torch.tensor([3, 1, 3])
    states = hidden.detach().float().requires_grad_()
    moments, columns = moments_and_columns(Head(layer, shape), states.detach(), sizes, 4)
    found = standardised_logprob(Head(layer, shape), states, columns, sizes, moments)

    leaves = [hidden, weight, bias.requires_grad_()]
    logits = logits_of(*leaves, shape)
    logprob = torch.log_softmax(logits / (logits.std(-1, keepdim=True) + 1e-4), -1)
    likeliest = torch.stack([part.exp().sum(0).topk(4).indices for part in logprob.split(sizes.tolist())])
    assert (columns == likeliest).all()
    expected = logprob.gather(1, likeliest.repeat_interleave(sizes, 0))
    torch.testing.assert_close(found.double(), expected, rtol=1e-5, atol=1e-5)
    slope = torch.randn(expected.shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    ours = torch.autograd.grad((found * slope.float()).sum(), [states, layer.weight, layer.bias])
    right = torch.autograd.grad((expected * slope).sum(), leaves)
    for a, b in zip(ours, right, strict=True):
        torch.testing.assert_close(a.double(), b, rtol=1e-4, atol=1e-5)


def test_standardised_of_equal_logits():
    """A deviation of zero moves nothing by itself, as torch's own has it."""
    layer = torch.nn.Linear(3, 6, bias=False)
    torch.nn.init.ones_(layer.weight)
    head, states, sizes = Head(layer, Shape(6)), torch.randn(2, 3).requires_grad_(), torch.tensor([2])
    moments, columns = moments_and_columns(head, states.detach(), sizes, 2)
    value = standardised_logprob(head, states, columns, sizes, moments)
    torch.testing.assert_close(value, torch.full((2, 2), 1 / 6).log())
    gradient = torch.autograd.grad(value[0, 0], [states, layer.weight])
    assert all(torch.isfinite(part).all() for part in gradient)
