import json
import pickle
from functools import cache

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import AddedToken, Tokenizer, models, pre_tokenizers

from stages.core.errors import UserError
from stages.tokenization import ByteView
from stages.tokenization.encoding import SCALE
from stages.tokenization.sources import prepare, write
from stages.tokenization.spec import TokenizerSpec, parse_spec
from tests.conftest import SHARED
from tests.unit import tokenizers_zoo as zoo

NAMES = [
    "qwen", "qwen3", "gpt2", "prefixed", "llama3", "bytes", "spaced", "legacy", "gemma", "bpe", "sentencepiece",
    "unigram", "wordpiece",
]  # fmt: skip
EXACT = [name for name in NAMES if name != "wordpiece"]
TEXTS = st.one_of(
    st.text(st.characters(codec="utf-8"), max_size=40),
    st.lists(
        st.sampled_from(
            ["the", " the", " ", "  ", "\t", "\n", "\n\n", "user", "assistant", "<s>", "</s>", "<unk>", "▁",
             "<|im_start|>", "<|endoftext|>", "<0x41>", "é", "e\u0301", "北京", "🎉",
             "👩\u200d👧", "##a", "[UNK]", "\r\n", "\u3000", "\x00"]
        ),
        max_size=12,
    ).map("".join),
)  # fmt: skip


def test_spec_grammar(tmp_path):
    assert parse_spec("gpt2") == TokenizerSpec("gpt2")
    assert parse_spec("org/name:source=Qwen2:target=Llama3:conversion=byte") == TokenizerSpec(
        "org/name", "Qwen2", "Llama3", "byte"
    )
    assert parse_spec("C:/models/x:source=GPT2").name == "C:/models/x"
    odd = tmp_path / "a:source=b"
    odd.mkdir()
    assert parse_spec(f"{odd}:source=GPT2") == TokenizerSpec(str(odd), "GPT2")
    assert parse_spec("x:source=GPT2").kind == "GPT2"
    assert parse_spec("x:source=GPT2:target=Qwen2").kind == "Qwen2"


@pytest.mark.parametrize(
    ("spec", "words"),
    [
        ("x:sorce=GPT2", ["sorce", "did you mean source?"]),
        ("x:source=GPT3", ["GPT3", "did you mean GPT2?"]),
        ("x:conversion=bytes", ["bytes", "byte, prebyteified"]),
        ("x:source=GPT2:source=Qwen2", ["twice"]),
        (":source=GPT2", ["names no tokenizer"]),
    ],
)
def test_spec_errors(spec, words):
    with pytest.raises(UserError) as caught:
        parse_spec(spec)
    assert all(word in str(caught.value) for word in words)


@pytest.mark.parametrize("name", EXACT)
@given(text=TEXTS)
@settings(max_examples=25, deadline=None)
def test_every_byte_comes_back(name, text):
    view = zoo.views()[name]
    tokens = view.encode_texts([text])[0]
    data = text.encode()
    joined = view.join(tokens.ids)
    assert tokens.exact
    assert joined == data or (view.prefix_space and joined == b" " + data)
    assert not set(tokens.ids.tolist()) & view.special_ids
    assert (np.diff(tokens.ends) >= 0).all()
    assert not len(data) or tokens.ends[-1] == len(data)


@given(texts=st.lists(TEXTS, max_size=5))
@settings(max_examples=25, deadline=None)
def test_a_batch_is_its_examples(texts):
    for view in zoo.views().values():
        together = view.encode_examples([zoo.plain(text) for text in texts], [True] * len(texts))
        for b, text in enumerate(texts):
            alone = view.encode_examples([zoo.plain(text)], [True])
            mine = slice(together.offsets[b], together.offsets[b + 1])
            for field in ("ids", "ends", "slot", "loss", "first"):
                assert (getattr(together, field)[mine] == getattr(alone, field)).all()
            assert together.widths[b] == alone.widths[0] and together.exact[b] == alone.exact[0]


@given(text=TEXTS)
@settings(max_examples=50, deadline=None)
def test_byte_conversion_is_pure_bytes(text):
    assert zoo.views()["bytes"].encode_texts([text])[0].ids.tolist() == list(text.encode())


