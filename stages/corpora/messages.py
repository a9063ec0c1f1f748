"""Messages of a chat, as data sets write them, to turns of a document."""

import json
from typing import Any

from stages.artifacts.schemas import REASONING
from stages.core.errors import UserError

# (role, text), and where the message has more than a role and a text the JSON of its other fields; see SLOT.
Turn = tuple[str, ...]

# ShareGPT names its keys and roles otherwise.
_ROLE_NAMES = {"human": "user", "gpt": "assistant", "bot": "assistant"}
_REASONING_KEYS = ("reasoning_content", "thinking", "reasoning")  # as transformers takes them, the first that is there
_TEXT_PARTS = ("text", "input_text", "output_text")


class OtherParts(Exception):
    """A message has parts that are no text, an image or a sound; no slot can hold them."""


def turns_of(messages: Any, where: str) -> list[Turn]:
    """Return the turns of a chat.

    A text may come in parts. Reasoning given beside it stands at its head (REASONING). UserError names `where` when
    this is no chat; OtherParts when a message has parts that are no text.
    """
    if not isinstance(messages, list):
        raise UserError(f"{where}: messages are {type(messages).__name__}, expected a list of {{role, content}}.")
    return [_turn(message, where) for message in messages]


def _turn(message: Any, where: str) -> Turn:
    if not isinstance(message, dict) or not {"role", "from"} & message.keys():
        raise UserError(f"{where}: a message has no role; expected {{role, content}}.")
    role = message.get("role") or message.get("from")
    if not isinstance(role, str):
        raise UserError(f"{where}: the role of a message is {role!r}, expected a name such as user or assistant.")
    content = message.get("content", message.get("value"))
    text = "" if content is None else _text(content)
    known = {"role", "from", "content", "value", *_REASONING_KEYS}
    # Readers of tables give a message every field that another message has.
    fields = {key: value for key, value in message.items() if key not in known and value not in (None, "", [], {})}
    if content is None and fields:
        fields["content"] = None
    reasoning = next((message[key] for key in _REASONING_KEYS if message.get(key)), None)
    if reasoning is not None and isinstance(text, str):
        reasoning = _text(reasoning)
        if not isinstance(reasoning, str):
            raise UserError(f"{where}: the reasoning of a message is {type(reasoning).__name__}, expected text.")
        text, fields = REASONING.format(reasoning) + text, {"reasoning_content": reasoning, **fields}
    # A plain text is told from a chat by its role, so no turn may have that name.
    name = _ROLE_NAMES.get(role, role) if role != "text" else "user"
    return (name, text, json.dumps(fields, ensure_ascii=False, default=str)) if fields else (name, text)


def _text(content: Any) -> Any:
    """Return the text of a content; a content that is neither text nor parts as it is."""
    if not isinstance(content, list):
        return content
    texts = [_part_text(part) if isinstance(part, dict) else part for part in content]
    return "".join(texts) if all(isinstance(text, str) for text in texts) else content


def _part_text(part: dict[str, Any]) -> str:
    if part.get("type") not in (None, *_TEXT_PARTS) or not isinstance(part.get("text"), str):
        raise OtherParts
    return part["text"]
