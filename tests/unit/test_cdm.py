"""CDM: places, pairs in context, and its relation to forward KL."""

from itertools import pairwise

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from rapidfuzz.distance import Levenshtein

from stages.core.errors import UserError
from stages.losses import cdm
from stages.losses.contextual import link, nearest_in_context
from stages.losses.mapped import Likeliest, ends_before_targets
from stages.losses.token_alignment import is_part, segments, texts_of, warp

from . import dense
from .mapped_toys import GROUPS, SPLIT, TEXTS, forward_kl, junk_in_padding, masked, step, toys, trained
from .toy_pair import Toy, close

ALIGNMENTS = ["chunks", "dtw"]
MAPPINGS = ["exact", "mined", "prefix"]


@pytest.fixture(scope="module")
def two(tmp_path_factory):
    return toys(tmp_path_factory.mktemp("tokenizers"))


def options_of(alignment, **changes):
    return {"name": "cdm", "cdm_alignment": alignment} | changes


@pytest.mark.parametrize("alignment", ALIGNMENTS)
@pytest.mark.parametrize("mapping", MAPPINGS)
@pytest.mark.parametrize("temperature", [1.0, 2.0])
@pytest.mark.parametrize("k", [1, 20, 100])
def test_one_tokenizer_is_forward_kl(two, alignment, mapping, temperature, k):
    options = options_of(alignment, cdm_mapping=mapping, temperature=temperature)
    close(step(cdm, two[0], options, k=k), forward_kl(two[0], k=k, temperature=temperature))


@pytest.mark.parametrize("alignment", ALIGNMENTS)
def test_one_tokenizer_is_forward_kl_behind_a_prompt(tmp_path, alignment):
    same = masked(toys(tmp_path)[0], 5)
    close(step(cdm, same, options_of(alignment), k=30), forward_kl(same, k=30))


@pytest.mark.parametrize("alignment", ALIGNMENTS)
def test_only_the_hundred_likeliest_take_part(two, alignment):
    """What a larger cache knows beyond them goes to the rest."""
    close(step(cdm, two[0], options_of(alignment), k=150), forward_kl(two[0], k=100))


@pytest.mark.parametrize("alignment", ALIGNMENTS)
@pytest.mark.parametrize("mapping", MAPPINGS)
def test_a_split_batch_is_the_same_batch(two, alignment, mapping):
    """Also: whatever the order of examples, as no map grows. The base map is what it was."""
    matches = two[1].pair.to_student, two[1].pair.to_teacher
    before = [side.exact.copy() for side in matches]
    options = options_of(alignment, cdm_mapping=mapping, t_squared=True, temperature=2.0)
    found = step(cdm, two[1], options, GROUPS, k=100)
    close(found, step(cdm, two[1], options, SPLIT, k=100))
    assert found[0] > 1e-3 and 0 < found[1]["teacher_paired_mass"] <= 1 + 1e-6
    assert all(np.array_equal(side.exact, old) for side, old in zip(matches, before, strict=True))


@pytest.mark.parametrize("alignment", ALIGNMENTS)
def test_padding_columns_do_not_exist(tmp_path, alignment):
    _, toy = toys(tmp_path)
    before = step(cdm, toy, options_of(alignment), k=100)[0]
    junk_in_padding(toy)
    assert step(cdm, toy, options_of(alignment), k=100)[0] == pytest.approx(before, rel=1e-6)


def test_context_pairs_more_than_the_base_map(two):
    toy = two[1]
    ids = np.tile(np.arange(100, 200), (3, 1))
    student = np.tile(np.arange(150, 250), (3, 1))
    nothing = np.full(toy.pair.teacher.vocab_size, -1)
    links = link(toy.pair, ids, student, nothing, np.full(toy.pair.student.vocab_size, -1))
    assert (links.teacher < 100).any() and (links.student[:, :100] == 100).all()


