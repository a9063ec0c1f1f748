"""Statistics of a pair of tokenizers: what adds up, what is a mirror image, and figures worked out by hand."""

import json
import random
from collections import Counter

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import pre_tokenizers

from stages.alignment.characters import CLASSES, byte_classes, class_of
from stages.alignment.coverage import GROUPS, advice, audit, outside, token_groups
from stages.alignment.fertility import ALL, quantities_of, ratio_interval
from stages.alignment.statistics import SIDES, PairStatistics, ahead
from stages.artifacts.schemas import COVERAGE, FERTILITY
from stages.inspection.samples import sample
from stages.tokenization import ByteView
from stages.tokenization.encoding import EncodedBatch
from tests.unit import tokenizers_zoo as zoo

ALPHABET = st.sampled_from(list("the user 12 \n\t.,()=") + list("éжأ漢かカ한½🎉\u200d\u3000\u0301"))
TEXTS = st.lists(st.text(ALPHABET, max_size=30), min_size=1, max_size=6)
PAIRS = [("qwen", "sentencepiece"), ("legacy", "bytes"), ("wordpiece", "unigram"), ("prefixed", "gemma")]


def statistics_of(pair, examples, starts=None, batch=3):
    """Return the statistics of examples, added `batch` at a time."""
    statistics = PairStatistics(*(zoo.views()[name] if isinstance(name, str) else name for name in pair))
    starts = starts or [True] * len(examples)
    for at in range(0, len(examples), batch):
        part = examples[at : at + batch]
        statistics.add(part, statistics.encode(part), starts[at : at + batch])
    return statistics


def test_classes_of_characters():
    expected = {
        "aé\uff21ﬁ": "Latin", "Ω": "Greek", "ж": "Cyrillic", "א": "Hebrew", "أ": "Arabic", "ह": "Devanagari",
        "ไ": "Thai",
        "漢々": "Han", "かカーｶ": "Kana", "한ᄒ": "Hangul", "ა\u0301": "other letters", "1٣": "digits",
        ".—。«": "punctuation", "+$½^": "symbols", "🎉☺\ufe0f": "emoji", " \n\t\u00a0\u3000": "whitespace",
        "\x00\u200d\ue000\U000e0fff": "other",
    }  # fmt: skip
    assert {c: class_of(c) for text in expected for c in text} == {c: n for t, n in expected.items() for c in t}
    assert set(expected.values()) == set(CLASSES)


@settings(max_examples=50, deadline=None)
@given(st.text(ALPHABET))
def test_every_byte_has_the_class_of_its_character(text):
    expected = [CLASSES.index(class_of(c)) for c in text for _ in c.encode()]
    assert byte_classes(text).tolist() == expected


@pytest.mark.parametrize("pair", PAIRS)
@settings(max_examples=25, deadline=None)
@given(TEXTS)
def test_counts_and_classes_add_up_to_the_corpus(pair, texts):
    statistics = statistics_of(pair, [zoo.plain(text) for text in texts])
    summary = statistics.summary()
    size, words = sum(len(text.encode()) for text in texts), sum(len(text.split()) for text in texts)
    assert (summary["bytes"], summary["words"], summary["examples"]) == (size, words, len(texts))
    assert summary["documents"] == sum(map(bool, texts))
    rows = summary["fertility"]
    for side, view in statistics.views.items():
        counts, tokens = statistics.counts[side], summary["sides"][side]["tokens"]
        dummies = sum(map(bool, texts)) if view.prefix_space else 0
        assert counts.sum() == tokens
        if not summary["sides"][side]["round_trip_failures"]:
            assert 0 <= counts @ view.lengths - size <= dummies
            assert tokens == sum(row["uses"] for row in summary["coverage"] if row["side"] == side)
        own = [row for row in rows if row["side"] == side]
        for name, total in (("bytes", size), ("tokens", tokens), ("words", words)):
            parts = [row[name] for row in own if row["class"] != ALL]
            assert sum(parts) == pytest.approx(total) == sum(row[name] for row in own if row["class"] == ALL)


def by_hand(view, text):
    """Return tokens of each class: each token spread over the classes of its bytes."""
    classes, at = byte_classes(text), 0
    found = Counter()
    for token in (view.token_bytes[i] for i in view.encode_texts([text])[0].ids):
        for place in classes[at : at + len(token)]:
            found[CLASSES[place]] += 1 / len(token)
        at += len(token)
    return found


