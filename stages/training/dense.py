"""Losses over whole distributions, made and used up in blocks of tokens.

A loss that reads every logit (an exact divergence from a teacher whose hidden states are at hand) is a sum over rows.
Its gradient is taken block by block in the forward pass, so logits of more than one block never exist (the idea of
Liger's fused linear losses, arXiv 2410.10989).
"""

from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any

import torch
from torch.autograd.function import once_differentiable

from stages.training.head import Shape, add_product, block_buffer, block_logits, block_size, compute_dtype, pieces

if TYPE_CHECKING:
    from stages.training.models import Head

RowLoss = Callable[[torch.Tensor, dict[str, torch.Tensor]], torch.Tensor]
Fixed = Mapping[str, "tuple[Head, torch.Tensor]"]


def dense_loss(
    function: RowLoss,
    hidden: torch.Tensor,
    weight: torch.Tensor,
    shape: Shape,
    constants: Mapping[str, torch.Tensor],
    bias: torch.Tensor | None = None,
    block: int | None = None,
    fixed: Fixed | None = None,
) -> torch.Tensor:
    """Return the sum of `function(logits, constants)` over all rows, differentiable in hidden, weight and bias.

    `hidden` [N, d], `weight` [V, d], `bias` [V]; `function` gets float32 logits [n, shape.vocab] of a few rows and the
    same rows of every constant [N, ...], and returns a sum over its rows. `fixed` maps names to output layers with
    states [N, d']: the logits that these make are constants too, and exist for a block of rows only. Nothing is
    differentiated in the constants.
    """
    size = block or block_size(shape.vocab, hidden.device)
    settings = (function, shape, size, compute_dtype(hidden), dict(fixed or {}))
    return _DenseLoss.apply(hidden, weight, bias, *settings, list(constants), *constants.values())


class _DenseLoss(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        hidden: torch.Tensor,
        weight: torch.Tensor,
        bias: torch.Tensor | None,
        function: RowLoss,
        shape: Shape,
        block: int,
        compute: torch.dtype,
        fixed: Fixed,
        names: list[str],
        *constants: torch.Tensor,
    ) -> torch.Tensor:
        need_hidden, need_weight, need_bias = ctx.needs_input_grad[:3]
        grad_hidden = torch.zeros_like(hidden) if need_hidden else None
        grad_weight = torch.zeros_like(weight, dtype=torch.float32) if need_weight else None
        grad_bias = torch.zeros_like(bias, dtype=torch.float32) if need_bias and bias is not None else None
        total = hidden.new_zeros((), dtype=torch.float32)
        with torch.autocast(hidden.device.type, enabled=False):
            rows = weight[: shape.vocab].to(compute)
            offsets = None if bias is None else bias[: shape.vocab].to(compute)
            fixed_logits = {name: _BlockLogits(head, min(block, len(hidden))) for name, (head, _) in fixed.items()}
            buffer = block_buffer(min(block, len(hidden)), shape.vocab, hidden)
            plain = Shape(shape.vocab)
            for start in range(0, len(hidden), block):
                part = slice(start, min(start + block, len(hidden)))
                inputs = hidden[part].to(compute)
                slope, _ = block_logits(inputs, rows, offsets, plain, buffer)
                here = {name: value[part] for name, value in zip(names, constants, strict=True)}
                here |= {name: logits(fixed[name][1][part]) for name, logits in fixed_logits.items()}
                for piece in pieces(slope):
                    few = {name: value[piece] for name, value in here.items()}
                    value, slope[piece] = _value_and_slope(function, slope[piece], shape, few)
                    total += value
                if grad_bias is not None:
                    grad_bias[: shape.vocab] += slope.sum(0)
                slope = slope.to(compute)
                if grad_hidden is not None:
                    grad_hidden[part] = slope @ rows
                if grad_weight is not None:
                    add_product(grad_weight[: shape.vocab], slope.T, inputs)
        ctx.save_for_backward(grad_hidden, grad_weight, grad_bias)
        ctx.types = [None if tensor is None else tensor.dtype for tensor in (hidden, weight, bias)]
        return total

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        found = [
            None if saved is None else (saved * gradient).to(dtype)
            for saved, dtype in zip(ctx.saved_tensors, ctx.types, strict=True)
        ]
        return *found, *[None] * (len(ctx.needs_input_grad) - 3)


class _BlockLogits:
    """Makes the logits of one block of rows after another in one place."""

    def __init__(self, head: "Head", rows: int) -> None:
        vocab = head.shape.vocab
        self.shape, self.weight = head.shape, head.weight[:vocab].detach()
        self.bias = None if head.bias is None else head.bias[:vocab].detach()
        self.buffer = block_buffer(rows, vocab, self.weight)

    def __call__(self, states: torch.Tensor) -> torch.Tensor:
        return block_logits(states.detach().to(self.weight.dtype), self.weight, self.bias, self.shape, self.buffer)[0]


def _value_and_slope(
    function: RowLoss, product: torch.Tensor, shape: Shape, constants: dict[str, torch.Tensor]
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the loss of a few rows and its gradient by the raw product [n, vocab]."""
    product = product.detach()
    with torch.enable_grad():
        product.requires_grad_()
        logits = product * shape.scale if shape.scale != 1.0 else product
        if shape.softcap is not None:
            logits = torch.tanh(logits / shape.softcap) * shape.softcap
        value = function(logits, constants)
        (slope,) = torch.autograd.grad(value, product)
    return value.detach(), slope
