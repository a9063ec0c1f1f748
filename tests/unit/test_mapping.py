"""Nearest tokens against brute force, the rules of the mapping between two tokenizers, and the projection W."""

import json
from types import SimpleNamespace

import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from rapidfuzz.distance import Levenshtein
from rapidfuzz.process import cdist
from tokenizers import Tokenizer, models

from stages.alignment.mapping import frequency_ranks, mine, nearest_tokens
from stages.alignment.nearest import nearest
from stages.alignment.projection import ENTRIES, projection
from stages.tokenization import ByteView

from . import tokenizers_zoo as zoo

LIMIT = 0.3
WORDS = st.lists(st.lists(st.sampled_from([0, 1, 2, 255]), max_size=6).map(bytes), min_size=1, max_size=40)
PAIRS = [("sentencepiece", "qwen"), ("qwen", "legacy"), ("gemma", "unigram"), ("bytes", "bpe"), ("wordpiece", "qwen3")]


def levenshtein(a, b):
    row = list(range(len(b) + 1))
    for i, x in enumerate(a, 1):
        previous, row[0] = row[0], i
        for j, y in enumerate(b, 1):
            previous, row[j] = row[j], min(row[j] + 1, row[j - 1] + 1, previous + (x != y))
    return row[-1]


def common(a, b):
    return next((i for i in range(min(len(a), len(b))) if a[i] != b[i]), min(len(a), len(b)))


def brute_force(query, choices, order):
    keys = [(levenshtein(query, token), -common(query, token), order[i], i) for i, token in enumerate(choices)]
    best = sorted(keys)[:2] + [(-1, 0, 0, -1)] * 2
    return [key[3] for key in best[:2]], [key[0] for key in best[:2]]


@given(queries=WORDS, choices=WORDS, seed=st.integers(0, 99))
@example(queries=[b"a" * 300, b"", b"ab"], choices=[b"a" * 299 + b"b", b"b" * 300, b"", b"a"], seed=0)
@example(queries=[b"ab", b"ab"], choices=[b"b"], seed=0)
@example(queries=[b"ab", b""], choices=[b"ab", b"ab", b"ab"], seed=1)
@settings(max_examples=150, deadline=None)
def test_two_nearest_are_brute_force(queries, choices, seed):
    order = np.random.default_rng(seed).integers(0, 4, len(choices))
    found = nearest(queries, choices, order)
    for row, query in enumerate(queries):
        index, distance = brute_force(query, choices, order)
        assert found.index[row].tolist() == index and found.distance[row].tolist() == distance


@given(a=WORDS, b=WORDS)
@settings(max_examples=50, deadline=None)
def test_distance_is_the_same_in_both_directions(a, b):
    for one, other in zip(a, b, strict=False):
        forth, back = nearest([one], [other]), nearest([other], [one])
        assert forth.distance[0].tolist() == back.distance[0].tolist() == [levenshtein(one, other), -1]


def test_ties_go_to_the_longest_prefix_then_to_the_frequent_then_to_the_first():
    choices = [b"xab", b"abx", b"aby", b"abz"]
    assert nearest([b"ab"], choices).index.tolist() == [[1, 2]]
    assert nearest([b"ab"], choices, np.array([0, 5, 5, 2])).index.tolist() == [[3, 1]]
    assert list(nearest_tokens([b"ab"], {b"xab": 0, b"aby": 9, b"abx": 7})) == [(7, 1)]


def test_nothing_to_choose_from():
    assert nearest([b"a", b"b"], []).index.tolist() == [[-1, -1]] * 2
    assert nearest([], [b"a"]).distance.shape == (0, 2)
    student = zoo.views()["bytes"]
    empty = SimpleNamespace(
        id_of_bytes={}, model={"type": "BPE", "vocab": {}, "merges": []}, vocab_size=0, roles={}, token_bytes=[],
        special_named=lambda content: None,
    )  # fmt: skip
    assert {(match.kind, match.identity) for match in mine(empty, student, LIMIT)} == {("none", -1)}


@pytest.mark.parametrize("name", ["qwen", "legacy", "gemma", "unigram", "bytes", "wordpiece"])
def test_same_tokenizer_is_the_identity(name):
    view = zoo.views()[name]
    for identity, (token, match) in enumerate(zip(view.token_bytes, mine(view, view, LIMIT), strict=True)):
        if token:
            assert match.kind == "exact" and match.distance == 0 and match.identity == view.id_of_bytes[token]
        elif identity in view.special_ids:
            assert match.kind == "special" and match.identity == identity
        assert match.reliable and match.confidence == 1 and match.prefix == match.identity


