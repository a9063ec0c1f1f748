"""One teacher pass: hidden states to the kept signals, in token blocks."""

import math
from typing import Any, NamedTuple

import numpy as np
import torch

from stages.core.errors import UserError
from stages.models.body import hidden_states, layer_states
from stages.signals.schema import NO_NEEDS, columns_for, first_not_finite, normaliser_column
from stages.vocabulary.blocks import SMALL_MASS, block_buffer, block_logits, block_size, pieces
from stages.vocabulary.head import Head
from stages.vocabulary.top_k import top_k

SMALLEST = 1e-37  # tail masses below are kept as this: log 0 has no place in a table


class Wanted(NamedTuple):
    """What is computed: `needs` as in `schema.NO_NEEDS`, with what it takes.

    `mask` float32 [vocab] of boundary tokens or None; `source`: the generator that samples are drawn from.
    """

    needs: dict[str, Any]
    mask: torch.Tensor | None
    eos_id: int | None
    source: torch.Generator | None = None

    @property
    def top_k(self) -> int:
        """How many of the likeliest tokens are kept."""
        return self.needs["top_k"]


def wanted_signals(
    needs: dict[str, Any], boundary: np.ndarray, eos_id: int | None, device: torch.device, seed: int = 0
) -> Wanted:
    """Return Wanted for settings as in `schema.NO_NEEDS`, a boundary mask bool [vocab] and the eos id.

    `seed` is that of the samples. UserError when eos is asked of a tokenizer without one, or more top-k than there are
    ids.
    """
    needs = NO_NEEDS | needs
    if needs["eos"] and eos_id is None:
        raise UserError(
            "The teacher's tokenizer names no end-of-sequence token, which the losses ask for: set its eos."
        )
    if needs["top_k"] > len(boundary):
        raise UserError(
            f"top_k is {needs['top_k']} but the teacher's tokenizer has {len(boundary)} ids: ask for fewer."
        )
    mask = torch.as_tensor(boundary, dtype=torch.float32, device=device) if needs["boundary"] else None
    source = torch.Generator(device).manual_seed(seed % 2**63) if needs["samples"] else None
    return Wanted(needs, mask, eos_id if needs["eos"] else None, source)


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

    They are float32; ids are int32 and top-k log-probabilities float16. Those of hidden states are not among them.

    `targets` int64 [N]: the token that follows each row; `last` int64: rows that nothing follows, whose
    observed_logprob becomes 0.
    """
    weight = head.weight[: head.shape.vocab]
    bias = None if head.bias is None else head.bias[: head.shape.vocab]
    size = min(block or block_size(head.shape.vocab, hidden.device), len(hidden))
    buffer = block_buffer(size, head.shape.vocab, hidden)
    parts = []
    for start in range(0, len(hidden), size):
        rows = hidden[start : start + size]
        logits, _ = block_logits(rows, weight, bias, head.shape, buffer)
        parts.append(_block_signals(logits, targets[start : start + size], wanted))
        _redo_small(parts[-1], rows, weight, bias, head, wanted)
    columns = columns_for(wanted.needs | {"hidden": False, "hidden_states": False})
    signals = {name: torch.cat([part[name] for part in parts]) for name in columns}
    signals["observed_logprob"][last] = 0
    return signals


def _block_signals(logits: torch.Tensor, targets: torch.Tensor, wanted: Wanted) -> dict[str, torch.Tensor]:
    """Return the signals of the rows of `logits` [n, vocab], which are used up, and "normaliser" [n].

    Only what reads all columns runs in pieces that fit the cache; what is small runs once for all rows.
    """
    signals = {"observed_logprob": logits.gather(1, targets[:, None])[:, 0]}
    if wanted.eos_id is not None:
        signals["eos_logprob"] = logits[:, wanted.eos_id].clone()
    for temperature in wanted.needs["temperatures"]:
        tempered = [torch.logsumexp(logits[piece] / temperature, -1) for piece in pieces(logits)]
        signals[normaliser_column(temperature)] = torch.cat(tempered)
    if wanted.source is not None:
        draws = [_draw(logits[piece], wanted) for piece in pieces(logits)]
        signals["sample_ids"] = torch.cat(draws)
    passes = [_piece_sums(logits[piece], wanted) for piece in pieces(logits)]
    top, total, mass, ids, values = (
        torch.cat(part) if part[0] is not None else None for part in zip(*passes, strict=True)
    )
    if wanted.top_k:
        # The mass outside the top k is summed by itself: no cancellation, as 1 - sum would have.
        tail, likeliest = total, (values - top[:, None]).exp_()
        total = tail + likeliest.sum(-1)
        signals["tail_logmass"] = (tail / total).log_().clamp_(math.log(SMALLEST), 0)
        if wanted.mask is not None:
            mass += (likeliest * wanted.mask[ids]).sum(-1)
    normaliser = signals["normaliser"] = total.log().add_(top)
    for temperature in wanted.needs["temperatures"]:
        signals[normaliser_column(temperature)].sub_(normaliser / temperature)
    for name in ("observed_logprob", "eos_logprob"):
        if name in signals:
            signals[name].sub_(normaliser).clamp_(max=0)
    if wanted.top_k:
        signals["topk_ids"] = ids.to(torch.int32)
        signals["topk_logprobs"] = values.sub_(normaliser[:, None]).clamp_(max=0).to(torch.float16)
    if wanted.mask is not None:
        signals["boundary_logprob"] = mass.div_(total).clamp_(max=1).log_()
    return signals


def _draw(logits: torch.Tensor, wanted: Wanted) -> torch.Tensor:
    """Return int32 [n, samples]: tokens drawn from each row's distribution, with replacement."""
    drawn = torch.multinomial(torch.softmax(logits, -1), wanted.needs["samples"], True, generator=wanted.source)
    return drawn.to(torch.int32)


