"""X-Token (arXiv 2605.21699): the student's distribution taken to the teacher's tokens by a sparse projection W.

`p_kl`: q~ = W^T q for each row of a chunk, averaged over them; the teacher's log-probabilities are averaged over its
own rows of the chunk, and divided by their sum; forward KL between the two.

- The release compares over the 8,192 columns that are largest anywhere in the batch and normalises within them. Here
  they are the union of the likeliest tokens of the chunk's rows, and all other tokens together are one more column
  (`divergences.with_rest`), so that both sides are distributions and a split batch gives the same gradient. A row that
  does not list a column of another row gives it the mean probability of what it does not list.
- A listed teacher token that W reaches from no student token says nothing of the student's: it is left out, and the
  chunk weighs as much as the teacher's mass on the others. So does the gradient of the release, where such a token
  adds its mass times log 1e-10 to the loss.
- With W the identity and chunks of one token this is forward KL, also number by number that of a sparse `fkl`.

`h_kl`: `losses.gold`, its matched tokens those of the same bytes and, beyond them, each student token with the teacher
token that it mostly projects to, where that weighs 0.6 or more; of several students the heaviest, then the lowest id.
Forward KL over them and the sorted L1 distance of the others, both with weight 1. The release averages
log-probabilities over a chunk here too; the chain rule of `gold` compares what the same bytes condition.

The release scales the KL to the size of the cross entropy at each step: here that is `loss_weights` and the
aggregation of losses.
"""

from functools import lru_cache
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from stages.losses import Needs, Prepared, gold
from stages.losses.chunks import merge_chunks
from stages.losses.divergences import SMALLEST_REST, check_temperature, divergence
from stages.losses.mapped import Likeliest, likeliest, signals_read
from stages.losses.statistics import loss_of_statistics

if TYPE_CHECKING:
    from stages.alignment.pair import Projection
    from stages.losses.examples import Examples

DEFAULTS: dict[str, Any] = {"temperature": 1.0, "t_squared": False}
HYBRID = {"gold_hybrid": True, "jsd_beta": 0.0, "gold_matched_weight": 1.0, "gold_unmatched_weight": 1.0}
HEAVY = 0.6  # weight from which on h_kl matches a student token with the teacher token that it projects to


def check(options: dict[str, Any]) -> None:
    """Raise UserError for a temperature that is not above 0."""
    check_temperature(DEFAULTS | options, "temperature")


def needs(options: dict[str, Any]) -> Needs:
    """Return the teacher's likeliest tokens and the projection; for h_kl the observed tokens too."""
    options = DEFAULTS | options
    columns = signals_read(options["temperature"])
    if options["name"] == "h_kl":
        columns |= {"observed_logprob"}
    return Needs(columns, pair=frozenset({"projection"}))


def prepare(examples: "Examples", options: dict[str, Any]) -> Prepared:
    """Return the chunks with the teacher's side; the count is their number."""
    options, pair = DEFAULTS | options, examples.pair
    chunks = merge_chunks(*examples.chunks(options["kind"]))
    vocab = pair.teacher.vocab_size
    if options["name"] == "h_kl":
        images, ids = heavy_tokens(pair.projection, vocab), examples.student.ids
        return gold.prepare_chunks(chunks, examples.signals, ids, images, pair.student.vocab_size, options)
    tokens, rows = np.flatnonzero(chunks.teacher >= 0), np.flatnonzero(chunks.student >= 0)
    top = likeliest(examples.signals, tokens - 1, options["temperature"])
    starts, sources, weights = inverse(pair.projection, vocab)
    target = chunk_targets(chunks.teacher[tokens], len(chunks.count), top, starts[1:-1] > starts[:-2])
    arrays = dict(zip(("columns", "logprob", "rest", "share"), target, strict=True))
    arrays |= {"starts": starts, "sources": sources, "weights": weights}
    arrays |= {"rows": rows - 1, "chunk": chunks.student[rows]}
    return Prepared(float(len(chunks.count)), np.zeros(0, np.int64), arrays)


def loss(
    student: dict[str, Any], arrays: dict[str, torch.Tensor], options: dict[str, Any]
) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    """Return the summed divergence of chunks in nats; times temperature squared with `t_squared`."""
    options = DEFAULTS | options
    factor = options["temperature"] ** 2 if options["t_squared"] else 1.0
    if options["name"] == "h_kl":
        total, parts = gold.loss(student, arrays, options | HYBRID)
        return total * factor, parts
    head, hidden = student["sides"].student.head, student["hidden"].index_select(0, arrays["rows"])
    projection = arrays["starts"], arrays["sources"], arrays["weights"]

    def masses(logits: torch.Tensor, here: dict[str, torch.Tensor]) -> torch.Tensor:
        tempered = logits if options["temperature"] == 1.0 else logits / options["temperature"]
        return projected(tempered, here["columns"], *projection)

    def of_chunks(found: torch.Tensor) -> torch.Tensor:
        divergences = chunk_divergences(found, arrays["chunk"], arrays["logprob"], arrays["rest"])
        return (arrays["share"] * divergences).sum()

    constants = {"columns": arrays["columns"].index_select(0, arrays["chunk"])}
    return loss_of_statistics(head, hidden, constants, masses, of_chunks) * factor, {}


