"""Which examples a step sees, as packed token arrays with everything that losses read of them."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, NamedTuple

import numpy as np
import pyarrow as pa

from stages.core.errors import UserError
from stages.core.seeds import seed_of
from stages.losses import Prepared
from stages.losses.examples import Examples
from stages.signals.reader import Signals
from stages.tokenization.batches import length_batches, select, token_places

if TYPE_CHECKING:
    from stages.alignment.pair import Pair
    from stages.tokenization import ByteView

Prepare = Callable[[Examples], list[Prepared]]


@dataclass
class MicroBatch:
    """One forward pass: token ids [rows, length] with the place of each flat token, and what each loss prepared.

    `positions` is None when every row holds one example. `index` int64 [N]: place of each flat token in the rows.
    `weight` is 0 for a pass that only keeps processes in step.
    """

    examples: Examples
    input_ids: np.ndarray
    positions: np.ndarray | None
    index: np.ndarray
    prepared: list[Prepared] = field(default_factory=list)
    weight: float = 1.0


class Step(NamedTuple):
    """The micro-batches of one optimizer step on one process, and how many examples were left out as inexact."""

    micro_batches: list[MicroBatch]
    skipped: int


def generator(seed: int, *names: object) -> np.random.Generator:
    """Return the random generator of this name: the same for the same seed and names, whatever else was drawn."""
    return np.random.Generator(np.random.Philox(seed_of(seed, *names)))


def step_examples(step: int, batch_size: int, count: int, seed: int) -> np.ndarray:
    """Return int64 [batch_size]: the examples of optimizer step `step` (from 0), by a permutation for each epoch."""
    positions = np.arange(step * batch_size, (step + 1) * batch_size)
    epochs = {epoch: generator(seed, "data order", epoch).permutation(count) for epoch in set(positions // count)}
    return np.array([epochs[position // count][position % count] for position in positions], np.int64)


class Collator:
    """Turns a step number into micro-batches: encode, read signals, align, prepare, pack. No torch, no state.

    `pair` holds the teacher's tokenizer, None when no loss reads a teacher. `prepare` is None when signals come from an
    online teacher; the trainer then prepares after asking it. `packs`: whether a row may hold several
    examples.
    """

    def __init__(
        self,
        table: pa.Table,
        student: "ByteView",
        pair: "Pair | None",
        signals: Signals | None,
        prepare: Prepare | None,
        *,
        batch_size: int,
        max_tokens: int,
        seed: int,
        packs: bool = True,
        rank: int = 0,
        ranks: int = 1,
    ) -> None:
        self.table, self.student, self.pair, self.signals, self.prepare = table, student, pair, signals, prepare
        self.batch_size, self.max_tokens, self.seed, self.packs = batch_size, max_tokens, seed, packs
        self.rank, self.ranks = rank, ranks
        if batch_size < ranks:
            raise UserError(
                f"batch_size is {batch_size} but there are {ranks} processes: each needs an example per step."
            )
        if not len(table):
            raise UserError("The corpus has no training examples: give it more text or a smaller heldout share.")

    def __call__(self, step: int) -> Step:
        """Return the micro-batches of this process for optimizer step `step`, counted from 0."""
        chosen = step_examples(step, self.batch_size, len(self.table), self.seed)[self.rank :: self.ranks]
        whole, keep = self.encode(chosen)
        wanted = np.flatnonzero(keep)
        lengths = np.diff(whole.student.offsets)
        wanted = wanted[lengths[wanted] > 0]
        weight = 1.0
        if not len(wanted):
            wanted, weight = np.array([int(np.argmax(lengths))]), 0.0
        micro = [
            replace(self.pack(whole, rows, wanted), weight=weight)
            for rows in (pack_rows if self.packs else single_rows)(lengths[wanted], self.max_tokens)
        ]
        if self.prepare:
            for batch in micro:
                batch.prepared = self.prepare(batch.examples)
        return Step(micro, len(chosen) - int(keep.sum()))

    def encode(self, chosen: np.ndarray) -> tuple[Examples, np.ndarray]:
        """Return the examples `chosen`, and bool [B]: those whose bytes both tokenizers reproduce."""
        rows = self.table.take(chosen)
        slots, ends = rows["slots"].to_pylist(), rows["ends_document"].to_pylist()
        student = self.student.encode_examples(slots, ends)
        if self.pair is None:
            return Examples(student), student.exact
        view = self.pair.teacher
        same = view.digest == self.student.digest
        teacher = student if same else view.encode_examples(slots, ends)
        if self.signals is None:
            return Examples(student, teacher), student.exact & teacher.exact
        signals = self.signals.gather(chosen)
        if not np.array_equal(signals.pop("input_ids").astype(np.int64), teacher.ids.astype(np.int64)):
            raise UserError(
                f"The teacher signals hold other tokens than tokenizer {view.name!r} gives for the examples "
                f"{', '.join(rows['example_id'].to_pylist()[:3])}...: rebuild the signals."
            )
        return Examples(student, teacher, signals), student.exact & teacher.exact & signals.pop("exact")

    def pack(self, whole: Examples, rows: list[list[int]], wanted: np.ndarray) -> MicroBatch:
        """Return the micro-batch of `rows`, each a list of places in `wanted`, the examples of `whole` in use."""
        order = np.array([wanted[place] for row in rows for place in row])
        student = select(whole.student, order)
        lengths = np.diff(student.offsets)
        per_row = np.array([len(row) for row in rows])
        row_of = np.repeat(np.arange(len(rows)), per_row)
        row_lengths = np.bincount(row_of, weights=lengths, minlength=len(rows)).astype(np.int64)
        width = int(row_lengths.max())
        within = np.arange(width)[None, :] < row_lengths[:, None]
        input_ids = np.zeros(within.shape, np.int64)
        input_ids[within] = student.ids
        positions = None
        if per_row.max() > 1:
            positions = np.zeros(within.shape, np.int64)
            positions[within] = np.arange(len(student.ids)) - np.repeat(student.offsets[:-1], lengths)
        teacher = None if whole.teacher is None else select(whole.teacher, order)
        examples = Examples(student, teacher, pair=self.pair)
        if whole.teacher is not None and whole.signals:
            places = token_places(whole.teacher.offsets, order)
            examples.signals = {name: values[places] for name, values in whole.signals.items()}
        return MicroBatch(examples, input_ids, positions, np.flatnonzero(within))


def pack_rows(lengths: Sequence[int] | np.ndarray, max_tokens: int) -> list[list[list[int]]]:
    """Return micro-batches, each a list of rows, each a list of example places; first fit, longest first.

    A row is at most as long as the longest example, a micro-batch at most `max_tokens` with its padding; an example
    longer than that gets one of its own.
    """
    lengths = np.asarray(lengths)
    width = int(lengths.max())
    rows: list[list[int]] = []
    space: list[int] = []
    for place in np.argsort(-lengths, kind="stable").tolist():
        length = int(lengths[place])
        row = next((row for row, left in enumerate(space) if left >= length), None)
        if row is None:
            rows.append([])
            space.append(width)
            row = len(rows) - 1
        rows[row].append(place)
        space[row] -= length
    per_batch = max(1, max_tokens // width)
    return [rows[start : start + per_batch] for start in range(0, len(rows), per_batch)]


def single_rows(lengths: Sequence[int] | np.ndarray, max_tokens: int) -> list[list[list[int]]]:
    """Return micro-batches as `pack_rows` does, with one example in each row, examples of like length together."""
    batches = length_batches(np.asarray(lengths), max_tokens)
    return [[[place] for place in batch.tolist()] for batch in batches]