def test_byte_conversion_keeps_specials_for_the_template():
    view = zoo.views()["bytes"]
    assert view.token_bytes[:256] == [bytes([byte]) for byte in range(256)]
    assert sorted(view.special_ids) == [256, 257, 258]
    batch = view.encode_examples([zoo.chat(("user", "a user"), ("assistant", "<|im_end|>"))])
    assert view.string_of(batch.ids[0]) == "<|im_start|>"
    assert view.join(batch.ids) == b"user\na user\nassistant\n<|im_end|>\n"


@pytest.mark.parametrize("target", ["Llama3", "Gemma2", "TinyLlama", "Phi3"])
@given(text=TEXTS)
@settings(max_examples=10, deadline=None)
def test_target_never_changes_text(target, text):
    view = zoo.views()["qwen"]
    other = _targeted(target)
    assert other.encode_texts([text])[0].ids.tolist() == view.encode_texts([text])[0].ids.tolist()


@cache
def _targeted(target):
    folder = zoo.views()["qwen"].folder
    return ByteView.of(prepare(folder, TokenizerSpec("x", "Qwen2", target)), folder)


def test_specials_in_text_are_text_and_in_templates_special():
    view = zoo.views()["qwen"]
    start, end, stop = (view.special_named(c) for c in ("<|im_start|>", "<|im_end|>", "<|endoftext|>"))
    batch = view.encode_examples([zoo.chat(("user", "<|im_end|>"), ("assistant", "ok"))])
    assert [i for i in batch.ids if i in view.special_ids] == [start, end, start, end]
    assert view.roles["header"] == start and view.roles["end_of_turn"] == end and view.roles["eos"] == stop
    assert view.start_id == view.eos_id == stop


def test_loss_covers_answer_and_its_end():
    view = zoo.views()["qwen"]
    batch = view.encode_examples([zoo.chat(("user", "hi"), ("assistant", "hello")), zoo.plain("text")], [True, True])
    trained = batch.ids[: batch.offsets[1]][batch.loss[: batch.offsets[1]]]
    assert view.join(trained) == b"hello\n" and view.roles["end_of_turn"] in trained
    plain = slice(batch.offsets[1], batch.offsets[2])
    assert batch.loss[plain].tolist() == [False] + [True] * (len(batch.ids[plain]) - 1)
    assert batch.ids[plain][-1] == view.eos_id
    assert view.encode_examples([zoo.plain("text")], [False]).ids[-1] != view.eos_id


def test_slots_are_laid_out_alike():
    example = zoo.chat(("system", "be nice"), ("user", "hi"), ("assistant", ""), ("user", "bye"), ("assistant", "ok"))
    batches = [view.encode_examples([example], [True]) for view in zoo.views().values()]
    assert len({int(batch.widths[0]) for batch in batches}) == 1
    text_ends = {}
    for batch in batches:
        for slot in range(2, 15, 3):
            inside = batch.ends[batch.slot == slot]
            if len(inside):
                assert text_ends.setdefault(slot, inside[-1]) == inside[-1] and inside[-1] % SCALE == 0


def test_dummy_space_gives_up_its_byte():
    for name in ("prefixed", "spaced", "legacy", "sentencepiece"):
        view = zoo.views()[name]
        assert view.prefix_space
        tokens = view.encode_texts(["the text", " the text", "\nx"])
        assert [t.ends[-1] for t in tokens] == [8, 9, 2] and all(t.exact for t in tokens)
    assert zoo.views()["gemma"].prefix_space is None


def test_header_that_ends_in_a_space_hands_it_to_the_dummy():
    template = "{{ bos_token }}{% for m in messages %}{% if m.role == 'user' %}{{ '[INST] ' + m.content + ' [/INST]' }}"
    template += "{% else %}{{ ' ' + m.content + ' ' + eos_token }}{% endif %}{% endfor %}"
    folder = zoo.save(zoo.legacy_llama(), template=template, bos_token="<s>", eos_token="</s>")
    view, whole = ByteView.load(folder), Tokenizer.from_file(str(folder / "tokenizer.json"))
    batch = view.encode_examples([zoo.chat(("user", "the user"), ("assistant", "the answer"))])
    assert view.join(batch.ids) == b" [INST] the user [/INST] the answer "
    rendered = "<s>[INST] the user [/INST] the answer </s>"
    assert batch.ids.tolist() == whole.encode(rendered, add_special_tokens=False).ids


