"""Losses, one module per method family; pure functions of token arrays.

A method is one file in this folder and one row in `stages.planning.methods`. The settings of a distillation name
the module, `stages.distill` imports it by that name, and nothing else has to change. A loss module has four
functions; `options` is the loss settings of the experiment with the entry's own keys ("name", "kind", "weight")
on top:

    check(options) -> None
        Raise UserError for a setting this method does not know. Called once, before any model is loaded.
    needs(options) -> Needs
        What it reads of the teacher's signals, and which statistics of the student's head.
    prepare(examples, options) -> Prepared
        NumPy, before the student's forward pass and in a background thread: everything that depends on tokens and
        teacher only. `Prepared.count` is this micro-batch's share of the denominator: it is summed over all
        micro-batches and processes before the first backward pass, so that splitting a batch changes nothing.
    loss(student, arrays, options) -> (sum, {name: sum})
        Torch. `student` maps the statistics named by `needs` to float32 tensors [tokens] (row i predicts token
        i + 1 of the flat micro-batch), and "hidden" to [tokens, hidden size] where asked for; `arrays` is
        `Prepared.arrays` as tensors. Returns the un-normalised loss and diagnostics, normalised like the loss.
"""

from dataclasses import dataclass, field
from typing import Any

import numpy as np


@dataclass(frozen=True)
class Needs:
    """What a loss reads.

    `teacher`: columns of the teacher signals; empty means that no teacher runs and none is aligned.
    `student`: statistics of the student's head: observed_logprob, boundary_logprob, eos_logprob, hidden.
    """

    teacher: frozenset[str] = frozenset()
    student: frozenset[str] = frozenset()


@dataclass(frozen=True)
class Prepared:
    """One micro-batch's constants of one loss.

    `count`: its share of the denominator. `rows`: int64, the student rows whose head statistics the loss reads.
    `arrays`: NumPy arrays that `loss` gets as tensors.
    """

    count: float
    rows: np.ndarray
    arrays: dict[str, Any] = field(default_factory=dict)
