"""The messages of a chat, as data sets write them, to turns."""

import json
from typing import Any

from stages.artifacts.schemas import REASONING
from stages.core.errors import UserError
from stages.corpora.cutting import Turn

# ShareGPT names its keys and roles otherwise.
ROLE_NAMES = {"human": "user", "gpt": "assistant", "bot": "assistant"}
# Fields in which data sets keep the reasoning before an answer, as transformers takes them: the first that is there.
REASONS = ("reasoning_content", "thinking", "reasoning")
READ = ("role", "from", "content", "value", *REASONS)


class NotText(Exception):
    """A message has parts that are no text: an image, say."""


def turns_of(messages: Any, where: str) -> list[Turn]:
    """Return the turns of a chat; their texts are not checked. Reasoning given beside a text is the head of it too.

    UserError, naming the place `where`, when it is no list of messages; NotText for parts that are no text.
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
    text = _joined(content) if isinstance(content, list) else "" if content is None else content
    reasoning = next((message[key] for key in REASONS if message.get(key)), None)
    if isinstance(reasoning, list):
        reasoning = _joined(reasoning)
    if not isinstance(reasoning, str | None):
        raise UserError(f"{where}: the reasoning of a message is {type(reasoning).__name__}, expected text.")
    # Tables have every field in every message, null where it has none.
    extra = {key: value for key, value in message.items() if key not in READ and value not in (None, [], {}, "")}
    if extra and content is None:
        extra["content"] = None
    if reasoning and isinstance(text, str):
        text, extra = REASONING.format(reasoning) + text, {"reasoning_content": reasoning} | extra
    # In their order: a template may write arguments as they come.
    said = json.dumps(_without_nulls(extra), ensure_ascii=False, default=str) if extra else ""
    # A plain text is told from a chat by its role, so no turn may have that name.
    return Turn(ROLE_NAMES.get(role, role) if role != "text" else "user", text, True, said)


def _joined(parts: list[Any]) -> str:
    """Return the text of a content that is given in parts."""
    texts = []
    for part in parts:
        text = part.get("text") if isinstance(part, dict) else part
        kind = part.get("type", "text") if isinstance(part, dict) else "text"
        if kind not in ("text", "input_text", "output_text") or not isinstance(text, str):
            raise NotText(str(kind))
        texts.append(text)
    return "".join(texts)


def _without_nulls(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _without_nulls(item) for key, item in value.items() if item is not None or key == "content"}
    return [_without_nulls(item) for item in value] if isinstance(value, list) else value
