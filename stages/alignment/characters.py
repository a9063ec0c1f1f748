"""Classes of characters: the script of a letter, or what else a character is."""

import sys
import unicodedata
from functools import cache

import numpy as np

SCRIPTS = ("Latin", "Greek", "Cyrillic", "Hebrew", "Arabic", "Devanagari", "Thai", "Han", "Kana", "Hangul")
CLASSES = (*SCRIPTS, "other letters", "digits", "punctuation", "symbols", "emoji", "whitespace", "other")
_NAMES = {script.upper(): script for script in SCRIPTS} | {
    "CJK": "Han",
    "IDEOGRAPHIC": "Han",
    "HIRAGANA": "Kana",
    "KATAKANA": "Kana",
}
_EMOJI = (range(0x1F000, 0x1FB00), range(0x2600, 0x27C0), range(0xFE0F, 0xFE10))


def class_of(character: str) -> str:
    """Return the class of a character, one of CLASSES.

    Emoji are the pictographs of U+1F000 to U+1FAFF and U+2600 to U+27BF with the variation selector U+FE0F; whitespace
    is what `str.split` splits at; digits are decimal (Nd); letters and combining marks go by the first word of their
    Unicode name, FULLWIDTH and HALFWIDTH aside; other is controls, joiners, private and unassigned.
    """
    if any(ord(character) in part for part in _EMOJI):
        return "emoji"
    if character.isspace():
        return "whitespace"
    category = unicodedata.category(character)
    if category[0] in "LM":
        words = unicodedata.name(character, "").removeprefix("FULLWIDTH ").removeprefix("HALFWIDTH ")
        return _NAMES.get(words.replace("-", " ").partition(" ")[0], "other letters")
    if category == "Nd":
        return "digits"
    return {"P": "punctuation", "S": "symbols", "N": "symbols"}.get(category[0], "other")


def character_classes(text: str) -> np.ndarray:
    """Return uint8 [characters]: places in CLASSES."""
    return _classes_of_points(np.frombuffer(text.encode("utf-32-le"), np.uint32))


def byte_classes(text: str) -> np.ndarray:
    """Return uint8 [UTF-8 bytes]: each byte has the class of its character, as a place in CLASSES."""
    if text.isascii():
        return _classes_of_points(np.frombuffer(text.encode(), np.uint8))
    points = np.frombuffer(text.encode("utf-32-le"), np.uint32)
    widths = 1 + (points >= 0x80) + (points >= 0x800) + (points >= 0x10000).astype(np.int64)
    return np.repeat(_classes_of_points(points), widths)


@cache
def _table() -> np.ndarray:
    """Return uint8 [code points], filled in as characters are met: naming all of Unicode takes seconds."""
    return np.full(sys.maxunicode + 1, len(CLASSES), np.uint8)


def _classes_of_points(points: np.ndarray) -> np.ndarray:
    table = _table()
    classes = table[points]
    unmet = classes == len(CLASSES)
    if unmet.any():
        for point in np.unique(points[unmet]).tolist():
            table[point] = CLASSES.index(class_of(chr(point)))
        classes = table[points]
    return classes
