"""Chat templates: Jinja as transformers renders it (`apply_chat_template`), sandboxed."""

import datetime
import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from typing import Any

from stages.tokenization.kinds import Kind

# Llama 3.1 prints a date: a fixed one, its own default, keeps artifacts the same on every day.
RENDER_DATE = datetime.datetime(2024, 7, 26)

# A text that stands for another in a rendering is one character of a plane for private use; the same character of the
# next plane stands for the text as a string of JSON has it.
PLACEHOLDERS = 0xF0000
ESCAPED = 0x10000
Message = Mapping[str, Any]


class TemplateRefusal(Exception):
    """The template called `raise_exception`, or cannot cope with these messages, or is not valid Jinja."""


@dataclass(frozen=True)
class ChatTemplate:
    """A Jinja chat template, and the variables (`bos_token` and the like) that transformers gives it.

    `parts`: it wants contents as lists of parts, as those of models that see images do.
    """

    source: str
    variables: Mapping[str, str]
    parts: bool = False

    def render(self, messages: Sequence[Message], placeholders: bool = False, **options: Any) -> str:
        """Return what the template makes of messages; TemplateRefusal when it makes nothing of them.

        `placeholders`: the messages hold characters that stand for texts. `options` are further variables of the
        template, such as add_generation_prompt.
        """
        import jinja2

        variables = {"tools": None, "documents": None, "add_generation_prompt": False, **self.variables, **options}
        try:
            return _compiled(self.source, placeholders).render(messages=list(map(self._given, messages)), **variables)
        except (jinja2.TemplateError, TypeError, ValueError, LookupError, AttributeError, ArithmeticError) as error:
            raise TemplateRefusal(str(error) or type(error).__name__) from None
        except RuntimeError as error:  # a macro that calls itself without end
            raise TemplateRefusal(type(error).__name__) from None

    def _given(self, message: Message) -> dict[str, Any]:
        """Return a message as transformers gives it to a template: without nulls, reasoning under two names."""
        given = {key: value for key, value in message.items() if value is not None}
        if "reasoning_content" in given:
            given = {"thinking": given["reasoning_content"], **given}
        if self.parts and isinstance(given.get("content"), str):
            given["content"] = [{"type": "text", "text": given["content"]}]
        return given


def asking(thinking: bool | None) -> dict[str, Any]:
    """Return the variables with which a template asks for an answer; `thinking` None: reasoning by its default."""
    return {"add_generation_prompt": True} | ({} if thinking is None else {"enable_thinking": thinking})


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


def environment(placeholders: bool = False) -> Any:
    """Return the Jinja environment of transformers' `apply_chat_template`; see `ChatTemplate.render`."""
    import jinja2
    from jinja2.ext import Extension, loopcontrols
    from jinja2.sandbox import ImmutableSandboxedEnvironment

    class Generation(Extension):
        """`{% generation %}`, with which templates mark answers for transformers' assistant mask: its body alone."""

        tags = {"generation"}  # noqa: RUF012

        def parse(self, parser: Any) -> Any:
            line = next(parser.stream).lineno
            body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
            return jinja2.nodes.CallBlock(self.call_method("_body"), [], [], body).set_lineno(line)

        def _body(self, caller: Any) -> str:
            return caller()

    def raise_exception(message: str) -> None:
        raise jinja2.TemplateError(message)

    def tojson(
        value: object,
        ensure_ascii: bool = False,
        indent: int | None = None,
        separators: Any = None,
        sort_keys: bool = False,
    ) -> str:
        text = json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)
        return re.sub("[\U000f0000-\U000fffff]", lambda c: chr(ord(c[0]) + ESCAPED), text) if placeholders else text

    made = ImmutableSandboxedEnvironment(trim_blocks=True, lstrip_blocks=True, extensions=[loopcontrols, Generation])
    made.filters["tojson"] = tojson
    made.globals["raise_exception"] = raise_exception
    made.globals["strftime_now"] = RENDER_DATE.strftime
    return made


@cache
def _compiled(source: str, placeholders: bool) -> Any:
    return environment(placeholders).from_string(source)


def _quote(text: str) -> str:
    return json.dumps(text)
