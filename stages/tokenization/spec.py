"""Tokenizer spec strings: `name[:source=Kind][:target=Kind][:conversion=...]`, as tokenkit's `load_byteify_tokenizer`.

`name` is a Hub id or a local folder and may hold colons: options begin at the first `:key=`. A folder that exists
under the longest matching name wins, so that any path can be written.
"""

import re
from dataclasses import dataclass
from difflib import get_close_matches
from pathlib import Path

from stages.core.errors import UserError
from stages.tokenization.kinds import kind_named

KEYS = ("source", "target", "conversion")
CONVERSIONS = ("byte", "prebyteified", "manual_add_prefix_space")


@dataclass(frozen=True)
class TokenizerSpec:
    """A parsed spec. `source` gives the byte function, `target` the special tokens and the chat template."""

    name: str
    source: str | None = None
    target: str | None = None
    conversion: str | None = None

    @property
    def kind(self) -> str | None:
        """The model kind whose special tokens and chat pieces are used; None means the tokenizer's own."""
        return self.target or self.source


def parse_spec(text: str) -> TokenizerSpec:
    """Parse a spec string; UserError for an unknown or repeated key, kind or conversion."""
    name, options = _split(text)
    if not name:
        raise UserError(
            f"Tokenizer spec {text!r} names no tokenizer: write a Hub id or a folder before the first colon."
        )
    values: dict[str, str] = {}
    for option in options:
        key, equals, value = option.partition("=")
        if key not in KEYS or not equals:
            near = get_close_matches(key, KEYS, 1, 0.4)
            hint = f", did you mean {near[0]}?" if near else "."
            raise UserError(f"Tokenizer spec {text!r}: unknown key {key!r}; known are {', '.join(KEYS)}{hint}")
        if key in values:
            raise UserError(f"Tokenizer spec {text!r} gives {key} twice: keep one.")
        values[key] = value
    for key in ("source", "target"):
        if key in values:
            kind_named(values[key], text)
    conversion = values.get("conversion")
    if conversion is not None and conversion not in CONVERSIONS:
        raise UserError(
            f"Tokenizer spec {text!r}: unknown conversion {conversion!r}; known are {', '.join(CONVERSIONS)}."
        )
    return TokenizerSpec(name, **values)


def _split(text: str) -> tuple[str, list[str]]:
    parts = text.split(":")
    for used in range(len(parts), 1, -1):
        name = ":".join(parts[:used])
        if "=" in name and Path(name).is_dir():
            return name, parts[used:]
    first = next((i for i, part in enumerate(parts) if i and re.match(r"[A-Za-z_]+=", part)), len(parts))
    return ":".join(parts[:first]), parts[first:]
