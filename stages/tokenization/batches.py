"""What is done with many examples: encode them, choose some, group them by length, refuse what tokens cannot say."""

import logging
from collections.abc import Iterator, Sequence
from dataclasses import replace

import numpy as np
import pyarrow as pa

from stages.core.errors import UserError
from stages.tokenization.encoding import EncodedBatch
from stages.tokenization.view import ByteView

INEXACT_LIMIT = 0.01
LOG = logging.getLogger(__name__)


def encode_rows(view: ByteView, rows: pa.Table) -> EncodedBatch:
    """Return the tokens of rows of a corpus (schema EXAMPLES)."""
    return view.encode_examples(rows["slots"].to_pylist(), rows["ends_document"].to_pylist())


def token_places(offsets: np.ndarray, examples: np.ndarray) -> np.ndarray:
    """Return int64: the flat places of the tokens of `examples`, in their order."""
    if not len(examples):
        return np.zeros(0, np.int64)
    return np.concatenate([np.arange(offsets[e], offsets[e + 1]) for e in examples])


def select(batch: EncodedBatch, examples: np.ndarray) -> EncodedBatch:
    """Return a batch of some examples of `batch`, in the order given."""
    places = token_places(batch.offsets, examples)
    lengths = np.diff(batch.offsets)[examples]
    tokens = {name: getattr(batch, name)[places] for name in ("ids", "ends", "slot", "loss", "first")}
    per_example = {name: getattr(batch, name)[examples] for name in ("exact", "widths")}
    return replace(batch, offsets=np.concatenate([[0], np.cumsum(lengths)]), **tokens, **per_example)


def length_batches(lengths: np.ndarray, batch_tokens: int) -> Iterator[np.ndarray]:
    """Yield index arrays of examples of like length, longest first, empty ones left out.

    Each is at most `batch_tokens` tokens when padded, or a single example.
    """
    order = np.argsort(-lengths, kind="stable")
    order = order[lengths[order] > 0]
    start = 0
    while start < len(order):
        count = max(1, batch_tokens // int(lengths[order[start]]))
        yield order[start : start + count]
        start += count


def refuse_inexact(exact: np.ndarray, example_ids: Sequence[str], tokenizer: str) -> None:
    """Refuse text of which more than 1 % of the examples cannot be written in the tokenizer's tokens."""
    inexact = int((~exact).sum())
    if inexact > INEXACT_LIMIT * len(exact):
        raise UserError(
            f"Tokenizer {tokenizer!r} does not reproduce the text of {inexact} of {len(exact)} examples, "
            f"{example_ids[int(np.argmin(exact))]} first: take a tokenizer with byte fallback, or leave such text out "
            "(and chats that its template refuses)."
        )


def warn_untrained(view: ByteView, rows: pa.Table) -> None:
    """Say how many turns of a corpus's rows are not trained on, since the chat template leaves a part of them out."""
    turns, first = 0, ""
    for name, slots in zip(rows["example_id"].to_pylist(), rows["slots"].to_pylist(), strict=True):
        count = view.untrained(slots)
        turns, first = turns + count, first or (name if count else "")
    if turns:
        LOG.warning(
            "%d turns in the first %d examples are not trained on, the first in %s: the chat template of tokenizer %s "
            "leaves a part of them out (reasoning, tool calls).", turns, len(rows), first, view.name,
        )  # fmt: skip
