"""Contextual dynamic mapping (CDM, arXiv 2502.11104): a map between vocabularies that grows with the context.

Distributions of the same place in the text are compared over pairs of tokens. Most pairs come from a base map between
the vocabularies, `cdm_mapping`: exact (the same bytes or role), mined (the least edit distance) or prefix (the longest
token that begins it). A likely token without a partner gets one for this place alone: the nearest of the other side's
100 likeliest, if its normalised edit distance is below .3 (`losses.contextual`). It works in both directions, and the
base map never changes; in the paper's code it grows over the whole run, so results depend on the order of the data.
Tokens that share a partner are one event. All else is the rest, and the loss is forward KL of events and rest, both
sides at `temperature`. Only the teacher's 100 likeliest tokens take part.

Places are aligned by `cdm_alignment`:
- chunks: the ends of byte chunks, exactly; the loss is the mean over them.
- dtw: the paper's. Time warping over edit distances weighed by entropy, 3 to 5 (`entropy_weights`, of the likeliest
  tokens and an even tail): it depends on the student, so it runs after the student's pass, on the CPU, and the output
  layer runs a second time. Tokens that a path joins are one place: the mean of their logits. Of the student that is
  the output of the mean hidden state (with a soft cap, nearly); of the teacher `mean_rows`. The loss is the mean over
  the student's tokens, each with the divergence of its place, as the number of places is known too late to divide by.
  The release averages over places and, where a path has steps in both directions without a diagonal between them, lets
  places overlap; here they are one.

The paper's `kd_alpha` is the ratio of `loss_weights` of sft and cdm.
"""

import math
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from stages.core.errors import UserError
from stages.losses import Needs, Prepared, Query
from stages.losses.contextual import Links, link
from stages.losses.divergences import SMALLEST_REST, check_temperature, with_rest
from stages.losses.mapped import (
    Likeliest,
    compared,
    ends_before_targets,
    grouped,
    likeliest,
    signals_read,
)
from stages.losses.token_alignment import aligned_tokens, segments, token_costs, warp

if TYPE_CHECKING:
    from stages.alignment.pair import Matches, Pair
    from stages.losses.examples import Examples

DEFAULTS: dict[str, Any] = {
    "cdm_alignment": "dtw", "cdm_mapping": "exact", "temperature": 1.0, "t_squared": False,
}  # fmt: skip
ALIGNMENTS = ("dtw", "chunks")
MAPPINGS = {"exact": "exact", "mined": "nearest", "prefix": "prefix"}  # setting -> part of Matches
TOP_K = 100  # likeliest tokens of each side that take part, as in the paper


def check(options: dict[str, Any]) -> None:
    """Raise UserError naming the setting that this loss does not know."""
    options = DEFAULTS | options
    check_temperature(options, "temperature")
    for key, known in (("cdm_alignment", ALIGNMENTS), ("cdm_mapping", MAPPINGS)):
        if options[key] not in known:
            raise UserError(f"{key} is {options[key]!r}; it must be one of {', '.join(known)}.")


def needs(options: dict[str, Any]) -> Needs:
    """Return the teacher's likeliest tokens at the temperature, and the mapping."""
    return Needs(signals_read((DEFAULTS | options)["temperature"]), pair=frozenset({"mapping"}))


def prepare(examples: "Examples", options: dict[str, Any]) -> Prepared:
    """Return the places of byte chunks, or what time warping needs; counted are places, or the student's rows."""
    options = DEFAULTS | options
    pair, signals, temperature = examples.pair, examples.signals, options["temperature"]
    assert pair is not None and examples.teacher is not None
    likely = min(TOP_K, pair.student.vocab_size)
    none = np.zeros(0, np.int64)
    if options["cdm_alignment"] == "chunks":
        teacher, student, example = examples.chunks("unconstrained", scored=False)
        teacher_rows, rows, usable = ends_before_targets(examples, teacher, student, len(example))
        top = cut(likeliest(signals, teacher_rows[usable], temperature), TOP_K)
        base = base_map(pair.to_student, options)[top.ids]
        query = Query(rows[usable], np.maximum(base, 0), likely, temperature)
        return Prepared(float(len(query.rows)), none, top._asdict(), query)
    teacher_rows, teacher_sizes, teacher_ids = aligned_tokens(examples.teacher)
    rows, sizes, ids = aligned_tokens(examples.student)
    plain = likeliest(signals, teacher_rows)
    uncertainty = entropy(torch.from_numpy(plain.logprob), torch.from_numpy(plain.rest), pair.teacher.vocab_size)
    arrays = likeliest(signals, teacher_rows, temperature)._asdict() | {
        "rows": rows,
        "cost": token_costs(pair, teacher_ids, ids),
        "teacher_sizes": teacher_sizes,
        "student_sizes": sizes,
        "teacher_entropy": uncertainty.numpy(),
    }
    return Prepared(float(len(rows)), none, arrays, Query(rows, np.zeros((len(rows), 0), np.int64), likely))


