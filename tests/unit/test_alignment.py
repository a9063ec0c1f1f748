from itertools import pairwise

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from stages.alignment import KINDS, BiasTable, align, drop_unscored
from stages.alignment.statistics import PairStatistics, drawn_alignment
from stages.tokenization.encoding import SCALE
from tests.unit import tokenizers_zoo as zoo
from tests.unit.test_tokenization import EXACT, NAMES, TEXTS

ROLES = st.sampled_from(["system", "user", "assistant"])
EXAMPLES = st.lists(
    st.one_of(
        TEXTS.map(zoo.plain), st.lists(st.tuples(ROLES, TEXTS), min_size=1, max_size=4).map(lambda t: zoo.chat(*t))
    ),
    min_size=1,
    max_size=4,
)
NO_BIAS = BiasTable(np.zeros(0, np.int64))


def _spans(batch, b, chunks):
    """Return {chunk: (slot, first byte coordinate, last)} of example b, checking that chunks are runs of one slot."""
    inside = slice(batch.offsets[b], batch.offsets[b + 1])
    ends, slots, ids = batch.ends[inside], batch.slot[inside], chunks[inside]
    spans = {}
    for chunk in sorted(set(ids.tolist()) - {-1}):
        at = np.flatnonzero(ids == chunk)
        assert (np.diff(at) == 1).all() and len(set(slots[at])) == 1
        spans[chunk] = (int(slots[at[0]]), int(ends[at[-1]]))
    return spans


@pytest.mark.parametrize("kind", KINDS)
@given(examples=EXAMPLES, pair=st.tuples(st.sampled_from(NAMES), st.sampled_from(NAMES)), data=st.data())
@settings(max_examples=150, deadline=None)
def test_every_pair_covers_everything(kind, examples, pair, data):
    teacher, student = (zoo.views()[name].encode_examples(examples, [True] * len(examples)) for name in pair)
    chunks = align(teacher, student, kind, NO_BIAS, scored=False)
    for b in range(len(examples)):
        spans = [_spans(batch, b, c) for batch, c in ((teacher, chunks[0]), (student, chunks[1]))]
        assert spans[0] == spans[1]
        assert list(spans[0]) == list(range(chunks[2][b]))
        slots = [set(batch.slot[batch.offsets[b] : batch.offsets[b + 1]].tolist()) for batch in (teacher, student)]
        for batch, c in ((teacher, chunks[0]), (student, chunks[1])):
            inside = slice(batch.offsets[b], batch.offsets[b + 1])
            common = np.isin(batch.slot[inside], sorted(slots[0] & slots[1]))
            assert ((c[inside] >= 0) == common).all()


TEMPLATE_EDGES = b"\n\n "  # the most whitespace of a template that a token can share with a content


@given(examples=EXAMPLES, pair=st.tuples(st.sampled_from(EXACT), st.sampled_from(EXACT)))
@settings(max_examples=60, deadline=None)
def test_chunks_hold_equal_bytes(examples, pair):
    views = [zoo.views()[name] for name in pair]
    batches = [view.encode_examples(examples) for view in views]
    chunks = align(*batches, scored=False)
    for b, example in enumerate(examples):
        for m, message in enumerate(example):
            texts = []
            for view, batch, c in zip(views, batches, chunks[:2], strict=True):
                index = np.arange(len(batch.ids))
                mine = (index >= batch.offsets[b]) & (index < batch.offsets[b + 1]) & (batch.slot == 3 * m + 2)
                pieces = [view.join(batch.ids[mine & (c == chunk)]) for chunk in dict.fromkeys(c[mine].tolist())]
                data = message["text"].encode()
                # A first token may begin in the template, and a last one end there.
                whole = b"".join(pieces)
                assert data in whole and len(whole) <= len(data) + len(TEMPLATE_EDGES)
                at = whole.index(data)
                if pieces:
                    pieces[0] = pieces[0][at:]
                    pieces[-1] = pieces[-1][: len(pieces[-1]) - (len(whole) - at - len(data))]
                texts.append(pieces)
            assert texts[0] == texts[1]


