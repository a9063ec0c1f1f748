"""Dual-space distillation with cross-model attention (tokenkit's `baseline_dskd`; DSKD, arXiv 2406.17328).

Attention between the two token sequences of an example stands in for their alignment. A token is described by the
embeddings of itself and of the token after it; the student's description, projected, asks, the teacher's answers. The
attended teacher states must predict the student's next tokens (cross entropy, which trains the projectors), the
student learns from them where they do (`baseline.divergence`), and the other way round the attended student states
must give the teacher's distribution (forward KL).

Where DSKD's code and tokenkit differ, this follows DSKD: attention among trained tokens alone, the student's
embeddings fixed within it, and sums of all three terms over the number of trained student tokens; tokenkit divides
each by its own number, that of rightly predicted tokens among them, which no step can know in advance. Both scale
the teacher by standard deviations over a whole batch; here over each example, so that splitting a batch changes
nothing: DSKD with batches of one. Its total is half this loss, half the student's own cross entropy: losses
[sft, baseline_dskd].

Per example of n and m tokens the attention takes n x m numbers, four times.
"""

from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import nn

from stages.losses import Needs, Prepared, dual_space
from stages.losses.divergences import check_divergence, check_temperature
from stages.losses.dual_space import read_projected, student_space, teacher_space
from stages.losses.projectors import linear
from stages.losses.sft import example_of, target_rows
from stages.signals.schema import to_float32

if TYPE_CHECKING:
    from stages.losses.examples import Examples
    from stages.tokenization.encoding import EncodedBatch
    from stages.vocabulary.head import Side, Sides

DEFAULTS = dual_space.DEFAULTS | {"teacher_temperature": 1.0}


def check(options: dict[str, Any]) -> None:
    """Raise UserError for a divergence that does not exist or a setting out of its range."""
    options = DEFAULTS | options
    check_divergence(options, options["divergence"])
    for key in ("kd_temp", "teacher_temperature"):
        check_temperature(options, key)


def needs(options: dict[str, Any]) -> Needs:
    """Return both models' last states and the teacher's matrices."""
    return Needs(frozenset({"hidden"}), frozenset({"hidden"}), teacher_head=True)


def projectors(options: dict[str, Any], sides: "Sides", generator: torch.Generator, pair: Any) -> nn.Module:
    """Return the query, teacher-to-student and student-to-teacher layers."""
    assert sides.teacher is not None
    return CrossModelAttention(sides.student.head.weight.shape[1], sides.teacher.head.weight.shape[1], generator)


