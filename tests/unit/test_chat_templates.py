"""Chats are what the template renders, tokenized with special tokens as atoms: transformers is asked for each."""
# ruff: noqa: E501

import json
import re
from copy import copy
from functools import cache
from pathlib import Path
from tempfile import mkdtemp

import pytest
from jinja2 import TemplateError
from transformers import PreTrainedTokenizerFast

from stages.generation.prompts import answer_of
from stages.tokenization import ByteView
from stages.tokenization.rendering import Message
from stages.tokenization.sources import prepare, write
from stages.tokenization.spec import TokenizerSpec
from stages.tokenization.template import Template
from tests.conftest import SHARED

LOOP = "{% for m in messages %}"
TEMPLATES = {
    "chatml": LOOP + "{{ '<|im_start|>' + m.role + '\n' + m.content + '<|im_end|>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}",
    "chatml with a default system turn": "{% if messages[0].role != 'system' %}{{ '<|im_start|>system\nBe helpful.<|im_end|>\n' }}"
    "{% endif %}" + LOOP + "{{ '<|im_start|>' + m.role + '\n' + m.content + '<|im_end|>' }}"
    "{% if not loop.last or add_generation_prompt %}{{ '\n' }}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}",
    "llama 3": LOOP + "{% set text = '<|start_header_id|>' + m.role + '<|end_header_id|>\n\n' + m.content | trim + '<|eot_id|>' %}"
    "{% if loop.first %}{% set text = '<|begin_of_text|>' + text %}{% endif %}{{ text }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|start_header_id|>assistant<|end_header_id|>\n\n' }}{% endif %}",
    "phi 3": LOOP + "{{ '<|' + m.role + '|>\n' + m.content + '<|end|>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|assistant|>\n' }}{% else %}{{ '<|endoftext|>' }}{% endif %}",
    "phi 4": LOOP + "{{ '<|im_start|>' + m.role + '<|im_sep|>' + m.content + '<|im_end|>' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant<|im_sep|>' }}{% endif %}",
    "gemma": "{% if messages[0].role == 'system' %}{{ raise_exception('no system role') }}{% endif %}" + LOOP
    + "{% if (m.role == 'user') != (loop.index0 % 2 == 0) %}{{ raise_exception('roles must alternate') }}{% endif %}"
    "{{ '<start_of_turn>' + ('model' if m.role == 'assistant' else m.role) + '\n' + m.content | trim + '<end_of_turn>\n' }}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<start_of_turn>model\n' }}{% endif %}",
    "mistral": LOOP + "{% if m.role == 'user' %}{{ '[INST] ' + m.content + ' [/INST]' }}{% elif m.role == 'system' %}"
    "{{ '[SYSTEM_PROMPT]' + m.content + '[/SYSTEM_PROMPT]' }}{% else %}{{ ' ' + m.content + '</s>' }}{% endif %}{% endfor %}",
    "zephyr": LOOP + "{{ '<|' + m.role + '|>\n' + m.content + '</s>\n' }}"
    "{% if loop.last and add_generation_prompt %}{{ '<|assistant|>' }}{% endif %}{% endfor %}",
    "vicuna": LOOP + "{% if m.role == 'system' %}{{ m.content + ' ' }}{% elif m.role == 'user' %}{{ 'USER: ' + m.content + ' ' }}"
    "{% else %}{{ 'ASSISTANT: ' + m.content + '</s>' }}{% endif %}{% endfor %}{% if add_generation_prompt %}{{ 'ASSISTANT:' }}{% endif %}",
    "alpaca": LOOP + "{% if m.role == 'system' %}{{ m.content + '\n\n' }}{% elif m.role == 'user' %}"
    "{{ '### Instruction:\n' + m.content.strip() + '\n\n' }}{% else %}{{ '### Response:\n' + m.content.strip() + '\n\n' }}{% endif %}"
    "{% endfor %}{% if add_generation_prompt %}{{ '### Response:\n' }}{% endif %}",
    "falcon": LOOP + "{{ '\n\n' + m.role | capitalize + ': ' + m.content.replace('\r\n', '\n').replace('\n\n', '\n') | trim }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '\n\nAssistant:' }}{% endif %}",
    "deepseek": LOOP + "{% if m.role == 'user' %}{{ '<|User|>' + m.content }}{% elif m.role == 'system' %}{{ m.content }}{% else %}"
    "{% set content = m.content %}{% if '</think>' in content %}{% set content = content.split('</think>')[-1] %}{% endif %}"
    "{{ '<|Assistant|>' + content + '<|end_of_sentence|>' }}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|Assistant|><think>\n' }}{% endif %}",
    "command": LOOP + "{{ '<|START_OF_TURN_TOKEN|><|' + ('CHATBOT' if m.role == 'assistant' else m.role | upper) + '_TOKEN|>' }}"
    "{{ m.content.strip() + '<|END_OF_TURN_TOKEN|>' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|START_OF_TURN_TOKEN|><|CHATBOT_TOKEN|>' }}{% endif %}",
    "granite": LOOP + "{{ '<|start_of_role|>' + m.role + '<|end_of_role|>' + m.content + '<|end_of_text|>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|start_of_role|>assistant<|end_of_role|>' }}{% endif %}",
    "harmony": LOOP + "{% if m.role == 'assistant' %}{% if m.thinking %}{{ '<|start|>assistant<|channel|>analysis<|message|>' + m.thinking + '<|end|>' }}"
    "{% endif %}{{ '<|start|>assistant<|channel|>final<|message|>' + m.content + '<|end|>' }}{% else %}"
    "{{ '<|start|>' + m.role + '<|message|>' + m.content + '<|end|>' }}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|start|>assistant' }}{% endif %}",
    "only contents": LOOP + "{{ m.content }}{% if not loop.last %}{{ '\n' }}{% endif %}{% endfor %}",
}  # fmt: skip
CASES = {"phi3": "phi3", "llama2": "llama2-chat-template", "qwen1.5": "qwen3.5-template"}
TOKENIZERS = ("gpt2", "llama2", "qwen1.5", "phi3")
SPECIAL = re.compile(r"<\|[^|<>\s{}']+\|>|</?s>|\[/?(?:INST|SYSTEM_PROMPT)\]|<(?:start|end)_of_turn>")


