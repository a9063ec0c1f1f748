"""Chat templates for tokenizers that come without one, or get that of a model kind."""

import json

from stages.tokenization.kinds import Kind


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


def _quote(text: str) -> str:
    return json.dumps(text)
