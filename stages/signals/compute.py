"""One teacher pass: hidden states to the kept signals, in token blocks."""

import math
from typing import Any, NamedTuple

import numpy as np
import torch

from stages.core.errors import UserError
from stages.training.head import block_logits, block_size, finish_piece, pieces
from stages.training.models import Head, hidden_states

GROUP = 16  # columns per group in the search for the likeliest tokens
SMALLEST = 1e-37  # tail masses below are kept as this: log 0 has no place in a table


class Wanted(NamedTuple):
    """What is computed: `mask` float32 [vocab] of boundary tokens or None, `eos_id` or None, `top_k` 0 for none."""

    mask: torch.Tensor | None
    eos_id: int | None
    top_k: int


def wanted_signals(needs: dict[str, Any], boundary: np.ndarray, eos_id: int | None, device: torch.device) -> Wanted:
    """Return Wanted for settings {"boundary", "eos", "top_k"}, a boundary mask bool [vocab] and the eos id.

    UserError when eos is asked of a tokenizer without one, or more top-k than there are ids.
    """
    if needs.get("eos") and eos_id is None:
        raise UserError(
            "The teacher's tokenizer names no end-of-sequence token, which the losses ask for: set its eos."
        )
    mask = torch.as_tensor(boundary, dtype=torch.float32, device=device) if needs.get("boundary") else None
    top_k = int(needs.get("top_k") or 0)
    if top_k > len(boundary):
        raise UserError(f"top_k is {top_k} but the teacher's tokenizer has {len(boundary)} ids: ask for fewer.")
    return Wanted(mask, eos_id if needs.get("eos") else None, top_k)


@torch.no_grad()
def compute_signals(
    hidden: torch.Tensor,
    head: Head,
    targets: torch.Tensor,
    last: torch.Tensor,
    wanted: Wanted,
    block: int | None = None,
) -> dict[str, torch.Tensor]:
    """Return the signal columns, [N] or [N, k], on the device of `hidden` [N, d].

    They are float32; top-k ids are int32 and top-k log-probabilities float16.

    `targets` int64 [N]: the token that follows each row; `last` int64: rows that nothing follows, whose
    observed_logprob becomes 0.
    """
    weight = head.weight[: head.shape.vocab]
    bias = None if head.bias is None else head.bias[: head.shape.vocab]
    size = block or block_size(head.shape.vocab, hidden.device)
    parts = [
        _block_signals(hidden[start : start + size], targets[start : start + size], weight, bias, head, wanted)
        for start in range(0, len(hidden), size)
    ]
    signals = {name: torch.cat([part[name] for part in parts]) for name in parts[0]}
    signals["observed_logprob"][last] = 0
    return signals


def _block_signals(
    hidden: torch.Tensor,
    targets: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    head: Head,
    wanted: Wanted,
) -> dict[str, torch.Tensor]:
    logits, _ = block_logits(hidden, weight, bias, head.shape)
    parts = [
        _piece_signals(logits[piece], hidden[piece], targets[piece], weight, bias, head, wanted)
        for piece in pieces(logits)
    ]
    return {name: torch.cat([part[name] for part in parts]) for name in parts[0]}


def _piece_signals(
    logits: torch.Tensor,
    hidden: torch.Tensor,
    targets: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    head: Head,
    wanted: Wanted,
) -> dict[str, torch.Tensor]:
    """Return the signals of the rows of `logits` [n, vocab], which are used up."""
    signals = {"observed_logprob": logits.gather(1, targets[:, None])[:, 0]}
    if wanted.eos_id is not None:
        signals["eos_logprob"] = logits[:, wanted.eos_id].clone()
    if wanted.top_k:
        values, ids = top_k(logits, wanted.top_k)
        top = values[:, 0].clone()
    else:
        top = logits.amax(-1)
    exponentials = logits.sub_(top[:, None]).exp_()
    if wanted.top_k:
        # The mass outside the top k is summed by itself: no cancellation, as 1 - sum would have.
        likeliest = exponentials.gather(1, ids)
        tail = exponentials.scatter_(1, ids, 0).sum(-1)
        exponentials.scatter_(1, ids, likeliest)
        total = tail + likeliest.sum(-1)
        signals["tail_logmass"] = torch.log(tail / total).clamp_(math.log(SMALLEST), 0)
    else:
        total = exponentials.sum(-1)
    normaliser, *boundary = finish_piece(exponentials, total, top, wanted.mask)
    for name in ("observed_logprob", "eos_logprob"):
        if name in signals:
            signals[name].sub_(normaliser).clamp_(max=0)
    if wanted.top_k:
        signals["topk_ids"] = ids.to(torch.int32)
        signals["topk_logprobs"] = values.sub_(normaliser[:, None]).clamp_(max=0).to(torch.float16)
    if wanted.mask is not None:
        mass, small = boundary
        if small.any():
            redone, _ = block_logits(hidden[small], weight, bias, head.shape)
            mass[small] = torch.logsumexp(redone[:, wanted.mask > 0], -1) - normaliser[small]
        signals["boundary_logprob"] = mass
    return signals


