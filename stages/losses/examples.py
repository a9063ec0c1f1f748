"""The examples of a micro-batch as losses see them: tokens of both sides, their chunks, and the teacher's signals."""

from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import numpy as np

from stages.alignment.chunks import align
from stages.losses.chunks import scored_chunks

if TYPE_CHECKING:
    from stages.alignment.pair import Pair
    from stages.tokenization.encoding import EncodedBatch


@dataclass
class Examples:
    """The examples of one micro-batch, flat: student tokens, teacher tokens and the teacher's signals for them.

    `teacher` and `pair` are None and `signals` empty when no loss reads a teacher; `signals` maps a column to [Nt] or
    [Nt, k].
    """

    student: "EncodedBatch"
    teacher: "EncodedBatch | None" = None
    signals: dict[str, np.ndarray] = field(default_factory=dict)
    pair: "Pair | None" = None

    def chunks(self, kind: str, scored: bool = True) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Return (chunk of each teacher token, of each student token, example of each chunk), int64.

        Chunk ids run over all examples; -1 is none. If `scored`, only tokens that are training targets have one.
        """
        assert self.teacher is not None
        bias = self.pair.bias if self.pair else None
        teacher, student, counts = align(self.teacher, self.student, kind, bias, scored=scored)
        starts = np.cumsum(counts, dtype=np.int64) - counts
        sides = []
        for chunk, batch in ((teacher, self.teacher), (student, self.student)):
            wide = chunk + np.where(chunk >= 0, np.repeat(starts, np.diff(batch.offsets)), 0)
            sides.append(scored_chunks(wide, batch.loss, batch.offsets) if scored else wide)
        return sides[0], sides[1], np.repeat(np.arange(len(counts)), counts)
