"""MinED: `baseline_mined` and `baseline_minED`, and the teacher's rows on the student's vocabulary."""

import json

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from rapidfuzz.distance import Levenshtein
from tokenizers import Tokenizer, decoders, models, pre_tokenizers

from stages.alignment.pair import Pair
from stages.core.errors import UserError
from stages.losses import mined
from stages.losses.mapped import Likeliest, compared, gathered, grouped, spread
from stages.losses.token_alignment import token_costs
from stages.tokenization import ByteView

from . import tiny, toy_pair
from .dense import toy_examples
from .mapped_toys import GROUPS, SPLIT, TEXTS, forward_kl, junk_in_padding, masked, matches, step, toys, trained
from .toy_pair import Toy, close

NAMES = ["baseline_mined", "baseline_minED"]


@pytest.fixture(scope="module")
def two(tmp_path_factory):
    return toys(tmp_path_factory.mktemp("tokenizers"))


def options_of(name, **changes):
    return {"name": name, "divergence": "kl", "kd_temp": 1.0} | changes


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("temperature", [1.0, 2.0])
@pytest.mark.parametrize("k", [1, 7, None])
def test_one_tokenizer_is_forward_kl(two, name, temperature, k):
    same, _ = two
    found = step(mined, same, options_of(name, kd_temp=temperature), k=k)
    close(found, forward_kl(same, k=k, temperature=temperature))
    assert found[0] > 0.1


@pytest.mark.parametrize("name", NAMES)
def test_one_tokenizer_is_forward_kl_behind_a_prompt(tmp_path, name):
    same, _ = toys(tmp_path)
    masked(same, 5)
    close(step(mined, same, options_of(name), k=9), forward_kl(same, k=9))


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("divergence", ["kl", "rkl", "srkl", "akl"])
def test_a_split_batch_is_the_same_batch(two, name, divergence):
    options = options_of(name, divergence=divergence, kd_temp=2.0)
    close(step(mined, two[1], options, GROUPS, k=9), step(mined, two[1], options, SPLIT, k=9))


@pytest.mark.parametrize("name", NAMES)
def test_padding_columns_do_not_exist(tmp_path, name):
    _, toy = toys(tmp_path)
    before = step(mined, toy, options_of(name), k=9)
    junk_in_padding(toy)
    after = step(mined, toy, options_of(name), k=9)
    assert (
        after[0] == pytest.approx(before[0], rel=1e-6) and (after[2]["head"][toy.pair.student.vocab_size :] == 0).all()
    )


def spans(batch):
    """(example, start, end) of each token, in the coordinates that tokenizers share."""
    example = np.repeat(np.arange(len(batch.offsets) - 1), np.diff(batch.offsets))
    start = np.append(0, batch.ends[:-1])
    start[batch.offsets[:-1]] = 0
    return list(zip(example.tolist(), start.tolist(), batch.ends.tolist(), strict=True))


def test_rows_of_chunks_of_one_token(tmp_path):
    toy = masked(toys(tmp_path)[1], 4)
    examples = toy.examples([0, 1, 2, 3])
    teacher, student = spans(examples.teacher), spans(examples.student)
    shared = set(teacher) & set(student)
    found = mined.one_to_one_rows(examples)
    trained = {row + 1 for row in range(len(student) - 1) if examples.student.loss[row + 1] and student[row + 1][1] > 0}
    rows = [row for row, span in enumerate(student) if span in shared and row + 1 in trained]
    assert found[1].tolist() == rows and len(rows) > 10
    assert [teacher[row] for row in found[0]] == [student[row] for row in rows]
    observed = [token - 1 for token in sorted(trained) if student[token] not in shared]
    assert found[2].tolist() == observed and len(observed) > 5


def reference_joined(pair, costs, teacher, student):
    """DSKD's `transform_step_logits_fast`, place by place: [(teacher place, student place)] that it compares."""
    least = np.full((len(teacher) + 1, len(student) + 1), np.inf)
    least[0, 0] = 0
    for i in range(len(teacher)):
        for j in range(len(student)):
            least[i + 1, j + 1] = costs[i, j] + min(least[i, j + 1], least[i + 1, j], least[i, j])
    partners = [[] for _ in student]
    i, j = len(teacher), len(student)
    while i and j:
        partners[j - 1].append(i - 1)
        step = int(np.argmin([least[i - 1, j - 1], least[i - 1, j], least[i, j - 1]]))
        i, j = i - (step != 2), j - (step != 1)
    return [
        (found[0], place)
        for place, found in enumerate(partners)
        if len(found) == 1 and pair.to_student.nearest[teacher[found[0]]] == student[place]
    ]


