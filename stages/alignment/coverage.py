"""The coverage audit: which kinds of tokens two vocabularies have in common, and what that means for each method."""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from stages.alignment.characters import CLASSES, SCRIPTS, character_classes

SIDES = ("teacher", "student")
GROUPS = (
    "Latin words",
    "Latin words after a space",
    "CJK",
    "other scripts",
    "single digits",
    "multi-digit numerals",
    "punctuation",
    "operators",
    "marks with whitespace",
    "whitespace",
    "emoji",
    "partial characters",
    "mixed",
)
# What X-Token's rule looks at (arXiv 2605.21699): digits, punctuation and everything that is not ASCII.
CRITICAL = (
    "single digits",
    "multi-digit numerals",
    "punctuation",
    "operators",
    "CJK",
    "other scripts",
    "emoji",
    "partial characters",
)
COVERED = 0.9  # a group of which less is matched falls outside the common tokens
NOTICED = 0.001  # of the student's tokens in the text, else of its vocabulary; a smaller group decides nothing
SHOWN = 5  # unmatched tokens listed of each group


def token_groups(token_bytes: Sequence[bytes | None]) -> np.ndarray:
    """Return int8 [vocab]: the place in GROUPS of each token, -1 for one without bytes.

    A token that is no whole UTF-8 is partial characters. Of the others one leading space is taken off, if anything is
    left, and the classes of the characters decide: letters of one kind alone are Latin words, CJK (Han, Kana, Hangul)
    or other scripts; digits alone are a single digit or a multi-digit numeral; one mark or symbol is punctuation,
    several are operators, with whitespace among them marks with whitespace; anything else ("don't", "x1") is mixed.
    """
    texts = [_text(token) for token in token_bytes]
    bare = [text[1:] if text[:1] == " " and len(text) > 1 else text for text in (text or "" for text in texts)]
    lengths = np.fromiter(map(len, bare), np.int64)
    present = _classes_present("".join(bare), lengths)
    spaced = np.fromiter(((text or "")[:1] == " " for text in texts), bool)

    def only(*names: str) -> np.ndarray:
        return (present & ~_bits(*names)) == 0

    conditions = {
        "Latin words": only("Latin") & ~spaced,
        "Latin words after a space": only("Latin"),
        "CJK": only("Han", "Kana", "Hangul"),
        "other scripts": only(*SCRIPTS, "other letters") & ((present & _bits("Latin")) == 0),
        "single digits": only("digits") & (lengths == 1),
        "multi-digit numerals": only("digits"),
        "whitespace": only("whitespace"),
        "punctuation": only("punctuation", "symbols") & (lengths == 1),
        "operators": only("punctuation", "symbols"),
        "marks with whitespace": only("punctuation", "symbols", "whitespace"),
        "emoji": only("emoji"),
    }
    numbers = [GROUPS.index(name) for name in conditions]
    groups = np.select(list(conditions.values()), numbers, GROUPS.index("mixed"))
    partial = np.fromiter((text is None for text in texts), bool)
    without = np.fromiter((not token for token in token_bytes), bool)
    return np.select([without, partial], [-1, GROUPS.index("partial characters")], groups).astype(np.int8)


def audit(vocabularies: Mapping[str, Sequence[bytes | None]], counts: Mapping[str, np.ndarray]) -> list[dict[str, Any]]:
    """Return one row (schema COVERAGE) for each side and group that has tokens.

    A token is matched when the other side has one of the same bytes. `types` are distinct byte strings, `uses` their
    occurrences in the corpus; `unmatched` the most used tokens without a match.
    """
    rows = []
    strings = {side: {token for token in vocabulary if token} for side, vocabulary in vocabularies.items()}
    for side, other in (SIDES, SIDES[::-1]):
        vocabulary, uses = vocabularies[side], counts[side]
        groups = token_groups(vocabulary)
        matched = np.fromiter((token in strings[other] for token in vocabulary), bool)
        first: dict[bytes | None, int] = {}
        distinct = np.fromiter((first.setdefault(token, i) == i for i, token in enumerate(vocabulary)), bool)
        for number, name in enumerate(GROUPS):
            own = groups == number
            if not own.any():
                continue
            missing = np.flatnonzero(own & ~matched)
            missing = missing[np.argsort(-uses[missing], kind="stable")][:SHOWN]
            types = own & distinct
            facts = {"side": side, "group": name, "types": int(types.sum())}
            facts |= {"matched_types": int((types & matched).sum())}
            facts |= {"uses": int(uses[own].sum()), "matched_uses": int(uses[own & matched].sum())}
            rows.append(facts | {"unmatched": [vocabulary[i] for i in missing]})
    return rows


