"""Statistics of a language model's output distribution without its logits.

The vocabulary axis exists for one block of tokens at a time, forward and backward (the idea of cut cross entropy,
arXiv 2411.09009, with more than one output). Kept for the backward pass: the hidden states and three numbers
per token.
"""

from typing import Any

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

STATISTICS = ("observed_logprob", "boundary_logprob", "eos_logprob")


def head_statistics(
    hidden: torch.Tensor,
    weight: torch.Tensor,
    targets: torch.Tensor,
    boundary_mask: torch.Tensor | None = None,
    eos_id: int | None = None,
    vocab: int | None = None,
    bias: torch.Tensor | None = None,
    softcap: float | None = None,
    scale: float = 1.0,
    block: int | None = None,
) -> dict[str, torch.Tensor]:
    """Return {observed_logprob, boundary_logprob, eos_logprob}, float32 [N] each, differentiable; the asked ones only.

    `hidden` [N, d], `weight` [V, d], `bias` [V]; `targets` int64 [N] below `vocab`. `boundary_mask` bool [vocab] asks
    for the log of the probability mass on its tokens, `eos_id` for the log-probability of that token. `vocab`: rows
    of the weight that are real; the others are padding and take no part. `block`: tokens at a time. Products run in
    autocast's type if autocast is on, else in the type of `hidden`; everything after them in float32.
    """
    vocab = weight.shape[0] if vocab is None else vocab
    compute = compute_dtype(hidden)
    shape = Shape(vocab, float(scale), float(softcap) if softcap else None)
    mask = None if boundary_mask is None else boundary_mask.to(torch.float32)
    size = block or block_size(vocab, hidden.device)
    observed, boundary, eos = _HeadStatistics.apply(hidden, weight, bias, targets, mask, eos_id, shape, size, compute)
    result = {"observed_logprob": observed}
    if boundary_mask is not None:
        result["boundary_logprob"] = boundary
    if eos_id is not None:
        result["eos_logprob"] = eos
    return result


class _HeadStatistics(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        hidden: torch.Tensor,
        weight: torch.Tensor,
        bias: torch.Tensor | None,
        targets: torch.Tensor,
        mask: torch.Tensor | None,
        eos_id: int | None,
        shape: Shape,
        block: int,
        compute: torch.dtype,
    ) -> tuple[torch.Tensor, torch.Tensor | None, torch.Tensor | None]:
        number = hidden.shape[0]
        observed = hidden.new_empty(number, dtype=torch.float32)
        normaliser = torch.empty_like(observed)
        boundary = torch.empty_like(observed) if mask is not None else None
        eos = torch.empty_like(observed) if eos_id is not None else None
        with torch.autocast(hidden.device.type, enabled=False):
            rows = weight[: shape.vocab].to(compute)
            offsets = None if bias is None else bias[: shape.vocab].to(compute)
            buffer = block_buffer(min(block, number), shape.vocab, hidden)
            for start in range(0, number, block):
                part = slice(start, min(start + block, number))
                inputs = hidden[part].to(compute)
                logits, _ = block_logits(inputs, rows, offsets, shape, buffer)
                observed[part] = logits.gather(1, targets[part, None])[:, 0]
                if eos is not None:
                    eos[part] = logits[:, eos_id]
                normaliser[part], mass, small = normalise_block(logits, mask)
                if small is not None:
                    logits, _ = block_logits(inputs[small], rows, offsets, shape)
                    mass[small] = torch.logsumexp(logits[:, mask > 0], -1) - normaliser[part][small]
                if boundary is not None:
                    boundary[part] = mass
        observed -= normaliser
        if eos is not None:
            eos -= normaliser
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(hidden, weight, bias, targets, mask, normaliser, boundary)
        ctx.settings = eos_id, shape, block, compute
        return observed, boundary, eos

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *gradients: torch.Tensor | None) -> tuple[torch.Tensor | None, ...]:
        hidden, weight, bias, targets, mask, normaliser, boundary = ctx.saved_tensors
        eos_id, shape, block, compute = ctx.settings

        def slope_of(logits: torch.Tensor, at: slice) -> None:
            saved = (targets[at], mask, normaliser[at], None if boundary is None else boundary[at])
            _logit_gradient(logits, [None if g is None else g[at] for g in gradients], *saved, eos_id)

        found = gradient_blocks(hidden, weight, bias, shape, block, compute, ctx.needs_input_grad[:3], slope_of)
        return *found, None, None, None, None, None, None


def _logit_gradient(
    logits: torch.Tensor,
    gradients: list[torch.Tensor | None],
    targets: torch.Tensor,
    mask: torch.Tensor | None,
    normaliser: torch.Tensor,
    boundary: torch.Tensor | None,
    eos_id: int | None,
) -> None:
    """Put d/dlogits in place of `logits`: g_o (1_target - p) + g_b (q - p) + g_e (1_eos - p), q = p on the boundary.

    q is the softmax within the boundary columns, p * mask / exp(boundary).
    """
    of_observed, of_boundary, of_eos = gradients
    zero = torch.zeros_like(normaliser)
    of_observed = zero if of_observed is None else of_observed
    total = of_observed + (0 if of_boundary is None else of_boundary) + (0 if of_eos is None else of_eos)
    slope = logits.sub_(normaliser[:, None])
    rare = None
    if of_boundary is not None and mask is not None and boundary is not None:
        small = boundary < -60  # 1 / exp(boundary) would overflow beside p = 0
        if small.any():
            inside = (slope[small] - boundary[small, None]).masked_fill_(mask == 0, -torch.inf).exp_()
            rare = small, inside * of_boundary[small, None]
        factor = torch.where(small, zero, of_boundary * torch.exp(-boundary.clamp(min=-60)))
        slope.exp_()
        slope.mul_(torch.addr(-total[:, None], factor, mask))
    else:
        slope.exp_().mul_(-total[:, None])
    if rare is not None:
        slope[rare[0]] += rare[1]
    slope.scatter_add_(1, targets[:, None], of_observed[:, None])
    if of_eos is not None:
        slope[:, eos_id] += of_eos
