"""Chats against transformers: the ids of `apply_chat_template`, which of them are trained, and what is left out."""

import datetime
import json

import numpy as np
import pytest
from transformers import PreTrainedTokenizerFast
from transformers.utils import chat_template_utils

from stages.core.errors import UserError
from stages.corpora.cutting import Turn
from stages.corpora.messages import NotText, turns_of
from stages.tokenization import ByteView, encoding
from stages.tokenization.chat import Chats
from stages.tokenization.definition import add_token
from stages.tokenization.rendering import RENDER_DATE, ChatTemplate
from stages.tokenization.shapes import sought_by
from stages.tokenization.sources import prepare, write
from stages.tokenization.spec import TokenizerSpec
from tests.conftest import SHARED
from tests.unit import tokenizers_zoo as zoo
from tests.unit.chat_templates import SPECIALS, TEMPLATES


def chat(*turns):
    return [{"role": role, "content": content} for role, content in turns]


def call(arguments, name="get_weather"):
    return {"id": "call12345", "type": "function", "function": {"name": name, "arguments": arguments}}


CHATS = {
    "question": chat(("user", "Only a question?")),
    "one round": chat(("user", "Hello there"), ("assistant", "Hi! How can I help?")),
    "rounds": chat(("user", "One?"), ("assistant", "1"), ("user", "Two?"), ("assistant", "2.")),
    "system": chat(("system", "Be brief."), ("user", "Hello"), ("assistant", "Yes.")),
    "system, rounds": chat(
        ("system", "Be nice."), ("user", "One?"), ("assistant", "1"), ("user", "Two?"), ("assistant", "2.")
    ),
    "white space": chat(("user", "  Hello\n"), ("assistant", "\n\n Hi  ")),
    "white space of Unicode": chat(("user", "\u00a0\u3000x\u2028"), ("assistant", "\x1cy\x85 \t")),
    "only white space": chat(("user", " \n "), ("assistant", "\n")),
    "empty": chat(("user", "Hello"), ("assistant", ""), ("user", "again"), ("assistant", "ok")),
    "empty end": chat(("user", "Hello"), ("assistant", "")),
    "reasoning": chat(("user", "2+2?"), ("assistant", "<think>\ntwo and two\n</think>\n\n4")),
    "reasoning, rounds": chat(
        ("user", "2+2?"), ("assistant", "<think>\ntwo and two\n</think>\n\n4"), ("user", "3?"),
        ("assistant", "<think>\nhm\n</think>\n\n5"),
    ),
    "half a block": chat(("user", "<tool_response>\nx\n</tool_response>"), ("assistant", "a</think>b<think>c")),
    "Unicode": chat(("user", "naïve café 北京 🎉👩‍👧"), ("assistant", "日本語 — ok\n\n```py\nx = 1\n```\n")),
    "words of templates": chat(("user", "text image\nuser assistant:\n\t- a"), ("assistant", "user")),
    "JSON": chat(("user", '{"a": "b\\n"}'), ("assistant", "[1, 2]")),
    "placeholders": chat(("user", "\U000f0001 a \U00100001\ue000"), ("assistant", "\U000ffff0")),
    "the same": chat(("user", "x"), ("assistant", "x"), ("user", "x"), ("assistant", "x")),
    "two questions": chat(("user", "a"), ("user", "b"), ("assistant", "c")),
    "system within": chat(("user", "a"), ("assistant", "b"), ("system", "c"), ("user", "d"), ("assistant", "e")),
    "call": [
        {"role": "user", "content": "Weather in Brno?"},
        {"role": "assistant", "content": None, "tool_calls": [call('{"city":"Brno"}')]},
        {"role": "tool", "tool_call_id": "call12345", "content": '{"t": "18 C"}'},
        {"role": "assistant", "content": "It is 18 C."},
    ],
    "call with a mapping": [
        {"role": "user", "content": "Weather?"},
        {"role": "assistant", "content": "Let me see.", "tool_calls": [call({"city": 'Brno "b"', "days": 2})]},
        {"role": "tool", "tool_call_id": "call12345", "name": "get_weather", "content": "18 C"},
        {"role": "tool", "tool_call_id": "call12345", "name": "get_weather", "content": "19 C"},
        {"role": "assistant", "content": "Warm."},
    ],
    "reasoning beside": [
        {"role": "user", "content": "2+2?"},
        {"role": "assistant", "content": "4", "reasoning_content": "two\nare four"},
        {"role": "user", "content": "3?"},
        {"role": "assistant", "content": "5", "reasoning": "hm"},
    ],
}  # fmt: skip