@given(text=TEXTS, pair=st.tuples(st.sampled_from(EXACT), st.sampled_from(EXACT)))
@settings(max_examples=60, deadline=None)
def test_unconstrained_is_brute_force(text, pair):
    views = [zoo.views()[name] for name in pair]
    ends = []
    for view in views:
        found = view.encode_texts([text])[0].ends.tolist()
        # A widthless dummy rides with the token after it.
        ends.append([end or next((later for later in found if later), 0) for end in found])
    common = sorted(set(ends[0]) & set(ends[1]))
    batches = [view.encode_examples([zoo.plain(text)]) for view in views]
    chunks = align(*batches, scored=False)
    for batch, found, own in zip(batches, chunks[:2], ends, strict=True):
        inside = found[batch.slot == 2]
        started = int(chunks[2][0]) - len(common)  # chunks of the start slot
        assert (inside - started).tolist() == [common.index(min(c for c in common if c >= end)) for end in own]


def test_same_tokenizer_gives_single_tokens():
    for view in zoo.views().values():
        batch = view.encode_examples(
            [zoo.plain("the old  user\n"), zoo.chat(("user", "hi"), ("assistant", "the rest"))]
        )
        chunks, _, _ = align(batch, batch, scored=False)
        for slot in (2, 5):
            inside = (batch.slot == slot) & (batch.ends % SCALE == 0)
            assert (
                len(set(zip(np.repeat(np.arange(2), np.diff(batch.offsets))[inside], chunks[inside], strict=True)))
                == inside.sum()
            )


@pytest.mark.parametrize("kind", KINDS)
def test_coarser_kinds_join_the_shortest_chunks(kind):
    views = zoo.views()
    examples = [zoo.plain(text) for text in zoo.TEXT[:4]]
    batches = [views[name].encode_examples(examples, [True] * 4) for name in ("qwen", "unigram")]
    fine, coarse = align(*batches, scored=False), align(*batches, kind, NO_BIAS, scored=False)
    for a, b in zip(fine[:2], coarse[:2], strict=True):
        for (x, y), (u, v) in zip(pairwise(a.tolist()), pairwise(b.tolist()), strict=True):
            assert x != y or u == v