def check_joined(toy, chosen):
    """Compare `joined_rows` with the reference; (its teacher rows, its student rows, flat ids of both sides)."""
    examples = toy.examples(chosen)
    teacher_rows, rows, observed = mined.joined_rows(examples)
    expected, trained = [], []
    for number in range(len(chosen)):
        places = [target_rows_of(batch, number) for batch in (examples.teacher, examples.student)]
        ids = [batch.ids[rows] for batch, rows in zip((examples.teacher, examples.student), places, strict=True)]
        if all(map(len, ids)):
            costs = token_costs(toy.pair, *([side] for side in ids))[0]
            expected += [(places[0][i], places[1][j]) for i, j in reference_joined(toy.pair, costs, *ids)]
        trained += places[1].tolist()
    assert list(zip(teacher_rows.tolist(), rows.tolist(), strict=True)) == expected
    assert sorted([*rows.tolist(), *observed.tolist()]) == trained
    return teacher_rows, rows, examples.teacher.ids, examples.student.ids


def target_rows_of(batch, number):
    start, end = batch.offsets[number], batch.offsets[number + 1]
    return np.array([row for row in range(start, end - 1) if batch.loss[row + 1]], np.int64)


@pytest.mark.parametrize("sizes", [(330, 280), (280, 330), (400, 265), (300, 300)])
def test_rows_of_joined_tokens(tmp_path, sizes):
    """Whichever side splits finer: rows are compared where FuseLLM and DSKD compare them."""
    teacher, student = (toy_pair.view(tmp_path / side, size) for side, size in zip("ts", sizes, strict=True))
    toy = Toy(teacher, student, TEXTS)
    object.__setattr__(toy.pair, "to_teacher", matches(student, teacher))
    object.__setattr__(toy.pair, "to_student", matches(teacher, student))
    _, rows, _, _ = check_joined(toy, [0, 1, 2, 3])
    assert len(rows) > 10
    check_joined(masked(toy, 4), [3, 0, 2])


