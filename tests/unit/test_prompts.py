"""Prompts of chats that reason and call: what the template asks with, and how an answer becomes a message again."""

import json

import numpy as np
import pytest

from stages.corpora.cutting import Turn
from stages.generation.prompts import Prompt, answer_of, answered_rows, encode_prompts, prompts_of
from stages.tokenization import ByteView
from tests.unit import tokenizers_zoo as zoo

REASONING = """{%- for m in messages %}
    {%- set content = m.content.split('</think>')[-1].lstrip('\n') if m.role == 'assistant' else m.content %}
    {%- if m.role == 'assistant' and loop.last %}
        {%- set thought = m.content.split('</think>')[0].split('<think>')[-1].strip() if '</think>' in m.content %}
        {{- '<|im_start|>assistant\n<think>\n' + (thought or '') + '\n</think>' + content }}
    {%- else %}{{- '<|im_start|>' + m.role + '\n' + content }}{% endif %}
    {{- '<|im_end|>\n' }}
{%- endfor %}
{%- if add_generation_prompt %}{{- '<|im_start|>assistant\n<think>\n' }}
    {%- if enable_thinking is defined and not enable_thinking %}{{- '\n</think>' }}{% endif %}
{%- endif %}"""


@pytest.mark.parametrize("special", [True, False])
def test_reasoning_is_asked_for_and_kept(special, tmp_path):
    """The block that a prompt opens is a part of the answer, whether or not its marks are special tokens."""
    tokenizer = zoo.byte_level()
    (tokenizer.add_special_tokens if special else tokenizer.add_tokens)(["<think>", "</think>"])
    view = ByteView.load(zoo.save(tokenizer, tmp_path, template=REASONING, eos_token="<|endoftext|>"))
    prompt = Prompt("c:0", 1, (Turn("user", "2+2?"),), True)
    endings = frozenset({view.special_named("<|im_end|>")})
    for asked, opened in ((None, "<think>\n"), (True, "<think>\n"), (False, "")):
        encoded = encode_prompts(view, [prompt], asked)
        assert encoded.leads == [("", opened)]
        said = "two and two\n</think>4" if opened else "4"
        whole = [zoo.chat(("user", "2+2?"), ("assistant", opened + said))]
        batch = view.encode_examples(whole)
        size = len(encoded.ids[0])
        assert np.array_equal(batch.ids[:size], encoded.ids[0])
        answer = answer_of(view, batch.ids[size:].tolist(), endings, encoded.leads[0])
        assert answer == (opened + said, "stop")


def test_prompts_with_calls(tmp_path):
    """Turns keep their other fields: the prompt is what the template makes of the whole messages."""
    template = "{% for m in messages %}{{ m.role + ':' + (m.content or '') }}"
    template += "{% if m.tool_calls %}{{ m.tool_calls | tojson }}{% endif %}{{ '<|im_end|>' }}{% endfor %}"
    template += "{% if add_generation_prompt %}{{ 'assistant:' }}{% endif %}"
    view = ByteView.load(zoo.save(zoo.byte_level(), tmp_path, template=template))
    call = {"tool_calls": [{"name": "f"}], "content": None}
    slots = [
        {"role": "user", "text": "q", "loss": False},
        {"role": "assistant", "text": "", "loss": True, "extra": json.dumps(call)},
        {"role": "tool", "text": "r", "loss": False, "extra": None},
        {"role": "assistant", "text": "a", "loss": True},
    ]
    row = {"slots": slots, "example_id": "x", "starts_document": True}
    prompts = prompts_of(row, 40)
    assert [prompt.slot for prompt in prompts] == [1, 3]
    ids = encode_prompts(view, prompts).ids
    written = ["".join(view.string_of(i) for i in found) for found in ids]
    assert written[0] == "user:q<|im_end|>assistant:"
    assert written[1] == 'user:q<|im_end|>assistant:[{"name": "f"}]<|im_end|>tool:r<|im_end|>assistant:'
    (answered,) = answered_rows(prompts[1], "b", True, 100)
    assert [slot.get("extra") for slot in answered["slots"]] == [None, json.dumps(call), None, None]
