"""Side-path distillation (`alm_side_path`): next-token distributions after each chunk, on tokens that match each other.

tokenkit had it until June 2025. Where a chunk ends both sides have read the same bytes; there the teacher's likeliest
tokens are compared with the student tokens that match them. `side_path_mapping_mode`: exact_match (the same bytes, or
the same role of a special token), bias_threshold (of these the pairs whose tokenization biases are both at most
`tokenizer_pair_bias_threshold_side_path`) or mined (the least edit distance). Several student tokens that match one
teacher token are one event, with their probabilities summed; tokenkit counts the teacher's once for each of them, so
that a "distribution" can have more mass than 1.

Known are the teacher's k likeliest tokens. Whatever is not matched among them, and everything else, is the rest of both
sides: kl and reverse_kl are those of the coarser distributions, the others look at the matched tokens alone. With k the
whole vocabulary all six are tokenkit's, but that a rest smaller than 1e-7 counts as that (1e-8 there): nearer to 0,
one minus a float32 sum is noise.
"""

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from stages.core.errors import UserError
from stages.losses import Needs, Prepared, Query
from stages.losses.divergences import forward_kl, reverse_kl, with_rest
from stages.losses.mapped import (
    LOG_SMALLEST,
    Likeliest,
    ends_before_targets,
    grouped,
    likeliest,
    members,
    signals_read,
)

if TYPE_CHECKING:
    from stages.alignment.pair import Pair
    from stages.losses.examples import Examples

DEFAULTS: dict[str, Any] = {"side_path_mapping_mode": "exact_match", "side_path_distance_fn": "kl"}
MODES = ("exact_match", "bias_threshold", "mined")


def check(options: dict[str, Any]) -> None:
    """Raise UserError naming the setting that this loss does not know."""
    options = DEFAULTS | options
    for key, known in (("side_path_mapping_mode", MODES), ("side_path_distance_fn", DISTANCES)):
        if options[key] not in known:
            raise UserError(f"{key} is {options[key]!r}; it must be one of {', '.join(known)}.")


def needs(options: dict[str, Any]) -> Needs:
    """Return the teacher's likeliest tokens, the mapping, and the biases where the mode reads them."""
    by_bias = (DEFAULTS | options)["side_path_mapping_mode"] == "bias_threshold"
    return Needs(signals_read(1.0), pair=frozenset({"mapping", *(["side_path_bias"] if by_bias else [])}))


def prepare(examples: "Examples", options: dict[str, Any]) -> Prepared:
    """Return the ends of chunks that a trained token follows, with the teacher's matched tokens; counted are the ends.

    tokenkit keeps an end whose following token is masked on the teacher's side alone; the masks are the same text's.
    """
    options = DEFAULTS | options
    assert examples.pair is not None
    teacher, student, example = examples.chunks(options.get("kind") or "unconstrained", scored=False)
    number = len(example)
    teacher_rows, rows, usable = ends_before_targets(examples, teacher, student, number)
    top = likeliest(examples.signals, teacher_rows[usable])
    mapping = matching(examples.pair, options["side_path_mapping_mode"])
    return prepare_rows(top, rows[usable], mapping, examples.pair.teacher.vocab_size)


def matching(pair: "Pair", mode: str) -> np.ndarray:
    """Return int64 [student tokens]: the teacher token that each matches in this mode, -1 for none."""
    assert pair.to_teacher is not None
    if mode == "mined":
        return pair.to_teacher.nearest
    exact = pair.to_teacher.exact
    if mode == "exact_match":
        return exact
    assert pair.side_path_bias is not None
    accepted = pair.side_path_bias.accepts(np.maximum(exact, 0), np.arange(len(exact)))
    return np.where(accepted, exact, -1)


