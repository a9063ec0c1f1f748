"""Losses, one module per method family; pure functions of token arrays.

A method is one file in this folder and one row in `stages.planning.methods`. The settings of a distillation name
the module, `stages.distill` imports it by that name, and nothing else has to change. A loss module has four
functions; `options` is the loss settings of the experiment with the entry's own keys ("name", "kind", "weight")
on top:

    check(options) -> None
        Raise UserError for a setting this method does not know. Called once, before any model is loaded.
    needs(options) -> Needs
        What it reads of the teacher, of the two tokenizers and of the student.
    prepare(examples, options) -> Prepared
        NumPy, before the student's forward pass and in a background thread: everything that depends on tokens and
        teacher only. `Prepared.count` is this micro-batch's share of the denominator: it is summed over all
        micro-batches and processes before the first backward pass, so that splitting a batch changes nothing.
    loss(student, arrays, options) -> (sum, {name: sum})
        Torch. `student` maps what `needs` names to tensors (row i predicts token i + 1 of the flat micro-batch);
        its "sides" are the matrices of both models, its "pair" their tokenizers. `arrays` is `Prepared.arrays` as
        tensors. Returns the un-normalised loss and diagnostics, normalised like the loss.

A loss with weights of its own has a fifth:

    projectors(options, sides, generator, pair) -> torch.nn.Module
        Made once and trained with the student; `sides` holds the matrices of the two models, `pair` their tokenizers.
        `loss` finds the module as student["projectors"].
"""

from dataclasses import dataclass, field
from types import ModuleType
from typing import Any

import numpy as np


@dataclass(frozen=True)
class Needs:
    """What a loss reads.

    `teacher`: columns of the teacher signals; empty means that no teacher runs and none is aligned.
    `student`: of these, float32 and by flat token [N] or [N, d]: observed_logprob, boundary_logprob, eos_logprob
    (statistics of the head at `Prepared.rows`), hidden (the state that the head reads), hidden_states [N, L + 1, d]
    (of every layer, the embedding first).
    `pair`: parts of the pair of tokenizers (`stages.alignment.pair.Pair`): mapping (both directions), projection, bias,
    side_path_bias.
    `teacher_head`: whether the teacher's output layer and embedding are at hand, as student["sides"].teacher.
    """

    teacher: frozenset[str] = frozenset()
    student: frozenset[str] = frozenset()
    pair: frozenset[str] = frozenset()
    teacher_head: bool = False


@dataclass(frozen=True)
class Query:
    """Tokens whose log-probabilities a loss reads of the student's distribution, at a temperature.

    `rows` int64 [R]; `candidates` int64 [R, m] asks for these tokens, student["candidate_logprob"] [R, m]; `top_k` for
    the likeliest ones, student["topk_logprob"] and student["topk_ids"] [R, k], likeliest first.
    """

    rows: np.ndarray
    candidates: np.ndarray
    top_k: int = 0
    temperature: float = 1.0


@dataclass(frozen=True)
class Prepared:
    """One micro-batch's constants of one loss.

    `count`: its share of the denominator. `rows`: int64, the student rows whose head statistics the loss reads.
    `arrays`: NumPy arrays that `loss` gets as tensors. `totals` names those of them that it gets summed over the
    whole step, as the count is. `query`: what it asks of the student's distribution.
    """

    count: float
    rows: np.ndarray
    arrays: dict[str, Any] = field(default_factory=dict)
    query: Query | None = None
    totals: tuple[str, ...] = ()


@dataclass(frozen=True)
class Loss:
    """A loss of the run: the module of stages/losses, its settings, its weight and that one's schedule."""

    name: str
    module: ModuleType
    options: dict[str, Any]
    weight: float
    schedule: str = "constant"