@settings(max_examples=50, deadline=None)
@given(TEXTS)
def test_shared_tokens_count_by_bytes(texts):
    statistics = statistics_of(("qwen", "bpe"), [zoo.plain(text) for text in texts])
    rows = statistics.summary()["fertility"]
    for side, view in statistics.views.items():
        expected = sum((by_hand(view, text) for text in texts), Counter())
        found = {row["class"]: row["tokens"] for row in rows if row["side"] == side and row["class"] != ALL}
        assert found == pytest.approx(dict(expected))


def test_words_belong_to_their_own_classes_and_slots():
    view = ByteView.load(zoo.save(zoo.byte_level(size=259)))  # a byte is a token
    rows = statistics_of((view, view), [zoo.chat(("user", "ab1 ж"), ("assistant", "x")), zoo.plain("2")]).summary()
    found = {row["class"]: row for row in rows["fertility"] if row["side"] == "student"}
    assert rows["words"] == 4 and found[ALL]["tokens_per_word"] == 8 / 4
    assert found["Latin"]["words"] == pytest.approx(2 / 3 + 1) and found["digits"]["words"] == pytest.approx(1 / 3 + 1)
    assert found["Cyrillic"]["words"] == 1 and found["Cyrillic"]["tokens_per_word"] == 2
    assert found["whitespace"]["words"] == 0 and found["whitespace"]["tokens_per_word"] is None
    assert {row["bytes_per_token"] for row in found.values()} == {1}


@settings(max_examples=50, deadline=None)
@given(TEXTS, st.data())
def test_batches_do_not_matter(texts, data):
    starts = [True] + [data.draw(st.booleans()) for _ in texts[1:]]
    examples = [zoo.plain(text) for text in texts]
    whole = statistics_of(("qwen", "legacy"), examples, starts, batch=len(texts)).summary()
    parts = statistics_of(("qwen", "legacy"), examples, starts, batch=data.draw(st.integers(1, 4))).summary()
    for a, b in zip(whole.pop("fertility"), parts.pop("fertility"), strict=True):
        assert a == pytest.approx(b)
    for side in SIDES:
        a, b = whole["sides"].pop(side), parts["sides"].pop(side)
        for name in ("bytes_per_token_interval", "tokens_per_word_interval"):
            assert (a[name] is None) == (b[name] is None) and (a.pop(name) or 0) == pytest.approx(b.pop(name) or 0)
        assert a == pytest.approx(b)
    assert whole == parts


@settings(max_examples=50, deadline=None)
@given(TEXTS)
def test_the_other_way_round_is_the_mirror_image(texts):
    examples = [zoo.plain(text) for text in texts]
    pair = ("qwen", "sentencepiece")
    one, other = (statistics_of(order, examples).summary() for order in (pair, pair[::-1]))
    assert one["sides"] == dict(zip(SIDES, (other["sides"][side] for side in SIDES[::-1]), strict=True))
    for kind, facts in one["chunks"].items():
        mirrored = other["chunks"][kind]
        shares = mirrored.pop("shares")
        assert facts.pop("shares") == shares | {"1-n": shares["n-1"], "n-1": shares["1-n"]} and facts == mirrored
    swapped = dict(zip(SIDES, SIDES[::-1], strict=True))
    assert one["overlap"]["tokens"] == other["overlap"]["tokens"]
    for side in SIDES:
        for what in ("vocabulary", "use"):
            assert one["overlap"][f"share_of_{side}_{what}"] == other["overlap"][f"share_of_{swapped[side]}_{what}"]
    for name in ("fertility", "coverage"):
        rows = [row | {"side": swapped[row["side"]]} for row in other[name]]
        assert sorted(one[name], key=str) == sorted(rows, key=str)


@settings(max_examples=10, deadline=None)
@given(texts=TEXTS)
@pytest.mark.parametrize("name", ["qwen", "unigram"])
def test_the_same_tokenizer_twice(name, texts):
    summary = statistics_of((name, name), [zoo.plain(text) for text in [*texts, "the user"]]).summary()
    assert all(facts["shares"]["1-1"] == 1 for kind, facts in summary["chunks"].items() if kind == "unconstrained")
    assert {value for key, value in summary["overlap"].items() if key != "tokens"} == {1}
    assert all(row["matched_types"] == row["types"] and row["unmatched"] == [] for row in summary["coverage"])
    assert len(summary["advice"]) == 1 and "same-vocabulary" in summary["advice"][0]


