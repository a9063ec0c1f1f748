"""ByteView: a Hugging Face tokenizer as bytes, with its chat template."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from copy import copy
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from stages.core.errors import UserError
from stages.tokenization import encoding
from stages.tokenization.byte_tokens import ByteTokenizer
from stages.tokenization.chat import SLOTS_PER_MESSAGE, Chats
from stages.tokenization.definition import without_prefix_space
from stages.tokenization.rendering import ChatTemplate, asking
from stages.tokenization.sources import Prepared, built, prepare, read_settings
from stages.tokenization.spec import TokenizerSpec
from stages.tokenization.turns import PLAIN_ROLES

if TYPE_CHECKING:
    from tokenizers import Tokenizer

BOUNDARY_BYTES = {"space": 0x20, "tab": 0x09, "newline": 0x0A}
DEFAULT_BOUNDARY = "space+tab+newline+special"


class Turn(NamedTuple):
    """Token ids around a message's content."""

    header: list[int]
    end: list[int]


class Template(NamedTuple):
    """Token ids of a chat without its contents: the start slot, and one Turn per message."""

    start: list[int]
    turns: list[Turn]


class ByteView(ByteTokenizer):
    """A tokenizer whose every token is bytes, and whose chats are what its template renders. Make one with `load`.

    folder; role_of: special id -> role; chats: its chat template; more in ByteTokenizer.
    """

    def __init__(
        self, tokenizer: Tokenizer, unprefixed: Tokenizer | None, settings: Mapping[str, Any], folder: Path
    ) -> None:
        super().__init__(tokenizer, unprefixed, settings)
        self.folder = folder
        template = ChatTemplate(settings["template"], settings["variables"])
        self.chats = Chats(template, self)
        self._name_specials()

    @classmethod
    def load(cls, folder: Path) -> ByteView:
        """Load from a folder of the tokenizer stage, or from any folder with a tokenizer.json.

        UserError when it has none, or when the tokenizer loses bytes.
        """
        from tokenizers import Tokenizer

        folder = Path(folder)
        settings = read_settings(folder)
        if settings is None:
            return cls.of(prepare(folder, TokenizerSpec(str(folder))), folder)
        path = folder / "tokenizer.json"
        try:
            tokenizer = Tokenizer.from_file(str(path))
            definition = json.loads(path.read_text(encoding="utf-8")) if settings["prefix_space"] else None
            unprefixed = built(without_prefix_space(definition)) if definition else None
        except Exception as error:  # the tokenizers library has no other
            raise UserError(f"{path} cannot be read ({error}): remove {folder} and run snakemake again.") from None
        return cls(tokenizer, unprefixed, settings, folder)

    @classmethod
    def of(cls, prepared: Prepared, folder: Path) -> ByteView:
        """Return the view of a prepared tokenizer."""
        unprefixed = built(without_prefix_space(prepared.tokenizer)) if prepared.settings["prefix_space"] else None
        return cls(built(prepared.tokenizer), unprefixed, prepared.settings, folder)

    def __reduce__(self) -> tuple[Any, ...]:
        return ByteView.load, (self.folder,)

    def _name_specials(self) -> None:
        turns = self.chat_pieces(PLAIN_ROLES).turns[2:]
        header = [i for i in turns[0].header if i in self.special_ids]
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
        needed = {i for role, i in self.roles.items() if role not in ("pad", "unk")}
        needed |= set(self.encode_prompts([_words(PLAIN_ROLES)]).ids.tolist())
        missing = [i for i in range(rows, self.vocab_size) if self.token_bytes[i] is not None or i in needed]
        if missing:
            raise UserError(
                f"Model {model!r} has {rows} embedding rows but tokenizer {self.name!r} has {self.vocab_size} ids, of "
                f"which {missing[0]} ({self.string_of(missing[0])!r}) can stand in a text: give the model the "
                "tokenizer it was trained with, or initialize it for this one."
            )
        view = copy(self)
        view.cut_ids(rows)
        view.role_of = {i: role for i, role in self.role_of.items() if i < rows}
        return view

    def boundary_mask(self, mode: str = DEFAULT_BOUNDARY) -> np.ndarray:
        """Return bool [vocab]: the token starts with one of the boundary bytes of `mode`, or is special if it says so.

        `mode` is tokenkit's `space_mask_mode`: any of space, tab, newline, special joined by "+" (tokenkit has tab and
        newline swapped, this has not). UserError for another word.
        """
        mask = np.zeros(self.vocab_size, bool)
        for word in mode.split("+"):
            if word == "special":
                mask[list(self.special_ids)] = True
            elif word in BOUNDARY_BYTES:
                mask |= (self.first_bytes == BOUNDARY_BYTES[word]) & (self.lengths > 0)
            else:
                known = ", ".join([*BOUNDARY_BYTES, "special"])
                raise UserError(f"space_mask_mode {mode!r}: unknown word {word!r}; join some of {known} with +.")
        return mask

    def encode_texts(self, texts: Sequence[str]) -> list[encoding.Tokens]:
        """Encode raw texts: no special tokens are added, special-looking text is plain text."""
        return encoding.encode_texts(self, texts)

    def encode_examples(
        self, slots_per_example: Sequence[Sequence[Mapping[str, Any]]], ends_document: Sequence[bool] | None = None
    ) -> encoding.EncodedBatch:
        """Encode examples whose slots are as in the EXAMPLES schema, {"role", "text", "loss"} and perhaps "extra".

        Plain text (role "text"): [start][text][eos if the document ends]; a chat: what the template renders, special
        tokens in it as tokens. Trained are the texts with `loss`, the end of turn after one, and a plain text's eos;
        but not a turn of which the template leaves something out.
        """
        return encoding.encode_examples(self, self.chats, slots_per_example, ends_document)

    def encode_prompts(
        self, slots_per_example: Sequence[Sequence[Mapping[str, Any]]], thinking: bool | None = None
    ) -> encoding.EncodedBatch:
        """Encode examples as prompts: after a chat stands what makes the assistant answer, in the last slot.

        `thinking`: the template's variable enable_thinking; None leaves it undefined.
        """
        return encoding.encode_examples(self, self.chats, slots_per_example, None, asking(thinking))

    def leads(self, slots: Sequence[Mapping[str, Any]], thinking: bool | None = None) -> tuple[str, str]:
        """Return (what the model has to write before the text of its answer, what of the text it is given).

        The first is of the template, or the tokenizer's dummy space; the second is a block that the prompt opens.
        """
        written, given = self.chats.leads(slots, **asking(thinking))
        if written or given or self.prefix_space != "always":
            return written, given
        prompt = self.encode_prompts([slots], thinking).ids
        return " " if not len(prompt) or int(prompt[-1]) in self.special_ids else "", ""

    def untrained(self, slots: Sequence[Mapping[str, Any]]) -> int:
        """Return how many turns of an example with `loss` are not trained on; see `encode_examples`."""
        return 0 if encoding.is_plain(slots) else self.chats.untrained(slots)

    def chat_pieces(self, roles: tuple[str, ...]) -> Template:
        """Return the token ids around contents in a conversation of `roles`."""
        batch = self.encode_examples([_words(roles)])
        ids = [batch.ids[batch.slot == slot].tolist() for slot in range(SLOTS_PER_MESSAGE * len(roles) + 1)]
        return Template(ids[0], [Turn(*pair) for pair in zip(ids[1::3], ids[3::3], strict=True)])

    def generation_prompt(self, roles: tuple[str, ...]) -> list[int]:
        """Return the ids that the template adds after messages of `roles` to make the assistant answer."""
        batch = self.encode_prompts([_words(roles)])
        return batch.ids[batch.slot > SLOTS_PER_MESSAGE * len(roles)].tolist()


def _words(roles: Sequence[str]) -> list[dict[str, Any]]:
    return [{"role": role, "text": "x", "loss": False} for role in roles]
