"""MinED: the teacher's distribution on the student's vocabulary, token for token by edit distance.

`baseline_mined` is tokenkit's: where a chunk of bytes is one token on both sides, the distributions that follow it are
compared, each student token having the logit of the teacher token that it was mined to (`mapped.spread`); a token in
any other chunk is learned from the text. So the row before such a token can count twice, and the row after one not at
all. tokenkit leaves out the chunk of an example's first token; here it counts, as both sides have read it. A token in
no chunk is learned from the text as well.
`baseline_minED` is FuseLLM's (arXiv 2401.10491) as DSKD has it: where a string alignment joins a student token with one
teacher token alone, which was mined to it, the student's row has that teacher token's distribution, each teacher token
its logit to the student token that it was mined to (`mapped.gathered`); every other row learns the token that follows.
FuseLLM took the token of the row itself there. The teacher's token may be joined with more student tokens: the one that
it was mined to still has its row. Mining goes from teacher to student alone, as in both: the teacher's token that is
nearest to a student token does not make them a pair.

The comparison is `baseline.divergence`, by default forward KL, as in FuseLLM, and in tokenkit whatever it is set to.
Both sides are at `baseline.kd_temp`. A one-hot target is not tempered: cross entropy of the student at that
temperature, whatever the divergence. There is no factor of the temperature squared.
"""

from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from stages.losses import Needs, Prepared, Query
from stages.losses.divergences import check_divergence, check_temperature
from stages.losses.mapped import (
    Likeliest,
    compared,
    ends_before_targets,
    gathered,
    likeliest,
    signals_read,
    spread,
)
from stages.losses.sft import target_rows
from stages.losses.token_alignment import aligned_tokens, flat_places, token_costs, warp

if TYPE_CHECKING:
    from stages.losses.examples import Examples

DEFAULTS: dict[str, Any] = {"divergence": "kl", "kd_temp": 2.0}


def check(options: dict[str, Any]) -> None:
    """Raise UserError for a temperature that is not above 0, or a divergence that is not known."""
    options = DEFAULTS | options
    check_temperature(options, "kd_temp")
    check_divergence(options, options["divergence"])


def needs(options: dict[str, Any]) -> Needs:
    """Return the teacher's likeliest tokens at the temperature, and the mapping."""
    return Needs(signals_read((DEFAULTS | options)["kd_temp"]), pair=frozenset({"mapping"}))


def prepare(examples: "Examples", options: dict[str, Any]) -> Prepared:
    """Return the rows to compare and those that learn from the text; the count is the number of both."""
    options = DEFAULTS | options
    pair, temperature = examples.pair, options["kd_temp"]
    assert pair is not None and pair.to_teacher is not None and pair.to_student is not None
    if options["name"] == "baseline_minED":
        teacher_rows, rows, observed = joined_rows(examples)
        mapping, to_student = pair.to_student.nearest, gathered
    else:
        teacher_rows, rows, observed = one_to_one_rows(examples)
        mapping, to_student = pair.to_teacher.nearest, spread
    mapped = to_student(likeliest(examples.signals, teacher_rows, temperature), mapping, pair.teacher.vocab_size)
    return prepare_rows(mapped, rows, observed, examples.student.ids, temperature)


def prepare_rows(
    mapped: Likeliest, rows: np.ndarray, observed: np.ndarray, ids: np.ndarray, temperature: float
) -> Prepared:
    """Return student `rows` to compare with `mapped`, and `observed` rows, which learn the token that follows.

    Both int64 and flat; `ids` [N] are the student's tokens.
    """
    candidates = np.zeros((len(rows) + len(observed), mapped.ids.shape[1]), np.int64)
    candidates[: len(rows)] = mapped.ids
    candidates[len(rows) :, 0] = ids[observed + 1]
    query = Query(np.concatenate((rows, observed)), candidates, 0, temperature)
    arrays = {"logprob": mapped.logprob, "rest": mapped.rest}
    return Prepared(float(len(query.rows)), np.zeros(0, np.int64), arrays, query)


def loss(
    student: dict[str, Any], arrays: dict[str, torch.Tensor], options: dict[str, Any]
) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    """Return the summed divergences and cross entropies in nats; how many rows were compared, and their part."""
    options = DEFAULTS | options
    log_p, log_q = arrays["logprob"], student["candidate_logprob"]
    number = len(log_p)
    apart = compared(options["divergence"], log_p, arrays["rest"], log_q[:number], options).sum()
    observed = -log_q[number:, 0].sum()
    return apart + observed, {"compared_rows": apart.new_tensor(float(number)), "divergence": apart.detach()}


def one_to_one_rows(examples: "Examples") -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Return (teacher rows, student rows) after chunks of one token each, and the rows before tokens of no such chunk.

    All rows predict a token that is trained on.
    """
    teacher, student, example = examples.chunks("unconstrained", scored=False)
    number = len(example)
    single = _count(teacher, number) * _count(student, number) == 1
    teacher_end, student_end, usable = ends_before_targets(examples, teacher, student, number)
    rows = target_rows(examples.student.loss, examples.student.offsets)
    alone = np.append(single, False)[student[rows + 1]]
    return teacher_end[single & usable], student_end[single & usable], rows[~alone]


def joined_rows(examples: "Examples") -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Return (teacher rows, student rows) of tokens that the alignment joins, and the other rows of the student.

    Aligned are the tokens of the rows that predict a trained token. Joined is a student token with its only teacher
    token, if that one is mined to it (as every token is to its equal).
    """
    pair = examples.pair
    assert pair is not None and pair.to_student is not None and examples.teacher is not None
    teacher_rows, teacher_sizes, teacher_ids = aligned_tokens(examples.teacher)
    rows, sizes, ids = aligned_tokens(examples.student)
    path, _ = warp(token_costs(pair, teacher_ids, ids), teacher_sizes, sizes)
    left, right = flat_places(path, teacher_sizes, sizes)
    single = np.bincount(right, minlength=len(rows))[right] == 1
    left, right = left[single], right[single]
    mined = pair.to_student.nearest[np.concatenate(teacher_ids)[left]] == np.concatenate(ids)[right]
    return teacher_rows[left[mined]], rows[right[mined]], np.delete(rows, right[mined])


def _count(segment: np.ndarray, number: int) -> np.ndarray:
    return np.bincount(segment[segment >= 0], minlength=number)
