"""Two tokenizers as losses see them: which tokens stand for which, and where chunks may not end."""

from dataclasses import dataclass

import numpy as np

from stages.alignment.chunks import BiasTable
from stages.tokenization.view import ByteView


@dataclass(frozen=True)
class Matches:
    """For each id of one vocabulary the id of the other that stands for it, int64 [V], -1 for none.

    `exact`: with the same bytes, or the same role of a special token; `prefix`: the longest token that its bytes
    begin with; `nearest`: the least edit distance, exact matches among them; `reliable` bool [V]: whether that is near
    enough.
    """

    exact: np.ndarray
    prefix: np.ndarray
    nearest: np.ndarray
    reliable: np.ndarray


@dataclass(frozen=True, eq=False)  # by identity, so that what is made of it can be cached
class Projection:
    """X-Token's sparse projection (arXiv 2605.21699): the teacher's tokens for each of the student's, with weights.

    `ids` int64 [V student, pieces], `weights` float32 alike; places that are not used have weight 0.
    """

    ids: np.ndarray
    weights: np.ndarray


@dataclass(frozen=True)
class Pair:
    """The tokenizers of a distillation and what was mined of them; None where no loss asks for it.

    `to_teacher` by student id, `to_student` by teacher id. `bias` and `side_path_bias` are of two thresholds.
    """

    teacher: ByteView
    student: ByteView
    to_teacher: Matches | None = None
    to_student: Matches | None = None
    projection: Projection | None = None
    bias: BiasTable | None = None
    side_path_bias: BiasTable | None = None