def words(folder, pieces, merges):
    """A byte-level BPE of these merges, with nothing but them and single bytes."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    model = models.BPE(vocab={token: i for i, token in enumerate([*alphabet, *pieces])}, merges=merges)
    tokenizer = Tokenizer(model)
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens(["</s>"])
    folder.mkdir()
    tokenizer.save(str(folder / "tokenizer.json"))
    (folder / "tokenizer_config.json").write_text(json.dumps({"eos_token": "</s>"}))
    return ByteView.load(folder)


def test_a_teacher_token_that_two_student_tokens_share_keeps_the_one_it_stands_for(tmp_path):
    """The teacher reads "xabcd" as x, abcd, the student as x, abc, d: abcd is joined with both and mined to abc.

    One to one on both sides would leave that row without its teacher; d, which abcd is not mined to, has none.
    """
    teacher = words(tmp_path / "t", ["ab", "cd", "abcd"], [("a", "b"), ("c", "d"), ("ab", "cd")])
    student = words(tmp_path / "s", ["ab", "abc"], [("a", "b"), ("ab", "c")])
    toy = Toy(teacher, student, ["xabcdy"])
    object.__setattr__(toy.pair, "to_teacher", matches(student, teacher))
    object.__setattr__(toy.pair, "to_student", matches(teacher, student))
    left, right = teacher.id_of_bytes[b"abcd"], student.id_of_bytes[b"abc"]
    assert toy.pair.to_student.nearest[left] == right
    teacher_rows, rows, teacher_ids, ids = check_joined(toy, [0])
    pairs = list(zip(teacher_ids[teacher_rows].tolist(), ids[rows].tolist(), strict=True))
    assert (left, right) in pairs and student.id_of_bytes[b"d"] not in ids[rows]


def test_a_student_token_with_two_teacher_tokens_has_none(tmp_path):
    """The teacher reads "xabcdy" as x, ab, cd, y, the student as x, abcd, y."""
    teacher = words(tmp_path / "t", ["ab", "cd"], [("a", "b"), ("c", "d")])
    student = words(tmp_path / "s", ["ab", "cd", "abcd"], [("a", "b"), ("c", "d"), ("ab", "cd")])
    toy = Toy(teacher, student, ["xabcdy"])
    object.__setattr__(toy.pair, "to_teacher", matches(student, teacher))
    object.__setattr__(toy.pair, "to_student", matches(teacher, student))
    _, rows, _, ids = check_joined(toy, [0])
    assert student.id_of_bytes[b"y"] in ids[rows] and student.id_of_bytes[b"abcd"] not in ids[rows]


def test_mined_from_the_student_alone_is_no_match(tmp_path):
    """The teacher's "abc" is mined to "abd"; that the student's "bc", joined with it, is mined to "abc" is no match."""
    teacher = words(tmp_path / "t", ["ab", "abc"], [("a", "b"), ("ab", "c")])
    student = words(tmp_path / "s", ["bc", "abd"], [("b", "c")])
    toy = Toy(teacher, student, ["xabcy"])
    to_teacher, to_student = matches(student, teacher), matches(teacher, student)
    left, right = teacher.id_of_bytes[b"abc"], student.id_of_bytes[b"bc"]
    to_student.nearest[left], to_teacher.nearest[right] = student.id_of_bytes[b"abd"], left
    object.__setattr__(toy.pair, "to_teacher", to_teacher)
    object.__setattr__(toy.pair, "to_student", to_student)
    _, rows, _, ids = check_joined(toy, [0])
    assert right not in ids[rows] and student.id_of_bytes[b"y"] in ids[rows]


def test_token_costs(tmp_path):
    """Edit distances without spaces; specials of one role cost nothing, however they are written."""
    tiny.bpe(tmp_path / "teacher", 290, ("[BOS]", "[EOS]", "[PAD]"))
    tiny.bpe(tmp_path / "student", 280)
    teacher, student = ByteView.load(tmp_path / "teacher"), ByteView.load(tmp_path / "student")
    pair = Pair(teacher, student, matches(student, teacher), matches(teacher, student))
    ids = [np.array([teacher.start_id, *teacher.text_ids(["the model"], [False])[0], teacher.eos_id])]
    others = [np.array([student.start_id, *student.text_ids([" model"], [False])[0], student.eos_id])]
    found = token_costs(pair, [*ids, np.zeros(0, np.int64)], [*others, others[0]])
    assert found.shape == (2, len(ids[0]), len(others[0])) and not found[1].any()
    assert found[0, 0, 0] == found[0, -1, -1] == 0 and found[0, 0, -1] == Levenshtein.distance("[BOS]", "</s>")
    for row, left in zip(found[0, 1:-1, 1:-1], ids[0][1:-1], strict=True):
        for cost, right in zip(row, others[0][1:-1], strict=True):
            strings = [view.string_of(i).replace(" ", "") for view, i in ((teacher, left), (student, right))]
            assert cost == Levenshtein.distance(*strings)


def dense_spread(logprob, to_teacher):
    logit = np.where(to_teacher >= 0, logprob[:, np.maximum(to_teacher, 0)], -np.inf)
    return torch.log_softmax(torch.tensor(logit), -1).numpy()


def dense_gathered(logprob, to_student, size):
    logit = np.full((len(logprob), size), -np.inf)
    for token, image in enumerate(to_student):
        if image >= 0:
            logit[:, image] = np.maximum(logit[:, image], logprob[:, token])
    return torch.log_softmax(torch.tensor(logit), -1).numpy()


@st.composite
def rows_and_map(draw, images, source):
    """(teacher rows of 12 tokens whose 12 - k unlikeliest share the tail evenly, k, a map, its seed)."""
    seed, k = draw(st.integers(0, 2**16)), draw(st.integers(1, 12))
    rng = np.random.default_rng(seed)
    logit = 3 * rng.standard_normal((4, 12))
    order = np.argsort(-logit, 1)
    even = np.arange(12)[None, :] >= k
    ranked = np.take_along_axis(logit, order, 1)
    level = ranked[:, min(k, 11)][:, None]
    np.put_along_axis(logit, order, np.where(even, level, ranked), 1)
    logprob = torch.log_softmax(torch.tensor(logit), -1).numpy()
    top = np.take_along_axis(logprob, order[:, :k], 1)
    rest = np.log(np.maximum(1 - np.exp(top).sum(-1), 1e-37))
    mapping = rng.integers(-1, images, source)
    return logprob, Likeliest(order[:, :k], top.astype(np.float32), rest.astype(np.float32)), mapping


def check_mapped(mapped, expected, known):
    """What is known has its probability, and the rest what is left."""
    found = np.full(expected.shape, -np.inf)
    row, column = np.nonzero(~np.isneginf(mapped.logprob))
    found[row, mapped.ids[row, column]] = mapped.logprob[row, column]
    np.testing.assert_allclose(np.exp(found), np.where(known, np.exp(expected), 0), atol=1e-5)
    np.testing.assert_allclose(np.exp(mapped.logprob).sum(-1) + np.exp(mapped.rest), 1, atol=1e-5)


@given(rows_and_map(12, 9))
@settings(max_examples=60, deadline=None)
def test_spread_is_the_dense_distribution(case):
    """With an even tail, and so with k the whole vocabulary, nothing is approximated."""
    logprob, top, to_teacher = case
    expected = np.nan_to_num(dense_spread(logprob, to_teacher), nan=-np.inf)
    known = (to_teacher[None, :, None] == top.ids[:, None, :]).any(-1)
    check_mapped(spread(top, to_teacher, 12), expected, known)


@given(rows_and_map(9, 12))
@settings(max_examples=60, deadline=None)
def test_gathered_is_the_dense_distribution(case):
    logprob, top, to_student = case
    expected = np.nan_to_num(dense_gathered(logprob, to_student, 9), nan=-np.inf)
    known = (to_student[top.ids][:, :, None] == np.arange(9)).any(1)
    check_mapped(gathered(top, to_student, 12), expected, known)


@given(st.integers(0, 2**16))
@settings(max_examples=30, deadline=None)
def test_grouped(seed):
    source = torch.Generator().manual_seed(seed)
    logprob = (200 * torch.randn(3, 6, generator=source, dtype=torch.float64)).requires_grad_()
    group = torch.randint(0, 4, (3, 6), generator=source)
    found = grouped(logprob, group, 3)
    for row in range(3):
        for number in range(3):
            expected = torch.logsumexp(logprob[row, group[row] == number], 0)
            torch.testing.assert_close(found[row, number], expected)
    (gradient,) = torch.autograd.grad(found[~torch.isneginf(found)].sum(), logprob)
    assert torch.isfinite(gradient).all() and (gradient[group == 3] == 0).all()


@pytest.mark.parametrize("divergence", ["kl", "rkl", "skl", "srkl", "js", "gjsd", "akl", "tvd"])
def test_a_row_without_any_mapped_token_teaches_nothing(divergence):
    nothing = np.full(5, -1)
    top = Likeliest(np.array([[1, 2]]), np.log(np.array([[0.5, 0.3]], np.float32)), np.log(np.array([0.2], np.float32)))
    for mapped in (spread(top, nothing, 5), gathered(top, nothing, 5)):
        log_q = torch.log_softmax(torch.randn(1, mapped.ids.shape[1] + 3), -1).requires_grad_()
        value = compared(
            divergence, torch.tensor(mapped.logprob), torch.tensor(mapped.rest), log_q[:, :-3], {"jsd_beta": 0.5}
        )
        assert abs(value.item()) < 1e-5
        assert (torch.autograd.grad(value.sum(), log_q)[0] == 0).all()


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("texts,masks", [(TEXTS[:1], (0,)), (["x"], (0,)), ([""], ())])
def test_nothing_to_learn_is_zero(two, name, texts, masks):
    views = two[1].pair.teacher, two[1].pair.student
    toy = Toy(*views, texts, masked=masks)
    for batch in (toy.teacher, toy.student):
        batch.loss[:] = False
    toy.pair = two[1].pair
    value, _, gradients = step(mined, toy, options_of(name, divergence="srkl"), [[0]], k=5)
    assert value == 0 and all((gradient == 0).all() for gradient in gradients.values())


@pytest.mark.parametrize("name", NAMES)
def test_the_count_is_the_rows(two, name):
    prepared = mined.prepare(toy_examples(two[1], [0, 1], 5, {2.0}), options_of(name, kd_temp=2.0))
    assert prepared.count == len(prepared.query.rows) == len(prepared.query.candidates)
    assert prepared.query.candidates.max() < two[1].pair.student.vocab_size and prepared.query.temperature == 2.0


def test_settings_are_checked():
    mined.check({"name": "baseline_mined"})
    for change, sentence in (
        ({"kd_temp": 0.0}, "kd_temp is 0.0; it must be above 0"),
        ({"divergence": "fkll"}, "divergence is 'fkll'; it must be one of"),
        ({"skew_lambda": 1.5}, "skew_lambda is 1.5"),
    ):
        with pytest.raises(UserError, match=sentence):
            mined.check({"name": "baseline_mined"} | change)
    assert mined.needs({"kd_temp": 2.0}).teacher == {"topk_ids", "topk_logprobs", "tail_logmass", "normaliser_2"}
    assert "normaliser_1" not in mined.needs({"kd_temp": 1.0}).teacher
    assert mined.needs({}).pair == {"mapping"}


@pytest.mark.parametrize("name", NAMES)
def test_trains_cached_and_online(tmp_path, monkeypatch, name):
    options = {"name": name, "divergence": "srkl", "kd_temp": 2.0}
    cached, online = trained(tmp_path, monkeypatch, mined, options, [2.0])
    assert cached == pytest.approx(online, rel=1e-4) and cached[-1] < cached[0]
