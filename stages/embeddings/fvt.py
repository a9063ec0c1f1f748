"""Fast Vocabulary Transfer: which source embeddings each token of a new vocabulary is made of.

Gee et al. 2022 (arXiv 2402.09977), in the byte-level variant of tokenkit (`tokenkit/utils.py: fvt`). It differs
from tokenkit where tokenkit errs:
- A special takes the row of a special (`stages.tokenization.specials`), an ordinary token never does; eos is mapped
  too, and before pad. (tokenkit fills the newline of Qwen from `<|end_header_id|>` of Llama 3 and leaves eos out, so
  that the `<|endoftext|>` of Qwen gets the row of Gemma's `<pad>`.)
- Bytes that are no UTF-8 on their own are cut into the fewest source tokens, where tokenkit draws at random.
- An encoding that does not give the bytes back (a normaliser, a prefix space, unk) is replaced likewise.
"""

from dataclasses import dataclass

from stages.tokenization.specials import counterpart
from stages.tokenization.spelling import Vocabulary, decompose, ids_by_bytes


@dataclass(frozen=True)
class Plan:
    """Where each target row comes from: `rules[i]` is special, copy, mean, random or padding.

    `sources[i]` lists the source ids: one for special and copy, those to average for mean, none otherwise.
    """

    rules: list[str]
    sources: list[list[int]]


def plan(target: Vocabulary, source: Vocabulary, *, rows: int, exact: bool = True) -> Plan:
    """Return where every embedding row of `target` comes from.

    `rows` is the number of source embedding rows; ids beyond it have no embedding and are not used. With
    `exact=False` tokens that both vocabularies hold are decomposed like the others (tokenkit's
    `allow_exact_match=False`).
    """
    size = len(target.token_bytes)
    rules, sources = ["random"] * size, [[] for _ in range(size)]
    same_bytes = ids_by_bytes(source, rows) if exact else {}
    specials = _match_specials(target, source, rows)
    missing = []
    for index, content in enumerate(target.token_bytes):
        if index in specials:
            rules[index], sources[index] = "special", [specials[index]]
        elif content is None and index not in target.special_texts:
            rules[index] = "padding"
        elif content is not None and content in same_bytes:
            rules[index], sources[index] = "copy", [same_bytes[content][index in target.duplicate_ids]]
        else:
            missing.append(index)
    contents = [_content(target, index) for index in missing]
    for index, ids in zip(missing, decompose(contents, source), strict=True):
        kept = [identifier for identifier in ids if identifier < rows]
        if kept:
            rules[index], sources[index] = "mean", kept
    return Plan(rules, sources)


def identity_plan(size: int) -> Plan:
    """Return the plan for a target that is the source tokenizer itself: every row from its own."""
    return Plan(["copy"] * size, [[index] for index in range(size)])


def uniform_plan(size: int, rule: str, rows: int) -> Plan:
    """Return the plan of a baseline: rule "random" for every row, or "mean" of all `rows` source rows."""
    return Plan([rule] * size, [list(range(rows)) if rule == "mean" else []] * size)


def _match_specials(target: Vocabulary, source: Vocabulary, rows: int) -> dict[int, int]:
    """Map special target ids to the special source ids with an embedding that stand for them."""
    available = {role: index for role, index in source.roles.items() if index < rows}
    by_text = {text: index for index, text in sorted(source.special_texts.items(), reverse=True) if index < rows}
    found = {
        index: counterpart(index, text, target.roles, available, by_text.get)
        for index, text in target.special_texts.items()
    }
    return {index: other for index, other in found.items() if other is not None}


def _content(vocabulary: Vocabulary, index: int) -> bytes:
    content = vocabulary.token_bytes[index]
    return vocabulary.special_texts[index].encode() if content is None else content