def top_k(logits: torch.Tensor, k: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Return (values, ids) [n, k] of the largest logits [n, vocab], largest first.

    The k largest lie in the k groups of columns with the largest maxima, so a pass for the maxima leaves
    k * GROUP candidates to sort instead of the vocabulary.
    """
    vocab = logits.shape[1]
    groups = vocab // GROUP
    if groups < 2 * k:
        return torch.topk(logits, k, dim=1)
    # Group j holds the columns j, j + groups, ...: maxima over the outer axis are as fast as reading.
    whole = groups * GROUP
    grouped = logits[:, :whole].unflatten(1, (GROUP, groups))
    _, best = torch.topk(grouped.amax(1), k, dim=1, sorted=False)
    inside = grouped.gather(2, best[:, None, :].expand(-1, GROUP, -1)).flatten(1)
    first = torch.arange(0, whole, groups, device=logits.device)
    ids = (first[None, :, None] + best[:, None, :]).flatten(1)
    if vocab > whole:
        inside = torch.cat([inside, logits[:, whole:]], 1)
        rest = torch.arange(whole, vocab, device=logits.device)
        ids = torch.cat([ids, rest.expand(len(logits), -1)], 1)
    values, place = torch.topk(inside, k, dim=1)
    return values, ids.gather(1, place)


@torch.no_grad()
def teacher_pass(
    body: torch.nn.Module, head: Head, ids: np.ndarray, offsets: np.ndarray, examples: np.ndarray, wanted: Wanted
) -> dict[str, np.ndarray]:
    """Return signals, flat in the order of `examples`, of one forward pass over them, padded to the longest.

    `ids` int [N] and `offsets` int64 [B + 1] hold all examples of the batch that `examples` int64 indexes. No
    attention mask is needed: padding is at the right end, which earlier tokens of a causal model never see.
    """
    device = head.weight.device
    lengths = (offsets[1:] - offsets[:-1])[examples]
    width = int(lengths.max())
    within = np.arange(width)[None, :] < lengths[:, None]
    padded = np.zeros(within.shape, np.int64)
    padded[within] = np.concatenate([ids[offsets[e] : offsets[e + 1]] for e in examples])
    flat = torch.from_numpy(padded)
    targets = torch.from_numpy(np.roll(padded, -1, axis=1)[within]).to(device)
    index = torch.from_numpy(np.flatnonzero(within)).to(device)
    last = torch.from_numpy(np.cumsum(lengths) - 1).to(device)
    hidden = hidden_states(body, flat.to(device), None, index)
    signals = compute_signals(hidden, head, targets, last, wanted)
    return {name: value.cpu().numpy() for name, value in signals.items()}


def check_finite(signals: dict[str, np.ndarray], offsets: np.ndarray, example_ids: list[str], model: str) -> None:
    """Refuse signals that are not finite, naming the first example: the teacher's weights or its type are at fault."""
    for name, values in signals.items():
        if values.dtype.kind == "f" and not np.isfinite(values).all():
            row = int(np.argmax(~np.isfinite(values).reshape(len(values), -1).all(-1)))
            first = float(values.reshape(len(values), -1)[row, 0])
            example = example_ids[int(np.searchsorted(offsets, row, side="right")) - 1]
            raise UserError(
                f"Teacher {model!r} gives {name} {first} in example {example}, which is not finite: "
                "its weights are damaged, or it overflows in this dtype (try signals.dtype: float32)."
            )
