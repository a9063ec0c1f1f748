"""Prompts: what a teacher is given of each example of a corpus, and how its answer becomes an example again."""

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

from stages.corpora.cutting import Turn, cut_text, cut_turns
from stages.corpora.examples import example_rows
from stages.tokenization import ByteView


class Prompt(NamedTuple):
    """What an answer continues: the turns of a chat up to it, or the start of a plain text.

    `source_id`: the example of the prompts' corpus; `slot`: which of its slots the answer stands for; `starts`: whether
    it begins where its document does.
    """

    source_id: str
    slot: int
    turns: tuple[Turn, ...]
    starts: bool

    @property
    def plain(self) -> bool:
        """Whether this is the start of a plain text."""
        return self.turns[0].role == "text"

    @property
    def document_id(self) -> str:
        """The id of the new document."""
        return f"{self.source_id}:{self.slot}"

    @property
    def slots(self) -> list[dict[str, Any]]:
        """The turns as slots of a row of EXAMPLES."""
        return [turn._asdict() for turn in self.turns]


def prompts_of(row: Mapping[str, Any], prompt_bytes: int) -> list[Prompt]:
    """Return the prompts of an example (a row of EXAMPLES), [] where there is nothing to continue.

    Of a chat, the turns before each answer that is trained on. Of a plain text its first `prompt_bytes` bytes or less,
    cut as corpora are cut, at a newline or before a space; a text that is not longer leaves nothing to continue.
    """
    slots, source, starts = row["slots"], row["example_id"], row["starts_document"]
    if all(slot["role"] == "text" for slot in slots):
        text = "".join(slot["text"] for slot in slots)
        head = cut_text(text, prompt_bytes)[0]
        return [Prompt(source, 1, (Turn("text", head, False),), starts)] if len(head) < len(text) else []
    turns = tuple(Turn(slot["role"], slot["text"], False, slot.get("extra") or "") for slot in slots)
    answers = [i for i, slot in enumerate(slots) if i and slot["role"] == "assistant" and slot["loss"]]
    return [Prompt(source, i, turns[:i], starts) for i in answers]


class Encoded(NamedTuple):
    """Prompts as tokens.

    `ids`: int32 arrays; `exact` bool [B]: the tokens are the prompt's bytes; `leads`: for each, (what of the template
    comes before the text of the answer but is the model's to write, what of the answer the prompt already holds).
    """

    ids: list[np.ndarray]
    exact: np.ndarray
    leads: list[tuple[str, str]]


def encode_prompts(view: ByteView, prompts: Sequence[Prompt], thinking: bool | None = None) -> Encoded:
    """Return the tokens of prompts; those of a chat end with what the template adds to make the assistant answer.

    `thinking`: the template's variable enable_thinking, None leaves it undefined.
    """
    batches = (
        view.encode_examples([p.slots for p in prompts if p.plain]),
        view.encode_prompts([p.slots for p in prompts if not p.plain], thinking),
    )
    ids, exact, leads, at = [], np.ones(len(prompts), bool), [], [0, 0]
    for place, prompt in enumerate(prompts):
        chat = not prompt.plain
        batch, number = batches[chat], at[chat]
        ids.append(batch.ids[batch.offsets[number] : batch.offsets[number + 1]])
        exact[place] = batch.exact[number]
        leads.append(view.leads(prompt.slots, thinking) if chat else ("", ""))
        at[chat] += 1
    return Encoded(ids, exact, leads)


def stopping_ids(view: ByteView, endings: frozenset[int]) -> frozenset[int]:
    """Return the tokens with which an answer stops: `endings`, and special tokens that its text cannot hold."""
    return endings | (view.special_ids - view.chats.readable)


def answer_of(view: ByteView, ids: Sequence[int], endings: frozenset[int], leads: tuple[str, str]) -> tuple[str, str]:
    """Return (text, finish reason) of the tokens that a teacher answered with; `leads` as in `Encoded`.

    stop: it ended with a token of `endings`. length: it did not end; a character that is cut off is left out. invalid:
    another special token, or bytes that are no UTF-8, which no text can hold; the text is what comes before.
    """
    stopping = stopping_ids(view, endings)
    end = next((place for place, i in enumerate(ids) if i in stopping), len(ids))
    reason = "length" if end == len(ids) else "stop" if ids[end] in endings else "invalid"
    content = b"".join(view.string_of(i).encode() if i in view.special_ids else view.join([i]) for i in ids[:end])
    try:
        text = content.decode()
    except UnicodeDecodeError as error:
        cut_off = reason == "length" and error.end == len(content) and error.reason == "unexpected end of data"
        text, reason = content[: error.start].decode(), reason if cut_off else "invalid"
    written, given = leads
    return (given + text.removeprefix(written) if text else ""), reason


def answered_rows(prompt: Prompt, answer: str, ended: bool, max_bytes: int) -> list[dict[str, Any]]:
    """Return prompt and answer as rows of EXAMPLES, cut like any text; only the answer is trained on.

    `ended`: whether the answer has an end of its own, which a student then learns too.
    """
    if prompt.plain:
        examples = _cut_continuation(prompt.turns[0].text, answer, max_bytes)
    else:
        examples = cut_turns([*prompt.turns, Turn("assistant", answer)], max_bytes)
    return example_rows(prompt.document_id, examples, prompt.starts, ended)


def _cut_continuation(start: str, rest: str, max_bytes: int) -> list[list[Turn]]:
    examples, at = [], 0
    for piece in cut_text(start + rest, max_bytes):
        known = start[at : at + len(piece)]
        parts = ((known, False), (piece[len(known) :], True))
        examples.append([Turn("text", text, loss) for text, loss in parts if text])
        at += len(piece)
    return examples