def test_no_text_at_all():
    for examples in ([], [zoo.plain("")]):
        summary = statistics_of(("qwen", "legacy"), examples).summary()
        assert summary["bytes"] == summary["words"] == summary["documents"] == 0 and summary["fertility"] == []
        side = summary["sides"]["student"]
        assert side["bytes_per_token"] is None and side["tokens_per_word_interval"] is None
        (sentence,) = summary["advice"]
        assert sentence.startswith("The text has no tokens; ")


def test_text_that_a_vocabulary_cannot_spell_still_adds_up():
    lossy = ByteView.load(zoo.save(zoo.word_piece(pre_tokenizers.Metaspace(prepend_scheme="never")), unk_token="[UNK]"))
    summary = statistics_of((lossy, "qwen"), [zoo.plain("the old 龍 user"), zoo.plain("龍")]).summary()
    rows = [row for row in summary["fertility"] if row["side"] == "teacher"]
    assert summary["sides"]["teacher"]["round_trip_failures"] == 2
    assert sum(row["tokens"] for row in rows if row["class"] != ALL) == pytest.approx(
        summary["sides"]["teacher"]["tokens"]
    )


def test_text_that_becomes_no_token_has_none():
    batches = []
    for tokens, offsets in ((3, [0, 2, 3]), (2, [0, 2, 2])):  # start, "ab", and on the first side alone "龍"
        ends, slot = np.array([4, 16, 20])[:tokens], np.array([0, 2, 2], np.int32)[:tokens]
        batches.append(EncodedBatch(slot, np.array(offsets), ends, slot, slot > 0, slot > 0, np.array([24, 28]), slot))
    found = quantities_of([zoo.plain("ab"), zoo.plain("龍")], batches)
    assert found[0, CLASSES.index("Latin")].tolist() == [2, 1, 1, 1]
    assert found[1, CLASSES.index("Han")].tolist() == [3, 1, 1, 0]


def test_interval_is_that_of_the_bootstrap():
    source = np.random.default_rng(3)
    x = source.integers(20, 400, 400).astype(float)
    y = x * source.normal(4, 0.8, 400)
    ratio, low, high = ratio_interval(y.sum(), x.sum(), y @ y, y @ x, x @ x, len(x))
    drawn = source.integers(0, len(x), (4000, len(x)))
    ends = np.quantile(y[drawn].sum(1) / x[drawn].sum(1), (0.025, 0.975))
    assert ratio == y.sum() / x.sum() and (low, high) == pytest.approx(ends, abs=0.15 * (high - low))
    # Cochran's formula by hand for two documents: y = (6, 2), x = (2, 2), so R = 2 and residuals 2 and -2.
    ratio, low, high = ratio_interval(8.0, 4.0, 40.0, 16.0, 8.0, 2)
    assert (ratio, low, high) == pytest.approx((2.0, 0.0, 2 + 12.7062047 * np.sqrt(2 / 1 * 8) / 4))
    assert ratio_interval(8.0, 4.0, 64.0, 32.0, 16.0, 1) == (2.0, None, None)


def test_groups_of_tokens():
    expected = {
        "Latin words": ["the", "né"], "Latin words after a space": [" the"], "CJK": ["漢字", " かな", "한"],
        "other scripts": ["ж", " لا", "Ωж"], "single digits": ["7", " 7", "٣"], "multi-digit numerals": ["123", " 42"],
        "punctuation": [".", " (", "。", "+"], "operators": ["()", " ==", "//"], "marks with whitespace": [".\n", "( "],
        "whitespace": [" ", "  ", "\n\t"], "emoji": ["🎉", " ☺"], "mixed": ["don't", "x1", "aж", "1.", "\x00"],
    }  # fmt: skip
    tokens = [token.encode() for part in expected.values() for token in part]
    groups = [name for name, part in expected.items() for _ in part]
    found = token_groups([*tokens, b"\xe6\xbc", b" \xff", b"", None])
    assert [GROUPS[place] for place in found[:-2]] == [*groups, "partial characters", "partial characters"]
    assert found[-2:].tolist() == [-1, -1]