@lru_cache(maxsize=2)
def heavy_tokens(projection: "Projection", vocab: int) -> np.ndarray:
    """Return int64[V teacher]: the student token that each teacher token is compared with in h_kl, -1 for none."""
    piece = projection.weights.argmax(1)
    students = np.arange(len(piece))
    weight, teacher = projection.weights[students, piece], projection.ids[students, piece]
    order = np.lexsort((-students, weight))
    order = order[weight[order] >= HEAVY]
    images = np.full(vocab, -1)
    images[teacher[order]] = order  # the last one stays
    return images


@lru_cache(maxsize=2)
def inverse(projection: "Projection", vocab: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Return W by teacher token: (starts int64 [vocab + 2], student ids int64, weights float32).

    Token t owns the places starts[t]:starts[t + 1]; `vocab` itself stands for no token and owns none.
    """
    places = np.flatnonzero(projection.weights.ravel() > 0)
    teacher = projection.ids.ravel()[places]
    order = np.argsort(teacher, kind="stable")
    starts = np.zeros(vocab + 2, np.int64)
    np.cumsum(np.bincount(teacher, minlength=vocab + 1), out=starts[1:])
    places = places[order]
    return starts, places // projection.weights.shape[1], projection.weights.ravel()[places].astype(np.float32)


def chunk_targets(
    chunk: np.ndarray, number: int, top: Likeliest, reached: np.ndarray
) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    """Return the mean of the teacher's rows of each chunk: (columns int64 [C, m], logprob [C, m], rest [C], share [C]).

    `chunk` int64 [R], the chunk of each row of `top`; `reached` bool [V teacher]: tokens that can be a column. Columns
    that are not used are V teacher, with a log-probability of -inf. `share`: the teacher's mass but for listed tokens
    that are not reached; logprob and rest are within it. All float32 but the columns.
    """
    vocab, k = len(reached), top.ids.shape[1]
    rows = np.bincount(chunk, minlength=number)
    cells, place = np.unique(chunk[:, None] * vocab + top.ids, return_inverse=True)
    owner, token = np.divmod(cells, vocab)
    size = np.bincount(owner, minlength=number)
    hidden = vocab - k
    unlisted = top.rest - np.log(hidden) if hidden else np.zeros(len(chunk))  # of one token that a row does not list
    excess = np.bincount(place.ravel(), (top.logprob - unlisted[:, None]).ravel(), len(cells))
    mean = (np.bincount(chunk, unlisted, number)[owner] + excess) / rows[owner]
    mass, rest = np.exp(mean), np.zeros(number)
    if hidden:
        with np.errstate(divide="ignore"):
            left = top.rest + np.log1p(-(size - k) / hidden)[chunk]
        rest = np.exp(np.bincount(chunk, left, number) / rows)
    kept = reached[token]
    whole, within_reach = (rest + np.bincount(owner, part, number) for part in (mass, mass * kept))
    owner, token, mean = owner[kept], token[kept], mean[kept]
    size = np.bincount(owner, minlength=number)
    within = np.arange(len(owner)) - (np.cumsum(size) - size)[owner]
    width = int(size.max(initial=1))
    columns, logprob = np.full((number, width), vocab), np.full((number, width), -np.inf, np.float32)
    columns[owner, within], logprob[owner, within] = token, mean - np.log(within_reach[owner])
    with np.errstate(divide="ignore", invalid="ignore"):
        rest = np.log(np.where(within_reach > 0, rest / within_reach, 1))
    return columns, logprob, rest.astype(np.float32), (within_reach / whole).astype(np.float32)


def projected(
    logits: torch.Tensor, columns: torch.Tensor, starts: torch.Tensor, sources: torch.Tensor, weights: torch.Tensor
) -> torch.Tensor:
    """Return [n, m]: the probability that rows of logits [n, V student] project to their `columns` int64 [n, m].

    `starts`, `sources`, `weights` as `inverse` returns them.
    """
    rows, width = columns.shape
    cells = columns.flatten()
    counts = starts[cells + 1] - starts[cells]
    cell = torch.repeat_interleave(torch.arange(len(cells), device=cells.device), counts)
    first = starts[cells] - (counts.cumsum(0) - counts)
    place = torch.arange(len(cell), device=cells.device) + first[cell]
    row = cell // width
    found = logits.flatten().gather(0, row * logits.shape[1] + sources[place])
    mass = (found - torch.logsumexp(logits, -1)[row]).exp() * weights[place]
    return mass.new_zeros(rows * width).index_add(0, cell, mass).view(rows, width)


def chunk_divergences(
    masses: torch.Tensor, chunk: torch.Tensor, logprob: torch.Tensor, rest: torch.Tensor
) -> torch.Tensor:
    """Return [C]: forward KL of each chunk, of the student the mean of its rows' masses [R, m].

    `chunk` int64 [R]; `logprob` [C, m] and `rest` [C] as `chunk_targets` returns them.
    """
    rows = torch.bincount(chunk, minlength=len(rest)).clamp(min=1)
    mean = torch.zeros_like(logprob).index_add(0, chunk, masses) / rows[:, None]
    others = torch.log1p(-mean.sum(-1).clamp(max=1 - SMALLEST_REST))
    log_q = mean.clamp(min=torch.finfo(mean.dtype).tiny).log()
    sides = (torch.cat([side, other[:, None]], -1) for side, other in ((logprob, rest), (log_q, others)))
    return divergence("fkl", *sides, {})
