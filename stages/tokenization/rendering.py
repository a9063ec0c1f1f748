"""Rendering a chat template as transformers does, and what of a content a template can depend on.

Contents never pass through a template themselves: what does is their *shape*, in which every run of text that the
template cannot tell from another is one private character. So nothing in user text can become template, and one
rendering serves all conversations of the same shape.
"""

import datetime
import json
import re
from collections.abc import Iterator, Mapping, Sequence
from functools import cache
from typing import Any, NamedTuple

# Llama 3.1 prints a date: a fixed one, its own default, keeps artifacts the same on every day.
RENDER_DATE = datetime.datetime(2024, 7, 26)
# Fields of a message that hold the reasoning before an answer, and what marks it within a content.
REASONING = ("reasoning_content", "reasoning", "thinking")
THINK = ("<think>", "</think>")
REASONED = "reasoned"  # among the other fields of a message: its content begins with what a data set has in REASONING
FIRST_MARK = 0xF0000  # private characters stand for runs of text
# Methods of strings that look for their arguments anywhere in a content, and those that look at its ends, where
# whitespace stays as it is.
ANYWHERE = ("split", "rsplit", "partition", "rpartition", "replace", "find", "rfind", "index", "count")
AT_ENDS = ("startswith", "endswith", "strip", "lstrip", "rstrip", "removeprefix", "removesuffix")


class TemplateRefusal(Exception):
    """The template called `raise_exception`, cannot handle the messages, or is not valid Jinja."""


class Message(NamedTuple):
    """A message: its role, its content, and its other fields (tool calls, say) as JSON, "" for none."""

    role: str
    text: str
    extra: str = ""


class Shape(NamedTuple):
    """A content as a template sees it: `pieces` are verbatim strings, and None for each run of text in `runs`.

    `runs` are (start, end) in characters of the content. `blank`: the whole of a content that is whitespace alone,
    one run that a template may take away.
    """

    pieces: tuple[str | None, ...]
    runs: tuple[tuple[int, int], ...]
    blank: str = ""

    def marked(self, first: int) -> str:
        """Return the shape as text, its runs being the private characters number `first` on."""
        marks = iter(range(first, first + len(self.runs)))
        return "".join(chr(FIRST_MARK + next(marks)) if piece is None else piece for piece in self.pieces)


def shape_of(template: str, text: str) -> Shape:
    """Return the shape of a content: outer whitespace and what the template looks for stay as they are."""
    if text.isspace():
        return Shape((None,), ((0, len(text)),), text)
    pieces: list[str | None] = []
    runs: list[tuple[int, int]] = []
    at = 0
    pattern = _looked_for(template)
    for match in [*pattern.finditer(text), None] if pattern else [None]:
        end = match.start() if match else len(text)
        part = text[at:end]
        inner = part.strip()
        if inner:
            start = at + part.index(inner)
            runs.append((start, start + len(inner)))
            pieces += [part[: start - at], None, part[start - at + len(inner) :]]
        else:
            pieces.append(part)
        if match:
            pieces.append(match[0])
            at = match.end()
    joined: list[str | None] = []
    for piece in pieces:
        if piece is not None and joined and joined[-1] is not None:
            joined[-1] += piece
        elif piece != "":
            joined.append(piece)
    return Shape(tuple(joined), tuple(runs))


def render(
    template: str, messages: Sequence[Mapping[str, Any]], variables: Mapping[str, Any], prompted: bool = False
) -> str:
    """Return what transformers' `apply_chat_template` gives for messages before tokenization.

    `variables` holds bos_token and the like; `prompted` asks for the beginning of an answer. TemplateRefusal when the
    template does not take these messages.
    """
    import jinja2

    try:
        return _compiled(template).render(
            messages=messages, tools=None, documents=None, add_generation_prompt=prompted, **variables
        )
    except (jinja2.TemplateError, TypeError, ValueError, LookupError, AttributeError, ArithmeticError) as error:
        raise TemplateRefusal(str(error) or type(error).__name__) from None


def reads_reasoning(template: str) -> bool:
    """Return whether a template reads the reasoning of an answer from a field of its own."""
    return not _names(template).isdisjoint(REASONING)


@cache
def _looked_for(template: str) -> re.Pattern[str] | None:
    """Return a pattern of the strings that a template looks for in contents, None for none.

    Plain words are left out where they are sought with `in`: those are keys of messages.
    """
    from jinja2 import nodes

    found: set[str] = set()
    for call in _tree(template).find_all(nodes.Call):
        if isinstance(call.node, nodes.Getattr) and call.node.attr in (*ANYWHERE, *AT_ENDS):
            inside = call.node.attr in ANYWHERE
            found |= {text for text in _strings(call.args) if text.strip() or inside}
    for filtered in _tree(template).find_all(nodes.Filter):
        if filtered.name == "replace":
            found |= set(_strings(filtered.args))
    for compare in _tree(template).find_all(nodes.Compare):
        if any(operand.op in ("in", "notin") for operand in compare.ops):
            found |= {text for text in _strings([compare.expr]) if not re.fullmatch(r"\w+", text)}
    found |= set(THINK) if reads_reasoning(template) else set()
    wanted = sorted(found - {"", " "}, key=len, reverse=True)
    return re.compile("|".join(map(re.escape, wanted))) if wanted else None


def _strings(expressions: Sequence[Any]) -> Iterator[str]:
    from jinja2 import nodes

    for expression in expressions:
        if isinstance(expression, nodes.Const) and isinstance(expression.value, str):
            yield expression.value


@cache
def _names(template: str) -> frozenset[str]:
    from jinja2 import nodes

    tree = _tree(template)
    names = {node.attr for node in tree.find_all(nodes.Getattr)} | {node.name for node in tree.find_all(nodes.Name)}
    return frozenset(names | {node.value for node in tree.find_all(nodes.Const) if isinstance(node.value, str)})


@cache
def _tree(template: str) -> Any:
    return _environment().parse(template)


@cache
def _compiled(template: str) -> Any:
    return _environment().from_string(template)


@cache
def _environment() -> Any:
    import jinja2
    from jinja2.ext import Extension, loopcontrols
    from jinja2.sandbox import ImmutableSandboxedEnvironment

    class Generation(Extension):
        """`{% generation %}`, with which templates mark answers for transformers' assistant mask: its body alone."""

        tags = {"generation"}  # noqa: RUF012

        def parse(self, parser: Any) -> Any:
            next(parser.stream)
            return parser.parse_statements(("name:endgeneration",), drop_needle=True)

    def raise_exception(message: str) -> None:
        raise jinja2.TemplateError(message)

    def tojson(value: object, ensure_ascii: bool = False, **options: Any) -> str:
        return json.dumps(value, ensure_ascii=ensure_ascii, **options)

    environment = ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[loopcontrols, Generation]
    )
    environment.filters["tojson"] = tojson
    environment.globals["raise_exception"] = raise_exception
    environment.globals["strftime_now"] = RENDER_DATE.strftime
    return environment
