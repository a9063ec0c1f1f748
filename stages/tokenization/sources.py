"""Turn a tokenizer folder and a spec into an exact tokenizer: probe its byte function, apply conversions, write it."""

import hashlib
import json
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from stages.core.errors import UserError
from stages.tokenization.byte_functions import BYTE_FUNCTIONS, PROBES, SPACE_MARK, byte_function
from stages.tokenization.definition import (
    Definition,
    add_token,
    model_vocabulary,
    prefixes_every_section,
    prepend_space,
    read_definition,
    to_bytes_only,
)
from stages.tokenization.kinds import kind_named
from stages.tokenization.rendering import plain_template, template_of_kind
from stages.tokenization.spec import TokenizerSpec

if TYPE_CHECKING:
    from tokenizers import Tokenizer


SETTINGS_FILE = "byte_view.json"


@dataclass
class Prepared:
    """An exact tokenizer to be written: parsed tokenizer.json, settings of the byte view, tokenizer_config.json."""

    tokenizer: dict[str, Any]
    settings: dict[str, Any]
    config: dict[str, Any]


def prepare(folder: Path, spec: TokenizerSpec) -> Prepared:
    """Read the tokenizer in `folder`, apply `spec`, and make sure that no byte is lost.

    UserError, naming the tokenizer, when it is not a fast tokenizer or when text does not come back.
    """
    try:
        definition = read_definition(folder, spec.name)
    except (LookupError, TypeError, AttributeError, ValueError) as error:
        raise UserError(
            f"Tokenizer {spec.name}: the files in {folder} are not as transformers writes them "
            f"({type(error).__name__}: {error}); save it with save_pretrained again."
        ) from None
    tokenizer = definition.tokenizer
    source = kind_named(spec.source, spec.name) if spec.source else None
    kind = kind_named(spec.kind, spec.name) if spec.kind else None
    function = source.byte_function if source else None
    for content in kind.specials if kind else ():
        add_token(tokenizer, content)
    if kind:
        named = {"bos": kind.bos, "eos": kind.eos, "pad": kind.pad, "unk": definition.named.get("unk")}
        definition.named = {role: content for role, content in named.items() if content}
        definition.template = template_of_kind(kind)
    if spec.conversion == "byte":
        to_bytes_only(tokenizer, list(kind.specials) if kind else _specials(tokenizer))
        function = "byte_level"
    elif spec.conversion == "prebyteified":
        function = "byte_level"
    elif spec.conversion == "manual_add_prefix_space":
        prepend_space(tokenizer)
    return settle(definition, spec, function)


def settle(definition: Definition, spec: TokenizerSpec, function: str | None) -> Prepared:
    """Probe a tokenizer and complete it to what is written; `function` names its byte function if known."""
    tokenizer, named = definition.tokenizer, definition.named
    if definition.template is None:
        start = named.get("bos") or named.get("eos") or ""
        definition.template = plain_template(start, named.get("eos", ""))
    settings: dict[str, Any] = {
        "name": spec.name,
        "kind": spec.kind,
        "conversion": spec.conversion,
        "mark": _space_mark(tokenizer),
        "subword_prefix": _subword_prefix(tokenizer),
        "named": named,
        "variables": definition.variables | {f"{role}_token": content for role, content in named.items()},
        "template": definition.template,
    }
    made = built(tokenizer)
    _check_ids(tokenizer, made, spec.name)
    settings["byte_function"], prefixed = _probe(made, settings, function)
    settings["prefix_space"] = ("always" if prefixes_every_section(tokenizer) else "first") if prefixed else None
    described = {key: value for key, value in settings.items() if key != "name"}
    content = json.dumps([tokenizer, described], sort_keys=True, ensure_ascii=True)
    settings["digest"] = hashlib.sha256(content.encode()).hexdigest()[:32]
    config = settings["variables"] | {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "clean_up_tokenization_spaces": False,
    }
    if definition.max_length is not None:
        config["model_max_length"] = definition.max_length
    return Prepared(tokenizer, settings, config)


def write(prepared: Prepared, folder: Path) -> None:
    """Write tokenizer.json, tokenizer_config.json, chat_template.jinja and byte_view.json into `folder`."""
    _dump(folder / "tokenizer.json", prepared.tokenizer)
    _dump(folder / "tokenizer_config.json", prepared.config)
    _dump(folder / SETTINGS_FILE, prepared.settings)
    (folder / "chat_template.jinja").write_text(prepared.settings["template"], encoding="utf-8")


