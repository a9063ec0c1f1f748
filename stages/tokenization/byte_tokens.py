"""A tokenizer as bytes: which bytes each token stands for, and texts to tokens without losing one."""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Mapping, Sequence
from functools import cached_property
from itertools import compress
from operator import itemgetter
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from stages.tokenization.byte_functions import byte_function, is_fallback

if TYPE_CHECKING:
    from tokenizers import Tokenizer

_OTHER = "\0"  # of the finder of specials: any text between them


class Special(NamedTuple):
    """A special token that stands in a text from `start` to `end`, white space that it takes along included.

    `prefixes`: the text after it gets the dummy space that the tokenizer may add.
    """

    start: int
    end: int
    identity: int
    prefixes: bool = False


class ByteTokenizer:
    """A tokenizer whose every token is bytes.

    vocab_size: ids including added tokens; token_bytes: list of bytes, None for specials; lengths int32 [vocab], 0 for
    specials; special_ids; special_texts: text of a special -> id; roles: role -> special id; start_id (bos, else eos),
    eos_id, pad_id; name; digest.
    """

    def __init__(self, tokenizer: Tokenizer, unprefixed: Tokenizer | None, settings: Mapping[str, Any]) -> None:
        self.name: str = settings["name"]
        self.digest: str = settings["digest"]
        self.settings = dict(settings)
        self.prefix_space: str | None = settings["prefix_space"]  # None, "first" or "always"
        self._tokenizer = _text_mode(tokenizer)
        self._unprefixed = _text_mode(unprefixed) if unprefixed is not None else self._tokenizer
        self._read_vocabulary()
        named: dict[str, str] = settings["named"]
        self.roles: dict[str, int] = {
            role: self.special_texts[content] for role, content in named.items() if content in self.special_texts
        }
        self.eos_id: int | None = self.roles.get("eos")
        self.start_id: int | None = self.roles.get("bos", self.eos_id)
        self.pad_id: int = self.roles.get("pad", self.eos_id if self.eos_id is not None else 0)

    def _read_vocabulary(self) -> None:
        vocabulary = self._tokenizer.get_vocab(with_added_tokens=True)
        added = self._tokenizer.get_added_tokens_decoder()
        settings = self.settings
        self.vocab_size = max(vocabulary.values(), default=-1) + 1
        in_model = self._tokenizer.get_vocab(with_added_tokens=False)
        convert = byte_function(settings["byte_function"], settings["mark"], settings["subword_prefix"])
        self.token_bytes: list[bytes | None] = [None] * self.vocab_size
        self._fallbacks: set[int] = set()
        for token, identity in vocabulary.items():
            self.token_bytes[identity] = convert(token)
            if is_fallback(token):
                self._fallbacks.add(identity)
        self.special_texts = {token.content: identity for identity, token in added.items() if token.special}
        self._special_tokens = {identity: token for identity, token in added.items() if token.special}
        self._regular = frozenset(identity for identity, token in added.items() if not token.special)
        for identity, token in added.items():
            if token.special:
                self.token_bytes[identity] = None
            elif token.content not in in_model:
                self.token_bytes[identity] = token.content.encode()
        self.special_ids = frozenset(self._special_tokens)
        self._joinable = [token or b"" for token in self.token_bytes]
        self.lengths = np.fromiter(map(len, self._joinable), np.int32, self.vocab_size)
        self.first_bytes = np.fromiter(
            (token[0] if token else 0 for token in self._joinable), np.uint8, self.vocab_size
        )

    def cut_ids(self, rows: int) -> None:
        """Take the ids from `rows` on away, none of which has bytes."""
        self.__dict__.pop("id_of_bytes", None)
        self.vocab_size = rows
        self.token_bytes, self._joinable = self.token_bytes[:rows], self._joinable[:rows]
        self.lengths, self.first_bytes = self.lengths[:rows], self.first_bytes[:rows]
        self.special_texts = {content: i for content, i in self.special_texts.items() if i < rows}
        self._special_tokens = {i: token for i, token in self._special_tokens.items() if i < rows}
        self.special_ids = frozenset(self._special_tokens)
        self.roles = {role: i for role, i in self.roles.items() if i < rows}
        self.pad_id = self.roles.get("pad", self.eos_id if self.eos_id is not None else 0)

    @property
    def model(self) -> dict[str, Any]:
        """The model part of the tokenizer.json: its vocabulary, and the merges or scores it was trained to."""
        return json.loads(self._tokenizer.to_str())["model"]

    @cached_property
    def id_of_bytes(self) -> dict[bytes, int]:
        """Token bytes -> id. Where several ids have the same bytes: not a `<0xNN>` fallback, then the lowest id."""
        order = sorted(range(self.vocab_size), key=lambda i: (i not in self._fallbacks, -i))
        return {token: i for i in order if (token := self.token_bytes[i])}

    def string_of(self, identity: int) -> str:
        """Return how a token is written: a special's own text, else its bytes, with U+FFFD for partial characters."""
        special = self._special_tokens.get(identity)
        return special.content if special else (self.token_bytes[identity] or b"").decode(errors="replace")

    def special_named(self, content: str) -> int | None:
        """Return the id of the special token written `content`, None when there is none."""
        return self.special_texts.get(content)

    def join(self, ids: Iterable[int]) -> bytes:
        """Return the bytes of tokens together; specials have none."""
        ids = tuple(ids)
        return b"".join(itemgetter(*ids)(self._joinable)) if len(ids) > 1 else b"".join(self._joinable[i] for i in ids)

    def text_ids(self, texts: Sequence[str], prefixed: Sequence[bool]) -> list[Sequence[int]]:
        """Return the ids of each text; `prefixed` says which ones get the dummy space that the tokenizer may add."""
        if self.settings["conversion"] == "byte":
            return [text.encode() for text in texts]
        pattern = self._misread
        if pattern is not None and any(pattern.search(text) for text in texts):
            return [self._spelled_ids(*item) for item in zip(texts, prefixed, strict=True)]
        if self._unprefixed is self._tokenizer or all(prefixed):
            return [item.ids for item in self._tokenizer.encode_batch_fast(list(texts), add_special_tokens=False)]
        ids: list[Sequence[int]] = [()] * len(texts)
        for tokenizer, wanted in ((self._tokenizer, list(prefixed)), (self._unprefixed, [not p for p in prefixed])):
            found = tokenizer.encode_batch_fast(list(compress(texts, wanted)), add_special_tokens=False)
            for position, item in zip(compress(range(len(texts)), wanted), found, strict=True):
                ids[position] = item.ids
        return ids

    def lengths_in(self, text: bytes, ids: Sequence[int]) -> np.ndarray | None:
        """Return how many bytes of a text each of its tokens has, int64, None where they are not the text's bytes.

        A dummy space has none: after a regular added token a tokenizer may put another one.
        """
        lengths, at, spare = self.lengths[list(ids)].astype(np.int64), 0, False
        for place, identity in enumerate(ids):
            token = self._joinable[identity]
            spare |= self.prefix_space == "always" and (place == 0 or ids[place - 1] in self._regular)
            if not text.startswith(token, at) and spare and token[:1] == b" ":
                token, spare = token[1:], False
                lengths[place] -= 1
            if not text.startswith(token, at):
                return None
            spare &= not token.strip(b" ")
            at += len(token)
        return lengths if at == len(text) else None

    def estimated_ends(self, text: str, count: int, fallback: np.ndarray) -> np.ndarray:
        """Return byte ends [count] of the tokens of a text whose bytes do not add up (unknown tokens), from offsets."""
        size = len(text.encode())
        for tokenizer in (self._tokenizer, self._unprefixed):
            item = tokenizer.encode(text, add_special_tokens=False)
            if len(item.ids) == count:
                characters = np.array([len(c.encode()) for c in text]).cumsum()
                ends = np.array([characters[end - 1] if end else 0 for _, end in item.offsets])
                ends = np.maximum.accumulate(np.minimum(ends, size))
                break
        else:
            ends = np.minimum(fallback, size)
        ends[-1] = size
        return ends

    def find_specials(self, text: str) -> list[Special]:
        """Return the special tokens in a text, as the tokenizers library finds them by their flags."""
        finder, specials = self._finder
        found = finder.encode(text, add_special_tokens=False)
        places = [
            (specials[identity], place)
            for identity, place in zip(found.ids, found.offsets, strict=True)
            if identity in specials
        ]
        return [Special(start, end, *special) for special, (start, end) in places]

    @cached_property
    def _finder(self) -> tuple[Tokenizer, dict[int, tuple[int, bool]]]:
        """Return a tokenizer of added tokens alone, and its ids of specials -> our id, `Special.prefixes`."""
        from tokenizers import Tokenizer, models

        # All text between added tokens is one token.
        finder = Tokenizer(models.WordLevel({_OTHER: 0}, unk_token=_OTHER))
        normalizer = finder.normalizer = self._tokenizer.normalizer
        for _, token in sorted(self._tokenizer.get_added_tokens_decoder().items()):
            (finder.add_special_tokens if token.special else finder.add_tokens)([token])
        # A normalizer puts its space before any special is found that is looked for in normalized text.
        once = normalizer is not None and b'"Prepend"' in normalizer.__getstate__()
        always = self.prefix_space == "always"
        return finder, {
            identity: (self.special_texts[token.content], always and not (once and token.normalized))
            for identity, token in finder.get_added_tokens_decoder().items()
            if token.special
        }

    @cached_property
    def _misread(self) -> re.Pattern[str] | None:
        """What in a text the tokenizer would take for something else, None for nothing.

        The space mark of SentencePiece, which would come back as a space; and, where the model itself has special
        tokens among its pieces (a Unigram vocabulary that lists `</s>`), their text and that of byte fallbacks.
        """
        emits = self._model_emits_specials()
        literals = list(self.special_texts) if emits else []
        if self.settings["byte_function"] == "sentencepiece" and self.settings["mark"] != " ":
            literals.append(self.settings["mark"])
        patterns = [re.escape(literal) for literal in sorted(literals, key=len, reverse=True)]
        patterns += ["<0x[0-9A-F]{2}>"] if emits and self._fallbacks else []
        return re.compile("|".join(patterns)) if patterns else None

    def _model_emits_specials(self) -> bool:
        for form in ("{}", "a{}a", "a {} a"):
            texts = [form.format(content) for content in self.special_texts]
            found = self._tokenizer.encode_batch_fast(texts, add_special_tokens=False)
            if any(i in item.ids for i, item in zip(self.special_texts.values(), found, strict=True)):
                return True
        return False

    def _spelled_ids(self, text: str, prefixed: bool) -> list[int]:
        """Return the ids of a text, in which literals that the tokenizer misreads are spelled with other tokens."""
        pattern = self._misread
        ids: list[int] = []
        at = 0
        for match in [*pattern.finditer(text), None] if pattern else [None]:
            part = text[at : match.start() if match else len(text)]
            tokenizer = self._tokenizer if prefixed and at == 0 else self._unprefixed
            ids += tokenizer.encode(part, add_special_tokens=False).ids if part else []
            if match:
                ids += self._spell(match[0].encode()) or tokenizer.encode(match[0], add_special_tokens=False).ids
                at = match.end()
        return ids

    def _spell(self, text: bytes) -> list[int] | None:
        """Return regular tokens for `text`, longest match first; None when there are none."""
        ids, at = [], 0
        while at < len(text):
            end = next((e for e in range(len(text), at, -1) if text[at:e] in self.id_of_bytes), None)
            if end is None:
                return None
            ids.append(self.id_of_bytes[text[at:end]])
            at = end
        return ids


def _text_mode(tokenizer: Tokenizer) -> Tokenizer:
    tokenizer.no_truncation()
    tokenizer.no_padding()
    tokenizer.encode_special_tokens = True
    return tokenizer
