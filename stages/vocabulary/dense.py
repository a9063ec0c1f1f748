"""Losses over whole distributions, made and used up in blocks of tokens.

A loss that reads every logit (an exact divergence from a teacher whose hidden states are at hand) is a sum over rows.
Its gradient is taken block by block in the forward pass, so logits of more than one block never exist (the idea of
Liger's fused linear losses, arXiv 2410.10989).
"""

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import torch
from torch.autograd.function import once_differentiable

from stages.vocabulary.blocks import Shape, block_buffer, block_logits, block_size, compute_dtype, gradient_blocks

RowLoss = Callable[[torch.Tensor, dict[str, torch.Tensor]], torch.Tensor]


class Fixed(NamedTuple):
    """An output layer that is not differentiated: weight [V, d'], bias [V] or None, and the states [N, d'] it reads."""

    weight: torch.Tensor
    bias: torch.Tensor | None
    shape: Shape
    states: torch.Tensor


def dense_loss(
    function: RowLoss,
    hidden: torch.Tensor,
    weight: torch.Tensor,
    shape: Shape,
    constants: Mapping[str, torch.Tensor],
    bias: torch.Tensor | None = None,
    block: int | None = None,
    fixed: Mapping[str, Fixed] | None = None,
) -> torch.Tensor:
    """Return the sum of `function(logits, constants)` over all rows, differentiable in hidden, weight and bias.

    `hidden` [N, d], `weight` [V, d], `bias` [V]; `function` gets float32 logits [n, shape.vocab] of a few rows and the
    same rows of every constant [N, ...], and returns a sum over its rows. The logits that layers in `fixed` make are
    constants too, and exist for a block of rows only. Nothing is differentiated in the constants.
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
        fixed: dict[str, Fixed],
        names: list[str],
        *constants: torch.Tensor,
    ) -> torch.Tensor:
        total = hidden.new_zeros((), dtype=torch.float32)
        made = {name: _BlockLogits(layer, block) for name, layer in fixed.items()}

        def slope_of(logits: torch.Tensor, at: slice) -> None:
            here = {name: value[at] for name, value in zip(names, constants, strict=True)}
            here |= {name: rows(at) for name, rows in made.items()}
            leaf = logits.detach().requires_grad_()
            with torch.enable_grad():
                value = function(leaf, here)
                (slope,) = torch.autograd.grad(value, leaf)
            total.add_(value.detach())
            logits.copy_(slope)

        with torch.autocast(hidden.device.type, enabled=False):
            found = gradient_blocks(hidden, weight, bias, shape, block, compute, ctx.needs_input_grad[:3], slope_of)
        ctx.save_for_backward(*found)
        return total

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        found = [None if saved is None else saved * gradient for saved in ctx.saved_tensors]
        return *found, *[None] * (len(ctx.needs_input_grad) - 3)


class _BlockLogits:
    """Makes the logits of one block of rows after another in one place."""

    def __init__(self, layer: Fixed, block: int) -> None:
        vocab = layer.shape.vocab
        self.shape, self.weight = layer.shape, layer.weight[:vocab].detach()
        self.bias = None if layer.bias is None else layer.bias[:vocab].detach()
        self.states, self.block = layer.states.detach(), block
        self.buffer = block_buffer(min(block, len(self.states)), vocab, self.weight)
        self.first, self.logits = 0, self.weight.new_zeros((0, vocab))

    def __call__(self, at: slice) -> torch.Tensor:
        """Return the logits of the rows `at`, which lie in the last block made or begin the next."""
        if at.stop > self.first + len(self.logits):
            self.first = at.start
            rows = self.states[at.start : at.start + self.block].to(self.weight.dtype)
            self.logits, _ = block_logits(rows, self.weight, self.bias, self.shape, self.buffer)
        return self.logits[at.start - self.first : at.stop - self.first]