def test_word_kinds_end_where_both_sides_start_a_word():
    views = zoo.views()
    text = "the user\tthe\nrest of"
    teacher, student = (views[name].encode_examples([zoo.plain(text)]) for name in ("bytes", "gemma"))
    for kind, marks in (("space", b" "), ("greedy", b" \t\n")):
        chunk = align(teacher, student, kind, scored=False)[0][teacher.slot == 2]
        data = text.encode()
        starts = [i for i in range(1, len(data)) if chunk[i] != chunk[i - 1]]
        allowed = {int(end) // SCALE - 2 for end in student.ends[student.slot == 2]}
        assert starts == [i for i in range(1, len(data)) if data[i] in marks and i in allowed]


def test_greedy_without_a_word_boundary_is_unconstrained():
    views = zoo.views()
    for text in ("北京日本", "fibonacci(n-1)"):
        batches = [views[name].encode_examples([zoo.plain(text)]) for name in ("bytes", "unigram")]
        for a, b in zip(align(*batches, "greedy"), align(*batches), strict=True):
            assert (a == b).all()


def test_bias_table_closes_only_accepted_boundaries():
    views = zoo.views()
    teacher, student = (views[name].encode_examples([zoo.plain("the rest of the rest")]) for name in ("qwen", "qwen3"))
    free = align(teacher, student, "unbiased", NO_BIAS, scored=False)
    ends_t = {int(free[0][i]): int(teacher.ids[i]) for i in range(len(teacher.ids))}
    ends_s = {int(free[1][i]): int(student.ids[i]) for i in range(len(student.ids))}
    last = int(free[2][0]) - 1
    pairs = np.array([(ends_t[c], ends_s[c]) for c in range(last + 1)])
    n = len(pairs)
    closed = BiasTable.over(pairs[:, 0], pairs[:, 1], np.full(n, 0.0), np.full(n, 0.2), 0.1)
    found = align(teacher, student, "unbiased", closed, scored=False)
    assert found[2][0] == len(set(teacher.slot.tolist()) & set(student.slot.tolist()))
    open_again = BiasTable.over(pairs[:, 0], pairs[:, 1], np.full(n, 0.1), np.full(n, 0.1), 0.1)
    assert align(teacher, student, "unbiased", open_again, scored=False)[2][0] == free[2][0]
    with pytest.raises(ValueError, match="bias"):
        align(teacher, student, "unbiased")


@given(examples=EXAMPLES, pair=st.tuples(st.sampled_from(NAMES), st.sampled_from(NAMES)))
@settings(max_examples=60, deadline=None)
def test_first_tokens_are_never_scored(examples, pair):
    teacher, student = (zoo.views()[name].encode_examples(examples, [True] * len(examples)) for name in pair)
    pure, scored = align(teacher, student, scored=False), align(teacher, student)
    for b in range(len(examples)):
        sides = [(batch, p, s) for batch, p, s in zip((teacher, student), pure[:2], scored[:2], strict=True)]
        dropped = any(p[batch.offsets[b]] == 0 for batch, p, _ in sides if batch.offsets[b + 1] > batch.offsets[b])
        assert scored[2][b] == pure[2][b] - dropped
        for batch, p, s in sides:
            inside = slice(batch.offsets[b], batch.offsets[b + 1])
            if batch.offsets[b + 1] > batch.offsets[b]:
                assert s[batch.offsets[b]] == -1
            assert (s[inside] == np.maximum(p[inside] - dropped, -1)).all()
    again = drop_unscored(*pure, teacher.offsets, student.offsets)
    assert all((a == s).all() for a, s in zip(again, scored, strict=True))


def test_one_sided_start_does_not_ride_along():
    """Qwen 3 starts with a token, Qwen 2 does not: tokenkit aligned 41% of such a pair."""
    views = zoo.views()
    chat = zoo.chat(("user", "the user"), ("assistant", "the rest"))
    llama, qwen = (views[name].encode_examples([chat]) for name in ("llama3", "qwen"))
    left, right, count = align(llama, qwen, scored=False)
    assert left[0] == -1 and llama.slot[0] == 0 and qwen.slot[0] == 1
    assert (left[1:] >= 0).all() and (right >= 0).all() and count[0] == left.max() + 1


def test_other_examples_are_refused():
    view = zoo.views()["qwen"]
    batches = [view.encode_examples([zoo.plain(text)]) for text in ("one", "three")]
    with pytest.raises(ValueError, match="same examples"):
        align(*batches)
    with pytest.raises(ValueError, match="unknown chunk kind"):
        align(batches[0], batches[0], "word")


def test_empty_batch():
    empty = zoo.views()["qwen"].encode_examples([], [])
    for kind in KINDS:
        chunks = align(empty, empty, kind, NO_BIAS)
        assert [len(part) for part in chunks] == [0, 0, 0]


def test_statistics_add_up():
    views = zoo.views()
    statistics = PairStatistics(views["qwen"], views["sentencepiece"])
    examples = [zoo.plain(text) for text in zoo.TEXT] + [zoo.chat(("user", "the user"), ("assistant", "<s> ok"))]
    for start in range(0, len(examples), 3):
        part = examples[start : start + 3]
        statistics.add(part, statistics.encode(part), [True] * len(part))
    summary = statistics.summary()
    size = sum(len(slot["text"].encode()) for example in examples for slot in example)
    assert summary["bytes"] == size and summary["examples"] == len(examples)
    for side, view in statistics.views.items():
        counts = statistics.counts[side]
        assert summary["sides"][side]["tokens"] == counts.sum()
        assert 0 <= (counts @ view.lengths) - size <= (view.prefix_space is not None) * (len(examples) + 1)
        assert summary["sides"][side]["round_trip_failures"] == 0
        assert not counts[list(view.special_ids)].any()
    for kind in summary["chunks"].values():
        assert abs(sum(kind["shares"].values()) - 1) < 1e-5
        assert sum(kind["lengths"]) == kind["chunks"]
    lengths = summary["chunks"]["unconstrained"]["lengths"]
    assert sum(i * n for i, n in enumerate(lengths)) == size
    same = PairStatistics(views["qwen"], views["qwen"])
    same.add(examples, same.encode(examples), [True] * len(examples))
    assert same.summary()["chunks"]["unconstrained"]["shares"]["1-1"] == 1
    assert same.summary()["overlap"]["share_of_teacher_use"] == 1
    drawn = drawn_alignment(views["qwen"], views["sentencepiece"], examples[0])
    assert max(drawn["teacher"]["chunks"]) == max(drawn["student"]["chunks"])
    assert "".join(drawn["teacher"]["tokens"][1:]) == examples[0][0]["text"]
