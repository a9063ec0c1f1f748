"""Prompts: what a teacher is given of each example of a corpus, and how its answer becomes an example again."""

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

from stages.corpora.cutting import Turn, cut_text, cut_turns
from stages.corpora.examples import example_rows
from stages.tokenization import ByteView


class Prompt(NamedTuple):
    """(role, text) turns that an answer continues: a chat up to an answer, or the start of a plain text.

    `source_id`: the example of the prompts' corpus; `slot`: which of its slots the answer stands for; `starts`: whether
    it begins where its document does.
    """

    source_id: str
    slot: int
    turns: tuple[tuple[str, str], ...]
    starts: bool

    @property
    def plain(self) -> bool:
        """Whether this is the start of a plain text."""
        return self.turns[0][0] == "text"

    @property
    def document_id(self) -> str:
        """The id of the new document."""
        return f"{self.source_id}:{self.slot}"


def prompts_of(row: Mapping[str, Any], prompt_bytes: int) -> list[Prompt]:
    """Return the prompts of an example (a row of EXAMPLES), [] where there is nothing to continue.

    Of a chat, the turns before each answer that is trained on. Of a plain text its first `prompt_bytes` bytes or less,
    cut as corpora are cut, at a newline or before a space; a text that is not longer leaves nothing to continue.
    """
    slots, source, starts = row["slots"], row["example_id"], row["starts_document"]
    if all(slot["role"] == "text" for slot in slots):
        text = "".join(slot["text"] for slot in slots)
        head = cut_text(text, prompt_bytes)[0]
        return [Prompt(source, 1, (("text", head),), starts)] if len(head) < len(text) else []
    turns = tuple((slot["role"], slot["text"]) for slot in slots)
    answers = [i for i, slot in enumerate(slots) if i and slot["role"] == "assistant" and slot["loss"]]
    return [Prompt(source, i, turns[:i], starts) for i in answers]


class Encoded(NamedTuple):
    """Prompts as tokens.

    `ids`: int32 arrays; `exact` bool [B]: the tokens are the prompt's bytes; `prefixed`: the tokenizer's dummy space
    comes before the answer.
    """

    ids: list[np.ndarray]
    exact: np.ndarray
    prefixed: list[bool]


def encode_prompts(view: ByteView, prompts: Sequence[Prompt]) -> Encoded:
    """Return the tokens of prompts; those of a chat end with the header that the template puts before an answer."""
    slots = [
        [{"role": role, "text": text, "loss": False} for role, text in (*p.turns, *(() if p.plain else ANSWER))]
        for p in prompts
    ]
    batch = view.encode_examples(slots)
    ids, prefixed = [], []
    for prompt, start, end in zip(prompts, batch.offsets, batch.offsets[1:], strict=False):
        # Slots of a message: header 1 + 3m, text 2 + 3m, end of turn 3 + 3m.
        before = np.full(end - start, True) if prompt.plain else batch.slot[start:end] <= 1 + 3 * len(prompt.turns)
        ids.append(batch.ids[start:end][before])
        roles = tuple(role for role, _ in prompt.turns)
        prefixed.append(not prompt.plain and view.chat_pieces((*roles, "assistant")).turns[-1].prefixed)
    return Encoded(ids, batch.exact, prefixed)


ANSWER = (("assistant", ""),)


def answer_of(view: ByteView, ids: Sequence[int], endings: frozenset[int], prefixed: bool) -> tuple[str, str]:
    """Return (text, finish reason) of the tokens that a teacher answered with.

    stop: it ended with a token of `endings`. length: it did not end; a character that is cut off is left out. invalid:
    another special token, or bytes that are no UTF-8, which no text can hold; the text is what comes before.
    """
    end = next((place for place, i in enumerate(ids) if i in view.special_ids or i in endings), len(ids))
    reason = "length" if end == len(ids) else "stop" if ids[end] in endings else "invalid"
    content = view.join(ids[:end])
    if prefixed and content.startswith(b" "):
        content = content[1:]
    try:
        return content.decode(), reason
    except UnicodeDecodeError as error:
        cut_off = reason == "length" and error.end == len(content) and error.reason == "unexpected end of data"
        return content[: error.start].decode(), reason if cut_off else "invalid"


def answered_rows(prompt: Prompt, answer: str, ended: bool, max_bytes: int) -> list[dict[str, Any]]:
    """Return prompt and answer as rows of EXAMPLES, cut like any text; only the answer is trained on.

    `ended`: whether the answer has an end of its own, which a student then learns too.
    """
    if prompt.plain:
        examples = _cut_continuation(prompt.turns[0][1], answer, max_bytes)
    else:
        turns: list[Turn] = [(role, text, False) for role, text in prompt.turns]
        examples = cut_turns([*turns, ("assistant", answer, True)], max_bytes)
    return example_rows(prompt.document_id, examples, prompt.starts, ended)


def _cut_continuation(start: str, rest: str, max_bytes: int) -> list[list[Turn]]:
    examples, at = [], 0
    for piece in cut_text(start + rest, max_bytes):
        known = start[at : at + len(piece)]
        parts = ((known, False), (piece[len(known) :], True))
        examples.append([("text", text, loss) for text, loss in parts if text])
        at += len(piece)
    return examples