class CrossModelAttention(nn.Module):
    """Attention between the tokens of a student of size d_s and of a teacher of size d_t, in both directions."""

    def __init__(self, student: int, teacher: int, generator: torch.Generator) -> None:
        super().__init__()
        self.query = linear(2 * student, 2 * teacher, generator)
        self.t2s = linear(teacher, student, generator)
        self.s2t = linear(student, teacher, generator)

    def forward(
        self, described: torch.Tensor, hidden: torch.Tensor, keys: torch.Tensor, values: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Return (teacher states for student tokens [n, d_s], student states for teacher tokens [m, d_t]).

        Of one example: `described` [n, 2 d_s], the embeddings of a student token and of the next; `hidden` [n, d_s];
        `keys` [m, 2 d_t] and `values` [m, d_t] as in `keys_and_values`.
        """
        scores = self.query(described) @ keys.T / keys.shape[1] ** 0.5
        return scores.softmax(1) @ self.t2s(values), scores.T.softmax(1) @ self.s2t(hidden)


def deviations(described: torch.Tensor, hidden: torch.Tensor) -> tuple[torch.Tensor, ...]:
    """Return the standard deviations over all numbers of `described` [m, 2 d], `hidden` [m, d] and the next tokens."""
    parts = (described, hidden, described.chunk(2, -1)[1])
    return tuple(part.std().clamp(min=torch.finfo(part.dtype).tiny) for part in parts)


def keys_and_values(
    described: torch.Tensor, hidden: torch.Tensor, scales: tuple[torch.Tensor, ...]
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the teacher's keys [m, 2 d] and values [m, d], scaled by `deviations`: its state plus the next token."""
    return described / scales[0], hidden / scales[1] + described.chunk(2, -1)[1] / scales[2]


def prepare(examples: "Examples", options: dict[str, Any]) -> Prepared:
    """Return the trained rows of both sides, by example; the count is that of the student's."""
    assert examples.teacher is not None
    sides = (examples.student, examples.teacher)
    rows = [target_rows(batch.loss, batch.offsets) for batch in sides]
    example = [example_of(part, batch.offsets) for part, batch in zip(rows, sides, strict=True)]
    sizes = np.stack([np.bincount(part, minlength=len(examples.student.offsets) - 1) for part in example], 1)
    both = (sizes > 0).all(1)
    own, other = (part[both[index]] for part, index in zip(rows, example, strict=True))
    arrays = {
        "rows": own,
        "tokens": _with_next(examples.student, own),
        "teacher_tokens": _with_next(examples.teacher, other),
        "teacher": to_float32(examples.signals["hidden"][other]),
        "sizes": sizes[both],
    }
    return Prepared(float(len(own)), np.zeros(0, np.int64), arrays)


def loss(
    student: dict[str, Any], arrays: dict[str, torch.Tensor], options: dict[str, Any]
) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    """Return the sum of the three terms, each of them, and the number of tokens that the projected teacher predicts."""
    options = DEFAULTS | options
    own, other = student["sides"].student, student["sides"].teacher
    hidden, targets = student["hidden"].index_select(0, arrays["rows"]), arrays["tokens"][:, 1]
    t2s, s2t = _attended(student["projectors"], own, other, hidden, arrays)
    t2s, s2t = t2s.to(hidden.dtype), s2t.to(hidden.dtype)
    read = read_projected(own.head, t2s, targets)
    right = read.likeliest == targets
    terms = {
        "t2s_ce": read.cross_entropy,
        "t2s_kd": student_space(own.head, hidden[right], t2s[right], options, options["teacher_temperature"]),
        "s2t_kd": teacher_space(other.head, s2t, arrays["teacher"], "kl", options),
    }
    total = terms["t2s_ce"] + terms["t2s_kd"] + terms["s2t_kd"]
    return total, {name: term.detach() for name, term in terms.items()} | {"t2s_accuracy": right.sum().float()}


def _with_next(batch: "EncodedBatch", rows: np.ndarray) -> np.ndarray:
    """Return int64 [R, 2]: the token of each row and the one after it."""
    return np.stack([batch.ids[rows], batch.ids[rows + 1]], 1).astype(np.int64)


def _attended(
    attention: CrossModelAttention,
    own: "Side",
    other: "Side",
    hidden: torch.Tensor,
    arrays: dict[str, torch.Tensor],
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return what `attention` gives, example by example, for all rows [R, d_s] of the student and [Rt, d_t]."""
    with torch.no_grad():
        described = own.embed(arrays["tokens"]).flatten(1).float()
        known = other.embed(arrays["teacher_tokens"]).flatten(1).float()
    sizes, teacher_sizes = arrays["sizes"].T.tolist()
    split = (described.split(sizes), hidden.float().split(sizes))
    teacher_split = (known.split(teacher_sizes), arrays["teacher"].split(teacher_sizes))
    pairs = []
    for mine, states, theirs, teacher in zip(*split, *teacher_split, strict=True):
        keys, values = keys_and_values(theirs, teacher, deviations(theirs, teacher))
        pairs.append(attention(mine, states, keys, values))
    if not pairs:
        return hidden.float(), arrays["teacher"]
    t2s, s2t = zip(*pairs, strict=True)
    return torch.cat(t2s), torch.cat(s2t)