def slow_links(pair, teacher_ids, student_ids, to_student, to_teacher):
    """The events of one place, as sets: the words of `link`'s docstring in a loop."""
    texts = [["" if is_part(text) else text for text in texts_of(view)] for view in (pair.teacher, pair.student)]

    def near(text, others):
        sides = [(i, other) for i, other in enumerate(others) if text and other]
        found = [(Levenshtein.distance(text, other) / (len(text) + len(other)), i) for i, other in sides]
        return min([item for item in found if item[0] < 0.3], default=(0, None))[1]

    partner = {}
    for place, token in enumerate(teacher_ids):
        if to_student[token] >= 0:
            partner[place] = int(to_student[token])
        elif (found := near(texts[0][token], [texts[1][i] for i in student_ids])) is not None:
            partner[place] = int(student_ids[found])
    events = {}
    for place, token in partner.items():
        events.setdefault(token, (set(), {token}))[0].add(int(teacher_ids[place]))
    free = [int(token) for token in student_ids if int(token) not in events]
    for token in free:
        places = [place for place, other in enumerate(teacher_ids) if to_teacher[token] == other]
        for place in places:
            alone = ({int(teacher_ids[place])}, set())
            events.setdefault(partner.get(place, ("alone", place)), alone)[1].add(token)
    for token in free:
        if to_teacher[token] < 0:
            found = near(texts[1][token], [texts[0][i] for i in teacher_ids])
            if found is not None:
                events[partner[found]][1].add(token)
    return {(frozenset(left), frozenset(right)) for left, right in events.values()}


@given(st.integers(0, 2**16), st.sampled_from(MAPPINGS))
@settings(max_examples=30, deadline=None)
def test_links_are_the_events(two, seed, mapping):
    pair, rng = two[1].pair, np.random.default_rng(seed)
    teacher = np.stack([rng.permutation(pair.teacher.vocab_size)[:30] for _ in range(3)])
    student = np.stack([rng.permutation(pair.student.vocab_size)[:40] for _ in range(3)])
    to_student, to_teacher = (
        np.where(rng.random(len(found)) < 0.5, found, -1)
        for found in (cdm.base_map(side, {"cdm_mapping": mapping}) for side in (pair.to_student, pair.to_teacher))
    )
    links = link(pair, teacher, student, to_student, to_teacher)
    base = np.maximum(to_student[teacher], 0)
    for row in range(3):
        columns = np.concatenate((base[row], student[row]))
        found = set()
        for event in range(30):
            left, right = teacher[row][links.teacher[row] == event], columns[links.student[row] == event]
            assert len(set(right.tolist())) == len(right) and (len(left) > 0) == (len(right) > 0)
            if len(left):
                found.add((frozenset(left.tolist()), frozenset(right.tolist())))
        assert found == slow_links(pair, teacher[row], student[row], to_student, to_teacher)


@pytest.mark.parametrize("mapping", MAPPINGS)
@pytest.mark.parametrize("temperature", [1.0, 2.0])
def test_the_loss_is_forward_kl_of_the_events(two, mapping, temperature):
    """Row by row from all logits, in float64."""
    toy, options = two[1], options_of("chunks", cdm_mapping=mapping, temperature=temperature)
    examples = dense.toy_examples(toy, range(len(TEXTS)), 100)
    *chunks, example = examples.chunks("unconstrained", scored=False)
    *rows, usable = ends_before_targets(examples, *chunks, len(example))
    student = toy.sides.student.head.logits(toy.hidden[:, -1]).detach()
    sides = [
        torch.softmax(logits.detach().double() / temperature, -1)[torch.as_tensor(at[usable])]
        for logits, at in zip((dense.teacher_logits(toy, examples), student), rows, strict=True)
    ]
    maps = [cdm.base_map(side, {"cdm_mapping": mapping}) for side in (toy.pair.to_student, toy.pair.to_teacher)]
    total = 0.0
    for p, q in zip(*sides, strict=True):
        events = slow_links(toy.pair, p.topk(100).indices.numpy(), q.topk(100).indices.numpy(), *maps)
        masses = [(float(p[list(left)].sum()), float(q[list(right)].sum())) for left, right in events]
        rests = [max(1 - sum(mass[side] for mass in masses), 1e-7) for side in (0, 1)]
        total += sum(a * np.log(a / b) for a, b in [*masses, rests])
    value = step(cdm, toy, options, k=100)[0]
    assert value == pytest.approx(total / usable.sum(), rel=1e-4)


