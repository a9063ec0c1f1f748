"""The files of a Hugging Face tokenizer, read and made exact: what is changed before it is seen as bytes.

Changes, each because bytes would be lost otherwise: Unicode normal forms (NFC, NFKC, ...) go, as in tokenkit;
truncation, padding and BPE dropout go; whitespace-eating flags of regular added tokens go; tokens that the
configuration names as special are flagged special, so that their text inside a document is text.
"""

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from stages.core.errors import UserError
from stages.tokenization.byte_functions import SPACE_MARK, byte_alphabet

FILES = (
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "chat_template.jinja",
    "chat_template.json",
)
NAMED_ROLES = ("bos", "eos", "pad", "unk")
NORMAL_FORMS = ("NFC", "NFD", "NFKC", "NFKD")


@dataclass
class Definition:
    """A tokenizer's files: `tokenizer` is the parsed tokenizer.json, `named` maps bos, eos, pad, unk to strings.

    `variables`: what its template can name besides them (`sep_token`, `image_token`).
    """

    name: str
    tokenizer: dict[str, Any]
    named: dict[str, str] = field(default_factory=dict)
    template: str | None = None
    max_length: int | None = None
    variables: dict[str, str] = field(default_factory=dict)


def read_definition(folder: Path, name: str) -> Definition:
    """Read a tokenizer folder and make it exact; UserError when it has no readable fast tokenizer."""
    path = folder / "tokenizer.json"
    if not path.is_file():
        raise UserError(
            f"Tokenizer {name}: {folder} has no tokenizer.json; save it as a fast tokenizer (`save_pretrained`) first."
        )
    tokenizer = _read_json(path)
    if "model" not in tokenizer:
        raise UserError(f"Tokenizer {name}: {path} has no model; it is not a tokenizer.json of the tokenizers library.")
    config = _read_json(folder / "tokenizer_config.json", required=False)
    named_tokens = _read_json(folder / "special_tokens_map.json", required=False) | config
    named = {role: _content(named_tokens.get(f"{role}_token")) for role in NAMED_ROLES}
    named = {role: content for role, content in named.items() if content}
    if unknown := _unknown_token(tokenizer["model"]):
        named["unk"] = unknown
    variables = _variables(named_tokens)
    template = _template(folder, config)
    definition = Definition(name, tokenizer, named, template, config.get("model_max_length"), variables)
    for _, token in sorted(config.get("added_tokens_decoder", {}).items(), key=lambda item: int(item[0])):
        if token["content"] not in {known["content"] for known in tokenizer.get("added_tokens", [])}:
            add_token(tokenizer, token["content"], bool(token.get("special")), token)
    make_exact(tokenizer)
    for content in [*named.values(), *variables.values(), *_extra(named_tokens)]:
        add_token(tokenizer, content)
    return definition


def make_exact(tokenizer: dict[str, Any]) -> None:
    """Drop, in place, the parts of a tokenizer.json that would change or cut text."""
    tokenizer["truncation"] = tokenizer["padding"] = None
    if "dropout" in tokenizer["model"]:
        tokenizer["model"]["dropout"] = None
    tokenizer["normalizer"] = _without(tokenizer.get("normalizer"), lambda part: part["type"] in NORMAL_FORMS)
    tokenizer.setdefault("added_tokens", [])
    for token in tokenizer["added_tokens"]:
        if not token["special"]:
            token["lstrip"] = token["rstrip"] = False


def add_token(
    tokenizer: dict[str, Any], content: str, special: bool = True, flags: Mapping[str, Any] | None = None
) -> int:
    """Make `content` an added token of a tokenizer.json, flagged special if asked; return its id (new ones last).

    `flags`: of a new one, how it is matched (lstrip, ...); none by default.
    """
    for token in tokenizer["added_tokens"]:
        if token["content"] == content:
            token["special"] = token["special"] or special
            return token["id"]
    vocabulary = model_vocabulary(tokenizer)
    used = [*vocabulary.values(), *(token["id"] for token in tokenizer["added_tokens"])]
    identity = vocabulary.get(content, max(used, default=-1) + 1)
    matching = {flag: bool((flags or {}).get(flag)) for flag in ("single_word", "lstrip", "rstrip", "normalized")}
    tokenizer["added_tokens"].append({"id": identity, "content": content, **matching, "special": special})
    tokenizer["added_tokens"].sort(key=lambda token: token["id"])
    return identity


def model_vocabulary(tokenizer: dict[str, Any]) -> dict[str, int]:
    """Return token string -> id of a tokenizer.json's model, without added tokens."""
    vocabulary = tokenizer["model"]["vocab"]
    if isinstance(vocabulary, list):
        return {piece: i for i, (piece, _) in enumerate(vocabulary)}
    return vocabulary


