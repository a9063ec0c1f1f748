"""The teacher's likeliest tokens as tokens of the student, for losses that compare distributions of two vocabularies.

Of a row of the teacher only k tokens are known one by one. It stands for the row in which all others share the tail's
mass evenly: that fixes how much of the tail a mapping drops or counts several times, and what a mean over rows is.
They are compared as one token, the rest, like all student tokens that no known token maps to; with k the whole
vocabulary nothing is approximated.
"""

import math
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import torch

from stages.losses.chunks import run_ends
from stages.losses.divergences import SMALLEST_REST, divergence, with_rest
from stages.signals.schema import normaliser_column

if TYPE_CHECKING:
    from stages.losses.examples import Examples

LOG_SMALLEST = math.log(SMALLEST_REST)


class Likeliest(NamedTuple):
    """Rows of the teacher: `ids` int64 [R, k] and `logprob` float32 of the likeliest tokens; `rest` [R], all others.

    Mapped to the student's tokens, a place that is not used has a `logprob` of -inf.
    """

    ids: np.ndarray
    logprob: np.ndarray
    rest: np.ndarray


def signals_read(temperature: float) -> frozenset[str]:
    """Return the columns of teacher signals that `likeliest` reads."""
    columns = {"topk_ids", "topk_logprobs", "tail_logmass"}
    return frozenset(columns | ({normaliser_column(temperature)} if temperature != 1.0 else set()))


def likeliest(signals: dict[str, np.ndarray], rows: np.ndarray, temperature: float = 1.0) -> Likeliest:
    """Return what the signals hold of the teacher's distributions at flat `rows`, at a temperature."""
    logprob = signals["topk_logprobs"][rows].astype(np.float32)
    rest = signals["tail_logmass"][rows].astype(np.float32)
    if temperature != 1.0:
        logprob = logprob / temperature - signals[normaliser_column(temperature)][rows][:, None]
        rest = np.log1p(-np.exp(logprob).sum(-1).clip(0, 1 - SMALLEST_REST)).astype(np.float32)
    return Likeliest(signals["topk_ids"][rows].astype(np.int64), logprob.astype(np.float32), rest)


