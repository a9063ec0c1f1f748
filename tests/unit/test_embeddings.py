"""FVT: every rule, exact copies, fp32 means, seeded draws, and no ordinary token from a special."""

from functools import cache

import pytest
import torch

from stages.alignment.mapping import mine
from stages.embeddings import fvt
from stages.embeddings.rows import assemble, generator
from stages.initialize import vocabulary
from stages.tokenization import ByteView
from stages.tokenization.spelling import Vocabulary, fewest_pieces

from . import tokenizers_zoo as zoo


def by_characters(texts):
    return [[10 + ord(c) - ord("a") if c in "abc" else 0 for c in text] for text in texts]


def source(**options):
    specials: list[bytes | None] = [None, None, None]
    ordinary = [b"\n", b"<pad>", b"\xe2", b"\x80", b"\xe2\x80", b"ab", b" "]
    letters = [bytes([b]) for b in b"abc"]
    settings = {
        "encode": by_characters,
        "roles": {"bos": 0, "eos": 1, "header": 2},
        "special_texts": {0: "<s>", 1: "</s>", 2: "<h>"},
    }
    return Vocabulary(specials + ordinary + letters, **(settings | options))


def target(contents, **options):
    return Vocabulary(contents, **options)


def test_rules():
    vocabulary = target(
        [None, None, None, b"\n", b"ab", b"abc", b"\xe2\x80", b"\x80\xe2\x80", b"zz", b"<pad>", None],
        roles={"eos": 0, "bos": 1, "pad": 2},
        special_texts={0: "<end>", 1: "<begin>", 2: "<fill>"},
    )
    plan = fvt.plan(vocabulary, source(), rows=13)
    made = list(zip(plan.rules, plan.sources, strict=True))
    assert made[0] == ("special", [1])  # eos is mapped
    assert made[1] == ("special", [0])
    assert made[2] == ("special", [1])  # pad has no counterpart: eos stands in
    assert made[3] == ("copy", [3])
    assert made[4] == ("copy", [8])
    assert made[5] == ("mean", [10, 11, 12])  # the source's own encoding
    assert made[6] == ("copy", [7])
    assert made[7] == ("mean", [6, 7])  # no UTF-8: the fewest tokens
    assert made[8] == ("random", [])
    assert made[9] == ("copy", [4])  # ordinary text that looks like a special
    assert made[10] == ("padding", [])


def test_ordinary_tokens_never_take_a_special_and_specials_never_an_ordinary_token():
    vocabulary = target([b"<h>", None], roles={"unk": 1}, special_texts={1: "ab"})
    plan = fvt.plan(vocabulary, source(encode=lambda texts: [[10, 11] for _ in texts]), rows=13)
    assert plan.rules == ["random", "mean"]  # "<h>" is spelled by no source token but the special
    assert plan.sources[1] == [10, 11]


def test_same_written_form_matches_without_a_role():
    vocabulary = target([None], special_texts={0: "<h>"})
    assert fvt.plan(vocabulary, source(), rows=13).sources == [[2]]


