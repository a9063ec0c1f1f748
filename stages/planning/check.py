"""Check a config against the schema; every error is one sentence that names the key and the fix."""

import difflib
import math
import re
from collections.abc import Hashable
from datetime import date, datetime
from pathlib import Path
from typing import Any

from stages.core.errors import UserError

NAME = re.compile(r"[a-z0-9][a-z0-9._-]*")
NAMED = ("corpora", "tokenizers", "models", "experiments")


def refuse_duplicate_keys(paths: list[Path]) -> None:
    """Refuse config files in which one mapping has the same key twice, which YAML would silently drop.

    Such files lose an experiment of two with one name. UserError names file, line and key.
    """
    import yaml

    class Loader(yaml.SafeLoader):
        pass

    def mapping(loader: Loader, node: yaml.MappingNode) -> dict:
        seen: dict[Any, int] = {}
        for key_node, _ in node.value:
            key = loader.construct_object(key_node, deep=True)
            line = key_node.start_mark.line + 1
            if not isinstance(key, Hashable):
                continue
            if key in seen:
                raise UserError(
                    f"{path}, line {line}: `{key}` was already given in line {seen[key]}; rename one of the two."
                )
            seen[key] = line
        return loader.construct_mapping(node, deep=True)

    Loader.add_constructor(yaml.resolver.BaseResolver.DEFAULT_MAPPING_TAG, mapping)
    for path in paths:
        try:
            yaml.load(Path(path).read_text(encoding="utf-8"), Loader=Loader)
        except yaml.YAMLError as error:
            raise UserError(f"{path} is not YAML: {' '.join(str(error).split())}") from None


def nearest(word: str, known: list[str]) -> str:
    """Return the end of a sentence about an unknown word: the nearest known one, or all of them."""
    close = difflib.get_close_matches(str(word), known, n=1, cutoff=0.6)
    return f"did you mean `{close[0]}`?" if close else f"known: {', '.join(sorted(known))}."


def validate(value: Any, schema: dict, definition: str | None, where: str) -> Any:
    """Return `value` with defaults filled in, checked against the schema or one of its `$defs`.

    `where` is the dotted place of `value` in the config, used in the message. UserError for the first fault.
    """
    from jsonschema import Draft202012Validator
    from jsonschema.validators import extend

    # JSON has no infinity and no NaN, YAML has: they are numbers to no setting.
    finite = Draft202012Validator.TYPE_CHECKER.redefine(
        "number", lambda checker, found: checker.is_type(found, "integer") or _is_finite(found)
    )
    target = {"$ref": f"#/$defs/{definition}", "$defs": schema["$defs"]} if definition else schema
    errors = sorted(
        extend(Draft202012Validator, type_checker=finite)(target).iter_errors(value),
        key=lambda error: [str(part) for part in error.path],
    )
    if errors:
        raise UserError(_sentence(errors[0], where))
    return with_defaults(value, schema["$defs"][definition] if definition else schema, schema["$defs"])


def with_defaults(value: Any, schema: dict, definitions: dict) -> Any:
    """Return a copy of `value` in which every absent key with a default in the schema is filled in."""
    schema = _resolved(schema, definitions)
    if isinstance(value, list):
        return [with_defaults(item, schema.get("items", {}), definitions) for item in value]
    if not isinstance(value, dict):
        return value
    properties = schema.get("properties", {})
    filled = dict(value)
    for key, sub in properties.items():
        resolved = _resolved(sub, definitions)
        if key not in filled and "default" in resolved:
            filled[key] = resolved["default"]
    other = schema.get("additionalProperties")
    for key in filled:
        sub = properties.get(key, other if isinstance(other, dict) else {})
        filled[key] = with_defaults(filled[key], sub, definitions)
    return filled


def _resolved(schema: dict, definitions: dict) -> dict:
    """Return the definition that a schema refers to, with what the schema itself says laid over it."""
    name = schema.get("$ref", "").rpartition("/")[2]
    return merged(definitions[name], schema) if name else schema