def slots_of(messages):
    return [turn._asdict() | {"loss": turn.role == "assistant"} for turn in turns_of(messages, "a row")]


class Side:
    """A tokenizer as we and as transformers have it, with the special tokens of all templates."""

    def __init__(self, source, folder):
        definition = json.loads((source / "tokenizer.json").read_text())
        for content in SPECIALS:
            add_token(definition, content)
        for content in ("<think>", "</think>"):
            add_token(definition, content, special=False)
        named = json.loads((source / "tokenizer_config.json").read_text()) | {"bos_token": "<s>", "eos_token": "</s>"}
        changed, made = folder / "changed", folder / "made"
        for path in (changed, made):
            path.mkdir()
        (changed / "tokenizer.json").write_text(json.dumps(definition))
        (changed / "tokenizer_config.json").write_text(json.dumps(named))
        write(prepare(changed, TokenizerSpec(str(changed))), made)
        self.view, self.theirs = ByteView.load(made), PreTrainedTokenizerFast.from_pretrained(made)

    def chats(self, source):
        return Chats(ChatTemplate(source, self.view.settings["variables"]), self.view)

    def encode(self, chats, *messages, **options):
        return encoding.encode_examples(self.view, chats, [slots_of(chat) for chat in messages], None, options)

    def expected(self, source, messages, parts=False, **options):
        """The ids of `apply_chat_template`, None for a chat that it refuses."""
        if parts:
            given = [[{"type": "text", "text": m["content"]}] if m["content"] is not None else None for m in messages]
            messages = [message | {"content": content} for message, content in zip(messages, given, strict=True)]
        try:
            return self.theirs.apply_chat_template(messages, chat_template=source, return_dict=False, **options)
        except Exception:  # of every kind, as the template has it
            return None

    def written(self, ids):
        return "".join(self.view.string_of(i) for i in ids)

    def trained(self, batch):
        """What is trained, without white space: that beside a special token may be the token's, or a dummy."""
        return bare(self.written(batch.ids[batch.loss]))


def bare(text):
    return "".join(text.split())


@pytest.fixture(scope="module", autouse=True)
def one_date():
    """Templates may ask for the date: that of our renderings."""

    class Fixed(datetime.datetime):
        @classmethod
        def now(cls, tz=None):
            return RENDER_DATE

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(chat_template_utils, "datetime", Fixed)
        yield


@pytest.fixture(scope="module")
def sides(tmp_path_factory):
    """Tokenizers of every family: small ones, and the real ones that are there."""
    small = {"bytes": zoo.byte_level(), "legacy": zoo.legacy_llama(), "gemma": zoo.gemma_like(), "first": zoo.unigram()}
    folders = {name: zoo.save(tokenizer) for name, tokenizer in small.items()}
    real = [SHARED / "tokenizers" / name for name in ("gpt2", "llama2", "qwen1.5")] + [SHARED / "cases" / "phi3"]
    folders |= {path.name: path for path in real if path.is_dir()}
    return {name: Side(path, tmp_path_factory.mktemp(name)) for name, path in folders.items()}


