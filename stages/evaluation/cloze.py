"""A multiple-choice task from plain text: which of four passages continues this one?"""

import re
from dataclasses import dataclass

import numpy as np

CHOICES = 4


@dataclass(frozen=True)
class Window:
    """A piece of a document: `context`, and the `continuation` that follows it after one space."""

    document: int
    context: str
    continuation: str


def windows(document: int, text: str, context_bytes: int, continuation_bytes: int) -> list[Window]:
    """Return windows of `text`, cut where a word follows a single space; continuations do not overlap.

    A context has at most `context_bytes` bytes and at least half of that, a continuation about
    `continuation_bytes` (never fewer).
    """
    data = text.encode()
    cuts = [match.start() for match in re.finditer(rb"(?<=\S) (?=\S)", data)]  # places of the spaces
    found: list[Window] = []
    earliest = context_bytes // 2
    for index, cut in enumerate(cuts):
        if cut < earliest:
            continue
        end = next((later for later in cuts[index + 1 :] if later - cut - 1 >= continuation_bytes), None)
        if end is None:
            break
        begin = next((place + 1 for place in cuts if place + 1 >= cut - context_bytes), 0) if cut > context_bytes else 0
        found.append(Window(document, data[begin:cut].decode(), data[cut + 1 : end].decode()))
        earliest = end
    return found


def questions(pool: list[Window], items: int, generator: np.random.Generator) -> list[dict]:
    """Return at most `items` questions {document, context, choices, label}, spread evenly over documents.

    The three false choices are true continuations of other documents, of the most similar length among a random
    sample; no text appears twice in a question.
    """
    chosen = _spread(pool, items, generator)
    result = []
    for window in chosen:
        false = _distractors(window, pool, generator)
        if len(false) < CHOICES - 1:
            continue
        label = int(generator.integers(CHOICES))
        choices = [*false[:label], window.continuation, *false[label:]]
        result.append({"document": window.document, "context": window.context, "choices": choices, "label": label})
    return result


def _spread(pool: list[Window], items: int, generator: np.random.Generator) -> list[Window]:
    """Take windows in rounds, one of each document per round, in random order."""
    by_document: dict[int, list[Window]] = {}
    for index in generator.permutation(len(pool)):
        by_document.setdefault(pool[index].document, []).append(pool[index])
    rounds: list[Window] = []
    while by_document and len(rounds) < items:
        rounds += [entries.pop() for entries in by_document.values()]
        by_document = {document: entries for document, entries in by_document.items() if entries}
    return rounds[:items]


def _distractors(window: Window, pool: list[Window], generator: np.random.Generator) -> list[str]:
    sample = [pool[index] for index in generator.permutation(len(pool))[:64]]
    texts = {other.continuation: None for other in sample if other.document != window.document}
    texts.pop(window.continuation, None)
    wanted = len(window.continuation.encode())
    return sorted(texts, key=lambda text: abs(len(text.encode()) - wanted))[: CHOICES - 1]
