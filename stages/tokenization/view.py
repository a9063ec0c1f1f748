"""ByteView: a Hugging Face tokenizer as bytes."""

from __future__ import annotations

import copy
import json
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from functools import cached_property
from itertools import compress
from operator import itemgetter
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from stages.core.errors import UserError
from stages.tokenization import encoding, sources
from stages.tokenization.byte_functions import byte_function, is_fallback
from stages.tokenization.definition import without_prefix_space
from stages.tokenization.layout import END, HEADER, SLOTS_PER_MESSAGE, Layout, Part
from stages.tokenization.rendering import Message
from stages.tokenization.spec import TokenizerSpec
from stages.tokenization.template import PLAIN_ROLES, Template

if TYPE_CHECKING:
    from tokenizers import Tokenizer

BOUNDARY_BYTES = {"space": 0x20, "tab": 0x09, "newline": 0x0A}
DEFAULT_BOUNDARY = "space+tab+newline+special"


class Turn(NamedTuple):
    """Token ids of the template around a message's content."""

    header: Sequence[int]
    end: Sequence[int]


class ByteView:
    """A tokenizer whose every token is bytes. Make one with `load`, or `of`.

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
        self._template_pieces: dict[int, tuple[Layout, list[Part | tuple[int, int]]]] = {}
        self._read_vocabulary()
        variables = {f"{role}_token": content for role, content in settings["named"].items()}
        self.template = Template(settings["template"], variables, list(self._specials), self.name)
        self._name_specials()

    @classmethod
    def load(cls, folder: Path) -> ByteView:
        """Load from a folder of the tokenizer stage, or from any folder with a tokenizer.json.

        UserError when it has none, or when the tokenizer loses bytes.
        """
        folder = Path(folder)
        settings = sources.read_settings(folder)
        if settings is None:
            return cls.of(sources.prepare(folder, TokenizerSpec(str(folder))), folder)
        from tokenizers import Tokenizer

        path = folder / "tokenizer.json"
        unprefixed = None
        try:
            tokenizer = Tokenizer.from_file(str(path))
            if settings["prefix_space"]:
                unprefixed = sources.built(without_prefix_space(json.loads(path.read_text(encoding="utf-8"))))
        except Exception as error:  # the tokenizers library has no other
            raise UserError(f"{path} cannot be read ({error}): remove {folder} and run snakemake again.") from None
        return cls(tokenizer, unprefixed, settings, folder)

    @classmethod
    def of(cls, prepared: sources.Prepared, folder: Path) -> ByteView:
        """Return the view of a prepared tokenizer."""
        prefixed = prepared.settings["prefix_space"]
        unprefixed = sources.built(without_prefix_space(prepared.tokenizer)) if prefixed else None
        return cls(sources.built(prepared.tokenizer), unprefixed, prepared.settings, folder)

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
        turns = self.turns()
        header = [i for i in turns[2].header if i in self.special_ids]
        end = [i for i in turns[1].end if i in self.special_ids]
        for role, ids in (("header", header[:1]), ("end_header", header[1:]), ("end_of_turn", end)):
            if ids:
                self.roles.setdefault(role, ids[0])
        self.role_of: dict[int, str] = dict.fromkeys(sorted(self.special_ids), "special")
        for role in ("end_header", "header", "end_of_turn", "unk", "pad", "bos", "eos"):
            if role in self.roles:
                self.role_of[self.roles[role]] = role

    def limited(self, rows: int, model: str) -> ByteView:
        """Return this tokenizer without its ids from `rows` on, for which the model called `model` has no row.

        UserError when a text or the template can need one of them.
        """
        if rows >= self.vocab_size:
            return self
        template = {piece[1] for piece in self.template_pieces(self.template.plain()) if not isinstance(piece, Part)}
        needed = {i for role, i in self.roles.items() if role not in ("pad", "unk")} | template
        missing = [i for i in range(rows, self.vocab_size) if self.token_bytes[i] is not None or i in needed]
        if missing:
            raise UserError(
                f"Model {model!r} has {rows} embedding rows but tokenizer {self.name!r} has {self.vocab_size} ids, of "
                f"which {missing[0]} ({self.string_of(missing[0])!r}) can stand in a text: give the model the "
                "tokenizer it was trained with, or initialize it for this one."
            )
        view = copy.copy(self)
        view.__dict__.pop("id_of_bytes", None)
        view.vocab_size = rows
        view.token_bytes, view._joinable = self.token_bytes[:rows], self._joinable[:rows]
        view.lengths, view.first_bytes = self.lengths[:rows], self.first_bytes[:rows]
        view._special_mask = self._special_mask[:rows]
        view._specials = {content: i for content, i in self._specials.items() if i < rows}
        view._special_tokens = {i: token for i, token in self._special_tokens.items() if i < rows}
        view.special_ids = frozenset(view._special_tokens)
        view.roles = {role: i for role, i in self.roles.items() if i < rows}
        view.role_of = {i: role for i, role in self.role_of.items() if i < rows}
        view.pad_id = view.roles.get("pad", view.eos_id if view.eos_id is not None else 0)
        return view

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
        """Encode examples whose slots are {"role", "text", "loss"} and perhaps "extra", as in the EXAMPLES schema.

        Plain text (role "text"): [start][text][eos if the document ends]; a chat: what the template renders. Trained
        are the texts with `loss`, the end of turn after one, and a plain text's eos.
        """
        return encoding.encode_examples(self, slots_per_example, ends_document)

    def encode_prompts(
        self, slots_per_example: Sequence[Sequence[Mapping[str, Any]]], thinking: bool | None = None
    ) -> encoding.EncodedBatch:
        """Encode chats as `encode_examples` does, each with what the template adds to make the assistant answer.

        `thinking`: the template's variable enable_thinking; None leaves it undefined.
        """
        return encoding.encode_examples(self, slots_per_example, None, prompted=True, thinking=thinking)

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

    def leads(self, messages: Sequence[Message], thinking: bool | None = None) -> tuple[str, str]:
        """Return `Template.leads`, the dummy space that the tokenizer puts before an answer with them."""
        written, given = self.template.leads(messages, thinking)
        if written or given or self.prefix_space != "always":
            return written, given
        prompt = encoding.encode_examples(
            self, [[m._asdict() | {"loss": False} for m in messages]], None, prompted=True, thinking=thinking
        )
        fresh = not len(prompt.ids) or int(prompt.ids[-1]) in self.special_ids
        return (" " if fresh else ""), ""

    def turns(self) -> list[Turn]:
        """Return the ids of the template around the contents of two rounds of user and assistant."""
        layout = self.template.plain()
        slots = [number * SLOTS_PER_MESSAGE for number in range(len(PLAIN_ROLES))]
        return [Turn(*(self.template_ids(layout, slot + kind) for kind in (HEADER, END))) for slot in slots]

    def template_pieces(self, layout: Layout) -> list[Part | tuple[int, int]]:
        """Return a layout's parts, with (slot, id) for each special token of its template text."""
        known = self._template_pieces.get(id(layout))
        if known is None:
            known = self._template_pieces[id(layout)] = (layout, self._cut_at_specials(layout.parts))
        return known[1]

    def _cut_at_specials(self, parts: Sequence[Part]) -> list[Part | tuple[int, int]]:
        """Cut template text at special tokens, which take the whitespace beside them where their flags say so."""
        found: list[Part | tuple[int, int]] = []
        strip_next = False
        for part in parts:
            if part.content or not self._specials:
                literal = part.literal.lstrip() if strip_next and part.literal else part.literal
                strip_next = strip_next and literal == ""
                found += [replace(part, literal=literal)] if literal != "" else []
                continue
            at, text = 0, part.literal or ""
            for match in [*self._special_pattern.finditer(text), None]:
                literal = text[at : match.start() if match else len(text)]
                literal = literal.lstrip() if strip_next else literal
                strip_next = strip_next and not literal
                found += [replace(part, literal=literal)] if literal else []
                if match:
                    token = self._special_tokens[self._specials[match[0]]]
                    if token.lstrip:
                        _strip_end(found)
                    found.append((part.slot, self._specials[match[0]]))
                    at, strip_next = match.end(), token.rstrip
        return found

    def template_ids(self, layout: Layout, slot: int) -> list[int]:
        """Return the ids of the template text of a slot, by itself."""
        ids: list[int] = []
        for piece in self.template_pieces(layout):
            if not isinstance(piece, Part):
                ids += [piece[1]] if piece[0] == slot else []
            elif piece.slot == slot and not piece.content and piece.literal:
                ids += self.text_ids([piece.literal], [self.prefix_space == "always"])[0]
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


def _strip_end(pieces: list[Part | tuple[int, int]]) -> None:
    """Take the whitespace from the end of the last pieces, in place."""
    while pieces and isinstance(pieces[-1], Part) and pieces[-1].literal is not None:
        literal = pieces[-1].literal.rstrip()
        if literal:
            pieces[-1] = replace(pieces[-1], literal=literal)
            return
        pieces.pop()


def _text_mode(tokenizer: Tokenizer) -> Tokenizer:
    tokenizer.no_truncation()
    tokenizer.no_padding()
    tokenizer.encode_special_tokens = True
    return tokenizer