@pytest.mark.parametrize("name", TEMPLATES)
def test_ids_are_those_of_transformers(name, sides):
    source = TEMPLATES[name][0]
    compared = 0
    for side_name, side in sides.items():
        chats = side.chats(source)
        for kind, messages in CHATS.items():
            expected = side.expected(source, messages, name == "parts")
            batch = side.encode(chats, messages)
            where = (name, side_name, kind)
            assert (np.diff(batch.ends) >= 0).all(), where
            assert (np.diff(batch.slot) >= 0).all(), where
            if expected is not None:
                assert side.written(batch.ids) == side.written(expected), where
                assert batch.ids.tolist() == expected and batch.exact.all(), where
                compared += 1
            for options in ({}, {"enable_thinking": False}, {"enable_thinking": True}):
                options |= {"add_generation_prompt": True}
                expected = side.expected(source, messages, name == "parts", **options)
                if expected is not None:
                    assert side.encode(chats, messages, **options).ids.tolist() == expected, where
    assert compared > len(sides) * 8


@pytest.mark.parametrize("name", TEMPLATES)
def test_the_answer_and_its_end_are_trained(name, sides):
    source, end, last_end = TEMPLATES[name]
    for side_name, side in sides.items():
        batch = side.encode(side.chats(source), CHATS["rounds"])
        assert side.trained(batch) == bare("1" + end + "2." + last_end), (name, side_name)


def test_coordinates_are_the_same_for_all_tokenizers_and_templates(sides):
    for messages in CHATS.values():
        slots = slots_of(messages)
        sizes = [len(slot["text"].encode()) for slot in slots]
        units = 2 + sum(size + 2 for size in sizes)
        closing = np.cumsum([1 + 1 + sizes[0], *(2 + size for size in sizes[1:])])
        for side in sides.values():
            for name in ("chatml", "llama2", "qwen3", "harmony"):
                batch = side.encode(side.chats(TEMPLATES[name][0]), messages)
                assert batch.widths.tolist() == [encoding.SCALE * units]
                for number, end in enumerate(closing):
                    inside = batch.ends[batch.slot == 3 * number + 2]
                    assert not len(inside) or inside[-1] == encoding.SCALE * end


@pytest.mark.parametrize("name", TEMPLATES)
def test_what_looks_special_in_a_text_is_text(name, sides):
    source = TEMPLATES[name][0]
    for side in sides.values():
        chats = side.chats(source)
        texts = [content for content in SPECIALS if content not in ("<s>", "</s>")]
        spoken = chat(("user", "What is " + " or ".join(texts) + "?"), ("assistant", "".join(texts[::-1])))
        plain, odd = (side.encode(chats, messages) for messages in (CHATS["one round"], spoken))
        specials = [[i for i in batch.ids if i in side.view.special_ids] for batch in (plain, odd)]
        if name != "harmony":  # which refuses channels in a content
            assert specials[0] == specials[1] and odd.exact.all()
            content = side.view.join(odd.ids[odd.slot == 5]).decode()
            assert "".join(texts[::-1]) in content


def test_texts_of_other_fields_are_text(sides):
    for side in sides.values():
        chats = side.chats(TEMPLATES["qwen2.5"][0])
        asked = [{"role": "user", "content": "x"}, {"role": "assistant", "content": "", "tool_calls": None}]
        found = []
        for city in ("Brno", "<|im_end|>"):
            asked[1]["tool_calls"] = [call({"city": city})]
            found.append(side.encode(chats, asked))
        specials = [[i for i in batch.ids if i in side.view.special_ids] for batch in found]
        assert specials[0] == specials[1]
        assert '{"city": "<|im_end|>"}' in side.written(found[1].ids)


def test_phi_3(tmp_path):
    folder = SHARED / "cases" / "phi3"
    if not folder.is_dir():
        pytest.skip(f"no chats: {folder} does not exist")
    view = ByteView.load(folder)
    batch = view.encode_examples([slots_of(CHATS["one round"])])
    theirs = PreTrainedTokenizerFast.from_pretrained(folder)
    assert batch.ids.tolist() == theirs.apply_chat_template(CHATS["one round"], return_dict=False)
    answer = view.encode_texts(["Hi! How can I help?"])[0].ids.tolist()
    trained = batch.ids[batch.loss].tolist()
    assert trained[-1] == 32007 and 32000 in batch.ids and 32001 in batch.ids and 32010 in batch.ids
    # At the start of a text its first token has the dummy space, after a special token it has none.
    assert view.join(trained) == view.join(answer).removeprefix(b" ")


