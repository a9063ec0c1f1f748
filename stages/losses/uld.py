"""Universal logit distillation (arXiv 2402.12030): the L1 distance of sorted probabilities, whatever their tokens are.

With `uld_alignment: position`, as published, the j-th trained place of an example on one side meets the j-th on the
other, though after the first token that is cut differently they follow different text. With `chunk`, the rows that
predict the first token of a chunk meet: there both sides have read the same bytes.

The teacher is known by its k likeliest tokens. Their sorted differences are exact; the differences of all others are
replaced by that of their sums, which is at most theirs (the triangle inequality). With k the whole vocabulary nothing
is left and the smaller vocabulary is padded with zeros, as in the reference. The published weights are 1 for cross
entropy and 1.5 for this: `loss_weights`.
"""

from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from stages.core.errors import UserError
from stages.losses import Needs, Prepared, Query
from stages.losses.sft import example_of, target_rows

if TYPE_CHECKING:
    from stages.losses.examples import Examples
    from stages.tokenization.encoding import EncodedBatch

DEFAULTS = {"uld_alignment": "position"}
ALIGNMENTS = ("position", "chunk")


def check(options: dict[str, Any]) -> None:
    """Raise UserError for an alignment that does not exist."""
    alignment = (DEFAULTS | options)["uld_alignment"]
    if alignment not in ALIGNMENTS:
        raise UserError(f"uld_alignment is {alignment!r}; it must be one of {', '.join(ALIGNMENTS)}.")


def needs(options: dict[str, Any]) -> Needs:
    """Return the teacher's largest probabilities, of whatever tokens, and the mass of the rest."""
    return Needs(frozenset({"topk_logprobs", "tail_logmass"}))


def prepare(examples: "Examples", options: dict[str, Any]) -> Prepared:
    """Return the pairs of rows that meet; the count is their number."""
    options = DEFAULTS | options
    if options["uld_alignment"] == "chunk":
        teacher, student = chunk_pairs(*examples.chunks(options["kind"])[:2])
    else:
        teacher, student = position_pairs(examples.teacher, examples.student)
    probability = np.exp(examples.signals["topk_logprobs"][teacher].astype(np.float32))
    arrays = {"probability": probability, "rest": np.exp(examples.signals["tail_logmass"][teacher])}
    k = min(probability.shape[1], examples.pair.student.vocab_size)
    query = Query(student, np.zeros((len(student), 0), np.int64), k)
    return Prepared(float(len(student)), np.zeros(0, np.int64), arrays, query)


def loss(
    student: dict[str, Any], arrays: dict[str, torch.Tensor], options: dict[str, Any]
) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    """Return the summed distances, each between 0 and 2."""
    q = student["topk_logprob"].exp()
    rest = rest_of(q, student["sides"].student.head.shape.vocab)
    return sorted_l1(arrays["probability"], q, arrays["rest"], rest).sum(), {}


def sorted_l1(
    p: torch.Tensor, q: torch.Tensor, rest_p: torch.Tensor | None = None, rest_q: torch.Tensor | None = None
) -> torch.Tensor:
    """Return [R]: the L1 distance of sorted probabilities [R, m] and [R, n], the shorter padded with zeros.

    `rest_p`, `rest_q` [R]: the mass of what is not listed, compared as one number.
    """
    width = max(p.shape[1], q.shape[1])
    p, q = (torch.nn.functional.pad(side, (0, width - side.shape[1])) for side in (p, q))
    distance = (p - q).abs().sum(-1)
    return distance if rest_p is None or rest_q is None else distance + (rest_p - rest_q).abs()


def rest_of(listed: torch.Tensor, vocab: int) -> torch.Tensor:
    """Return [R]: the probability outside of that listed [R, m]; 0 where that is the whole vocabulary."""
    if listed.shape[1] == vocab:
        return listed.new_zeros(len(listed))
    return (1 - listed.sum(-1)).clamp(min=0)


def position_pairs(teacher: "EncodedBatch", student: "EncodedBatch") -> tuple[np.ndarray, np.ndarray]:
    """Return (teacher rows, student rows), int64: places as far from the first trained token of their example.

    Only rows that predict a trained token on both sides.
    """
    width = max(len(teacher.ids), len(student.ids)) + 1
    sides = []
    for batch in (teacher, student):
        rows = target_rows(batch.loss, batch.offsets)
        example = example_of(rows, batch.offsets)
        _, first, place = np.unique(example, return_index=True, return_inverse=True)
        sides.append((rows, example * width + rows - rows[first][place]))
    (teacher_rows, teacher_keys), (student_rows, student_keys) = sides
    _, at_teacher, at_student = np.intersect1d(teacher_keys, student_keys, True, return_indices=True)
    return teacher_rows[at_teacher], student_rows[at_student]


def chunk_pairs(teacher: np.ndarray, student: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Return (teacher rows, student rows), int64, that predict the first token of each chunk.

    `teacher`, `student`: int64[tokens], the chunk of every token, -1 for none.
    """
    sides = []
    for chunk in (teacher, student):
        tokens = np.flatnonzero(chunk >= 0)
        chunks, first = np.unique(chunk[tokens], return_index=True)
        sides.append((chunks, tokens[first] - 1))
    (teacher_chunks, teacher_rows), (student_chunks, student_rows) = sides
    _, at_teacher, at_student = np.intersect1d(teacher_chunks, student_chunks, True, return_indices=True)
    return teacher_rows[at_teacher], student_rows[at_student]