def said(*turns):
    return [{"role": role, "content": content} for role, content in turns]


CHATS = {
    "one round": said(("user", "Hello there"), ("assistant", "Hi! How can I help?")),
    "with system": said(("system", "You are brief."), ("user", "Hello"), ("assistant", "Yes.")),
    "two rounds": said(("user", "One?"), ("assistant", "1"), ("user", "Two?"), ("assistant", "2.")),
    "whitespace": said(("user", "  Hello\n"), ("assistant", "\n\n Hi  ")),
    "empty answer": said(("user", "Hello"), ("assistant", ""), ("user", "again"), ("assistant", "ok")),
    "blank": said(("user", " \n"), ("assistant", " x")),
    "reasoning": said(("user", "2+2?"), ("assistant", "<think>\ntwo and two\n</think>\n\n4")),
    "unicode": said(("user", "naïve café 北京 👩‍👧"), ("assistant", "日本語 — ok\n\n```py\nx = 1\n```\n")),
    "words of templates": said(("user", "user assistant system:\n\t- a"), ("assistant", "user")),
    "a question": said(("user", "Only a question")),
}


def folder_of(name):
    folder = SHARED / "cases" / name if name == "phi3" else SHARED / "tokenizers" / name
    if not folder.is_dir():
        pytest.skip(f"no real tokenizer: {folder} does not exist")
    return folder


@cache
def real(name):
    """A real tokenizer with the specials of all templates, as (view, transformers' tokenizer of the same files)."""
    source, folder = folder_of(name), Path(mkdtemp())
    for file in ("tokenizer.json", "tokenizer_config.json"):
        (folder / file).write_text((source / file).read_text(encoding="utf-8"))
    config = json.loads((folder / "tokenizer_config.json").read_text())
    config.pop("chat_template", None)
    config["extra_special_tokens"] = sorted({token for text in TEMPLATES.values() for token in SPECIAL.findall(text)})
    (folder / "tokenizer_config.json").write_text(json.dumps(config))
    write(prepare(folder, TokenizerSpec(str(folder))), folder)
    return ByteView.load(folder), PreTrainedTokenizerFast.from_pretrained(folder)


def opened(name, template):
    """Both sides of a real tokenizer with another template."""
    view, theirs = (copy(side) for side in real(name))
    theirs.chat_template = template
    view.template = Template(template, view.template.source.variables, view.template.source.specials, view.name)
    view._template_pieces = {}
    return view, theirs


def slots_of(messages):
    return [{"role": m["role"], "text": m["content"] or "", "loss": m["role"] == "assistant"} for m in messages]


def written(view, ids):
    return [view.string_of(i) for i in ids]


