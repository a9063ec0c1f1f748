"""Dual-space distillation over exactly aligned tokens (DSKDv2 with ETA, arXiv 2504.11426).

Where both sides have one and the same token with the same bytes before it, the states that predict it are compared.
The map from the teacher's space to the student's is trained from a start in closed form, W_T pinv(W_S) over the
tokens that both vocabularies have: projected states then give the shared tokens the teacher's logits, as nearly as
the student's output layer can. The map back, W_S pinv(W_T), has no weights and follows the student's output layer,
whose own gradient does not pass through it. The teacher's likeliest token, as the student's token of the same bytes,
is the label of the projected states; rows where it has none are left out. The student learns from the projected
states where they agree with that label.

The reference divides the student's term by the number of rows that agree, which no step can know in advance; here
all terms are divided by the number of aligned rows. Its `t2s_agreement`, from which on all rows count, stays at its
default, 1: never. Beside the teacher's matrices, a float32 copy of the size of its output layer is held.
"""

from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import nn

from stages.core.errors import UserError
from stages.losses import Needs, Prepared
from stages.losses.divergences import check_divergence, check_temperature
from stages.losses.dual_space import DEFAULTS, read_projected, student_space, teacher_space
from stages.signals.schema import to_float32

if TYPE_CHECKING:
    from stages.alignment.pair import Pair
    from stages.losses.examples import Examples
    from stages.vocabulary.head import Head, Sides

BLOCK = 4096  # tokens of a vocabulary that are in float64 at a time


def check(options: dict[str, Any]) -> None:
    """Raise UserError for a divergence that does not exist or a setting out of its range."""
    options = DEFAULTS | options
    check_divergence(options, options["divergence"])
    check_temperature(options, "kd_temp")


def needs(options: dict[str, Any]) -> Needs:
    """Return both models' last states, the teacher's likeliest token and matrices, and which tokens are the same."""
    teacher = frozenset({"hidden", "topk_ids"})
    return Needs(teacher, frozenset({"hidden"}), pair=frozenset({"mapping"}), teacher_head=True)


def projectors(options: dict[str, Any], sides: "Sides", generator: torch.Generator, pair: "Pair") -> nn.Module:
    """Return the maps between the spaces; UserError when the tokenizers have no token in common."""
    assert sides.teacher is not None and pair.to_teacher is not None
    exact = torch.from_numpy(pair.to_teacher.exact)
    ids = torch.nonzero(exact >= 0)[:, 0]
    if not len(ids):
        raise UserError(
            f"dskd_eta maps between models by the tokens they share, but tokenizers {pair.teacher.name!r} and "
            f"{pair.student.name!r} share none: take baseline_dskd."
        )
    return ClosedForm(sides.student.head, sides.teacher.head, ids, exact[ids])


class ClosedForm(nn.Module):
    """The trained map `t2s` and the one that follows the student's output layer, `to_teacher`."""

    @torch.no_grad()
    def __init__(self, student: "Head", teacher: "Head", student_ids: torch.Tensor, teacher_ids: torch.Tensor) -> None:
        super().__init__()
        self.student_ids = student_ids
        known = shared_rows(teacher, teacher_ids)
        start = closed_form(known, pseudo_inverse(shared_rows(student, student_ids).to(known.device)))
        self.t2s = nn.Linear(*start.shape, bias=False)
        self.t2s.weight.copy_(start.T)
        # No buffer: data parallelism would send it to all processes at every step.
        self.inverse = pseudo_inverse(known)

    @torch.no_grad()
    def to_teacher(self, student: "Head") -> torch.Tensor:
        """Return the map [d_s, d_t] for the output layer as it is."""
        rows = shared_rows(student, self.student_ids)
        return closed_form(rows, self.inverse.to(rows.device))


def shared_rows(head: "Head", ids: torch.Tensor) -> torch.Tensor:
    """Return float32 [O, d]: what a state is multiplied by for the logits of `ids`, before any cap."""
    return head.weight.detach()[ids.to(head.weight.device)].float() * head.shape.scale


def pseudo_inverse(rows: torch.Tensor) -> torch.Tensor:
    """Return float32 [O, d], the transposed pseudo-inverse of `rows` [O, d]: rows^T @ it is 1 on the rows' span.

    By way of rows^T rows, [d, d], in float64: singular values below about 1e-6 of the largest count as 0.
    """
    blocks = rows.split(BLOCK)
    gram = sum(block.double().T @ block.double() for block in blocks)
    inverse = torch.linalg.pinv(gram, hermitian=True)
    return torch.cat([(block.double() @ inverse).float() for block in blocks])


def closed_form(source: torch.Tensor, inverse: torch.Tensor) -> torch.Tensor:
    """Return the map [d_a, d_b] that keeps logits: (h @ map) @ target^T is h @ source^T as nearly as can be.

    `source` [O, d_a]; `inverse` [O, d_b] is the `pseudo_inverse` of the target's rows.
    """
    return source.T @ inverse


def prepare(examples: "Examples", options: dict[str, Any]) -> Prepared:
    """Return the rows before the tokens that are aligned one to one, with the label of each; the count is theirs."""
    assert examples.pair is not None and examples.pair.to_student is not None
    rows, teacher_rows = aligned_rows(*examples.chunks("unconstrained"))
    label = examples.pair.to_student.exact[examples.signals["topk_ids"][teacher_rows, 0].astype(np.int64)]
    known = label >= 0
    arrays = {
        "rows": rows[known],
        "label": label[known],
        "teacher": to_float32(examples.signals["hidden"][teacher_rows[known]]),
    }
    return Prepared(float(known.sum()), np.zeros(0, np.int64), arrays)


def aligned_rows(teacher: np.ndarray, student: np.ndarray, example: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Return int64 rows (student's, teacher's) that predict a token which is a chunk of its own on both sides.

    Arguments as `Examples.chunks` gives them, shortest chunks; such a pair of tokens covers the same bytes.
    """
    number = len(example)
    single = np.ones(number, bool)
    for chunk in (teacher, student):
        single &= np.bincount(chunk[chunk >= 0], minlength=number) == 1
    places = [np.flatnonzero((chunk >= 0) & np.append(single, False)[chunk]) for chunk in (student, teacher)]
    return places[0] - 1, places[1] - 1


def loss(
    student: dict[str, Any], arrays: dict[str, torch.Tensor], options: dict[str, Any]
) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    """Return the sum of the three terms, each of them, and the number of rows that agree with their label."""
    options = DEFAULTS | options
    own, other, maps = student["sides"].student.head, student["sides"].teacher.head, student["projectors"]
    hidden, label = student["hidden"].index_select(0, arrays["rows"]), arrays["label"]
    t2s = maps.t2s(arrays["teacher"]).to(hidden.dtype)
    read = read_projected(own, t2s, label)
    agree = read.likeliest == label
    s2t = (hidden.float() @ maps.to_teacher(own)).to(hidden.dtype)
    terms = {
        "t2s_ce": read.cross_entropy,
        "t2s_kd": student_space(own, hidden[agree], t2s[agree], options),
        "s2t_kd": teacher_space(other, s2t, arrays["teacher"], options["divergence"], options),
    }
    total = terms["t2s_ce"] + terms["t2s_kd"] + terms["s2t_kd"]
    return total, {name: term.detach() for name, term in terms.items()} | {"t2s_agreement": agree.sum().float()}
