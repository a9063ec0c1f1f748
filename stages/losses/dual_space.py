"""Dual-space distillation: what its variants share (DSKD, arXiv 2406.17328; DSKDv2, arXiv 2504.11426).

Each model's hidden states are projected into the other's space and read by the other's output layer: teacher states
become distributions over the student's tokens (t2s), student states ones over the teacher's (s2t). No model's logits
exist for more than a block of rows. Settings, as in tokenkit: `divergence` and `kd_temp` of `baseline`.
"""

from typing import TYPE_CHECKING, Any, NamedTuple

import torch

from stages.losses.divergences import divergence
from stages.vocabulary.dense import dense_loss

if TYPE_CHECKING:
    from stages.vocabulary.head import Head

DEFAULTS: dict[str, Any] = {"divergence": "srkl", "kd_temp": 2.0}


class Read(NamedTuple):
    """Projected states as the student's output layer reads them: their summed cross entropy, and each likeliest id."""

    cross_entropy: torch.Tensor
    likeliest: torch.Tensor


def read_projected(head: "Head", projected: torch.Tensor, targets: torch.Tensor) -> Read:
    """Return how teacher states projected to [R, d] predict `targets` int64 [R]; the output layer does not learn."""
    likeliest = [targets[:0]]

    def of_rows(logits: torch.Tensor, here: dict[str, torch.Tensor]) -> torch.Tensor:
        likeliest.append(logits.detach().argmax(-1))
        return torch.nn.functional.cross_entropy(logits, here["targets"], reduction="sum")

    bias = None if head.bias is None else head.bias.detach()
    total = dense_loss(of_rows, projected, head.weight.detach(), head.shape, {"targets": targets}, bias)
    return Read(total, torch.cat(likeliest))


def student_space(
    head: "Head", hidden: torch.Tensor, projected: torch.Tensor, options: dict[str, Any], cooling: float = 1.0
) -> torch.Tensor:
    """Return the summed divergence of the student, states [R, d], from the projected teacher [R, d], held fixed."""

    def of_rows(logits: torch.Tensor, here: dict[str, torch.Tensor]) -> torch.Tensor:
        return tempered(options["divergence"], here["teacher"], logits, options, cooling).sum()

    return head.dense(of_rows, hidden, {}, {"teacher": (head, projected)})


def teacher_space(
    head: "Head", projected: torch.Tensor, teacher: torch.Tensor, name: str, options: dict[str, Any]
) -> torch.Tensor:
    """Return the summed divergence `name` of the projected student [R, d] from the teacher, states [R, d]."""

    def of_rows(logits: torch.Tensor, here: dict[str, torch.Tensor]) -> torch.Tensor:
        return tempered(name, here["teacher"], logits, options).sum()

    return head.dense(of_rows, projected, {}, {"teacher": (head, teacher)})


def tempered(
    name: str, teacher: torch.Tensor, student: torch.Tensor, options: dict[str, Any], cooling: float = 1.0
) -> torch.Tensor:
    """Return the divergence of each row of logits [..., V], both over `kd_temp`, the teacher's also over `cooling`."""
    log_p = torch.log_softmax(teacher / (options["kd_temp"] * cooling), -1)
    return divergence(name, log_p, torch.log_softmax(student / options["kd_temp"], -1), options)