GEMMA = (
    "{{ bos_token }}{% if messages[0]['role'] == 'system' %}"
    "{{ raise_exception('System role not supported') }}{% endif %}"
    "{% for message in messages %}{% if (message['role'] == 'user') != (loop.index0 % 2 == 0) %}"
    "{{ raise_exception('roles must alternate') }}{% endif %}"
    "{{ '<s>' + message['role'] + '\n' + message['content'] | trim + '</s>\n' }}{% endfor %}"
)


def test_refused_conversations_are_composed():
    view = ByteView.load(zoo.save(zoo.gemma_like(), template=GEMMA, eos_token="</s>", pad_token="<unk>"))
    for roles in (("system", "user", "assistant"), ("user", "user"), ("assistant",), ("tool", "user")):
        batch = view.encode_examples([zoo.chat(*((role, "x") for role in roles))])
        text = view.join(batch.ids).decode()
        said = ["assistant" if role == "assistant" else "user" for role in roles]
        assert text == "".join(f"{role}\nx\n" for role in said), roles


def test_template_that_cannot_render_is_named():
    with pytest.raises(UserError, match=r"chat template of tokenizer .* cannot render.*never"):
        ByteView.load(zoo.save(zoo.byte_level(), template="{{ raise_exception('never') }}", eos_token="<|endoftext|>"))
    with pytest.raises(UserError, match="cannot render"):
        ByteView.load(zoo.save(zoo.byte_level(), template="{% for m in messages %}{{ m.role }}{% endfor %}"))


def test_templates_are_sandboxed_and_dated_alike():
    template = "{{ strftime_now('%Y') }}{% for m in messages %}{{ m.content }}{% endfor %}"
    view = ByteView.load(zoo.save(zoo.byte_level(), template=template))
    assert view.join(view.encode_examples([zoo.chat(("user", "x"))]).ids) == b"2024x"
    escape = "{{ ''.__class__.__mro__ }}{% for m in messages %}{{ m.content }}{% endfor %}"
    with pytest.raises(UserError, match="cannot render"):
        ByteView.load(zoo.save(zoo.byte_level(), template=escape))


def test_generation_blocks_and_loop_controls_are_understood():
    template = "{% for m in messages %}{% if not m.content %}{% continue %}{% endif %}"
    template += "{% generation %}{{ m.role + ':' + m.content + '\n' }}{% endgeneration %}{% endfor %}"
    view = ByteView.load(zoo.save(zoo.byte_level(), template=template))
    assert (
        view.join(view.encode_examples([zoo.chat(("user", "x"), ("assistant", "y"))]).ids) == b"user:x\nassistant:y\n"
    )


def test_added_tokens_that_are_pieces_of_the_model_keep_the_models_bytes():
    view = zoo.views()["gemma"]
    tokens = view.encode_texts(["a  b ▁▁"])[0]
    run = view._tokenizer.token_to_id("▁▁")
    assert tokens.exact and view.token_bytes[run] == b"  " and tokens.ids.tolist().count(run) == 1


def test_lossy_tokenizers_are_refused_with_what_was_lost():
    folder = zoo.save(zoo.bert_uncased(), unk_token="[UNK]")
    with pytest.raises(UserError, match="'Hello' comes back as 'hello'"):
        ByteView.load(folder)
    folder = zoo.save(zoo.word_piece(pre_tokenizers.Whitespace()), unk_token="[UNK]")
    with pytest.raises(UserError, match="'Hello world' comes back as 'Helloworld'"):
        ByteView.load(folder)
    with pytest.raises(UserError, match="loses text"):
        prepare(zoo.views()["legacy"].folder, TokenizerSpec("x", source="GPT2"))


def test_folders_without_a_fast_tokenizer_are_refused(tmp_path):
    with pytest.raises(UserError, match=r"no tokenizer\.json"):
        ByteView.load(tmp_path)
    (tmp_path / "tokenizer.json").write_text('{"version": ')
    with pytest.raises(UserError, match="cannot be read as JSON"):
        ByteView.load(tmp_path)