@pytest.mark.parametrize("names", PAIRS)
def test_every_token_has_its_nearest(names):
    teacher, student = (zoo.views()[name] for name in names)
    for target, source in ((teacher, student), (student, teacher)):
        known, ranks = target.id_of_bytes, frequency_ranks(target)
        matches = list(mine(target, source, LIMIT))
        assert len(matches) == source.vocab_size
        for identity, (token, match) in enumerate(zip(source.token_bytes, matches, strict=True)):
            if not token:
                assert match.kind in (("special", "none") if identity in source.special_ids else ("none",))
                continue
            keys = {
                choice: (Levenshtein.distance(token, choice), -common(token, choice), ranks[i], i)
                for choice, i in known.items()
            }
            best, second = sorted(keys, key=keys.__getitem__)[:2]
            assert (match.identity, match.content, match.distance) == (known[best], best, keys[best][0])
            starts = [choice for choice in known if token.startswith(choice)]
            assert match.prefix == (known[max(starts, key=len)] if starts else -1)
            assert match.kind == ("exact" if token in known else "mined")
            if match.kind == "mined":
                distance, longer = keys[best][0], max(len(token), len(best))
                margin = keys[second][0] / (distance + keys[second][0])
                assert (match.runner_up, match.runner_up_distance) == (known[second], keys[second][0])
                assert match.normalised_distance == distance / (len(token) + len(best))
                assert match.reliable == (match.normalised_distance < LIMIT)
                assert match.confidence == pytest.approx((1 - distance / longer) * margin) and 0 <= match.confidence < 1


def test_a_distance_of_zero_leaves_only_exact_ones_reliable():
    teacher, student = zoo.views()["sentencepiece"], zoo.views()["qwen"]
    for match in mine(teacher, student, 0.0):
        assert match.reliable == (match.kind in ("exact", "special"))


def test_specials_by_role_then_text_then_stand_in():
    teacher, student = zoo.views()["sentencepiece"], zoo.views()["qwen"]
    matches = list(mine(teacher, student, LIMIT))
    for role in ("eos", "end_of_turn"):
        assert matches[student.roles[role]][:3] == (teacher.roles[role], None, "special")
    assert matches[student.roles["header"]].kind == "none"
    qwen3, qwen = zoo.views()["qwen3"], zoo.views()["qwen"]
    start = list(mine(qwen, qwen3, LIMIT))[qwen3.roles["bos"]]
    assert start.kind == "special" and start.identity == qwen.special_named("<|im_start|>")
    gpt2 = zoo.views()["gpt2"]
    assert list(mine(gpt2, qwen, LIMIT))[qwen.roles["end_of_turn"]].identity == gpt2.roles["eos"]


def test_holes_duplicates_and_byte_fallbacks():
    definition = json.loads(zoo.byte_level().to_str())
    vocabulary = definition["model"]["vocab"]
    moved = max(vocabulary, key=vocabulary.__getitem__)
    hole, vocabulary[moved] = vocabulary[moved], vocabulary[moved] + 5
    holed = ByteView.load(zoo.save(Tokenizer.from_str(json.dumps(definition)), eos_token="<|endoftext|>"))
    assert holed.vocab_size == hole + 6
    legacy = zoo.views()["legacy"]
    matches = list(mine(legacy, holed, LIMIT))
    assert [match.kind for match in matches[hole : hole + 5]] == ["none"] * 5 and matches[hole + 5].kind != "none"
    assert all(match.identity not in range(hole, hole + 5) for match in mine(holed, legacy, LIMIT))
    fallbacks = [i for i, token in enumerate(legacy.token_bytes) if token and legacy.id_of_bytes[token] != i]
    assert fallbacks
    back = list(mine(holed, legacy, LIMIT))
    for identity in fallbacks:
        assert back[identity] == back[legacy.id_of_bytes[legacy.token_bytes[identity]]]
    assert not {match.identity for match in matches} & set(fallbacks)


def test_frequency_is_what_the_tokenizer_recorded():
    view = zoo.views()["qwen"]
    ranks, merges = frequency_ranks(view), view.model["merges"]
    assert [ranks[view.model["vocab"]["".join(merge)]] for merge in merges] == list(range(1, len(merges) + 1))
    assert ranks[view.model["vocab"]["e"]] == 0 and set(ranks[list(view.special_ids)]) <= {0, len(merges) + 1}
    unigram = zoo.views()["unigram"]
    scores = [score for _, score in unigram.model["vocab"]]
    assert (np.sign(np.diff(frequency_ranks(unigram)[: len(scores)])) == -np.sign(np.diff(scores))).all()
    assert not frequency_ranks(zoo.views()["wordpiece"]).any()
    pieces = [("<unk>", 0.0), *((f"<0x{byte:02X}>", -9.0) for byte in range(256)), ("abx", -3.0), ("aby", -2.0)]
    scored = ByteView.load(zoo.save(Tokenizer(models.Unigram(pieces, unk_id=0, byte_fallback=True)), unk_token="<unk>"))
    assert scored.token_bytes[next(iter(mine(scored, _only(b"ab"), LIMIT))).identity] == b"aby"


def _only(token):
    return SimpleNamespace(token_bytes=[token], special_ids=frozenset())


