"""Parts of a language model's output distribution, at any temperature, without its logits.

Where a loss compares distributions, it reads the log-probabilities of chosen tokens: those that the teacher holds
likely (`candidates`), or those that the student itself does (`top_k`). The vocabulary axis exists
for one block of tokens at a time (`stages.vocabulary.blocks`), forward and backward.
"""

from typing import Any, NamedTuple

import torch
from torch.autograd.function import once_differentiable

from stages.vocabulary.blocks import (
    Shape,
    block_buffer,
    block_logits,
    block_size,
    compute_dtype,
    gradient_blocks,
    normalise_block,
)
from stages.vocabulary.top_k import top_k


class Chosen(NamedTuple):
    """Log-probabilities, float32: `candidates` [N, m] of the ids asked for, `top` [N, k] of the likeliest `top_ids`."""

    candidates: torch.Tensor
    top: torch.Tensor
    top_ids: torch.Tensor


def head_distribution(
    hidden: torch.Tensor,
    weight: torch.Tensor,
    candidates: torch.Tensor,
    likeliest: int,
    shape: Shape,
    bias: torch.Tensor | None = None,
    temperature: float = 1.0,
    block: int | None = None,
) -> Chosen:
    """Return log softmax(logits / temperature) at chosen tokens of each row, differentiable.

    `hidden` [N, d], `weight` [V, d], `bias` [V]; `candidates` int64 [N, m] below `shape.vocab`, m may be 0;
    `likeliest`: how many of the likeliest tokens to give, likeliest first. Types as in `head_statistics`.
    """
    size = block or block_size(shape.vocab, hidden.device)
    settings = (candidates, likeliest, shape, float(temperature), size, compute_dtype(hidden))
    return Chosen(*_HeadDistribution.apply(hidden, weight, bias, *settings))


class _HeadDistribution(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        hidden: torch.Tensor,
        weight: torch.Tensor,
        bias: torch.Tensor | None,
        candidates: torch.Tensor,
        likeliest: int,
        shape: Shape,
        temperature: float,
        block: int,
        compute: torch.dtype,
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        number = len(hidden)
        chosen = hidden.new_empty(candidates.shape, dtype=torch.float32)
        top = hidden.new_empty((number, likeliest), dtype=torch.float32)
        top_ids = candidates.new_empty((number, likeliest))
        normaliser = hidden.new_empty(number, dtype=torch.float32)
        with torch.autocast(hidden.device.type, enabled=False):
            rows = weight[: shape.vocab].to(compute)
            offsets = None if bias is None else bias[: shape.vocab].to(compute)
            buffer = block_buffer(min(block, number), shape.vocab, hidden)
            for start in range(0, number, block):
                part = slice(start, min(start + block, number))
                logits, _ = block_logits(hidden[part].to(compute), rows, offsets, shape, buffer)
                if temperature != 1.0:
                    logits.div_(temperature)
                chosen[part] = logits.gather(1, candidates[part])
                if likeliest:
                    top[part], top_ids[part] = top_k(logits, likeliest)
                normaliser[part], _, _ = normalise_block(logits, None)
        chosen -= normaliser[:, None]
        top -= normaliser[:, None]
        ctx.mark_non_differentiable(top_ids)
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(hidden, weight, bias, candidates, top_ids, normaliser)
        ctx.settings = shape, temperature, block, compute
        return chosen, top, top_ids

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *gradients: torch.Tensor | None) -> tuple[torch.Tensor | None, ...]:
        hidden, weight, bias, candidates, top_ids, normaliser = ctx.saved_tensors
        shape, temperature, block, compute = ctx.settings
        pairs = zip((candidates, top_ids), gradients[:2], strict=True)
        asked = [(ids, gradient / temperature) for ids, gradient in pairs if gradient is not None]
        total = sum((gradient.sum(1) for _, gradient in asked), torch.zeros_like(normaliser))

        def slope_of(logits: torch.Tensor, at: slice) -> None:
            if temperature != 1.0:
                logits.div_(temperature)
            logits.sub_(normaliser[at, None]).exp_().mul_(-total[at, None])
            for ids, gradient in asked:
                logits.scatter_add_(1, ids[at], gradient[at])

        found = gradient_blocks(hidden, weight, bias, shape, block, compute, ctx.needs_input_grad[:3], slope_of)
        return *found, None, None, None, None, None, None
