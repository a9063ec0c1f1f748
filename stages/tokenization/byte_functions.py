"""From a vocabulary string to the bytes that it stands for, and finding out which way a tokenizer writes them."""

import re
from collections.abc import Callable

BYTE_FUNCTIONS = ("byte_level", "sentencepiece")
SPACE_MARK = "▁"
_HEX = re.compile(r"<0x([0-9A-Fa-f]{2})>")

# Texts on which a candidate must give back the very bytes. The first group is ASCII with the whitespace that
# tokenizers like to lose; characters of the second group may be unknown to a small vocabulary.
PROBES = (
    "Hello",
    "Hello world",
    "a  b   c",
    " lead",
    "trail ",
    "tab\there",
    "line\n\nnext\n",
    "\r\n x",
    "don't stop, 3.14% (x_y) ##a",
    "naïve 北京 日本語",
    "👩\u200d👩\u200d👧 🎉",
    "e\u0301 ﬁ Å \u00a0 \u3000",
)


def byte_alphabet() -> list[str]:
    """Return GPT-2's character for each byte (`bytes_to_unicode` of openai/gpt-2): 256 printable characters."""
    kept = [*range(33, 127), *range(161, 173), *range(174, 256)]
    characters = {byte: chr(byte) for byte in kept}
    for number, byte in enumerate(byte for byte in range(256) if byte not in characters):
        characters[byte] = chr(256 + number)
    return [characters[byte] for byte in range(256)]


_TO_BYTE = {ord(character): byte for byte, character in enumerate(byte_alphabet())}


def byte_level(token: str) -> bytes:
    """Return the bytes of a string in GPT-2's byte alphabet; a string with other characters stands for itself."""
    try:
        return bytes([_TO_BYTE[ord(character)] for character in token])
    except KeyError:
        return token.encode()


def sentencepiece(token: str, mark: str = SPACE_MARK) -> bytes:
    """Return the bytes of a SentencePiece string: `<0xNN>` is that byte, the mark is a space."""
    match = _HEX.fullmatch(token)
    return bytes([int(match[1], 16)]) if match else token.replace(mark, " ").encode()


def byte_function(name: str, mark: str, subword_prefix: str) -> Callable[[str], bytes]:
    """Return the function called `name` in BYTE_FUNCTIONS; `subword_prefix` (WordPiece's "##") is cut off first."""
    plain = byte_level if name == "byte_level" else (lambda token: sentencepiece(token, mark))
    if not subword_prefix:
        return plain

    def without_prefix(token: str) -> bytes:
        inner = len(token) > len(subword_prefix) and token.startswith(subword_prefix)
        return plain(token[len(subword_prefix) :] if inner else token)

    return without_prefix


def is_fallback(token: str) -> bool:
    """Return whether a vocabulary string is a byte fallback `<0xNN>`, second choice to a string with the same byte."""
    return _HEX.fullmatch(token) is not None