def advice(coverage: Sequence[Mapping[str, Any]], one_to_one: float) -> list[str]:
    """Return what the audit means for each family of methods, one sentence each.

    `coverage` as `audit` returns it, `one_to_one` the share of 1-1 chunks. The student's tokens decide, because a loss
    trains them. If a critical group falls outside the common tokens (`outside`), X-Token's rule prefers P-KL,
    which projects distributions, else H-KL, which compares the common tokens directly.
    """
    student = [row for row in coverage if row["side"] == "student"]
    matched, types = _share(student, "uses"), _share(student, "types")
    if not sum(row["uses"] for row in student):
        return [f"The text has no tokens; {_percent(types)} of the student's vocabulary are tokens of the teacher."]
    if matched == types == one_to_one == 1:
        return ["Both tokenizers cut this text alike and share the student's tokens: same-vocabulary methods apply."]
    missed = outside(student)
    choice = f"H-KL suffices: digits, punctuation and non-ASCII tokens are matched to {_percent(COVERED)} or more."
    first = ""
    if missed:
        named = _listed([f"{group} ({_percent(share)} of their {of})" for group, (share, of) in missed.items()])
        choice = f"prefer P-KL to H-KL, because too few have a match among {named}."
        used = [group for group, (_, of) in missed.items() if of == "use"]
        first = f", first of all {_listed(used)}" if used else ""
    positions = "positions agree here."
    if one_to_one < 1:
        positions = f"{_percent(1 - one_to_one)} of the chunks are not 1-1 and shift what follows: align it by chunks."
    in_text = f"{_percent(1 - matched)} of the student's tokens in this text"
    return [
        f"Common tokens: {_percent(matched)} of the student's tokens in this text, and {_percent(types)} of its "
        "vocabulary, are tokens of the teacher byte for byte.",
        f"X-Token: {choice}",
        f"GOLD: its loss on common tokens pushes all others of the student's down at every step: {in_text}{first}.",
        f"ULD: needs no match and pairs tokens by position; {positions}",
        f"MinED, CDM: {in_text} rest on the nearest spelling; see the mapping's distances.",
        "ALM: needs no match; it compares chunks of equal bytes, which cover all of the text.",
    ]


def outside(student: Sequence[Mapping[str, Any]]) -> dict[str, tuple[float, str]]:
    """Return the critical groups of which less than COVERED is matched: name -> (matched share, "use" or "types").

    A group counts by its use in the text where it is NOTICED there, else by its types where it is in the vocabulary.
    Those that count by use come first, and the least matched.
    """
    totals = {measure: sum(row[measure] for row in student) for measure in ("uses", "types")}
    found = {}
    for row in (row for row in student if row["group"] in CRITICAL):
        noticed = [measure for measure, total in totals.items() if row[measure] >= max(1, NOTICED * total)]
        if noticed and _share([row], noticed[0]) < COVERED:
            found[row["group"]] = _share([row], noticed[0]), {"uses": "use", "types": "types"}[noticed[0]]
    return dict(sorted(found.items(), key=lambda item: (item[1][1] != "use", item[1][0])))


def _share(rows: Sequence[Mapping[str, Any]], measure: str) -> float:
    total = sum(row[measure] for row in rows)
    return sum(row[f"matched_{measure}"] for row in rows) / total if total else 1.0


def _percent(share: float) -> str:
    """Return a share as percent that is 0 % or 100 % only when it is all or nothing."""
    places = 0 if share in (0, 1) else 1
    return f"{min(max(100 * share, 0.1), 99.9) if places else 100 * share:.{places}f} %"


def _listed(names: Sequence[str]) -> str:
    return " and ".join([", ".join(names[:-1]), names[-1]] if len(names) > 1 else names)


def _text(token: bytes | None) -> str | None:
    try:
        return (token or b"").decode()
    except UnicodeDecodeError:
        return None


def _bits(*names: str) -> int:
    return sum(1 << CLASSES.index(name) for name in names)


def _classes_present(text: str, lengths: np.ndarray) -> np.ndarray:
    """Return int64 [tokens]: a bit for each class that the token's characters have; tokens lie end to end in `text`."""
    present = np.zeros(len(lengths), np.int64)
    filled = np.flatnonzero(lengths)
    if len(filled):
        bits = np.int64(1) << character_classes(text).astype(np.int64)
        present[filled] = np.bitwise_or.reduceat(bits, (np.cumsum(lengths) - lengths)[filled])
    return present
