"""Chat templates as slots: the literal text before and after each message's content, for any Jinja template.

A template is rendered with placeholder contents, as transformers renders it (`apply_chat_template`, sandboxed), and
cut at the placeholders. Contents never pass through the template, so nothing in user text can become template.
"""

import datetime
import json
from functools import cache
from os.path import commonprefix
from typing import Any

from stages.core.errors import UserError
from stages.tokenization.kinds import Kind

# Llama 3.1 prints a date: a fixed one, its own default, keeps artifacts the same on every day.
RENDER_DATE = datetime.datetime(2024, 7, 26)
PLAIN_ROLES = ("user", "assistant", "user", "assistant")


def template_of_kind(kind: Kind) -> str:
    """Return the Jinja chat template that a model kind's pieces make."""
    headers = kind.headers()
    branches = " ".join(
        f"{{%- {'if' if i == 0 else 'elif'} message['role'] == {_quote(role)} -%}}{{{{ {_quote(header)} }}}}"
        for i, (role, header) in enumerate(headers.items())
    )
    raising = "{%- else -%}{{ raise_exception('unknown role ' + message['role']) }}{%- endif -%}"
    turn = f"{branches}{raising}{{{{ message['content'] }}}}{{{{ {_quote(kind.end_of_turn)} }}}}"
    ending = f"{{%- if add_generation_prompt -%}}{{{{ {_quote(headers['assistant'])} }}}}{{%- endif -%}}"
    return f"{{{{ {_quote(kind.bos or '')} }}}}{{%- for message in messages -%}}{turn}{{%- endfor -%}}{ending}"


def plain_template(start: str, end: str) -> str:
    """Return the template of a tokenizer that has none: a start token, then each content closed by `end`."""
    turn = f"{{{{ message['content'] }}}}{{{{ {_quote(end)} }}}}"
    return f"{{{{ {_quote(start)} }}}}{{%- for message in messages -%}}{turn}{{%- endfor -%}}"


def literals(
    template: str, roles: tuple[str, ...], variables: dict[str, str], name: str
) -> tuple[str, list[tuple[str, str]]]:
    """Return (start, [(header, end of turn), ...]): the template's text around the content of each message.

    `variables` holds bos_token and the like; `name` names the tokenizer in errors. The start is the start token if the
    rendering begins with it. A conversation that the template refuses (a system turn for Gemma 2, two user turns in a
    row) is put together from the pieces of one that it takes, roles it does not know as user.
    """
    try:
        return _learn(template, roles, variables)
    except (TemplateRefusal, ValueError):
        pass
    try:
        start, pieces = _learn(template, PLAIN_ROLES, variables)
    except (TemplateRefusal, ValueError) as error:
        raise UserError(
            f"The chat template of tokenizer {name} cannot render a user and an assistant turn: {error}."
        ) from None
    user, assistant = pieces[2], pieces[3]
    composed = [
        _accepted_turn(template, role, variables) or (assistant if role == "assistant" else user) for role in roles
    ]
    if composed and roles[0] != "system":
        composed[0] = assistant if roles[0] == "assistant" else pieces[0]
    return start, composed


class TemplateRefusal(Exception):
    """The template called `raise_exception` or is not valid Jinja."""


def generation_prompt(template: str, roles: tuple[str, ...], variables: dict[str, str]) -> str:
    """Return what the template adds to make the assistant answer after messages of `roles`, "" when nothing."""
    messages = [{"role": role, "content": _placeholder(i)} for i, role in enumerate(roles)]
    without = _render(template, messages, variables)
    prompted = _render(template, messages, variables, add_generation_prompt=True)
    return prompted[len(without) :] if prompted.startswith(without) else ""


def _accepted_turn(template: str, role: str, variables: dict[str, str]) -> tuple[str, str] | None:
    """Return the pieces of a role that the template takes as a first turn (system), if it is not user or assistant."""
    if role in ("user", "assistant"):
        return None
    try:
        return _learn(template, (role, "user"), variables)[1][0]
    except (TemplateRefusal, ValueError):
        return None


def _learn(template: str, roles: tuple[str, ...], variables: dict[str, str]) -> tuple[str, list[tuple[str, str]]]:
    messages = [{"role": role, "content": _placeholder(i)} for i, role in enumerate(roles)]
    between = _cut(_render(template, messages, variables), len(roles))
    start_token = variables.get("bos_token") or variables.get("eos_token") or ""
    start = start_token if start_token and between[0].startswith(start_token) else ""
    headers, ends = [between[0][len(start) :]], []
    for i in range(1, len(roles)):
        try:
            closed = _cut(_render(template, messages[:i], variables), i)[-1]
        except TemplateRefusal:
            closed = ends[-1] if ends else ""
        end = commonprefix([between[i], closed])  # noqa: RUF071
        ends.append(end)
        headers.append(between[i][len(end) :])
    ends.append(between[-1])
    return start, list(zip(headers, ends, strict=True))


def _cut(rendered: str, messages: int) -> list[str]:
    """Cut a rendering at its placeholders: messages + 1 literals. ValueError when a content is missing or repeated."""
    pieces, rest = [], rendered
    for i in range(messages):
        piece, found, rest = rest.partition(_placeholder(i))
        if not found or _placeholder(i) in rest:
            raise ValueError(f"message {i + 1} of {messages} does not appear exactly once in its place")
        pieces.append(piece)
    return [*pieces, rest]


def _placeholder(index: int) -> str:
    return f"c0ffee{index:05d}decade"


def _render(
    template: str, messages: list[dict[str, str]], variables: dict[str, str], add_generation_prompt: bool = False
) -> str:
    import jinja2

    try:
        return _compiled(template).render(
            messages=messages, tools=None, documents=None, add_generation_prompt=add_generation_prompt, **variables
        )
    except (jinja2.TemplateError, TypeError, ValueError, LookupError, AttributeError, ArithmeticError) as error:
        raise TemplateRefusal(str(error) or type(error).__name__) from None


@cache
def _compiled(template: str) -> Any:
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

    def tojson(value: object, ensure_ascii: bool = False, indent: int | None = None) -> str:
        return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent)

    environment = ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[loopcontrols, Generation]
    )
    environment.filters["tojson"] = tojson
    environment.globals["raise_exception"] = raise_exception
    environment.globals["strftime_now"] = RENDER_DATE.strftime
    return environment.from_string(template)


def _quote(text: str) -> str:
    return json.dumps(text)