def test_the_base_map_goes_both_ways(two):
    """Student tokens of one teacher token are one event with it, whichever of them it names, and if it names none."""
    pair = two[1].pair
    teacher, student = np.array([[300, 301, 302]]), np.array([[270, 271, 272, 273]])
    to_student, to_teacher = np.full(330, -1), np.full(280, 0)
    to_student[300] = 270
    to_teacher[[270, 271, 272]] = 300, 300, 302
    links = link(pair, teacher, student, to_student, to_teacher)
    assert links.teacher.tolist() == [[0, 3, 2]]
    assert links.student.tolist() == [[0, 3, 3, 3, 0, 2, 3]]


def test_parts_of_characters_differ_as_their_bytes_do():
    class Parts:
        vocab_size = 3
        token_bytes = (b"\xe9", b" \xb7", "\ufffd".encode())

        def string_of(self, identity):
            return self.token_bytes[identity].decode(errors="replace")

    texts = texts_of(Parts())
    assert [is_part(text) for text in texts] == [True, True, False] and texts[2] == "\ufffd"
    assert Levenshtein.distance(texts[0], texts[1]) == 1 and len(texts[1]) == 1


WORDS = ["ab", "", "abc", "abcd", "bcd", "dcba", "aaaaab", "aaab", "hello", "help", "world", "日本語", "日本", "\ufffd"]


class Words:
    """As much of a ByteView as a search reads."""

    vocab_size = len(WORDS)
    token_bytes = tuple(b"\xe6" if word == "\ufffd" else word.encode() for word in WORDS)

    def string_of(self, identity):
        return " " + WORDS[identity]


@given(st.data(), st.sampled_from([0.1, 0.3, 0.5]))
@settings(max_examples=60, deadline=None)
def test_nearest_in_context(data, threshold):
    """The bound rules nothing out that is near; id 0 is a token like any other."""
    view = Words()
    number = st.integers(0, len(WORDS) - 1)
    ids = np.array(data.draw(st.lists(number, min_size=1, max_size=4)))
    candidates = np.array([data.draw(st.lists(number, min_size=5, max_size=5)) for _ in ids])
    found = nearest_in_context((view, view), ids, candidates, threshold)
    for identity, row, column in zip(ids, candidates, found, strict=True):
        best, expected = threshold, -1
        for place, other in enumerate(row):
            a, b = WORDS[identity], WORDS[other]
            if a and b and "\ufffd" not in a + b and Levenshtein.distance(a, b) / (len(a) + len(b)) < best:
                best, expected = Levenshtein.distance(a, b) / (len(a) + len(b)), place
        assert column == expected


@given(st.integers(0, 2**16), st.integers(1, 12))
@settings(max_examples=40, deadline=None)
def test_mean_rows(seed, k):
    """Rows whose unlikeliest 12 - k tokens share their tail evenly: the mean is that of all logits."""
    rng = np.random.default_rng(seed)
    logit = 2 * rng.standard_normal((6, 12))
    order = np.argsort(-logit, 1)
    ranked = np.take_along_axis(logit, order, 1)
    ranked[:, k:] = ranked[:, min(k, 11)][:, None]
    np.put_along_axis(logit, order, ranked, 1)
    logprob = torch.log_softmax(torch.tensor(logit), -1).numpy()
    top = np.take_along_axis(logprob, order[:, :k], 1)
    rest = np.log(np.maximum(1 - np.exp(top).sum(-1), 1e-37))
    place = np.array([0, 0, 1, -1, 2, 2])
    found = cdm.mean_rows(Likeliest(order[:, :k], top, rest), place, 3, 12)
    for number in range(3):
        expected = torch.softmax(torch.tensor(logprob[place == number].mean(0)), -1).numpy()
        np.testing.assert_allclose(np.exp(found.logprob[number]), expected[found.ids[number]], atol=1e-5)
        np.testing.assert_allclose(np.exp(found.rest[number]), 1 - expected[found.ids[number]].sum(), atol=1e-5)
        assert expected[found.ids[number]].sum() == pytest.approx(np.sort(expected)[::-1][:k].sum(), abs=1e-5)


