"""The softmax of logits divided by their own standard deviation, log softmax(z / (std(z) + 1e-4)), without all logits.

The vocabulary axis exists for one block of tokens at a time (`stages.vocabulary.blocks`). One pass over the logits
finds what they are divided by and which tokens an example holds likely; the log-probabilities of those then need only
their own columns of the output layer, and the gradient one more pass.
"""

from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch.autograd.function import once_differentiable

from stages.vocabulary.blocks import Shape, block_logits, block_size, compute_dtype, gradient_blocks

if TYPE_CHECKING:
    from stages.vocabulary.head import Head

SMALLEST_DEVIATION = 1e-4  # added to every standard deviation


class Moments(NamedTuple):
    """Of each row's logits z, float32 [R]: their mean and standard deviation over the vocabulary, the log-normaliser
    of u = (z - mean) / (deviation + SMALLEST_DEVIATION), and the mean of z - mean under softmax(u)."""

    mean: torch.Tensor
    deviation: torch.Tensor
    normaliser: torch.Tensor
    expected: torch.Tensor

    @property
    def divisor(self) -> torch.Tensor:
        """What the logits of each row are divided by."""
        return self.deviation + SMALLEST_DEVIATION


@torch.no_grad()
def moments_and_columns(
    head: "Head", hidden: torch.Tensor, sizes: torch.Tensor, number: int
) -> tuple[Moments, torch.Tensor]:
    """Return (moments of each row, int64 [E, number]: each example's likeliest tokens, by their probabilities' sum).

    `hidden` [R, d], example by example; `sizes` int64 [E]: rows of each example, at least 1.
    """
    ends, chosen, found = sizes.cumsum(0).tolist(), [], []
    total = hidden.new_zeros(head.shape.vocab, dtype=torch.float32)
    for part, logits in head.logit_pieces(hidden):
        moments, exponentials, factor = _moments(logits)
        found.append(moments)
        start = part.start
        while start < part.stop:
            end = min(part.stop, ends[len(chosen)])
            rows = slice(start - part.start, end - part.start)
            total.addmv_(exponentials[rows].T, factor[rows])
            if end == ends[len(chosen)]:
                chosen.append(total.topk(number).indices)
                total.zero_()
            start = end
    if not chosen:
        empty = hidden.new_zeros(0, dtype=torch.float32)
        return Moments(empty, empty, empty, empty), sizes.new_zeros((0, number))
    return Moments(*(torch.cat(parts) for parts in zip(*found, strict=True))), torch.stack(chosen)


def _moments(logits: torch.Tensor) -> tuple[Moments, torch.Tensor, torch.Tensor]:
    """Return (moments, exponentials [n, vocab], factors [n] that make them probabilities); `logits` are used up."""
    mean = logits.mean(-1)
    centred = logits.sub_(mean[:, None])
    deviation = (torch.linalg.vecdot(centred, centred) / max(1, centred.shape[1] - 1)).sqrt()
    divisor = deviation + SMALLEST_DEVIATION
    top = centred.amax(-1) / divisor
    exponentials = (centred / divisor[:, None]).sub_(top[:, None]).exp_()
    factor = 1 / exponentials.sum(-1)
    expected = torch.linalg.vecdot(exponentials, centred) * factor
    return Moments(mean, deviation, top - factor.log(), expected), exponentials, factor


def standardised_logprob(
    head: "Head", hidden: torch.Tensor, columns: torch.Tensor, sizes: torch.Tensor, moments: Moments
) -> torch.Tensor:
    """Return [R, m]: the log-probability of the tokens `columns` [E, m] of each row's example, differentiable.

    `moments` are those of `hidden` [R, d]; the gradient is that of the whole expression, its mean and deviation too.
    """
    size = block_size(head.shape.vocab, hidden.device)
    settings = (sizes.tolist(), head.shape, size, compute_dtype(hidden))
    return _Standardised.apply(hidden, head.weight, head.bias, columns, *moments, *settings)


class _Standardised(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        hidden: torch.Tensor,
        weight: torch.Tensor,
        bias: torch.Tensor | None,
        columns: torch.Tensor,
        mean: torch.Tensor,
        deviation: torch.Tensor,
        normaliser: torch.Tensor,
        expected: torch.Tensor,
        sizes: list[int],
        shape: Shape,
        block: int,
        compute: torch.dtype,
    ) -> torch.Tensor:
        moments = Moments(mean, deviation, normaliser, expected)
        parts = []
        with torch.autocast(hidden.device.type, enabled=False):
            for rows, ids in zip(hidden.split(sizes), columns, strict=True):
                offsets = None if bias is None else bias[ids].to(compute)
                parts.append(block_logits(rows.to(compute), weight[ids].to(compute), offsets, shape)[0])
        logits = torch.cat(parts) if parts else hidden.new_zeros((0, columns.shape[1]), dtype=torch.float32)
        centred = logits.sub_(mean[:, None])
        by_row = columns.repeat_interleave(torch.tensor(sizes, dtype=torch.int64, device=columns.device), 0)
        ctx.save_for_backward(hidden, weight, bias, by_row, centred, *moments)
        ctx.settings = shape, block, compute
        return centred / moments.divisor[:, None] - normaliser[:, None]

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        hidden, weight, bias, columns, centred, *moments = ctx.saved_tensors
        shape, block, compute = ctx.settings
        mean, deviation, normaliser, expected = moments
        divisor = Moments(*moments).divisor
        # With u = c / s, s = std(z) + 1e-4 and c = z - mean: dL/du = g - sum(g) p, and dL/dz = dL/du / s - b c, where
        # b c is what the deviation's own slope c / ((V - 1) std) brings.
        total = gradient.sum(-1)
        along = (gradient * centred).sum(-1) - total * expected
        of_deviation = along / (divisor.square() * deviation * max(1, shape.vocab - 1))
        of_deviation = of_deviation.masked_fill_(deviation == 0, 0)
        scattered = gradient / divisor[:, None]

        def slope_of(logits: torch.Tensor, at: slice) -> None:
            logits.sub_(mean[at, None])
            probability = (logits / divisor[at, None]).sub_(normaliser[at, None]).exp_()
            logits.mul_(-of_deviation[at, None])
            logits.addcmul_(probability, (-total / divisor)[at, None])
            logits.scatter_add_(1, columns[at], scattered[at])

        found = gradient_blocks(hidden, weight, bias, shape, block, compute, ctx.needs_input_grad[:3], slope_of)
        return *found, *[None] * (len(ctx.needs_input_grad) - 3)
