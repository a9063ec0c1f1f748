"""MultiLevelOT (arXiv 2412.14528): optimal transport between sorted columns, by token and by sequence.

Logits are divided by their standard deviation over the vocabulary before the softmax. Of each side the 50 tokens with
the largest probability, summed over an example, are its columns; the i-th column of one side meets the i-th of the
other, whatever their tokens are. An example's loss is

    mean over places of (sum |p - q| + 0.1 * -sum p log q)  +  0.1 * 0.001 * sum of the plan times its costs

where places are paired by their position (`uld.position_pairs`), and the plan is Sinkhorn's between all places of both
sides: costs L1 between softmax(p / 2) and softmax(q / 2), regularisation 0.1, 10 iterations, one unit of mass for each
place of the teacher. The published weight of the whole is 1.5 beside a cross entropy of 1 (`loss_weights`).

Unlike the release (`models/distillation_model.py`):
- It passes student and teacher in swapped order to the logarithmic term and to Sinkhorn, so that the teacher's
  distribution stands inside the logarithm and the plan is normalised over the student's places last.
- It takes a softmax of the probabilities once more in the logarithmic term, which makes both sides almost uniform; the
  paper's term has none. The sequence term keeps it, its temperature of 2 is defined by it.
- It can choose the teacher's columns greedily, each the nearest to one of the student's; here they are its likeliest.
- It chooses columns for a whole batch, padded places included, and adds up the sequence term over the examples of a
  batch of which it averages the others. Here an example is the unit, so that splitting a batch changes nothing.

The standard deviation and the sums over an example need every logit of both sides: the teacher is known by its hidden
states and output layer.
"""

from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from stages.losses import Needs, Prepared
from stages.losses.sft import example_of, target_rows
from stages.losses.uld import position_pairs
from stages.signals.schema import to_float32
from stages.vocabulary.standardised import moments_and_columns, standardised_logprob

if TYPE_CHECKING:
    from stages.losses.examples import Examples
    from stages.tokenization.encoding import EncodedBatch
    from stages.vocabulary.head import Head

COLUMNS = 50
LOGARITHMIC_WEIGHT, SEQUENCE_WEIGHT = 0.1, 0.1 * 0.001
SINKHORN_TEMPERATURE, REGULARISATION, ITERATIONS = 2.0, 0.1, 10


def check(options: dict[str, Any]) -> None:
    """Accept any settings: this loss has none."""


def needs(options: dict[str, Any]) -> Needs:
    """Return the teacher's hidden states and output layer."""
    return Needs(frozenset({"hidden"}), teacher_head=True)


def prepare(examples: "Examples", options: dict[str, Any]) -> Prepared:
    """Return the places of each example on both sides; the count is the number of examples that have any on both."""
    teacher, student = examples.teacher, examples.student
    pairs = position_pairs(teacher, student)
    example = example_of(pairs[1], student.offsets)
    kept = np.unique(example)
    (teacher_rows, teacher_example), (student_rows, student_example) = (
        _rows_of(batch, kept) for batch in (teacher, student)
    )
    arrays = {
        "teacher": to_float32(examples.signals["hidden"][teacher_rows]),
        "teacher_sizes": np.bincount(teacher_example, minlength=len(kept)),
        "rows": student_rows,
        "sizes": np.bincount(student_example, minlength=len(kept)),
        "teacher_pairs": np.searchsorted(teacher_rows, pairs[0]),
        "pairs": np.searchsorted(student_rows, pairs[1]),
        "example": np.searchsorted(kept, example),
    }
    return Prepared(float(len(kept)), np.zeros(0, np.int64), arrays)


def loss(
    student: dict[str, Any], arrays: dict[str, torch.Tensor], options: dict[str, Any]
) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    """Return the sum over examples, and of the token term and the sequence term without their weights."""
    own, teacher = student["sides"].student.head, student["sides"].teacher.head
    hidden = student["hidden"].index_select(0, arrays["rows"])
    number = min(COLUMNS, own.shape.vocab, teacher.shape.vocab)
    log_q = likeliest_logprob(own, hidden, arrays["sizes"], number)
    log_p = likeliest_logprob(teacher, arrays["teacher"].to(teacher.weight.dtype), arrays["teacher_sizes"], number)
    return transport_loss(log_p, log_q, arrays)


def likeliest_logprob(head: "Head", hidden: torch.Tensor, sizes: torch.Tensor, number: int) -> torch.Tensor:
    """Return [R, number]: standardised log-probabilities of the likeliest tokens of each row's example.

    `hidden` [R, d], example by example; `sizes` int64 [E]: rows of each.
    """
    moments, columns = moments_and_columns(head, hidden.detach(), sizes, number)
    return standardised_logprob(head, hidden, columns, sizes, moments)


def transport_loss(
    log_p: torch.Tensor, log_q: torch.Tensor, arrays: dict[str, torch.Tensor]
) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    """Return the sum of the examples' losses, and of its terms; log-probabilities [Rt, m] and [Rs, m] of columns."""
    p, q = log_p[arrays["teacher_pairs"]].exp(), log_q[arrays["pairs"]]
    places = torch.bincount(arrays["example"], minlength=len(arrays["sizes"]))[arrays["example"]]
    token = ((p - q.exp()).abs().sum(-1) / places).sum()
    logarithmic = -((p * q).sum(-1) / places).sum()
    split = zip(log_p.split(arrays["teacher_sizes"].tolist()), log_q.split(arrays["sizes"].tolist()), strict=True)
    sequence = sum((sinkhorn_cost(theirs.exp(), own.exp()) for theirs, own in split), token.new_zeros(()))
    total = token + LOGARITHMIC_WEIGHT * logarithmic + SEQUENCE_WEIGHT * sequence
    return total, {"token": token.detach(), "sequence": sequence.detach()}


def sinkhorn_cost(p: torch.Tensor, q: torch.Tensor) -> torch.Tensor:
    """Return the sum of the plan times its costs between places of the teacher [n, m] and of the student [l, m]."""
    softened = [torch.softmax(side / SINKHORN_TEMPERATURE, -1) for side in (q, p)]
    cost = torch.cdist(*softened, p=1)
    plan = torch.exp(-cost / REGULARISATION)
    for _ in range(ITERATIONS):
        plan = plan / plan.sum(1, keepdim=True)
        plan = plan / plan.sum(0, keepdim=True)
    return (plan * cost).sum()


def _rows_of(batch: "EncodedBatch", examples: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Return the rows of these examples that predict a trained token, and the place of each one's example."""
    rows = target_rows(batch.loss, batch.offsets)
    example = example_of(rows, batch.offsets)
    kept = np.isin(example, examples)
    return rows[kept], np.searchsorted(examples, example[kept])
