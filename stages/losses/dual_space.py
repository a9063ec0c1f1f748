"""Dual-space distillation: what its variants share (DSKD, arXiv 2406.17328; DSKDv2, arXiv 2504.11426).

Each model's hidden states are projected into the other's space and read by the other's output layer: teacher states
become distributions over the student's tokens (t2s), student states ones over the teacher's (s2t). No model's logits
exist for more than a block of rows. Settings, as in tokenkit: `divergence` and `kd_temp` of `baseline`.
"""

from typing import TYPE_CHECKING, Any, NamedTuple

import torch

from stages.losses.divergences import divergence
from stages.training.distribution import head_distribution

if TYPE_CHECKING:
    from stages.training.models import Head

DEFAULTS: dict[str, Any] = {"divergence": "srkl", "kd_temp": 2.0}


class Read(NamedTuple):
    """Projected states as the student's output layer reads them: log-probability of a target, and the likeliest id."""

    logprob: torch.Tensor
    likeliest: torch.Tensor


def read_projected(head: "Head", projected: torch.Tensor, targets: torch.Tensor) -> Read:
    """Return, for teacher states projected to [R, d], what `targets` int64 [R] get; the output layer does not learn."""
    bias = None if head.bias is None else head.bias.detach()
    found = head_distribution(projected, head.weight.detach(), targets[:, None], 1, head.shape, bias)
    return Read(found.candidates[:, 0], found.top_ids[:, 0])


def student_space(
    head: "Head", hidden: torch.Tensor, projected: torch.Tensor, options: dict[str, Any], cooling: float = 1.0
) -> torch.Tensor:
    """Return the summed divergence of the student, states [R, d], from the projected teacher [R, d], held fixed."""

    def of_rows(logits: torch.Tensor, constants: dict[str, torch.Tensor]) -> torch.Tensor:
        with torch.no_grad():
            teacher = head.logits(constants["projected"])
        return tempered(options["divergence"], teacher, logits, options, cooling).sum()

    return head.dense(of_rows, hidden, {"projected": projected.detach()})


def teacher_space(
    head: "Head", projected: torch.Tensor, teacher: torch.Tensor, name: str, options: dict[str, Any]
) -> torch.Tensor:
    """Return the summed divergence `name` of the projected student [R, d] from the teacher, states [R, d]."""

    def of_rows(logits: torch.Tensor, constants: dict[str, torch.Tensor]) -> torch.Tensor:
        return tempered(name, head.logits(constants["teacher"]), logits, options).sum()

    return head.dense(of_rows, projected, {"teacher": teacher})


def tempered(
    name: str, teacher: torch.Tensor, student: torch.Tensor, options: dict[str, Any], cooling: float = 1.0
) -> torch.Tensor:
    """Return the divergence of each row of logits [..., V], both over `kd_temp`, the teacher's also over `cooling`."""
    log_p = torch.log_softmax(teacher / (options["kd_temp"] * cooling), -1)
    return divergence(name, log_p, torch.log_softmax(student / options["kd_temp"], -1), options)