def _check_ids(tokenizer: dict[str, Any], made: "Tokenizer", name: str) -> None:
    """Refuse ids that name two tokens, or that the library reads otherwise than the file has them.

    The library numbers added tokens on from the count of the model's tokens: behind a vocabulary with holes that is
    another id than the file's, and maybe one that is taken. Holes alone do no harm: such ids have no bytes.
    """
    actual = made.get_vocab(with_added_tokens=True)
    written = model_vocabulary(tokenizer) | {token["content"]: token["id"] for token in tokenizer["added_tokens"]}
    holder: dict[int, str] = {}
    for token, identity in sorted(actual.items()):
        wanted, other = written.get(token, identity), holder.setdefault(identity, token)
        if wanted == identity and other == token:
            continue
        what = f"id {identity} for {token!r}"
        what += f" instead of {wanted}" if wanted != identity else f", which {other!r} has"
        raise UserError(
            f"Tokenizer {name}: the tokenizers library reads {what}. Its ids have holes or double entries: give every "
            "id from 0 on to one token (unused ones for the holes)."
        )


def _probe(made: "Tokenizer", settings: dict[str, Any], function: str | None) -> tuple[str, bool]:
    """Return (name of the byte function, whether a dummy space is put before text).

    Tries the candidates on PROBES and takes the first that gives every byte back; `function` limits it to one.
    """
    made.encode_special_tokens = True
    unknown = made.token_to_id(settings["named"].get("unk", "")) if settings["named"].get("unk") else None
    losses = []
    for name in (function,) if function else BYTE_FUNCTIONS:
        convert = byte_function(name, settings["mark"], settings["subword_prefix"])
        loss, prefixed = _first_loss(made, convert, unknown)
        if loss is None:
            return name, prefixed
        losses.append(loss)
    # Of the candidate that came closest: that kept more of the probes, then that with the smaller difference.
    text, back = min(losses, key=lambda loss: (-PROBES.index(loss[0]), _distance(*loss)))
    raise UserError(
        f"Tokenizer {settings['name']} loses text: {text!r} comes back as {back!r}; use a tokenizer that keeps every "
        "byte (byte-level BPE, or SentencePiece with byte fallback), or name its `source=` kind."
    )


def _first_loss(tokenizer: "Tokenizer", convert: Any, unknown: int | None) -> tuple[tuple[str, str] | None, bool]:
    # As in ByteView: an added token that the model has too (Gemma's "▁▁") has the bytes of the model's.
    own = tokenizer.get_vocab(with_added_tokens=False)
    decoder = tokenizer.get_added_tokens_decoder()
    added = {i: token.content for i, token in decoder.items() if not token.special and token.content not in own}
    prefixed, kept = False, 0
    for text in PROBES:
        ids = tokenizer.encode(text, add_special_tokens=False).ids
        if unknown is not None and unknown in ids:
            continue
        kept += 1
        back = b"".join(added[i].encode() if i in added else convert(tokenizer.id_to_token(i)) for i in ids)
        if back == b" " + text.encode():
            prefixed = True
        elif back != text.encode():
            return (text, back.decode(errors="replace")), prefixed
    return (None if kept else (PROBES[0], tokenizer.id_to_token(unknown))), prefixed


def _distance(text: str, back: str) -> int:
    return sum(a != b for a, b in zip(text, back, strict=False)) + abs(len(text) - len(back))


def read_settings(folder: Path) -> dict[str, Any] | None:
    """Return the settings in a folder written by the tokenizer stage, None for another folder."""
    path = folder / SETTINGS_FILE
    try:
        return json.loads(path.read_text(encoding="utf-8")) if path.is_file() else None
    except ValueError as error:
        raise UserError(f"{path} cannot be read ({error}): remove {folder} and run snakemake again.") from None


def built(tokenizer: dict[str, Any]) -> "Tokenizer":
    """Return the tokenizer of a parsed tokenizer.json."""
    from tokenizers import Tokenizer

    try:
        return Tokenizer.from_str(json.dumps(tokenizer, ensure_ascii=False))
    except Exception as error:
        raise UserError(f"The tokenizers library cannot read this tokenizer.json ({error}).") from None


def _specials(tokenizer: dict[str, Any]) -> list[str]:
    return [token["content"] for token in tokenizer["added_tokens"] if token["special"]]


def _space_mark(tokenizer: dict[str, Any]) -> str:
    """Return the character that stands for a space: that of a Metaspace, or a Replace of " " in the normalizer."""
    parts = [tokenizer.get("pre_tokenizer"), tokenizer.get("normalizer")]
    for part in parts:
        for inner in (part or {}).get("pretokenizers", (part or {}).get("normalizers", [part])):
            if inner and inner["type"] == "Metaspace":
                return inner["replacement"]
            if inner and inner["type"] == "Replace" and inner["pattern"] == {"String": " "}:
                return inner["content"]
    return SPACE_MARK


def _subword_prefix(tokenizer: dict[str, Any]) -> str:
    return (
        (tokenizer["model"].get("continuing_subword_prefix") or "")
        if tokenizer["model"].get("type") == "WordPiece"
        else ""
    )


def _dump(path: Path, value: dict[str, Any]) -> None:
    path.write_text(
        json.dumps(value, ensure_ascii=False, indent=1, sort_keys=path.name != "tokenizer.json") + "\n",
        encoding="utf-8",
    )