def test_audit_by_hand():
    vocabularies = {"teacher": [b"1", b"a", b" a", None], "student": [b"1", b"12", b"34", b" a", b"a", b"ab", b"1"]}
    counts = {"teacher": np.array([5, 2, 3, 0]), "student": np.array([1, 4, 7, 2, 0, 3, 8])}
    rows = {(row["side"], row["group"]): row for row in audit(vocabularies, counts)}
    numerals = {"types": 2, "matched_types": 0, "uses": 11, "matched_uses": 0, "unmatched": [b"34", b"12"]}
    assert rows["student", "multi-digit numerals"].items() >= numerals.items()
    words = {"types": 2, "matched_types": 1, "uses": 3, "matched_uses": 0, "unmatched": [b"ab"]}
    assert rows["student", "Latin words"].items() >= words.items()
    assert rows["teacher", "single digits"]["matched_uses"] == 5
    twice = {"types": 1, "matched_types": 1, "uses": 9, "matched_uses": 9}  # two ids with the same bytes
    assert rows["student", "single digits"].items() >= twice.items()
    assert not any(row["group"] == "multi-digit numerals" for (side, _), row in rows.items() if side == "teacher")


def group(name, types, matched_types, uses, matched_uses):
    numbers = {"types": types, "matched_types": matched_types, "uses": uses, "matched_uses": matched_uses}
    return {"side": "student", "group": name} | numbers


def test_advice_follows_the_rule():
    words = group("Latin words", 9000, 8000, 90_000, 80_000)
    numerals = group("multi-digit numerals", 1100, 0, 0, 0)
    digits = group("single digits", 10, 10, 900, 900)
    rare = group("emoji", 3, 0, 2, 0)  # too few of text and vocabulary to decide anything
    operators = group("operators", 500, 500, 4000, 3500)
    sentences = dict(text.split(": ", 1) for text in advice([words, digits, rare], 0.9))
    assert sentences["X-Token"].startswith("H-KL suffices")
    assert "11.0 % of the student's tokens" in sentences["GOLD"] and sentences["GOLD"].endswith("in this text.")
    assert "10.0 % of the chunks are not 1-1" in sentences["ULD"]
    assert "89.0 %" in sentences["Common tokens"] and "needs no match" in sentences["ALM"]
    missed = outside([words, numerals, digits, rare, operators])
    assert missed == {"operators": (0.875, "use"), "multi-digit numerals": (0.0, "types")}
    sentences = dict(text.split(": ", 1) for text in advice([words, numerals, digits, operators], 1.0))
    expected = (
        "prefer P-KL to H-KL, because too few have a match among operators (87.5 % of their use) and multi-digit "
    )
    assert sentences["X-Token"] == expected + "numerals (0 % of their types)."
    assert sentences["GOLD"].endswith("first of all operators.") and "positions agree" in sentences["ULD"]


def test_inspection(tmp_path):
    examples = [zoo.plain(text) for text in zoo.TEXT]
    random.Random(0).shuffle(examples)
    summary = statistics_of(("qwen", "sentencepiece"), examples).summary()
    for name, schema in (("fertility", FERTILITY), ("coverage", COVERAGE)):
        pq.write_table(pa.Table.from_pylist(summary[name], schema), tmp_path / f"{name}.parquet")
    shown = sample(tmp_path / "fertility.parquet", None)
    line = next(line for line in shown.splitlines() if line.split()[:2] == ["all", "teacher"])
    side = summary["sides"]["teacher"]
    assert f"{side['bytes_per_token']:.3f} ({side['bytes_per_token_interval'][0]:.3f} to" in line
    assert "multi-digit" not in sample(tmp_path / "coverage.parquet", None)
    (tmp_path / "summary.json").write_text(json.dumps({"advice": summary["advice"]}))
    shown = sample(tmp_path / "coverage.parquet", None)
    assert all(sentence in shown for sentence in summary["advice"])


def test_ahead_keeps_order_and_passes_errors_on():
    assert list(ahead(lambda item: item * 2, iter(range(5)))) == [(i, 2 * i) for i in range(5)]
    assert list(ahead(str, [])) == []
    made = ahead(lambda item: 1 // item, [1, 0, 1])
    assert next(made) == (1, 1)
    with pytest.raises(ZeroDivisionError):
        next(made)