def test_damaged_folders_are_one_sentence(tmp_path):
    folder = zoo.save(zoo.byte_level(), tmp_path, eos_token=["<|endoftext|>"])
    with pytest.raises(UserError, match="not as transformers writes them"):
        ByteView.load(folder)
    write(prepare(zoo.views()["legacy"].folder, TokenizerSpec("x")), folder)
    for name in ("tokenizer.json", "byte_view.json"):
        whole = (folder / name).read_bytes()
        (folder / name).write_bytes(whole[:100] + bytes(50) + whole[150:])
        with pytest.raises(UserError, match=rf"{name} cannot be read .*: remove"):
            ByteView.load(folder)
        (folder / name).write_bytes(whole)
    ByteView.load(folder)


def test_a_tokenizer_that_knows_no_probe_is_refused():
    with pytest.raises(UserError, match=r"'Hello' comes back as '\[UNK\]'"):
        ByteView.load(zoo.save(Tokenizer(models.WordLevel({"a": 0, "[UNK]": 1}, unk_token="[UNK]")), unk_token="[UNK]"))


def test_unknown_characters_are_inexact_and_still_covered():
    view = ByteView.load(zoo.save(zoo.word_piece(pre_tokenizers.Metaspace(prepend_scheme="never")), unk_token="[UNK]"))
    tokens = view.encode_texts(["the old 龍 user"])[0]
    assert not tokens.exact and tokens.ends[-1] == len("the old 龍 user".encode())
    assert (np.diff(tokens.ends) >= 0).all()
    assert view.roles["unk"] in tokens.ids
    assert view.encode_texts(["the old"])[0].exact


def test_byte_fallback_gives_way_to_the_character():
    view = zoo.views()["legacy"]
    i = view.id_of_bytes[b"e"]
    assert sum(token == b"e" for token in view.token_bytes) == 2
    assert Tokenizer.from_file(str(view.folder / "tokenizer.json")).id_to_token(i) == "e"


def test_regular_added_tokens_keep_their_bytes():
    view = zoo.views()["gemma"]
    ids = view.encode_texts(["a\n\n   b<think>"])[0].ids.tolist()
    assert [view.token_bytes[i] for i in ids] == [b"a", b"\n\n", b"   ", b"b", b"<think>"]


def test_boundary_mask():
    view = zoo.views()["qwen"]
    words = {"space": b" ", "tab": b"\t", "newline": b"\n"}
    for word, byte in words.items():
        expected = [bool(token) and token.startswith(byte) for token in view.token_bytes]
        assert view.boundary_mask(word).tolist() == expected
    assert set(np.flatnonzero(view.boundary_mask("special"))) == view.special_ids
    assert view.boundary_mask().sum() == sum(view.boundary_mask(word).sum() for word in [*words, "special"])
    with pytest.raises(UserError, match="unknown word"):
        view.boundary_mask("space+eos")


def test_written_folder_loads_to_the_same_view(tmp_path):
    for name, spec in (("legacy", TokenizerSpec("x", "TinyLlama")), ("qwen", TokenizerSpec("x", conversion="byte"))):
        folder = tmp_path / name
        folder.mkdir()
        prepared = prepare(zoo.views()[name].folder, spec)
        write(prepared, folder)
        view, direct = ByteView.load(folder), ByteView.of(prepared, folder)
        assert view.token_bytes == direct.token_bytes and view.digest == direct.digest and view.roles == direct.roles
        example = [zoo.chat(("user", "hi <s>"), ("assistant", "the user"))]
        assert view.encode_examples(example).ids.tolist() == direct.encode_examples(example).ids.tolist()
        again = pickle.loads(pickle.dumps(view))
        assert again.encode_texts(["<s>"])[0].ids.tolist() == view.encode_texts(["<s>"])[0].ids.tolist()
        assert json.loads((folder / "byte_view.json").read_text())["digest"] == view.digest


def test_unicode_normal_forms_are_dropped():
    definition = json.loads(zoo.byte_level().to_str())
    definition["normalizer"] = {"type": "Sequence", "normalizers": [{"type": "NFC"}]}
    view = ByteView.load(zoo.save(Tokenizer.from_str(json.dumps(definition))))
    assert view.join(view.encode_texts(["e\u0301"])[0].ids) == "e\u0301".encode()


def test_a_token_that_is_a_single_word_stays_one():
    folder = SHARED / "cases" / "single-word"
    if not folder.is_dir():
        pytest.skip(f"no tokenizer: {folder} does not exist")
    view, whole = ByteView.load(folder), Tokenizer.from_file(str(folder / "tokenizer.json"))
    for text in ("cat", "concatenates", "a cat, a bobcat", "cats cat"):
        tokens = view.encode_texts([text])[0]
        assert tokens.exact and tokens.ids.tolist() == whole.encode(text).ids
    assert 257 not in view.encode_texts(["concatenates"])[0].ids and 257 in view.encode_texts(["a cat."])[0].ids


