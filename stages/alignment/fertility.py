"""Fertility of two tokenizers, overall and by class of characters, with intervals over documents.

Attribution: a byte belongs to the class of its character. A token counts 1 and spreads evenly over the bytes that it
covers, a word likewise over its own; a token or word of several classes is so counted in each by its share of bytes,
and the classes add up to the corpus exactly. A token that covers no byte (a dummy space on its own) counts at its
neighbour's.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from stages.alignment.characters import CLASSES, byte_classes
from stages.tokenization.encoding import SCALE, SLOTS_PER_MESSAGE, EncodedBatch

LEVEL = 0.95
ALL = "all"
QUANTITIES = ("bytes", "words", "teacher", "student")  # the last two: tokens
_WHITESPACE = CLASSES.index("whitespace")


class Fertility:
    """Sums over documents of QUANTITIES in each class (and ALL, the last), and of their products, for ratios."""

    def __init__(self) -> None:
        classes, quantities = len(CLASSES) + 1, len(QUANTITIES)
        self.sums = np.zeros((classes, quantities))
        self.products = np.zeros((classes, quantities, quantities))
        self.documents = np.zeros(classes, np.int64)  # that have a byte of the class
        self._open = np.zeros((1, len(CLASSES), quantities))  # of the document that the last example belongs to

    def add(
        self,
        slots_per_example: Sequence[Sequence[Mapping[str, Any]]],
        encoded: Sequence[EncodedBatch],
        starts_document: Sequence[bool],
    ) -> None:
        """Add examples in corpus order; `encoded` are they in the teacher's tokens and in the student's."""
        if not slots_per_example:
            return
        examples = quantities_of(slots_per_example, encoded)
        starts = np.array(starts_document, bool)
        if starts[0]:
            self._close(self._open)
        else:
            examples[0] += self._open[0]
        starts[0] = True
        documents = np.add.reduceat(examples, np.flatnonzero(starts), axis=0)
        self._close(documents[:-1])
        self._open = documents[-1:]

    def _close(self, documents: np.ndarray) -> None:
        """Add whole documents, [D, classes, quantities]."""
        documents = np.concatenate([documents, documents.sum(1, keepdims=True)], axis=1)
        self.sums += documents.sum(0)
        self.products += np.einsum("dcq,dcr->cqr", documents, documents)
        self.documents += (documents[:, :, 0] > 0).sum(0)

    def rows(self) -> list[dict[str, Any]]:
        """Return one row (schema FERTILITY) for each class in the text and side, the most bytes first, ALL on top."""
        self._close(self._open)
        self._open = np.zeros_like(self._open)
        names = (*CLASSES, ALL)
        order = sorted(np.flatnonzero(self.sums[:, 0]), key=lambda place: (names[place] != ALL, -self.sums[place, 0]))
        rows = []
        for place in order:
            for side in QUANTITIES[2:]:
                of = QUANTITIES.index
                facts = {"class": names[place], "side": side, "documents": int(self.documents[place])}
                facts |= {"bytes": round(self.sums[place, 0]), "words": float(self.sums[place, 1])}
                facts["tokens"] = float(self.sums[place, of(side)])
                for name, top, bottom in (("bytes_per_token", 0, of(side)), ("tokens_per_word", of(side), 1)):
                    facts |= self._ratio(name, place, top, bottom)
                rows.append(facts)
        return rows

    def _ratio(self, name: str, place: int, top: int, bottom: int) -> dict[str, float | None]:
        sums, products = self.sums[place], self.products[place]
        if sums[bottom] <= 0:
            return dict.fromkeys((name, f"{name}_low", f"{name}_high"))
        squares = (products[top, top], products[top, bottom], products[bottom, bottom])
        value, low, high = ratio_interval(sums[top], sums[bottom], *squares, int(self.documents[place]))
        return {name: value, f"{name}_low": low, f"{name}_high": high}


def ratio_interval(
    y: float, x: float, yy: float, yx: float, xx: float, documents: int
) -> tuple[float, float | None, float | None]:
    """Return (y / x, lower end, upper end) at LEVEL from sums over documents of y, x and their products.

    The ratio estimator: its variance is that of the residuals y - (y / x) x over documents (Cochran, Sampling
    Techniques, 1977, section 6.4), Student's t with documents - 1 degrees. No ends from fewer than two documents.
    """
    ratio = y / x
    if documents < 2:
        return ratio, None, None
    from scipy.special import stdtrit

    residual = max(0.0, yy - 2 * ratio * yx + ratio**2 * xx)
    error = np.sqrt(documents / (documents - 1) * residual) / x
    margin = float(stdtrit(documents - 1, (1 + LEVEL) / 2) * error)
    return ratio, max(0.0, ratio - margin), ratio + margin


def quantities_of(
    slots_per_example: Sequence[Sequence[Mapping[str, Any]]], encoded: Sequence[EncodedBatch]
) -> np.ndarray:
    """Return float [examples, CLASSES, QUANTITIES] of the texts of a batch."""
    texts = [slot["text"] for slots in slots_per_example for slot in slots]
    messages = np.fromiter(map(len, slots_per_example), np.int64)
    sizes = encoded[0].widths // SCALE - 2 - 2 * messages  # the layout of stages.tokenization.encoding
    classes = byte_classes("".join(texts))
    shape = (len(slots_per_example), len(CLASSES), len(QUANTITIES))
    if not len(classes):
        return np.zeros(shape)
    # One place for each byte; bincount adds in the order of the bytes, so that results do not depend on the machine.
    place = np.repeat(np.arange(len(sizes)) * len(CLASSES), sizes) + classes
    text_ends = np.cumsum(np.fromiter((len(text.encode()) for text in texts), np.int64))
    weights = [None, _word_share(classes == _WHITESPACE, text_ends)]
    weights += [_token_share(batch, sizes) for batch in encoded]
    bins = shape[0] * shape[1]
    return np.stack([np.bincount(place, weight, bins) for weight in weights], axis=-1).reshape(shape).astype(float)


def _token_share(batch: EncodedBatch, sizes: np.ndarray) -> np.ndarray:
    """Return float [bytes]: the part of a token that falls on each byte of the batch's texts, laid end to end."""
    text = batch.slot % SLOTS_PER_MESSAGE == 2
    first_byte = np.repeat(np.cumsum(sizes) - sizes, np.diff(batch.offsets))[text]
    message = batch.slot[text] // SLOTS_PER_MESSAGE
    # The byte that a token closes. A text's base is 2 units a message after the bytes before it; a token without width
    # ends a little beside a unit, so that this falls on its neighbour's byte.
    closed = (batch.ends[text] - 1) // SCALE - 2 - 2 * message + first_byte
    tokens = np.bincount(closed, minlength=int(sizes.sum()))
    ends = np.flatnonzero(tokens)
    share = np.zeros(len(tokens))
    covered = ends[-1] + 1 if len(ends) else 0  # less than all where a text became no token at all
    share[:covered] = _spread(ends, tokens[ends])
    return share


def _word_share(is_space: np.ndarray, text_ends: np.ndarray) -> np.ndarray:
    """Return float [bytes]: the part of a word (of `str.split` on each text) that falls on each byte."""
    ends = np.append(is_space[1:] != is_space[:-1], True)
    ends[text_ends - 1] = True
    ends = np.flatnonzero(ends)
    return _spread(ends, ~is_space[ends])


def _spread(ends: np.ndarray, values: np.ndarray) -> np.ndarray:
    """Return each run's value divided evenly among its bytes; runs touch, `ends` are their last bytes."""
    lengths = np.diff(ends, prepend=-1)
    return np.repeat(values / lengths, lengths)