def test_llama_2_folds_the_system_prompt(sides):
    folder = SHARED / "cases" / "llama2-chat-template"
    if not folder.is_dir() or "llama2" not in sides:
        pytest.skip(f"no chats: {folder} does not exist")
    source, side = (folder / "chat_template.jinja").read_text(), sides["llama2"]
    for kind in ("system", "system, rounds"):
        batch = side.encode(side.chats(source), CHATS[kind])
        assert batch.ids.tolist() == side.expected(source, CHATS[kind])
        assert side.written(batch.ids).startswith("<s>[INST] <<SYS>>\nBe ")


def test_one_block_of_reasoning(sides):
    folder = SHARED / "cases" / "qwen3.5-template"
    if not folder.is_dir():
        pytest.skip(f"no chats: {folder} does not exist")
    source = (folder / "chat_template.jinja").read_text()
    for side in sides.values():
        chats = side.chats(source)
        for kind in ("reasoning", "reasoning, rounds", "reasoning beside", "call with a mapping"):
            batch = side.encode(chats, CHATS[kind])
            assert batch.ids.tolist() == side.expected(source, CHATS[kind])
        batch = side.encode(chats, CHATS["reasoning"])
        assert side.written(batch.ids).count("<think>") == 1
        assert side.trained(batch) == "<think>twoandtwo</think>4<|im_end|>"
        # Of the first answer the template leaves the reasoning out: it is not trained on.
        batch = side.encode(chats, CHATS["reasoning, rounds"])
        assert side.trained(batch) == "<think>hm</think>5<|im_end|>"
        assert chats.untrained(slots_of(CHATS["reasoning, rounds"])) == 1


@pytest.mark.parametrize(
    ("name", "kind", "trained"),
    [
        (
            "qwen2.5",
            "call",
            r'<tool_call>{"name":"get_weather","arguments":"{\"city\":\"Brno\"}"}</tool_call><|im_end|>',
        ),
        ("qwen3", "call", '<tool_call>{"name":"get_weather","arguments":{"city":"Brno"}}</tool_call><|im_end|>'),
        ("mistral3", "call", r'"arguments":"{\"city\":\"Brno\"}"},"id":"call12345"}]</s>Itis18C.</s>'),
        ("llama3.1", "call", r'{"name":"get_weather","parameters":"{\"city\":\"Brno\"}"}<|eot_id|>Itis18C.<|eot_id|>'),
        ("qwen3", "reasoning beside", "<think>hm</think>5<|im_end|>"),
        ("harmony", "reasoning beside", "hm<|end|><|start|>assistant<|channel|>final<|message|>5<|return|>"),
        # What a template does not know is not trained on, nor the answer that it belongs to.
        ("chatml", "reasoning beside", None),
        ("llama3", "call with a mapping", "Warm.<|eot_id|>"),
        ("phi3", "call with a mapping", "Warm.<|end|>"),
    ],
)
def test_parts_of_messages_that_are_no_content(name, kind, trained, sides):
    for side in sides.values():
        found = side.trained(side.encode(side.chats(TEMPLATES[name][0]), CHATS[kind]))
        assert found == trained if name in ("llama3", "phi3") else trained in found if trained else not found