def test_flags_of_added_tokens_that_lose_no_bytes_are_kept(tmp_path):
    tokenizer = zoo.byte_level()
    tokenizer.add_tokens([AddedToken("été", single_word=True), AddedToken("oak", normalized=True)])
    tokenizer.add_tokens([AddedToken("<tab>", lstrip=True, rstrip=True)])
    view = ByteView.load(zoo.save(tokenizer, tmp_path, eos_token="<|endoftext|>"))
    for text in ("été", "l'été dernier", "répétées", "oak soaked Oak", "é été\n"):
        tokens = view.encode_texts([text])[0]
        assert tokens.exact and tokens.ids.tolist() == tokenizer.encode(text).ids
    tokens = view.encode_texts(["a \n<tab>\t b"])[0]
    assert tokens.exact and tokenizer.token_to_id("<tab>") in tokens.ids


def test_flags_of_special_tokens_act_in_templates(tmp_path):
    """Those of the library: white space that a special token takes along has no token of its own."""
    flags = {"<l>": {"lstrip": True}, "<r>": {"rstrip": True}, "<b>": {"lstrip": True, "rstrip": True}}
    flags |= {"EOT": {"single_word": True}, "<n>": {"normalized": True}}
    for number, tokenizer in enumerate((zoo.byte_level(), zoo.legacy_llama(), zoo.gemma_like())):
        tokenizer.add_special_tokens([AddedToken(content, **flag) for content, flag in flags.items()])
        template = (
            "{% for m in messages %}{{ m.role + ' <l>\n<r> \n' + m.content + ' <b> <n>end EOT , xEOT\n' }}{% endfor %}"
        )
        folder = tmp_path / str(number)
        folder.mkdir()
        view = ByteView.load(zoo.save(tokenizer, folder, template=template))
        for content in ("hello", "  spaced \n", "", "EOT <l>"):
            batch = view.encode_examples([zoo.chat(("user", content), ("assistant", "ok"))])
            turns = [
                f"{role} <l>\n<r> \n{text} <b> <n>end EOT , xEOT\n"
                for role, text in (("user", content), ("assistant", "ok"))
            ]
            assert batch.exact.all()
            if content != "EOT <l>":
                assert batch.ids.tolist() == tokenizer.encode("".join(turns), add_special_tokens=False).ids
            else:
                assert sum(view.string_of(i) == "<l>" for i in batch.ids) == 2


def test_flags_of_tokens_that_only_the_configuration_has(tmp_path):
    added = {
        "content": "<|x|>",
        "lstrip": False,
        "rstrip": True,
        "normalized": False,
        "single_word": False,
        "special": True,
    }
    template = "{% for m in messages %}{{ '<|x|>\n' + m.content }}{% endfor %}"
    config = {
        "added_tokens_decoder": {"400": added},
        "sep_token": "<|sep|>",
        "extra_special_tokens": {"image_token": "<image>"},
    }
    view = ByteView.load(zoo.save(zoo.byte_level(), tmp_path, template=template, **config))
    batch = view.encode_examples([zoo.chat(("user", "a"), ("assistant", "b"))])
    assert [view.string_of(i) for i in batch.ids] == ["<|x|>", "a", "<|x|>", "b"]
    assert view.settings["variables"] == {"sep_token": "<|sep|>", "image_token": "<image>"}
    assert {"<|sep|>", "<image>"} <= view.special_texts.keys()


def test_the_template_called_default_is_taken(tmp_path):
    templates = {"tool_use": "{{ 'no' }}", "default": "{% for m in messages %}{{ m.content + '!' }}{% endfor %}"}
    for number, written in enumerate((templates, [{"name": k, "template": v} for k, v in templates.items()])):
        folder = tmp_path / str(number)
        folder.mkdir()
        view = ByteView.load(zoo.save(zoo.byte_level(), folder, chat_template=written))
        assert view.join(view.encode_examples([zoo.chat(("user", "a"), ("assistant", "b"))]).ids) == b"a!b!"