def test_entropy_weights_of_rows_that_are_alike():
    """One row, or rows of equal entropies: 3, where the paper's code divides 0 by 0."""
    assert cdm.entropy_weights(np.array([2.0, 0.5, 0.5, 0.5]), np.array([1, 0, 3])).tolist() == [3, 3, 3, 3]
    assert cdm.entropy_weights(np.array([0.0, 1.0, 2.0]), np.array([3])).tolist() == [3, 4, 5]
    assert len(cdm.entropy_weights(np.zeros(0), np.array([0, 0]))) == 0


def test_entropy_of_an_even_tail():
    p = torch.tensor([[0.5, 0.2, 0.1, 0.1, 0.1]])
    found = cdm.entropy(p[:, :2].log(), torch.tensor([0.3]).log(), 5)
    torch.testing.assert_close(found, -(p * p.log()).sum(-1))


@given(st.integers(0, 2**16))
@settings(max_examples=40, deadline=None)
def test_warping(seed):
    """Every path is one of the cheapest, and every segment has one token on one side or steps without a diagonal."""
    rng = np.random.default_rng(seed)
    sizes = rng.integers(0, 7, (2, 3))
    cost = rng.integers(0, 4, (3, sizes[0].max(), sizes[1].max()))
    path, totals = warp(cost, *sizes)
    for number, (n, m) in enumerate(sizes.T):
        here = path.example == number
        steps = list(zip(path.teacher[here].tolist(), path.student[here].tolist(), strict=True))
        if not n or not m:
            assert not steps
            continue
        least = np.full((n + 1, m + 1), np.inf)
        for i in range(n):
            for j in range(m):
                best = min(least[i, j], least[i, j + 1], least[i + 1, j]) if i or j else 0
                least[i + 1, j + 1] = cost[number, i, j] + best
        assert steps[0] == (0, 0) and steps[-1] == (n - 1, m - 1)
        assert totals[number] == least[n, m] == sum(cost[number][step] for step in steps)
        assert all(c - a in (0, 1) and d - b in (0, 1) for (a, b), (c, d) in pairwise(steps))
    teacher, student, count = segments(path, *sizes)
    full = np.repeat((sizes > 0).all(0), sizes[0]), np.repeat((sizes > 0).all(0), sizes[1])
    for side, used in zip((teacher, student), full, strict=True):
        assert np.array_equal(side >= 0, used) and set(side[used].tolist()) == (set(range(count)) if count else set())


@pytest.mark.parametrize("alignment", ALIGNMENTS)
@pytest.mark.parametrize("texts,masks", [(TEXTS[:2], (0,)), (TEXTS[:1], (0,)), (["x"], ()), ([""], ())])
def test_little_or_nothing_to_learn(two, alignment, texts, masks):
    """A masked example beside another, only masked ones, one token, none: a number, or a defined zero."""
    toy = Toy(two[1].pair.teacher, two[1].pair.student, texts)
    toy.pair = two[1].pair
    for batch in (toy.teacher, toy.student):
        for example in masks if masks else range(len(texts)):
            batch.loss[batch.offsets[example] : batch.offsets[example + 1]] = False
    value, _, gradients = step(cdm, toy, options_of(alignment), [list(range(len(texts)))], k=100)
    assert np.isfinite(value) and all(torch.isfinite(gradient).all() for gradient in gradients.values())
    assert (value == 0) == (len(texts) == 1)


def test_settings_are_checked():
    cdm.check({})
    for change, sentence in (
        ({"cdm_alignment": "bytes"}, "cdm_alignment is 'bytes'; it must be one of dtw, chunks"),
        ({"cdm_mapping": "em"}, "cdm_mapping is 'em'; it must be one of exact, mined, prefix"),
        ({"temperature": 0}, "temperature is 0; it must be above 0"),
    ):
        with pytest.raises(UserError, match=sentence):
            cdm.check(change)
    assert "normaliser_0_8" in cdm.needs({"temperature": 0.8}).teacher and cdm.needs({}).pair == {"mapping"}


@pytest.mark.parametrize("alignment", ALIGNMENTS)
def test_trains_cached_and_online(tmp_path, monkeypatch, alignment):
    options = options_of(alignment, cdm_mapping="exact", temperature=2.0)
    cached, online = trained(tmp_path, monkeypatch, cdm, options, [2.0])
    assert cached == pytest.approx(online, rel=1e-4) and cached[-1] < cached[0]
