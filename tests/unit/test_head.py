"""Head statistics against plain autograd, and against the logits of real model classes."""

import itertools

import pytest
import torch

from stages.training.head import head_statistics

CASES = list(itertools.product([None, 5.0], [False, True], [1.0, 0.3], [True, False]))


def naive(hidden, weight, targets, mask, eos, vocab, bias, softcap, scale):
    logits = (hidden @ weight.T + (0 if bias is None else bias)).float()[:, :vocab] * scale
    if softcap:
        logits = softcap * torch.tanh(logits / softcap)
    logprobs = torch.log_softmax(logits, -1)
    return {
        "observed_logprob": logprobs.gather(1, targets[:, None])[:, 0],
        "boundary_logprob": logprobs[:, mask].logsumexp(-1),
        "eos_logprob": logprobs[:, eos],
    }


def tensors(dtype=torch.float32, spread=1.0, with_bias=False):
    source = torch.Generator().manual_seed(5)
    draw = lambda *size: torch.randn(*size, generator=source)  # noqa: E731
    hidden = (draw(37, 8) * spread).to(dtype).requires_grad_()
    weight = draw(29, 8).to(dtype).requires_grad_()
    bias = draw(29).to(dtype).requires_grad_() if with_bias else None
    targets = torch.randint(0, 23, (37,), generator=source)
    mask = torch.zeros(23, dtype=torch.bool)
    mask[[1, 4, 7, 20]] = True
    outer = [draw(37) for _ in range(3)]
    return hidden, weight, bias, targets, mask, outer


def compare(actual, expected, leaves, outer, rtol, atol):
    for name in expected:
        torch.testing.assert_close(actual[name], expected[name], rtol=rtol, atol=atol)
    grads = []
    for statistics in (actual, expected):
        total = sum((value * weight).sum() for value, weight in zip(statistics.values(), outer, strict=True))
        grads.append(torch.autograd.grad(total, leaves, retain_graph=True))
    for mine, theirs in zip(*grads, strict=True):
        torch.testing.assert_close(mine, theirs, rtol=rtol, atol=atol)


@pytest.mark.parametrize("softcap,with_bias,scale,small_blocks", CASES)
def test_equals_autograd(softcap, with_bias, scale, small_blocks):
    hidden, weight, bias, targets, mask, outer = tensors(with_bias=with_bias)
    actual = head_statistics(hidden, weight, targets, mask, 3, 23, bias, softcap, scale, 5 if small_blocks else None)
    expected = naive(hidden, weight, targets, mask, 3, 23, bias, softcap, scale)
    leaves = [hidden, weight] + ([bias] if with_bias else [])
    compare(actual, expected, leaves, outer, 1e-4, 1e-5)
    assert torch.autograd.grad(actual["observed_logprob"].sum(), weight)[0][23:].abs().max() == 0  # padding rows


def test_bfloat16_and_autocast():
    hidden, weight, _, targets, mask, outer = tensors(torch.bfloat16)
    actual = head_statistics(hidden, weight, targets, mask, 3, 23, block=5)
    expected = naive(hidden, weight, targets, mask, 3, 23, None, None, 1.0)
    compare(actual, expected, [hidden, weight], outer, 3e-2, 3e-2)
    hidden, weight, _, targets, mask, outer = tensors()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        actual = head_statistics(hidden, weight, targets, mask, 3, 23, block=5)
    assert actual["observed_logprob"].dtype == torch.float32
    exact = naive(hidden, weight, targets, mask, 3, 23, None, None, 1.0)
    compare(actual, exact, [hidden, weight], outer, 5e-2, 1e-1)


def test_only_what_is_asked():
    hidden, weight, _, targets, mask, _ = tensors()
    assert list(head_statistics(hidden, weight, targets, vocab=23)) == ["observed_logprob"]
    statistics = head_statistics(hidden, weight.detach(), targets, mask, vocab=23)
    statistics["boundary_logprob"].sum().backward()
    assert hidden.grad is not None and torch.isfinite(hidden.grad).all()


def test_extreme_logits_stay_finite():
    hidden, weight, _, targets, mask, outer = tensors(spread=200.0)
    actual = head_statistics(hidden, weight, targets, mask, 3, 23)
    expected = naive(hidden.double(), weight.double(), targets, mask, 3, 23, None, None, 1.0)
    assert actual["boundary_logprob"].min() < -100
    for name, value in expected.items():
        torch.testing.assert_close(actual[name], value.float(), rtol=1e-4, atol=1e-2)
    total = sum((value * weight).sum() for value, weight in zip(actual.values(), outer, strict=True))
    exact = sum((value * weight).sum() for value, weight in zip(expected.values(), outer, strict=True))
    gradients = (torch.autograd.grad(value, [hidden, weight]) for value in (total, exact))
    for mine, theirs in zip(*gradients, strict=True):
        assert torch.isfinite(mine).all()
        torch.testing.assert_close(mine, theirs, rtol=1e-2, atol=1e-1)