def prepare_rows(top: Likeliest, rows: np.ndarray, to_teacher: np.ndarray, vocab: int) -> Prepared:
    """Return the comparison of the teacher's rows `top` with student `rows`, int64 and flat.

    `to_teacher` as `matching` returns it; `vocab`: the teacher's number of tokens.
    """
    ids, column, used = members(top.ids, to_teacher, vocab)
    matched = np.bincount(to_teacher[to_teacher >= 0], minlength=vocab)[top.ids] > 0
    left = np.exp(np.where(matched, -np.inf, top.logprob.astype(np.float64))).sum(-1) + np.exp(top.rest)
    arrays = {
        "logprob": np.where(matched, top.logprob, -np.inf).astype(np.float32),
        "rest": np.maximum(np.log(np.maximum(left, np.finfo(np.float64).tiny)), LOG_SMALLEST).astype(np.float32),
        "event": np.where(used, column, top.ids.shape[1]),
    }
    return Prepared(float(len(rows)), np.zeros(0, np.int64), arrays, Query(rows, ids))


def loss(
    student: dict[str, Any], arrays: dict[str, torch.Tensor], options: dict[str, Any]
) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    """Return the summed distance over the ends of chunks, and the mass of the matched tokens on both sides."""
    log_p, options = arrays["logprob"], DEFAULTS | options
    log_q = grouped(student["candidate_logprob"], arrays["event"], log_p.shape[1])
    total = DISTANCES[options["side_path_distance_fn"]](log_p, arrays["rest"], log_q).sum()
    masses = {"teacher_matched_mass": log_p.exp().sum(), "student_matched_mass": log_q.detach().exp().sum()}
    return total, masses


def _kl(log_p: torch.Tensor, rest: torch.Tensor, log_q: torch.Tensor) -> torch.Tensor:
    return forward_kl(torch.cat([log_p, rest[:, None]], -1), with_rest(log_q), {})


def _reverse_kl(log_p: torch.Tensor, rest: torch.Tensor, log_q: torch.Tensor) -> torch.Tensor:
    return reverse_kl(torch.cat([log_p, rest[:, None]], -1), with_rest(log_q), {})


def _kl_subset(log_p: torch.Tensor, rest: torch.Tensor, log_q: torch.Tensor) -> torch.Tensor:
    return forward_kl(_within(log_p), _within(log_q), {})


def _reverse_kl_subset(log_p: torch.Tensor, rest: torch.Tensor, log_q: torch.Tensor) -> torch.Tensor:
    return reverse_kl(_within(log_p), _within(log_q), {})


def _log_abs(log_p: torch.Tensor, rest: torch.Tensor, log_q: torch.Tensor) -> torch.Tensor:
    matched = ~torch.isneginf(log_p)
    gap = (log_p.masked_fill(~matched, 0.0) - log_q.masked_fill(~matched, 0.0)).abs()
    return gap.sum(-1) / matched.sum(-1).clamp(min=1)


def _abs(log_p: torch.Tensor, rest: torch.Tensor, log_q: torch.Tensor) -> torch.Tensor:
    return (log_p.exp() - log_q.exp()).abs().sum(-1)


def _within(logprob: torch.Tensor) -> torch.Tensor:
    """Return log-probabilities [R, m] given that one of the m tokens comes; -inf where none is matched."""
    none = torch.isneginf(logprob).all(-1, keepdim=True)
    filled = logprob.masked_fill(none, 0.0)
    return (filled - filled.logsumexp(-1, keepdim=True)).masked_fill(none, -torch.inf)


# Of the teacher's and student's log-probabilities of matched tokens [R, m], -inf where there is none, and the
# teacher's of all others [R]; [R].
DISTANCES: dict[str, Callable[[torch.Tensor, torch.Tensor, torch.Tensor], torch.Tensor]] = {
    "kl": _kl,
    "reverse_kl": _reverse_kl,
    "kl_subset": _kl_subset,
    "reverse_kl_subset": _reverse_kl_subset,
    "log_abs": _log_abs,
    "abs": _abs,
}