@pytest.mark.parametrize("name", TOKENIZERS)
@pytest.mark.parametrize("style", TEMPLATES)
def test_ids_are_those_of_the_rendering(style, name):
    view, theirs = opened(name, TEMPLATES[style])
    widths = {}
    for label, chat in CHATS.items():
        try:
            expected = theirs.apply_chat_template(chat, tokenize=True, return_dict=False)
        except TemplateError:
            continue  # composed from what the template takes: see test_tokenization
        batch = view.encode_examples([slots_of(chat)])
        assert written(view, batch.ids) == written(view, expected), label
        assert batch.exact.all(), label
        widths[label] = int(batch.widths[0])
        prompt = theirs.apply_chat_template(chat[:1], tokenize=True, add_generation_prompt=True, return_dict=False)
        assert written(view, view.encode_prompts([slots_of(chat[:1])]).ids) == written(view, prompt), label
    assert len(widths) > 5


@pytest.mark.parametrize("name,case", CASES.items())
def test_given_templates(name, case):
    path = SHARED / "cases" / case / "chat_template.jinja"
    if not path.is_file():
        pytest.skip(f"no given template: {path} does not exist")
    view, theirs = opened(name, path.read_text(encoding="utf-8"))
    for label, chat in CHATS.items():
        expected = theirs.apply_chat_template(chat, tokenize=True, return_dict=False)
        assert written(view, view.encode_examples([slots_of(chat)]).ids) == written(view, expected), label


ENDS = {
    "chatml": "<|im_end|>\n", "llama 3": "<|eot_id|>", "phi 3": "<|end|>\n", "phi 4": "<|im_end|>", "mistral": "</s>",
    "zephyr": "</s>\n", "vicuna": "</s>", "command": "<|END_OF_TURN_TOKEN|>", "granite": "<|end_of_text|>\n",
    "harmony": "<|end|>", "gemma": "<end_of_turn>\n", "alpaca": "\n\n", "falcon": "",
}  # fmt: skip


@pytest.mark.parametrize("style", ENDS)
def test_trained_are_the_answers_and_their_ends(style):
    view, _ = opened("qwen1.5", TEMPLATES[style])
    batch = view.encode_examples([slots_of(CHATS["two rounds"])])
    assert "".join(written(view, batch.ids[batch.loss])).replace(" ", "") == "".join(
        f"{a}{ENDS[style]}" for a in ("1", "2.")
    )


def test_special_tokens_are_never_cut():
    """Phi 3's turns end alike up to `<|`: what follows is one token or another, and no part of either is trained."""
    path = SHARED / "cases" / "phi3" / "chat_template.jinja"
    view, _ = opened("phi3", path.read_text() if path.is_file() else TEMPLATES["phi 3"])
    batch = view.encode_examples([slots_of(CHATS["one round"])])
    named = {text: view.special_named(text) for text in ("<|user|>", "<|assistant|>", "<|end|>", "<|endoftext|>")}
    expected = ("<|user|>", "<|end|>", "<|assistant|>", "<|end|>", "<|endoftext|>")
    assert [i for i in batch.ids if i in view.special_ids] == [named[text] for text in expected]
    trained = batch.ids[batch.loss].tolist()
    assert trained[-1] == named["<|end|>"] and view.join(trained) == b"Hi! How can I help?"
    assert not {named["<|assistant|>"], named["<|endoftext|>"]} & set(trained)


@pytest.mark.parametrize("style", ["chatml", "llama 3", "mistral", "vicuna", "phi 3"])
def test_specials_in_contents_are_text(style):
    view, _ = opened("qwen1.5", TEMPLATES[style])
    harmless = view.encode_examples([slots_of(CHATS["one round"])])
    texts = "What is <|im_end|> or </s> or <|eot_id|>?", "<|end|> it is [INST]"
    batch = view.encode_examples([slots_of(said(("user", texts[0]), ("assistant", texts[1])))])
    specials = [[i for i in b.ids if i in view.special_ids] for b in (harmless, batch)]
    assert specials[0] == specials[1] and batch.exact.all()
    for text in texts:
        assert text.encode() in view.join(batch.ids)


# ---- reasoning, tools, settings


def test_reasoning_of_its_own_field_is_rendered_where_the_template_has_it():
    view, theirs = opened("qwen1.5", TEMPLATES["harmony"])
    chat = [{"role": "user", "content": "2+2?"}, {"role": "assistant", "content": "4", "thinking": "two and two"}]
    expected = theirs.apply_chat_template(chat, tokenize=True, return_dict=False)
    text = "<think>\ntwo and two\n</think>\n\n4"
    slots = [*slots_of(chat[:1]), {"role": "assistant", "text": text, "loss": True, "extra": '{"reasoned": true}'}]
    assert written(view, view.encode_examples([slots]).ids) == written(view, expected)


def test_a_turn_without_its_reasoning_is_not_trained_on():
    view, _ = opened("qwen1.5", TEMPLATES["deepseek"])
    batch = view.encode_examples([slots_of(CHATS["reasoning"])])
    assert not batch.loss.any() and b"two and two" not in view.join(batch.ids)
    assert view.encode_examples([slots_of(CHATS["one round"])]).loss.any()