def _piece_sums(logits: torch.Tensor, wanted: Wanted) -> tuple[torch.Tensor | None, ...]:
    """Return (largest logit, sum of exp, sum of exp on the mask, ids and logits of the top k) of each row.

    Both sums are relative to the largest logit and leave out the top k. `logits` are used up.
    """
    ids = values = None
    if wanted.top_k:
        values, ids = top_k(logits, wanted.top_k)
        top = values[:, 0]
        logits.scatter_(1, ids, -torch.inf)
    else:
        top = logits.amax(-1)
    exponentials = logits.sub_(top[:, None]).exp_()
    mass = None if wanted.mask is None else torch.mv(exponentials, wanted.mask)
    return top, exponentials.sum(-1), mass, ids, values


def _redo_small(
    signals: dict[str, torch.Tensor],
    hidden: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    head: Head,
    wanted: Wanted,
) -> None:
    """Compute log boundary masses that are too small to be exact from the logits of those columns alone."""
    if wanted.mask is None:
        return
    small = signals["boundary_logprob"] < math.log(SMALL_MASS)
    if small.any():
        logits, _ = block_logits(hidden[small], weight, bias, head.shape)
        mass = torch.logsumexp(logits[:, wanted.mask > 0], -1) - signals["normaliser"][small]
        signals["boundary_logprob"][small] = mass


def padded_rows(ids: np.ndarray, offsets: np.ndarray, examples: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Return token ids int64 [B, longest] of `examples`, padded at the right end, and bool: which are tokens."""
    lengths = (offsets[1:] - offsets[:-1])[examples]
    within = np.arange(int(lengths.max()))[None, :] < lengths[:, None]
    padded = np.zeros(within.shape, np.int64)
    padded[within] = np.concatenate([ids[offsets[e] : offsets[e + 1]] for e in examples])
    return padded, within


@torch.no_grad()
def teacher_pass(
    body: torch.nn.Module, head: Head, ids: np.ndarray, offsets: np.ndarray, examples: np.ndarray, wanted: Wanted
) -> dict[str, np.ndarray]:
    """Return signals, flat in the order of `examples`, of one forward pass over them, padded to the longest.

    `ids` int [N] and `offsets` int64 [B + 1] hold all examples of the batch that `examples` int64 indexes. No
    attention mask is needed: padding is at the right end, which earlier tokens of a causal model never see.
    """
    device = head.weight.device
    padded, within = padded_rows(ids, offsets, examples)
    lengths = within.sum(1)
    flat = torch.from_numpy(padded)
    targets = torch.from_numpy(np.roll(padded, -1, axis=1)[within]).to(device)
    index = torch.from_numpy(np.flatnonzero(within)).to(device)
    last = torch.from_numpy(np.cumsum(lengths) - 1).to(device)
    layers = layer_states(body, flat.to(device), None, index) if wanted.needs["hidden_states"] else None
    hidden = hidden_states(body, flat.to(device), None, index) if layers is None else layers[:, -1]
    signals = compute_signals(hidden, head, targets, last, wanted)
    if wanted.needs["hidden"]:
        signals["hidden"] = _bits(hidden)
    if layers is not None:
        signals["hidden_states"] = _bits(layers.flatten(1))
    return {name: value.cpu().numpy() for name, value in signals.items()}


def _bits(values: torch.Tensor) -> torch.Tensor:
    """Return the bits of values in bfloat16, which NumPy does not have; infinity where they overflow."""
    return values.to(torch.bfloat16).view(torch.uint16)


def check_finite(signals: dict[str, np.ndarray], offsets: np.ndarray, example_ids: list[str], model: str) -> None:
    """Refuse signals that are not finite, naming the first example: the teacher's weights or its type are at fault."""
    wrong = first_not_finite(signals)
    if wrong is not None:
        name, row, value = wrong
        example = example_ids[int(np.searchsorted(offsets, row, side="right")) - 1]
        raise UserError(
            f"Teacher {model!r} gives {name} {value} in example {example}, which is not finite: "
            "its weights are damaged, or it overflows in this dtype (try signals.dtype: float32)."
        )