def merged(base: dict, overrides: dict) -> dict:
    """Return `base` with `overrides` laid over it, mapping by mapping."""
    result = dict(base)
    for key, value in overrides.items():
        result[key] = (
            merged(result[key], value) if isinstance(value, dict) and isinstance(result.get(key), dict) else value
        )
    return result


def check_names(config: dict) -> None:
    """Refuse names that cannot be a path component; UserError names the entry."""
    evaluation = config["evaluation"]
    sections = {section: config[section] for section in (*NAMED, "resources")}
    sections |= {f"evaluation.{section}": evaluation[section] for section in ("suites", "tasks")}
    for section, entries in sections.items():
        for name in entries:
            check_name(name, section)


def check_name(name: Any, section: str) -> None:
    """Refuse `name` unless it is text that matches [a-z0-9][a-z0-9._-]*, for it becomes a path component."""
    check_is_text(name, section)
    if not NAME.fullmatch(name):
        raise UserError(
            f"{section}: the name `{name}` becomes a file name and must start with a lower-case letter or digit and go "
            "on with lower-case letters, digits, '.', '_' or '-' (no path separators); rename it."
        )


def check_is_text(name: Any, section: str) -> None:
    """Refuse a name that YAML reads as something else: 1, 2.5, yes, null, 2026-01-01."""
    if not isinstance(name, str):
        raise UserError(f"{section}: the name `{name}` is {_kind(name)} to YAML, not text; write it in quotes.")


def _sentence(error: Any, where: str) -> str:
    place = ".".join([part for part in [where, *map(str, error.absolute_path)] if part])
    value, kind = error.instance, error.validator
    start = f"Config: `{place}`" if place else "Config"
    if kind == "additionalProperties":
        known = list(error.schema.get("properties", {}))
        unknown = next(key for key in value if key not in known)
        full = f"{place}.{unknown}" if place else str(unknown)
        return f"Config: `{full}` is not a key of this section; {nearest(unknown, known)}"
    if kind == "required":
        missing = next(key for key in error.validator_value if key not in value)
        return f"{start} lacks the key `{missing}`; add it."
    if kind == "type":
        return (
            f"{start} is {_shown(value)} but must be {_types(error.validator_value)}; correct it.{_float_hint(value)}"
        )
    if kind == "enum":
        return f"{start} is {_shown(value)}; {nearest(value, [str(item) for item in error.validator_value])}"
    if kind == "pattern":
        return (
            f"{start} is {_shown(value)}: only lower-case letters, digits, '.', '_' and '-' may stand there "
            "(no path separators)."
        )
    bounds = {
        "minimum": "at least",
        "maximum": "at most",
        "exclusiveMinimum": "more than",
        "exclusiveMaximum": "less than",
    }
    if kind in bounds:
        return f"{start} is {_shown(value)} but must be {bounds[kind]} {error.validator_value}; correct it."
    return f"{start}: {error.message}."


def _is_finite(value: Any) -> bool:
    return isinstance(value, float) and math.isfinite(value)


def _shown(value: Any) -> str:
    if isinstance(value, float) and not _is_finite(value):
        return f"{value} (not a finite number)"
    return "empty" if value is None else f"{value!r} ({_kind(value)})"


def _kind(value: Any) -> str:
    names = {
        bool: "true or false", str: "text", int: "a whole number", float: "a number", list: "a list",
        dict: "a mapping", date: "a date", datetime: "a time", type(None): "nothing",
    }  # fmt: skip
    return names.get(type(value), type(value).__name__)


def _types(types: str | list[str]) -> str:
    words = {
        "string": "text", "integer": "a whole number", "number": "a number", "boolean": "true or false",
        "array": "a list", "object": "a mapping", "null": "null",
    }  # fmt: skip
    return " or ".join(words[name] for name in ([types] if isinstance(types, str) else types))


def _float_hint(value: Any) -> str:
    looks_like_number = isinstance(value, str) and re.fullmatch(r"[-+]?\d+(\.\d*)?[eE][-+]?\d+", value)
    return " YAML reads 1e-5 as text: write 1.0e-5." if looks_like_number else ""