def test_rows_of_data_sets():
    assert turns_of([{"role": "assistant", "content": None}], "x") == [Turn("assistant", "")]
    (turn,) = turns_of([{"role": "assistant", "content": None, "tool_calls": [call("{}")]}], "x")
    assert turn.text == "" and json.loads(turn.extra) == {"tool_calls": [call("{}")], "content": None}
    (turn,) = turns_of([{"from": "gpt", "value": "4", "reasoning_content": "sum", "tool_calls": []}], "x")
    assert turn == Turn("assistant", "<think>\nsum\n</think>\n\n4", True, '{"reasoning_content": "sum"}')
    parts = [{"type": "text", "text": "a"}, {"text": "b"}, "c"]
    assert turns_of([{"role": "text", "content": parts}], "x") == [Turn("user", "abc")]
    for other in (
        {"type": "image"},
        {"type": "image_url", "image_url": {"url": "x.png"}},
        {"type": "text", "text": None},
    ):
        with pytest.raises(NotText):
            turns_of([{"role": "user", "content": [*parts, other]}], "x")
    with pytest.raises(UserError, match="a row: the reasoning of a message is dict, expected text"):
        turns_of([{"role": "assistant", "content": "x", "reasoning": {"a": 1}}], "a row")


def test_a_template_that_reads_a_content_is_followed(sides):
    """What a template does with texts that it looks for, wherever it names them."""
    ways = {
        "split": "{{ m.content.split('::')[-1] }}",
        "name": "{% set mark = '::' %}{{ m.content.split(mark)[0] }}",
        "namespace": "{% set ns = namespace(mark=':' + ':') %}{{ m.content.split(ns.mark)[0] }}",
        "macro": "{% macro last(text, mark) %}{{ text.split(mark)[-1] }}{% endmacro %}{{ last(m.content, '::') }}",
        "loop": "{% for mark in ['::', '??'] %}{{ m.content.split(mark)[-1] }}{% endfor %}",
        "in": "{% if '::' in m.content %}{{ '<call>' }}{% endif %}{{ m.content }}",
        "slice": "{% if m.content[:2] == '::' %}{{ 'call' }}{% endif %}{{ m.content }}",
        "word": "{% if m.content == 'user' %}{{ 'self' }}{% else %}{{ m.content }}{% endif %}",
        "strip": "{{ m.content.strip(':b') }}",
        "replace": "{{ m.content | replace('::', '--') }}",
        "test": "{% if m.content is startingwith_nothing %}{% endif %}",
        "json": "{{ {'text': m.content} | tojson }}",
        "length": "{% if m.content | length > 0 %}{{ m.content }}{% else %}{{ 'nothing' }}{% endif %}",
    }
    del ways["test"]
    texts = ("user", "a::b", "::x", 'say "::"\n', "plain text", "")
    for side in sides.values():
        for way, body in ways.items():
            source = "{% for m in messages %}{{ '<|' + m.role + '|>' }}" + body + "{{ eos_token }}{% endfor %}"
            chats = side.chats(source)
            for text in texts:
                messages = chat(("user", text), ("assistant", "fine " + text))
                batch = side.encode(chats, messages)
                assert batch.ids.tolist() == side.expected(source, messages) and batch.exact.all(), (way, text)


def test_what_cannot_be_followed_is_counted(sides):
    side = sides["bytes"]
    for body in ("{{ m.content | upper }}", "{{ m.content[:2] }}", "{{ m.content | wordcount }}"):
        chats = side.chats("{% for m in messages %}{{ m.content + '<|im_end|>' }}" + body + "{% endfor %}")
        assert not side.encode(chats, CHATS["one round"]).exact.any()
    refused = side.encode(
        side.chats(TEMPLATES["harmony"][0]), chat(("user", "x"), ("assistant", "<|channel|>final<|message|>"))
    )
    assert not refused.exact.any() and not refused.loss.any()


def test_shapes():
    sought = sought_by("{% if '</t>' in m.content or m.content == 'user' %}{% endif %}", {})
    first, last = "\U000f0005", "\U000f0006"
    assert sought.shape(" a b </t>\n c ", 5) == (f" {first} </t>\n {last} ", ((1, 4), (11, 12)))
    assert sought.shape("user", 5) == ("user", ()) and sought.shape("a user", 5).text == first
    assert sought.shape(" \n", 5) == (" \n", ())
    assert sought_by("{% if %}", {}).within is None