TOOLS = (
    "{% for m in messages %}{{ '<|im_start|>' + m.role + '\n' }}{% if m.content %}{{ m.content }}{% endif %}"
    "{% for call in m.tool_calls or [] %}{{ '<tool_call>\n' + call.function | tojson + '\n</tool_call>' }}{% endfor %}"
    "{{ '<|im_end|>\n' }}{% endfor %}"
)
CALL = {"id": "c1", "type": "function", "function": {"name": "get_weather", "arguments": {"city": "Brno"}}}


def with_tools(call=CALL):
    return [
        {"role": "user", "content": "Weather?"}, {"role": "assistant", "content": None, "tool_calls": [call]},
        {"role": "tool", "content": "18 C", "tool_call_id": "c1"}, {"role": "assistant", "content": "It is 18 C."},
    ]  # fmt: skip


def slots_with_extra(messages):
    slots = slots_of(messages)
    for slot, message in zip(slots, messages, strict=True):
        extra = {key: value for key, value in message.items() if key not in ("role", "content")}
        extra |= {"content": None} if message["content"] is None else {}
        slot["extra"] = json.dumps(extra) if extra else None
    return slots


def test_tool_calls_are_rendered_and_trained():
    view, theirs = opened("qwen1.5", TOOLS)
    expected = theirs.apply_chat_template(with_tools(), tokenize=True, return_dict=False)
    batch = view.encode_examples([slots_with_extra(with_tools())])
    assert written(view, batch.ids) == written(view, expected)
    trained = "".join(written(view, batch.ids[batch.loss]))
    assert "get_weather" in trained and "It is 18 C." in trained and "18 C\n" not in trained.replace("It is 18 C.", "")


def test_arguments_as_json_text_are_given_as_the_template_takes_them():
    items = TOOLS.replace(
        "call.function | tojson", "call.function.name + (call.function.arguments | items | list | string)"
    )
    view, theirs = opened("qwen1.5", items)
    expected = theirs.apply_chat_template(with_tools(), tokenize=True, return_dict=False)
    call = CALL | {"function": CALL["function"] | {"arguments": json.dumps(CALL["function"]["arguments"])}}
    assert written(view, view.encode_examples([slots_with_extra(with_tools(call))]).ids) == written(view, expected)


def test_a_call_that_the_template_does_not_show_is_not_trained_on():
    silent = TOOLS.replace("m.tool_calls or []", "[]")
    view, _ = opened("qwen1.5", silent)
    batch = view.encode_examples([slots_with_extra(with_tools())])
    assert "".join(written(view, batch.ids[batch.loss])) == "It is 18 C.<|im_end|>\n"


THINKING = (
    TEMPLATES["chatml"].replace("{{ '<|im_start|>assistant\n' }}", "{{ '<|im_start|>assistant\n' }}"
    "{% if enable_thinking is defined and enable_thinking is false %}{{ '<think>\n\n</think>\n\n' }}"
    "{% else %}{{ '<think>\n' }}{% endif %}")
)  # fmt: skip


@pytest.mark.parametrize("thinking,given", [(None, "<think>\n"), (True, "<think>\n"), (False, "")])
def test_whether_to_ask_for_reasoning_is_a_setting(thinking, given):
    view, theirs = opened("qwen1.5", THINKING)
    chat = CHATS["a question"]
    options = {} if thinking is None else {"enable_thinking": thinking}
    expected = theirs.apply_chat_template(chat, add_generation_prompt=True, return_dict=False, **options)
    assert written(view, view.encode_prompts([slots_of(chat)], thinking).ids) == written(view, expected)
    leads = view.leads([Message("user", chat[0]["content"])], thinking)
    answer = "two and two\n</think>\n\n4" if given else "4"
    ids = [*view.encode_texts([answer])[0].ids.tolist(), view.special_named("<|im_end|>")]
    found = answer_of(view, ids, frozenset({ids[-1]}), leads)
    assert found == (given + answer, "stop")


def test_what_belongs_to_a_tokens_flags_loses_no_bytes():
    folder = SHARED / "cases" / "single-word"
    if not folder.is_dir():
        pytest.skip(f"no such case: {folder} does not exist")
    view, theirs = ByteView.load(folder), PreTrainedTokenizerFast.from_pretrained(folder)
    for text in ("a cat sat", "it concatenates", "cat", "cats cat."):
        tokens = view.encode_texts([text])[0]
        assert tokens.exact and tokens.ids.tolist() == theirs(text, add_special_tokens=False).input_ids