@pytest.mark.parametrize("names", PAIRS)
def test_projection_is_its_definition(names):
    teacher, student = (zoo.views()[name] for name in names)
    matches, reverse = list(mine(teacher, student, LIMIT)), list(mine(student, teacher, LIMIT))
    dense = np.zeros((student.vocab_size, teacher.vocab_size))
    for source, target, own, cells in ((student, teacher, matches, dense), (teacher, student, reverse, dense.T)):
        for identity, (token, match) in enumerate(zip(source.token_bytes, own, strict=True)):
            if token and match.kind == "mined":
                pieces = _spelled(target, token)
                weights = 0.9 * 0.1 ** np.arange(len(pieces))
                np.add.at(cells[identity], pieces, weights / weights.sum())
    for identity, (row, match) in enumerate(zip(dense, matches, strict=True)):
        if match.kind in ("exact", "special"):
            row[:] = 0
            row[match.identity] = 1
        row[np.lexsort((np.arange(len(row)), -row))[ENTRIES:]] = 0
        dense[identity] = row / max(row.sum(), 1e-300)
    students, teachers, weights = projection(teacher, student, matches, reverse)
    found = np.zeros_like(dense)
    found[students, teachers] = weights
    assert len(set(zip(students.tolist(), teachers.tolist(), strict=True))) == len(students)
    np.testing.assert_allclose(found, dense, atol=1e-12)
    sums = np.bincount(students, weights, student.vocab_size)
    np.testing.assert_allclose(sums[np.unique(students)], 1)
    assert (np.diff(students) >= 0).all() and np.bincount(students).max() <= ENTRIES


def _spelled(view, token):
    """The pieces of a token: the tokenizer's if they spell it, else the fewest."""
    text = token.decode(errors="ignore")
    ids = list(view.text_ids([text], [False])[0]) if text.encode() == token else []
    if ids and view.join(ids) == token:
        return ids
    ways = {0: []}
    for end in range(1, len(token) + 1):
        found = [
            [*ways[start], view.id_of_bytes[token[start:end]]]
            for start in range(end)
            if start in ways and token[start:end] in view.id_of_bytes
        ]
        if found:
            ways[end] = min(found, key=len)
    return ways.get(len(token), [])


def test_bytes_that_are_no_text_are_projected_on_byte_tokens():
    teacher = zoo.views()["bytes"]
    student = _with_tokens(b"\xe5\x8c", b"\xff\xfe\xfd\xfc\xfb")
    matches, reverse = list(mine(teacher, student, LIMIT)), list(mine(student, teacher, LIMIT))
    students, teachers, weights = projection(teacher, student, matches, reverse)
    assert teachers[students == 256].tolist() == [0xE5, 0x8C]
    np.testing.assert_allclose(weights[students == 256], [0.9 / 0.99, 0.09 / 0.99])
    assert teachers[students == 257].tolist() == [0xFF, 0xFE, 0xFD, 0xFC]


def _with_tokens(*tokens):
    """The bytes, then `tokens` that no merge makes."""
    from stages.tokenization.byte_functions import byte_alphabet

    alphabet = byte_alphabet()
    definition = json.loads(zoo.byte_level((), size=256).to_str())
    spelled = ["".join(alphabet[byte] for byte in token) for token in tokens]
    definition["model"]["vocab"] = {token: i for i, token in enumerate([*alphabet, *spelled])}
    return ByteView.load(zoo.save(Tokenizer.from_str(json.dumps(definition))))


@pytest.mark.parametrize("names", [("gpt2", "qwen1.5"), ("qwen1.5", "gpt2"), ("llama2", "gpt2")])
def test_real_tokenizers_sampled(names, tokenizers_dir):
    for name in names:
        if not (tokenizers_dir / name).is_dir():
            pytest.skip(f"no tokenizer {name} in {tokenizers_dir}")
    queries, choices = (list(ByteView.load(tokenizers_dir / name).id_of_bytes) for name in names)
    sampled = [queries[i] for i in np.random.default_rng(0).choice(len(queries), 200, replace=False)]
    found = nearest(sampled, choices)
    texts = [[token.decode("latin-1") for token in tokens] for tokens in (sampled, choices)]
    distances = cdist(*texts, scorer=Levenshtein.distance, dtype=np.uint16)
    for row, query in enumerate(sampled):
        second = np.partition(distances[row], 1)[1]
        near = np.flatnonzero(distances[row] <= second).tolist()
        best = sorted(near, key=lambda i: (distances[row, i], -common(query, choices[i]), i))[:2]
        assert found.index[row].tolist() == best and found.distance[row].tolist() == distances[row, best].tolist()


def test_projection_between_the_same_tokenizer_is_the_identity():
    view = zoo.views()["qwen"]
    matches = list(mine(view, view, LIMIT))
    students, teachers, weights = projection(view, view, matches, matches)
    assert (students == teachers).all() and (weights == 1).all() and len(students) == view.vocab_size
