"""Blocks of logits: what every computation on the vocabulary axis shares.

The axis exists for one block of tokens at a time, forward and backward; what is elementwise runs on pieces of a block.
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch

BLOCK_ELEMENTS = {"cpu": 2**23, "cuda": 2**28}
FEWEST_ROWS = 128  # with fewer, a product takes up to twice as long per row
# Logits that are worked on elementwise at once: what a CPU's cache holds, what a GPU's memory has room for ten times.
PIECE_ELEMENTS = {"cpu": 2**19, "cuda": 2**26}
SMALL_MASS = 1e-25  # below it, log boundary mass is computed on the boundary columns alone


@dataclass(frozen=True)
class Shape:
    """How a head makes logits: softcap * tanh(scale * (h W^T + b) / softcap), cut to `vocab` columns."""

    vocab: int
    scale: float = 1.0
    softcap: float | None = None


def compute_dtype(hidden: torch.Tensor) -> torch.dtype:
    """Return the type that products with `hidden` run in: autocast's if it is on."""
    kind = hidden.device.type
    return torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else hidden.dtype


def block_size(vocab: int, device: torch.device) -> int:
    """Return the tokens per block: enough rows for fast products, few enough that the block is small."""
    return max(FEWEST_ROWS, BLOCK_ELEMENTS.get(device.type, 2**26) // vocab)


def block_buffer(rows: int, vocab: int, hidden: torch.Tensor) -> torch.Tensor | None:
    """Return a place for the logits of one block after another, or None where fresh memory costs nothing.

    On a CPU, a new block each time would be new pages from the system each time, a fifth of the time of the product.
    """
    if hidden.device.type != "cpu" or hidden.dtype != torch.float32:
        return None
    return hidden.new_empty(rows, vocab)


def block_logits(
    hidden: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    shape: Shape,
    buffer: torch.Tensor | None = None,
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Return float32 logits [n, vocab], and tanh of the capped logits for the backward pass (None without softcap).

    With a `buffer` (of `block_buffer`), the logits lie in it.
    """
    out = None if buffer is None or hidden.dtype != buffer.dtype else buffer[: len(hidden)]
    if bias is None:
        logits = torch.mm(hidden, weight.T, out=out).float()
    else:
        logits = torch.addmm(bias, hidden, weight.T, out=out).float()
    if shape.scale != 1.0:
        logits *= shape.scale
    if shape.softcap is None:
        return logits, None
    capped = logits.div_(shape.softcap).tanh_()
    return capped * shape.softcap, capped


def normalise_block(
    logits: torch.Tensor, mask: torch.Tensor | None
) -> tuple[torch.Tensor, torch.Tensor | None, torch.Tensor | None]:
    """Return the log-normaliser [n], the log-probability mass [n] of the columns in `mask` and the rows to redo.

    `logits` [n, vocab] are used up; `mask` float32 [vocab]. Rows to redo (None, or bool [n]) have a mass so small that
    it has to be computed from the logits of those columns alone.
    """
    parts = [_normalise_piece(logits[piece], mask) for piece in pieces(logits)]
    normaliser = torch.cat([part[0] for part in parts])
    if mask is None:
        return normaliser, None, None
    small = torch.cat([part[2] for part in parts])
    return normaliser, torch.cat([part[1] for part in parts]), small if bool(small.any()) else None


def pieces(logits: torch.Tensor) -> list[slice]:
    """Return slices of the rows of logits [n, vocab] of PIECE_ELEMENTS each."""
    elements = PIECE_ELEMENTS.get(logits.device.type)
    step = max(1, elements // logits.shape[1]) if elements else max(1, len(logits))
    return [slice(start, min(start + step, len(logits))) for start in range(0, len(logits), step)]


def _normalise_piece(logits: torch.Tensor, mask: torch.Tensor | None) -> tuple[torch.Tensor, ...]:
    top = logits.amax(-1)
    exponentials = logits.sub_(top[:, None]).exp_()
    total = exponentials.sum(-1)
    if mask is None:
        return (total.log_().add_(top),)
    share = torch.mv(exponentials, mask).div_(total)
    small = share < SMALL_MASS
    boundary = share.clamp_(SMALL_MASS, 1).log_()
    return total.log_().add_(top), boundary, small


def gradient_blocks(
    hidden: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    shape: Shape,
    block: int,
    compute: torch.dtype,
    needed: tuple[bool, ...],
    slope_of: Callable[[torch.Tensor, slice], None],
) -> tuple[torch.Tensor | None, torch.Tensor | None, torch.Tensor | None]:
    """Return the gradients of hidden states, weight and bias (None where not `needed`), the logits made in blocks.

    `slope_of(logits, rows)` puts the gradient of the logits in their place; it gets a few rows [n, vocab] at a time.
    """
    need_hidden, need_weight, need_bias = needed
    rows = weight[: shape.vocab].to(compute)
    offsets = None if bias is None else bias[: shape.vocab].to(compute)
    grad_hidden = torch.empty_like(hidden) if need_hidden else None
    grad_weight = torch.zeros_like(weight, dtype=_accumulator(weight)) if need_weight else None
    grad_bias = torch.zeros_like(bias, dtype=torch.float32) if need_bias and bias is not None else None
    buffer = block_buffer(min(block, len(hidden)), shape.vocab, hidden)
    for start in range(0, len(hidden), block):
        part = slice(start, min(start + block, len(hidden)))
        inputs = hidden[part].to(compute)
        slope, capped = block_logits(inputs, rows, offsets, shape, buffer)
        for piece in pieces(slope):
            slope_of(slope[piece], slice(start + piece.start, start + piece.stop))
            if capped is not None:
                slope[piece].mul_(capped[piece].square_().neg_().add_(1))
        if shape.scale != 1.0:
            slope.mul_(shape.scale)
        if grad_bias is not None:
            grad_bias[: shape.vocab] += slope.sum(0)
        slope = slope.to(compute)
        if grad_hidden is not None:
            grad_hidden[part] = slope @ rows
        if grad_weight is not None:
            _add_product(grad_weight[: shape.vocab], slope.T, inputs)
    return (
        grad_hidden,
        None if grad_weight is None else grad_weight.to(weight.dtype),
        None if grad_bias is None or bias is None else grad_bias.to(bias.dtype),
    )


def _accumulator(weight: torch.Tensor) -> torch.dtype:
    return torch.float32 if weight.dtype in (torch.bfloat16, torch.float16) else weight.dtype


def _add_product(total: torch.Tensor, left: torch.Tensor, right: torch.Tensor) -> None:
    """Add left @ right to `total` in place."""
    if total.dtype == left.dtype:
        total.addmm_(left, right)
    else:
        total += (left @ right).to(total.dtype)
