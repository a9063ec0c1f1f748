"""Supervised fine-tuning: next-token cross entropy over the tokens that are trained on. tokenkit's `sft`, `clm`."""

from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from stages.losses import Needs, Prepared

if TYPE_CHECKING:
    from stages.losses.examples import Examples


def check(options: dict[str, Any]) -> None:
    """Accept any settings: this loss has none."""


def needs(options: dict[str, Any]) -> Needs:
    """Return the student's log-probability of the observed token; no teacher."""
    return Needs(student=frozenset({"observed_logprob"}))


def prepare(examples: "Examples", options: dict[str, Any]) -> Prepared:
    """Return the rows that predict a trained token; the count is their number."""
    rows = target_rows(examples.student.loss, examples.student.offsets)
    return Prepared(float(len(rows)), rows, {"rows": rows})


def loss(
    student: dict[str, torch.Tensor], arrays: dict[str, torch.Tensor], options: dict[str, Any]
) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    """Return the summed cross entropy in nats."""
    return -student["observed_logprob"][arrays["rows"]].sum(), {}


def target_rows(trained: np.ndarray, offsets: np.ndarray) -> np.ndarray:
    """Return the flat rows (int64) that predict a trained token.

    `trained` bool[N] marks target tokens, `offsets` int64[B+1] the examples. The first token of an example has no
    row that predicts it.
    """
    scored = trained.copy()
    scored[offsets[:-1][offsets[:-1] < offsets[1:]]] = False
    return np.flatnonzero(scored) - 1


def example_of(rows: np.ndarray, offsets: np.ndarray) -> np.ndarray:
    """Return the example (int64) that each flat row lies in; `offsets` int64[B+1]."""
    return np.searchsorted(offsets, rows, side="right") - 1