def loss(
    student: dict[str, Any], arrays: dict[str, torch.Tensor], options: dict[str, Any]
) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    """Return the summed divergence in nats, and the mass of the paired tokens on both sides, summed alike."""
    options = DEFAULTS | options
    pair: Pair = student["pair"]
    to_student, to_teacher = base_map(pair.to_student, options), base_map(pair.to_teacher, options)
    if options["cdm_alignment"] == "chunks":
        top = Likeliest(*(arrays[name].cpu().numpy() for name in Likeliest._fields))
        weight = arrays["rest"].new_ones(len(top.ids))
        seen = [student[name] for name in ("candidate_logprob", "topk_logprob", "topk_ids")]
    else:
        top, place, number = warped_places(student["topk_logprob"], arrays, pair)
        place = torch.from_numpy(place).to(arrays["rows"].device)
        states, weight = mean_states(student["hidden"].index_select(0, arrays["rows"]), place, number)
        base = torch.from_numpy(np.maximum(to_student[top.ids], 0)).to(place.device)
        likely = min(TOP_K, pair.student.vocab_size)
        seen = list(student["sides"].student.head.distribution(states, base, likely, options["temperature"]))
    links = link(pair, top.ids, seen[2].cpu().numpy(), to_student, to_teacher)
    log_p, rest, log_q = events(top, links, torch.cat(seen[:2], 1))
    total = (compared("fkl", log_p, rest, log_q, options) * weight).sum()
    masses = {"teacher_paired_mass": log_p, "student_paired_mass": log_q.detach()}
    factor = options["temperature"] ** 2 if options["t_squared"] else 1.0
    return total * factor, {name: (mass.exp().sum(-1) * weight).sum() for name, mass in masses.items()}


def base_map(matches: "Matches | None", options: dict[str, Any]) -> np.ndarray:
    """Return int64 [tokens of one side]: the token of the other that the base map gives it, -1 for none."""
    assert matches is not None
    return getattr(matches, MAPPINGS[options["cdm_mapping"]])