def ends_before_targets(
    examples: "Examples", teacher: np.ndarray, student: np.ndarray, number: int
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Return (last teacher token, last student token, whether both are followed by a trained token) of each chunk.

    At these rows both sides have read the same bytes. Masks apply to the token that a row predicts: chunks count whose
    own tokens are not trained on, or start an example. With one tokenizer for both the rows are all that predict a
    trained token.
    """
    assert examples.teacher is not None
    ends, usable = [], np.ones(number, bool)
    for chunk, batch in ((teacher, examples.teacher), (student, examples.student)):
        followed = np.append(batch.loss[1:], False)
        followed[batch.offsets[1:] - 1] = False
        ends.append(run_ends(chunk, number))
        usable &= (np.bincount(chunk[chunk >= 0], minlength=number) > 0) & followed[ends[-1]]
    return ends[0], ends[1], usable


def spread(top: Likeliest, to_teacher: np.ndarray, vocab: int) -> Likeliest:
    """Return the distribution in which a student token has the logit of the teacher token that it maps to.

    `to_teacher` int64 [student tokens], -1 for none; `vocab`: the teacher's number of tokens. Student tokens that
    share a teacher token have its logit each, so that it counts as often as it is shared; the sum over all student
    tokens that map to one is 1. Of the tail the mass counts as often as its tokens are shared on average.
    """
    ids, column, used = members(top.ids, to_teacher, vocab)
    share = ((to_teacher >= 0).sum() - used.sum(-1)) / max(vocab - top.ids.shape[1], 1)
    return _normalised(ids, np.where(used, np.take_along_axis(top.logprob, column, 1), -np.inf), top.rest, share)


def gathered(top: Likeliest, to_student: np.ndarray, vocab: int) -> Likeliest:
    """Return the distribution in which a teacher token gives its logit to the student token that it maps to.

    `to_student` int64 [teacher tokens], -1 for none; `vocab` is their number. Of several teacher tokens for one student
    token the likeliest counts. Teacher tokens that map to none are left out; the sum over the others is 1. Of the tail
    the mass counts by the share of its tokens that are the only ones for a student token.
    """
    ids = to_student[top.ids]
    kept = (ids >= 0) & (first_of_same(ids) == np.arange(ids.shape[1]))
    reached = len(np.unique(to_student[to_student >= 0]))
    share = (reached - kept.sum(-1)) / max(vocab - top.ids.shape[1], 1)
    return _normalised(np.where(kept, ids, 0), np.where(kept, top.logprob, -np.inf), top.rest, share)


def members(ids: np.ndarray, to_teacher: np.ndarray, vocab: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Return the student tokens that map to the teacher tokens `ids` [R, k], by row: (ids, column of k, used) [R, m].

    m is what the row with the most of them has; places not used hold 0.
    """
    order = np.argsort(to_teacher, kind="stable")
    counts = np.bincount(to_teacher[to_teacher >= 0], minlength=vocab)
    starts = np.cumsum(counts) - counts + int((to_teacher < 0).sum())
    times = counts[ids]
    width = max(int(times.sum(-1).max(initial=0)), 1)
    used = np.arange(width)[None, :] < times.sum(-1)[:, None]
    flat = times.ravel()
    column = np.repeat(np.tile(np.arange(ids.shape[1]), len(ids)), flat)
    within = np.arange(len(column)) - np.repeat(np.cumsum(flat) - flat, flat)
    result = np.zeros((2, *used.shape), np.int64)
    result[0, used] = order[np.repeat(starts[ids].ravel(), flat) + within]
    result[1, used] = column
    return result[0], result[1], used


def first_of_same(ids: np.ndarray) -> np.ndarray:
    """Return int64 [R, K]: for each place the first column of its row that holds the same id."""
    order = np.argsort(ids, axis=1, kind="stable")
    ranked = np.take_along_axis(ids, order, 1)
    start = np.zeros(ids.shape, np.int64)
    start[:, 1:] = np.where(ranked[:, 1:] != ranked[:, :-1], np.arange(1, ids.shape[1]), 0)
    first = np.take_along_axis(order, np.maximum.accumulate(start, 1), 1)
    result = np.empty_like(first)
    np.put_along_axis(result, order, first, 1)
    return result


def grouped(logprob: torch.Tensor, group: torch.Tensor, groups: int) -> torch.Tensor:
    """Return [R, groups]: the log of the mass of each group of places; -inf for none.

    `logprob` [R, m]; `group` int64 [R, m], `groups` where a place counts nowhere.
    """
    shape = (len(logprob), groups + 1)
    highest = logprob.new_full(shape, -torch.inf).scatter_reduce(1, group, logprob.detach(), "amax")
    highest = highest.masked_fill(torch.isneginf(highest), 0.0)
    mass = logprob.new_zeros(shape).scatter_add(1, group, (logprob - highest.gather(1, group)).exp())
    found = mass > 0
    return (highest + mass.masked_fill(~found, 1.0).log()).masked_fill(~found, -torch.inf)[:, :groups]


def compared(
    name: str, log_p: torch.Tensor, rest: torch.Tensor, log_q: torch.Tensor, options: dict[str, Any]
) -> torch.Tensor:
    """Return the divergence called `name` of each row, with a rest on both sides.

    `log_p`, `log_q` [R, m]: the teacher's, -inf where a place is unused, and the student's; `rest` [R]: the teacher's.
    """
    log_q = log_q.masked_fill(torch.isneginf(log_p), -torch.inf)
    log_p = torch.cat([log_p, rest[:, None].clamp(min=LOG_SMALLEST)], -1)
    return divergence(name, log_p, with_rest(log_q), options)


def _normalised(ids: np.ndarray, logprob: np.ndarray, rest: np.ndarray, share: np.ndarray) -> Likeliest:
    """Divide by the sum over the mapped tokens and the `share` [R] of the rest that is mapped; of none, all is rest."""
    tail = np.exp(rest.astype(np.float64)) * share
    total = np.exp(logprob.astype(np.float64)).sum(-1) + tail
    nothing = total == 0
    total = np.where(nothing, 1.0, total)
    with np.errstate(divide="ignore"):
        rest = np.where(nothing, 0.0, np.log(tail / total))
    return Likeliest(ids, (logprob - np.log(total)[:, None]).astype(np.float32), rest.astype(np.float32))