BASE = ("<|endoftext|>",)
CHATML = ("<|endoftext|>", "<|im_start|>", "<|im_end|>")
LLAMA3 = ("<|begin_of_text|>", "<|end_of_text|>", "<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>")
GEMMA = ("<pad>", "<eos>", "<bos>", "<start_of_turn>", "<end_of_turn>")
LLAMA2 = ("<unk>", "<s>", "</s>")
# What surrounds a message: (before it, behind it); of Llama 2, a question's.
TURNS = {
    "chatml": ("<|im_start|>{role}\\n", "<|im_end|>\\n"),
    "llama3": ("<|start_header_id|>{role}<|end_header_id|>\\n\\n", "<|eot_id|>"),
    "gemma": ("<start_of_turn>{role}\\n", "<end_of_turn>\\n"),
    "llama2": ("[INST] ", " [/INST] "),
}
END = "<|endoftext|>"
TOKENIZERS = {
    "gpt2": (BASE, None, {"bos_token": END, "eos_token": END, "unk_token": END}),
    "qwen": (CHATML, "chatml", {"eos_token": END, "pad_token": END}),
    "qwen-instruct": (CHATML, "chatml", {"eos_token": "<|im_end|>", "pad_token": END}),
    "llama3": (LLAMA3, "llama3", {"bos_token": "<|begin_of_text|>", "eos_token": "<|eot_id|>"}),
    "llama3-tuned": (LLAMA3, "llama3", {"eos_token": "<|eot_id|>", "pad_token": "<|eot_id|>"}),  # as many set it
    "gemma": (GEMMA, "gemma", {"bos_token": "<bos>", "eos_token": "<eos>", "pad_token": "<pad>"}),
    "llama2": (LLAMA2, None, {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"}),
    "llama2-chat": (LLAMA2, "llama2", {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"}),
}  # fmt: skip


@cache
def of_family(name):
    specials, turns, config = TOKENIZERS[name]
    template = None
    if turns:
        before, behind = (part.replace("{role}", "' + message['role'] + '") for part in TURNS[turns])
        turn = f"{{{{ '{before}' + message['content'] + '{behind}' }}}}"
        if turns == "llama2":
            answer = "{{ message['content'] + '</s>' }}"
            turn = f"{{% if message['role'] == 'user' %}}{turn}{{% else %}}{answer}{{% endif %}}"
        template = f"{{% for message in messages %}}{turn}{{% endfor %}}"
    return ByteView.load(zoo.save(zoo.byte_level(specials, size=300), template=template, **config))


@pytest.mark.parametrize(
    ("source_name", "target_name", "made"),
    [
        ("qwen", "llama3", {"<|eot_id|>": "<|im_end|>", "<|begin_of_text|>": END}),
        ("qwen", "llama3", {"<|start_header_id|>": "<|im_start|>"}),
        ("qwen-instruct", "llama3", {"<|eot_id|>": "<|im_end|>"}),
        ("qwen", "llama3-tuned", {"<|eot_id|>": "<|im_end|>"}),
        ("gpt2", "llama3", {"<|eot_id|>": END, "<|begin_of_text|>": END}),
        ("gemma", "llama3", {"<|eot_id|>": "<end_of_turn>", "<|begin_of_text|>": "<bos>"}),
        ("llama3", "qwen", {"<|im_end|>": "<|eot_id|>", END: "<|eot_id|>", "<|im_start|>": "<|start_header_id|>"}),
        ("llama3-tuned", "qwen-instruct", {"<|im_end|>": "<|eot_id|>", END: "<|eot_id|>"}),
        ("llama3", "gemma", {"<end_of_turn>": "<|eot_id|>", "<eos>": "<|eot_id|>", "<bos>": "<|begin_of_text|>"}),
        ("gemma", "qwen", {"<|im_end|>": "<end_of_turn>", END: "<eos>"}),
        ("qwen", "gemma", {"<end_of_turn>": "<|im_end|>", "<eos>": END, "<pad>": END}),
        ("qwen", "gpt2", {END: END}),  # GPT-2 marks no turns: its one special ends documents
        ("qwen", "llama2", {"</s>": END, "<s>": END}),
        ("qwen", "llama2-chat", {"</s>": "<|im_end|>"}),
        ("llama2-chat", "qwen", {"<|im_end|>": "</s>", END: "</s>"}),
        ("gpt2", "qwen", {"<|im_end|>": END, END: END}),
    ],
)  # fmt: skip
def test_what_closes_turns_is_made_of_what_closes_turns(source_name, target_name, made):
    """Where the source has something of its own that does; the mapping between the vocabularies agrees."""
    source_view, target_view = of_family(source_name), of_family(target_name)
    plan = fvt.plan(vocabulary(target_view), vocabulary(source_view), rows=source_view.vocab_size)
    matches = list(mine(source_view, target_view, 0.3))
    for text, other in made.items():
        index, expected = target_view.special_named(text), source_view.special_named(other)
        assert (plan.rules[index], plan.sources[index]) == ("special", [expected]), text
        assert (matches[index].kind, matches[index].identity) == ("special", expected), text


def test_an_end_of_turn_without_a_row_is_not_used():
    view = of_family("qwen")
    rows = view.special_named("<|im_end|>")
    target_view = of_family("llama3")
    plan = fvt.plan(vocabulary(target_view), vocabulary(view), rows=rows)
    assert plan.sources[target_view.special_named("<|eot_id|>")] == [view.special_named(END)]


def test_encoding_that_changes_bytes_is_not_used():
    plan = fvt.plan(target([b"ab c"]), source(encode=lambda texts: [[10, 11]]), rows=13)
    assert plan.sources == [[8, 9, 12]]


def test_duplicates_match_duplicates():
    contents = [b"A", b"A", b"B", b"B"]
    first = Vocabulary(contents, duplicate_ids=frozenset({0, 3}), encode=by_characters)
    plan = fvt.plan(target([b"A", b"B", b"A"], duplicate_ids=frozenset({2})), first, rows=4)
    assert plan.sources == [[1], [2], [0]]


def test_rows_beyond_the_embedding_are_not_used():
    plan = fvt.plan(target([b"c", b"abc"]), source(), rows=12)
    assert plan.rules == ["mean", "mean"] or plan.rules == ["random", "mean"]
    assert plan.sources[1] == [10, 11]


@pytest.mark.parametrize(
    ("content", "pieces", "expected"),
    [
        (b"aaab", {b"a": 0, b"aa": 1, b"aab": 2}, [0, 2]),
        (b"abcd", {b"abc": 0, b"ab": 1, b"cd": 2}, [1, 2]),  # greedy longest match would be stuck
        (b"ab", {b"a": 0}, []),
        (b"", {b"a": 0}, []),
    ],
)
def test_fewest_pieces(content, pieces, expected):
    assert fewest_pieces(content, pieces, 3) == expected


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_assemble(dtype):
    embedding = torch.randn(20, 6, generator=generator(0, "x")).to(dtype)
    embedding[16:] = float("nan")  # padding rows of the source
    plan = fvt.Plan(["copy", "mean", "random", "special", "padding"], [[3], [1, 2, 5], [], [0], []])
    made = assemble(embedding, plan, 16, seed=1, name="input")
    assert made.dtype == dtype and made.shape == (5, 6)
    assert torch.equal(made[0], embedding[3]) and torch.equal(made[3], embedding[0])
    assert torch.equal(made[1], embedding[[1, 2, 5]].float().mean(0).to(dtype))
    assert torch.isfinite(made).all()
    again = assemble(embedding, plan, 16, seed=1, name="input")
    assert torch.equal(made, again)
    other = assemble(embedding, plan, 16, seed=2, name="input")
    assert not torch.equal(made[2], other[2]) and torch.equal(made[:2], other[:2])
    assert not torch.equal(assemble(embedding, plan, 16, seed=1, name="output")[2], made[2])


def test_draws_follow_each_dimension():
    embedding = torch.randn(500, 3, generator=generator(0, "x")) * torch.tensor([1.0, 0.1, 5.0]) + torch.tensor(
        [0.0, 3.0, -2.0]
    )
    made = assemble(embedding, fvt.uniform_plan(4000, "random", 500), 500, seed=0, name="input")
    assert torch.allclose(made.mean(0), embedding.mean(0), atol=0.3)
    assert torch.allclose(made.std(0), embedding.std(0), rtol=0.1)


def test_mean_of_all_rows():
    embedding = torch.arange(12.0).view(4, 3)
    made = assemble(embedding, fvt.uniform_plan(5, "mean", 3), 3, seed=0, name="input")
    assert torch.equal(made, embedding[:3].mean(0).expand(5, 3))


def test_bias_vector():
    plan = fvt.Plan(["copy", "mean"], [[1], [0, 2]])
    assert torch.equal(assemble(torch.tensor([1.0, 2.0, 5.0]), plan, 3, 0, "bias"), torch.tensor([2.0, 3.0]))
