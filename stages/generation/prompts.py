"""Prompts: what a teacher is given of each example of a corpus, and how its answer becomes an example again."""

import re
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

from stages.corpora.cutting import Turn, cut_text, cut_turns
from stages.corpora.examples import example_rows
from stages.tokenization import ByteView
from stages.tokenization.chat import CONTENT, SLOTS_PER_MESSAGE


class Prompt(NamedTuple):
    """Turns, as documents have them, that an answer continues: a chat up to an answer, or the start of a plain text.

    `source_id`: the example of the prompts' corpus; `slot`: which of its slots the answer stands for; `starts`: whether
    it begins where its document does.
    """

    source_id: str
    slot: int
    turns: tuple[tuple[str, ...], ...]
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
    turns = tuple((slot["role"], slot["text"], *filter(None, [slot.get("fields")])) for slot in slots)
    answers = [i for i, slot in enumerate(slots) if i and slot["role"] == "assistant" and slot["loss"]]
    return [Prompt(source, i, turns[:i], starts) for i in answers]


class Encoded(NamedTuple):
    """Prompts as tokens.

    `ids`: int32 arrays; `exact` bool [B]: the tokens are the prompt's bytes; `prefixed`: a space of the template, or
    the tokenizer's dummy space, comes before the answer; `opened`: the start of the answer that the prompt has already
    ("<think>\n").
    """

    ids: list[np.ndarray]
    exact: np.ndarray
    prefixed: list[bool]
    opened: list[str]


_OPENED = re.compile(r"<(\w+)>\s*\Z")


def encode_prompts(view: ByteView, prompts: Sequence[Prompt], enable_thinking: bool | None = None) -> Encoded:
    """Return the tokens of prompts; those of a chat end with what the template adds to make the assistant answer.

    `enable_thinking` is the template's variable of this name, None for the template's own default.
    """
    slots = [_slots(prompt.turns) for prompt in prompts]
    options = {} if enable_thinking is None else {"enable_thinking": enable_thinking}
    batch = view.encode_prompts(slots, **options)
    answered = view.encode_examples(
        [turns if p.plain else [*turns, *ANSWER] for p, turns in zip(prompts, slots, strict=True)]
    )
    ids, prefixed, opened = [], [], []
    for number, prompt in enumerate(prompts):
        own = slice(batch.offsets[number], batch.offsets[number + 1])
        ids.append(batch.ids[own])
        last = SLOTS_PER_MESSAGE * len(prompt.turns)
        added = "".join(view.string_of(i) for i in batch.ids[own][batch.slot[own] > last])
        match = None if prompt.plain else _OPENED.search(added)
        opened.append(match[0] if match else "")
        own = slice(answered.offsets[number], answered.offsets[number + 1])
        text = view.join(answered.ids[own][answered.slot[own] == last + CONTENT])
        prefixed.append(not prompt.plain and text.startswith(b" "))
    return Encoded(ids, batch.exact, prefixed, opened)


ANSWER = ({"role": "assistant", "text": "x", "loss": False},)


def _slots(turns: Sequence[tuple[str, ...]]) -> list[dict[str, Any]]:
    return [dict(zip(("role", "text", "fields"), turn, strict=False), loss=False) for turn in turns]


def stopping_ids(view: ByteView, endings: frozenset[int]) -> frozenset[int]:
    """Return the tokens with which an answer stops: `endings`, and special tokens that its text cannot hold."""
    return endings | (view.special_ids - view.chats.readable)


def answer_of(view: ByteView, ids: Sequence[int], endings: frozenset[int], prefixed: bool) -> tuple[str, str]:
    """Return (text, finish reason) of the tokens that a teacher answered with.

    stop: it ended with a token of `endings`. length: it did not end; a character that is cut off is left out. invalid:
    another special token, or bytes that are no UTF-8, which no text can hold; the text is what comes before.
    """
    stopping = stopping_ids(view, endings)
    end = next((place for place, i in enumerate(ids) if i in stopping), len(ids))
    reason = "length" if end == len(ids) else "stop" if ids[end] in endings else "invalid"
    special = view.chats.readable.intersection(ids[:end])
    content = b"".join(view.string_of(i).encode() if i in special else view.join([i]) for i in ids[:end])
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
        turns: list[Turn] = [(role, text, False, *fields) for role, text, *fields in prompt.turns]
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