def events(top: Likeliest, links: Links, log_q: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Return the log-probabilities of events [R, K], -inf for none: (teacher's, teacher's rest [R], student's).

    `log_q` [R, K + k] is the student's at the columns of `links.student`.
    """
    place = lambda array: torch.from_numpy(array).to(log_q.device)  # noqa: E731
    columns = top.ids.shape[1]
    alone = np.where(links.teacher == columns, np.exp(top.logprob.astype(np.float64)), 0).sum(-1)
    rest = np.log(np.maximum(alone + np.exp(top.rest.astype(np.float64)), SMALLEST_REST)).astype(np.float32)
    log_p = grouped(place(top.logprob), place(links.teacher), columns)
    return log_p, place(rest), grouped(log_q, place(links.student), columns)


def warped_places(
    topk_logprob: torch.Tensor, arrays: dict[str, torch.Tensor], pair: "Pair"
) -> tuple[Likeliest, np.ndarray, int]:
    """Return the places that time warping makes: (the teacher's mean rows, the place of each student row, how many).

    `topk_logprob` [student rows, k] at temperature 1; a row without a place has -1.
    """
    with torch.no_grad():
        known = entropy(topk_logprob, with_rest(topk_logprob)[:, -1], pair.student.vocab_size).cpu().numpy()
    cost, *sizes = (arrays[name].cpu().numpy() for name in ("cost", "teacher_sizes", "student_sizes"))
    weights = [
        padded(entropy_weights(values, size), size, width)
        for values, size, width in zip(
            (arrays["teacher_entropy"].cpu().numpy(), known), sizes, cost.shape[1:], strict=True
        )
    ]
    path, _ = warp(cost * weights[0][:, :, None] * weights[1][:, None, :], *sizes)
    teacher, place, number = segments(path, *sizes)
    rows = Likeliest(*(arrays[name].cpu().numpy() for name in Likeliest._fields))
    return cut(mean_rows(rows, teacher, number, pair.teacher.vocab_size), TOP_K), place, number


def entropy(logprob: torch.Tensor, rest: torch.Tensor, vocab: int) -> torch.Tensor:
    """Return the entropy [R] of rows of which `logprob` [R, k] is known, and all others share `rest` [R] evenly."""
    others = math.log(max(vocab - logprob.shape[1], 1))
    return -(logprob.exp() * logprob).sum(-1) - rest.exp() * (rest - others)


def entropy_weights(values: np.ndarray, sizes: np.ndarray) -> np.ndarray:
    """Return int32 [R]: 3 to 5 by how high an entropy is between the lowest and the highest of its example.

    `sizes` int64 [B]: the rows of each example. All are 3 where there is no difference.
    """
    if not len(values):
        return np.zeros(0, np.int32)
    filled = np.flatnonzero(sizes)
    starts = (np.cumsum(sizes) - sizes)[filled]
    low, high = (np.repeat(part.reduceat(values, starts), sizes[filled]) for part in (np.minimum, np.maximum))
    height = np.divide(values - low, high - low, out=np.zeros(len(values)), where=high > low)
    return np.trunc(3 / (1 + np.exp(2 - 4 * height)) + 3).astype(np.int32)


def padded(values: np.ndarray, sizes: np.ndarray, width: int) -> np.ndarray:
    """Return the flat values of examples as [B, width], 0 behind them."""
    result = np.zeros((len(sizes), width), values.dtype)
    result[np.arange(width)[None, :] < sizes[:, None]] = values
    return result


def mean_states(states: torch.Tensor, place: torch.Tensor, number: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Return (mean of the states [n, d] of each place [number, d], how many they are, float32 [number])."""
    kept = place >= 0
    weight = torch.bincount(place[kept], minlength=number).float()
    sums = states.new_zeros((number, states.shape[1]), dtype=torch.float32).index_add(
        0, place[kept], states[kept].float()
    )
    return (sums / weight[:, None]).to(states.dtype), weight


def mean_rows(rows: Likeliest, place: np.ndarray, number: int, vocab: int) -> Likeliest:
    """Return the distributions of the mean logits of the rows of each place, with as many tokens as one row has.

    `place` int64 [R], -1 for none. A token that a row does not know has an even share of its tail.
    """
    kept = place >= 0
    ids, logprob, rest, place = (part[kept] for part in (*rows, place))
    count = np.bincount(place, minlength=number)
    unit = rest.astype(np.float64) - math.log(max(vocab - ids.shape[1], 1))
    base = np.bincount(place, unit, number) / count  # the mean logit of a token that no row knows
    key, inverse = np.unique(place[:, None] * vocab + ids, return_inverse=True)
    of, token = np.divmod(key, vocab)
    above = np.bincount(inverse.ravel(), (logprob.astype(np.float64) - unit[:, None]).ravel(), len(key))
    logit = base[of] + above / count[of]
    outside = np.maximum(vocab - np.bincount(of, minlength=number), 0)
    highest = np.maximum.reduceat(logit, np.searchsorted(of, np.arange(number))) if number else base
    total = np.bincount(of, np.exp(logit - highest[of]), number) + outside * np.exp(base - highest)
    logit -= (highest + np.log(total))[of]
    order = np.lexsort((-logit, of))
    rank = np.arange(len(of)) - np.searchsorted(of, np.arange(number))[of]
    chosen = order[rank < ids.shape[1]].reshape(number, ids.shape[1])
    others = np.bincount(of[order][rank >= ids.shape[1]], np.exp(logit[order][rank >= ids.shape[1]]), number)
    with np.errstate(divide="ignore"):
        rest = np.log(others + outside * np.exp(base - highest) / total)
    return Likeliest(token[chosen], logit[chosen].astype(np.float32), rest.astype(np.float32))


def cut(top: Likeliest, number: int) -> Likeliest:
    """Return the rows with the `number` likeliest tokens; the others go to the rest."""
    beyond = np.exp(top.logprob[:, number:].astype(np.float64)).sum(-1) + np.exp(top.rest.astype(np.float64))
    with np.errstate(divide="ignore"):
        return Likeliest(top.ids[:, :number], top.logprob[:, :number], np.log(beyond).astype(np.float32))