def to_bytes_only(tokenizer: dict[str, Any], specials: list[str]) -> None:
    """Replace, in place, a tokenizer by pure bytes: ids 0..255 are the bytes, then `specials`, sorted.

    The ids agree with tokenkit's byte checkpoints, whose multi-byte template words (`user`, a blank line) are gone.
    """
    byte_level = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": False}
    model = {
        "type": "BPE",
        "dropout": None,
        "unk_token": None,
        "continuing_subword_prefix": None,
        "end_of_word_suffix": None,
    }
    model |= {"fuse_unk": False, "byte_fallback": False, "ignore_merges": False, "merges": []}
    model["vocab"] = {character: byte for byte, character in enumerate(byte_alphabet())}
    tokenizer.update(
        normalizer=None,
        pre_tokenizer=byte_level,
        post_processor=None,
        decoder=dict(byte_level),
        model=model,
        added_tokens=[],
    )
    for content in sorted(specials):
        add_token(tokenizer, content)


def prepend_space(tokenizer: dict[str, Any]) -> None:
    """Make a tokenizer put a space before any text that does not begin with one (`manual_add_prefix_space`)."""
    existing = tokenizer.get("pre_tokenizer")
    # A normalizer cannot: its regular expressions may not match nothing, and Prepend does not look what is there.
    mark = " " if '"ByteLevel"' in json.dumps(existing) else SPACE_MARK
    prefix = {"type": "Metaspace", "replacement": mark, "prepend_scheme": "first", "split": False}
    tokenizer["pre_tokenizer"] = {"type": "Sequence", "pretokenizers": [prefix, *([existing] if existing else [])]}


def without_prefix_space(tokenizer: dict[str, Any]) -> dict[str, Any]:
    """Return a tokenizer.json that adds no dummy space, sharing its vocabulary with `tokenizer`."""
    normalizer = _without(tokenizer.get("normalizer"), lambda part: part["type"] == "Prepend")
    return tokenizer | {"normalizer": normalizer, "pre_tokenizer": _unprefixed(tokenizer.get("pre_tokenizer"))}


def prefixes_every_section(tokenizer: dict[str, Any]) -> bool:
    """Return whether the dummy space comes after every special token, not only at the start of the text."""
    return '"prepend_scheme": "first"' not in json.dumps(tokenizer.get("pre_tokenizer"))


def _unprefixed(part: dict[str, Any] | None) -> dict[str, Any] | None:
    if part is None:
        return None
    if part["type"] == "Sequence":
        return part | {"pretokenizers": [_unprefixed(inner) for inner in part["pretokenizers"]]}
    if part["type"] == "Metaspace":
        kept = {key: value for key, value in part.items() if key not in ("add_prefix_space", "str_rep")}
        return kept | {"prepend_scheme": "never"}
    return part | {"add_prefix_space": False} if "add_prefix_space" in part else part


def _without(part: dict[str, Any] | None, drop: Any) -> dict[str, Any] | None:
    if part is None or drop(part):
        return None
    if part["type"] != "Sequence":
        return part
    kept = [inner for inner in (_without(inner, drop) for inner in part["normalizers"]) if inner is not None]
    return part | {"normalizers": kept} if kept else None


def _unknown_token(model: dict[str, Any]) -> str | None:
    """Return the token that a model puts for what it does not know; configurations often name another."""
    if model.get("unk_id") is not None:
        return model["vocab"][model["unk_id"]][0]
    unknown = model.get("unk_token")
    return unknown if unknown in model["vocab"] else None


def _content(value: Any) -> str | None:
    return value.get("content") if isinstance(value, dict) else value


def _variables(named_tokens: dict[str, Any]) -> dict[str, str]:
    """Return the special tokens that a template can name, as transformers gives them, without those of NAMED_ROLES."""
    found = {key: value for key, value in named_tokens.items() if key.endswith("_token")}
    for key in ("extra_special_tokens", "model_specific_special_tokens"):
        if isinstance(named_tokens.get(key), dict):
            found |= named_tokens[key]
    contents = {key: _content(value) for key, value in found.items()}
    own = {f"{role}_token" for role in NAMED_ROLES}
    return {key: content for key, content in contents.items() if isinstance(content, str) and key not in own}


def _extra(named_tokens: dict[str, Any]) -> list[str]:
    """Return the contents of additional or extra special tokens, which are lists or, in new files, a map."""
    found = []
    for key in ("additional_special_tokens", "extra_special_tokens"):
        value = named_tokens.get(key) or []
        found += [_content(item) for item in (value.values() if isinstance(value, dict) else value)]
    return [content for content in found if content]


def _template(folder: Path, config: dict[str, Any]) -> str | None:
    path = folder / "chat_template.jinja"
    if path.is_file():
        return path.read_text(encoding="utf-8")
    template = _read_json(folder / "chat_template.json", required=False).get(
        "chat_template", config.get("chat_template")
    )
    if isinstance(template, list):
        template = {entry["name"]: entry["template"] for entry in template}
    if isinstance(template, dict):
        template = template.get("default") or next(iter(template.values()), None)
    return template


def _read_json(path: Path, required: bool = True) -> dict[str, Any]:
    if not required and not path.is_file():
        return {}
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise UserError(
            f"{path} cannot be read as JSON ({error}): restore it or download the tokenizer again."
        ) from None
    if not isinstance(value, dict):
        raise UserError(f"{path} holds a {type(value).__name__}, expected a JSON object.")
    return value
