"""ByteView: a Hugging Face tokenizer as bytes."""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Mapping, Sequence
from functools import cached_property
from itertools import compress
from operator import itemgetter
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from stages.core.errors import UserError
from stages.tokenization import chat, encoding
from stages.tokenization.byte_functions import byte_function, is_fallback

if TYPE_CHECKING:
    from tokenizers import Tokenizer

BOUNDARY_BYTES = {"space": 0x20, "tab": 0x09, "newline": 0x0A}
DEFAULT_BOUNDARY = "space+tab+newline+special"
SETTINGS_FILE = "byte_view.json"


class Turn(NamedTuple):
    """Token ids around a message's content; `prefixed`: the content carries the tokenizer's dummy space."""

    header: Sequence[int]
    end: Sequence[int]
    prefixed: bool


class Template(NamedTuple):
    """Token ids of an example's template: the start slot and one Turn per message."""

    start: Sequence[int]
    turns: Sequence[Turn]


class ByteView:
    """A tokenizer whose every token is bytes. Make one with `load`, or `stages.tokenization.sources.resolve`.

    vocab_size: ids including added tokens; token_bytes: list of bytes, None for specials; lengths int32 [vocab], 0 for
    specials; special_ids; role_of: special id -> role; roles: role -> special id; start_id (bos, else eos), eos_id,
    pad_id; folder; name; digest.
    """

    def __init__(
        self, tokenizer: Tokenizer, unprefixed: Tokenizer | None, settings: Mapping[str, Any], folder: Path
    ) -> None:
        self.folder = folder
        self.name: str = settings["name"]
        self.digest: str = settings["digest"]
        self.settings = dict(settings)
        self.prefix_space: str | None = settings["prefix_space"]  # None, "first" or "always"
        self._tokenizer = _text_mode(tokenizer)
        self._unprefixed = _text_mode(unprefixed) if unprefixed is not None else self._tokenizer
        self._template_cache: dict[Any, Template] = {}
        self._read_vocabulary()
        self._name_specials()

    @classmethod
    def load(cls, folder: Path) -> ByteView:
        """Load from a folder of the tokenizer stage, or from any folder with a tokenizer.json.

        UserError when it has none, or when the tokenizer loses bytes.
        """
        from stages.tokenization import sources

        return sources.load(Path(folder))

    def __reduce__(self) -> tuple[Any, ...]:
        return ByteView.load, (self.folder,)

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
        self._specials = {token.content: identity for identity, token in added.items() if token.special}
        self._special_tokens = {identity: token for identity, token in added.items() if token.special}
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
        self._special_mask = np.zeros(self.vocab_size, bool)
        self._special_mask[list(self.special_ids)] = True

    def _name_specials(self) -> None:
        named: dict[str, str] = self.settings["named"]
        self.roles: dict[str, int] = {
            role: self._specials[content] for role, content in named.items() if content in self._specials
        }
        self.eos_id: int | None = self.roles.get("eos")
        self.start_id: int | None = self.roles.get("bos", self.eos_id)
        self.pad_id: int = self.roles.get("pad", self.eos_id if self.eos_id is not None else 0)
        turns = self.chat_pieces(chat.PLAIN_ROLES).turns[2:]
        header = [i for i in turns[0].header if i in self.special_ids]
        end = [i for i in turns[1].end if i in self.special_ids]
        for role, ids in (("header", header[:1]), ("end_header", header[1:]), ("end_of_turn", end)):
            if ids:
                self.roles.setdefault(role, ids[0])
        self.role_of: dict[int, str] = dict.fromkeys(sorted(self.special_ids), "special")
        for role in ("end_header", "header", "end_of_turn", "unk", "pad", "bos", "eos"):
            if role in self.roles:
                self.role_of[self.roles[role]] = role

    def boundary_mask(self, mode: str = DEFAULT_BOUNDARY) -> np.ndarray:
        """Return bool [vocab]: the token starts with one of the boundary bytes of `mode`, or is special if it says so.

        `mode` is tokenkit's `space_mask_mode`: any of space, tab, newline, special joined by "+" (tokenkit has tab and
        newline swapped, this has not). UserError for another word.
        """
        mask = np.zeros(self.vocab_size, bool)
        for word in mode.split("+"):
            if word == "special":
                mask |= self._special_mask
            elif word in BOUNDARY_BYTES:
                mask |= (self.first_bytes == BOUNDARY_BYTES[word]) & (self.lengths > 0)
            else:
                known = ", ".join([*BOUNDARY_BYTES, "special"])
                raise UserError(f"space_mask_mode {mode!r}: unknown word {word!r}; join some of {known} with +.")
        return mask

    @property
    def model(self) -> dict[str, Any]:
        """The model part of the tokenizer.json: its vocabulary, and the merges or scores it was trained to."""
        return json.loads(self._tokenizer.to_str())["model"]

    @cached_property
    def id_of_bytes(self) -> dict[bytes, int]:
        """Token bytes -> id. Where several ids have the same bytes: not a `<0xNN>` fallback, then the lowest id."""
        order = sorted(range(self.vocab_size), key=lambda i: (i not in self._fallbacks, -i))
        return {token: i for i in order if (token := self.token_bytes[i])}

    def encode_texts(self, texts: Sequence[str]) -> list[encoding.Tokens]:
        """Encode raw texts: no special tokens are added, special-looking text is plain text."""
        return encoding.encode_texts(self, texts)

    def encode_examples(
        self, slots_per_example: Sequence[Sequence[Mapping[str, Any]]], ends_document: Sequence[bool] | None = None
    ) -> encoding.EncodedBatch:
        """Encode examples whose slots are {"role": str, "text": str, "loss": bool}, as in the EXAMPLES schema.

        Plain text (role "text"): [start][text][eos if the document ends]; a chat: the template's pieces around each
        content. Trained are the texts with `loss`, the end of turn after one, and a plain text's eos.
        """
        return encoding.encode_examples(self, slots_per_example, ends_document)

    def string_of(self, identity: int) -> str:
        """Return how a token is written: a special's own text, else its bytes, with U+FFFD for partial characters."""
        special = self._special_tokens.get(identity)
        return special.content if special else (self.token_bytes[identity] or b"").decode(errors="replace")

    def special_named(self, content: str) -> int | None:
        """Return the id of the special token written `content`, None when there is none."""
        return self._specials.get(content)

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

    def plain_pieces(self, slots: int, bare: bool) -> Template:
        """Return the template of a plain text of `slots` slots: a start token and nothing else; `bare`: nothing.

        Only the first slot is at the start of a text, where a tokenizer may add its dummy space.
        """
        start = () if bare or self.start_id is None else (self.start_id,)
        return Template(start, tuple(Turn((), (), slot == 0) for slot in range(slots)))

    def chat_pieces(self, roles: tuple[str, ...]) -> Template:
        """Return the token ids around the contents of a conversation of `roles`; cached per sequence of roles."""
        if roles not in self._template_cache:
            start, turns = chat.literals(self.settings["template"], roles, self._variables, self.name)
            pieces: list[Turn] = []
            before = start
            for header, end in turns:
                opens = not before and not pieces
                ids, prefixed = self._header_ids(header, opens, opens or self._ends_special(before))
                pieces.append(Turn(ids, self._literal_ids(end, False), prefixed or (not header and not pieces)))
                before = end
            self._template_cache[roles] = Template(self._literal_ids(start, bool(start)), pieces)
        return self._template_cache[roles]

    def generation_prompt(self, roles: tuple[str, ...]) -> list[int]:
        """Return the ids that the template adds after messages of `roles` to make the assistant answer."""
        return list(self._literal_ids(chat.generation_prompt(self.settings["template"], roles, self._variables), False))

    @property
    def _variables(self) -> dict[str, str]:
        return {f"{role}_token": content for role, content in self.settings["named"].items()}

    def _header_ids(self, header: str, opens: bool, fresh: bool) -> tuple[Sequence[int], bool]:
        """Return (ids of a header, whether the content after it takes the dummy space).

        `opens`: nothing comes before; `fresh`: nothing or a special token does. A header that ends in a space hands it
        to the dummy, which gives the very tokens of the joined text ("[INST] " + "Hello" is "[INST]", "▁Hello"); the
        space stays a template token where no dummy exists.
        """
        dummy = opens or (fresh and self.prefix_space == "always")
        if self.prefix_space is None:
            return self._literal_ids(header, False), False
        if header.endswith(" "):
            return self._literal_ids(header[:-1], dummy), True
        content_is_fresh = self._ends_special(header) if header else fresh
        return self._literal_ids(header, dummy), content_is_fresh and self.prefix_space == "always"

    def _ends_special(self, literal: str) -> bool:
        return any(literal.endswith(content) for content in self._specials)

    def _literal_ids(self, literal: str, dummy: bool) -> list[int]:
        """Return the ids of template text, in which special tokens are special tokens.

        `dummy`: text at the very start gets the dummy space.
        """
        ids: list[int] = []
        at, strip_next = 0, False
        for match in [*self._special_pattern.finditer(literal), None] if self._specials else [None]:
            token = self._special_tokens[self._specials[match[0]]] if match else None
            text = literal[at : match.start() if match else len(literal)]
            text = text.lstrip() if strip_next else text
            text = text.rstrip() if token is not None and token.lstrip else text
            if text:
                ids += self.text_ids([text], [dummy if at == 0 else self.prefix_space == "always"])[0]
            if match and token is not None:
                ids.append(self._specials[match[0]])
                at, strip_next = match.end(), token.rstrip
        return ids

    @cached_property
    def _special_pattern(self) -> re.Pattern[str]:
        longest_first = sorted(self._specials, key=len, reverse=True)
        return re.compile("|".join(re.escape(content) for content in longest_first))

    @cached_property
    def _misread(self) -> re.Pattern[str] | None:
        """What in a text the tokenizer would take for something else, None for nothing.

        The space mark of SentencePiece, which would come back as a space; and, where the model itself has special
        tokens among its pieces (a Unigram vocabulary that lists `</s>`), their text and that of byte fallbacks.
        """
        emits = self._model_emits_specials()
        literals = list(self._specials) if emits else []
        if self.settings["byte_function"] == "sentencepiece" and self.settings["mark"] != " ":
            literals.append(self.settings["mark"])
        patterns = [re.escape(literal) for literal in sorted(literals, key=len, reverse=True)]
        patterns += ["<0x[0-9A-F]{2}>"] if emits and self._fallbacks else []
        return re.compile("|".join(patterns)) if patterns else None

    def _model_emits_specials(self) -> bool:
        for form in ("{}", "a{}a", "a {} a"):
            texts = [form.format(content) for content in self._specials]
            found = self._tokenizer.encode_batch_fast(texts, add_special_tokens=False)
            if any(i in item.ids for i, item in zip(self._specials.values(), found, strict=True)):
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


def read_settings(folder: Path) -> dict[str, Any] | None:
    """Return the settings in a folder written by the tokenizer stage, None for another folder."""
    path = folder / SETTINGS_FILE
    try:
        return json.loads(path.read_text(encoding="utf-8")) if path.is_file() else None
    except ValueError as error:
        raise UserError(f"{path} cannot be read ({error}): remove {folder} and run snakemake again.") from None
