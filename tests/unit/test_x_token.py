"""X-Token's P-KL and H-KL: a plain computation, how they are forward KL, what W leaves out, the programs."""

from dataclasses import replace

import numpy as np
import pytest
import torch

from stages.alignment.mapping import mine
from stages.alignment.pair import Projection
from stages.alignment.projection import ENTRIES, projection
from stages.core.errors import UserError
from stages.losses import same_tokenizer, x_token
from stages.losses.chunks import merge_chunks
from stages.losses.mapped import Likeliest
from stages.signals.schema import NO_NEEDS
from stages.vocabulary.blocks import PIECE_ELEMENTS

from . import tiny
from .dense import step, teacher_logits, toy_examples
from .programs import World
from .toy_pair import Toy, close, view

TEXTS = [tiny.text(i, 9 + i) for i in range(4)]
NAMES = ("p_kl", "h_kl")


def mined(teacher, student):
    """The projection of two tokenizers as the loss gets it."""
    matches, reverse = list(mine(teacher, student, 0.3)), list(mine(student, teacher, 0.3))
    students, teachers, weights = projection(teacher, student, matches, reverse)
    place = np.arange(len(students)) - np.searchsorted(students, students)
    made = Projection(
        np.zeros((student.vocab_size, ENTRIES), np.int64), np.zeros((student.vocab_size, ENTRIES), np.float32)
    )
    made.ids[students, place], made.weights[students, place] = teachers, weights
    return made


def identity(vocab):
    return Projection(np.arange(vocab)[:, None], np.ones((vocab, 1), np.float32))


def with_projection(toy, made):
    toy.pair = replace(toy.pair, projection=made)
    return toy


@pytest.fixture(scope="module")
def views(tmp_path_factory):
    root = tmp_path_factory.mktemp("views")
    return view(root / "teacher", 400), view(root / "student", 300)


@pytest.fixture(scope="module")
def toy(views):
    return with_projection(Toy(*views, TEXTS), mined(*views))


@pytest.fixture(scope="module")
def same(views):
    return with_projection(Toy(views[0], views[0], TEXTS, masked=(2,)), identity(400))


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("options", [{}, {"temperature": 2.0, "t_squared": True}])
@pytest.mark.parametrize("k", [8, 400])
def test_the_identity_is_forward_kl(same, name, options, k):
    right = step(same_tokenizer, same, options | {"name": "fkl"}, [[0, 1, 2, 3]], k)
    close(step(x_token, same, options | {"name": name}, [[0, 1, 2, 3]], k), right)


def plain(toy, examples, logits):
    """The sum over chunks from all logits of both sides, W as a matrix, in loops."""
    made, vocab = toy.pair.projection, toy.pair.teacher.vocab_size
    matrix = torch.zeros(len(made.ids), vocab, dtype=torch.float64)
    rows = torch.arange(len(made.ids))[:, None].expand(made.ids.shape)
    matrix.index_put_((rows, torch.tensor(made.ids)), torch.tensor(made.weights).double(), accumulate=True)
    reached = (matrix > 0).any(0)
    log_p = torch.log_softmax(teacher_logits(toy, examples).double(), -1)
    projected = torch.softmax(logits.double(), -1) @ matrix
    chunks, total = merge_chunks(*examples.chunks("unconstrained")), 0.0
    for number in range(len(chunks.count)):
        theirs, own = (np.flatnonzero(chunk == number) - 1 for chunk in (chunks.teacher, chunks.student))
        p, q = torch.softmax(log_p[theirs].mean(0), -1), projected[own].mean(0)
        share = p[reached].sum()
        p, q = p[reached] / share, q[reached]
        total = total + share * (p * (p / q).log()).sum()
    return total


@pytest.mark.parametrize("larger", ["teacher", "student"])
def test_all_tokens_are_the_plain_computation(views, larger):
    pair = views if larger == "teacher" else views[::-1]
    toy = with_projection(Toy(*pair, TEXTS[:2]), mined(*pair))
    value, _, gradients = step(x_token, toy, {"name": "p_kl"}, [[0, 1]])
    leaf = toy.hidden.detach().clone().requires_grad_()
    examples = toy_examples(toy, [0, 1], 5)
    count = len(merge_chunks(*examples.chunks("unconstrained")).count)
    right = plain(toy, examples, toy.sides.student.head.layer(leaf[:, -1])) / count
    assert value == pytest.approx(right.item(), rel=1e-4)
    torch.testing.assert_close(gradients["hidden"], torch.autograd.grad(right, leaf)[0], rtol=1e-3, atol=2e-6)


def test_mean_of_rows_that_list_different_tokens():
    """Worked out by hand: V = 5, k = 2, a chunk of two rows; each unlisted token is given a third of the rest."""
    top = Likeliest(
        np.array([[0, 1], [1, 2]]), np.log(np.array([[0.5, 0.2], [0.6, 0.1]], "f4")), np.log(np.array([0.3, 0.3], "f4"))
    )
    reached = np.array([True, True, True, True, False])
    columns, logprob, rest, share = x_token.chunk_targets(np.zeros(2, int), 1, top, reached)
    mean = np.sqrt([0.5 * 0.1, 0.2 * 0.6, 0.1 * 0.1, 0.2 * 0.2])
    assert columns.tolist() == [[0, 1, 2]] and share == 1
    np.testing.assert_allclose(np.exp(np.append(logprob[0], rest)), mean / mean.sum(), rtol=1e-5)
    columns, logprob, rest, share = x_token.chunk_targets(np.zeros(2, int), 1, top, np.arange(5) < 2)
    assert columns.tolist() == [[0, 1]]  # token 2 is out of W's reach
    left = mean[[0, 1, 3]]
    np.testing.assert_allclose(np.exp(np.append(logprob[0], rest)), left / left.sum(), rtol=1e-5)
    np.testing.assert_allclose(share, left.sum() / mean.sum(), rtol=1e-5)


def test_less_is_known_less_is_seen(views):
    """Where W reaches every token, fewer columns are a coarser distribution (data-processing inequality)."""
    toy = with_projection(Toy(*views, TEXTS), mined(*views))
    made = toy.pair.projection
    unreached = np.setdiff1d(np.arange(400), made.ids[made.weights > 0])
    assert 0 < len(unreached) <= 290
    made.ids[: len(unreached), -1], made.weights[: len(unreached), -1] = unreached, 0.1
    made.weights[:] /= made.weights.sum(1, keepdims=True).clip(min=0.1)
    values = [step(x_token, toy, {"name": "p_kl"}, [[0, 1, 2, 3]], k, sharpness=3.0)[0] for k in (1, 10, 100, 400)]
    assert values == sorted(values) and values[0] > 0 and values[2] > 0.95 * values[3]


def test_heavy_tokens():
    ids = np.array([[0, 1], [1, 0], [1, 2], [2, 0], [3, 0], [3, 1]])
    weights = np.array([[1.0, 0], [0.7, 0.3], [0.9, 0.1], [0.59, 0.41], [0.6, 0.4], [0.6, 0.4]], np.float32)
    # 1 and 2 both go to 1, the heavier stays; 3 is too light; 4 and 5 weigh the same, the lower id stays.
    assert x_token.heavy_tokens(Projection(ids, weights), 5).tolist() == [0, 2, -1, 4, -1]


def test_exact_tokens_are_matched_in_h_kl(toy):
    images = x_token.heavy_tokens(toy.pair.projection, 400)
    exact = toy.pair.to_student.exact
    assert (images[exact >= 0] == exact[exact >= 0]).all() and (images >= 0).sum() >= (exact >= 0).sum()


@pytest.mark.parametrize("name", NAMES)
def test_a_split_batch_gives_the_same_gradient(toy, name):
    options = {"name": name}
    close(step(x_token, toy, options, [[0, 1, 2, 3]], k=20), step(x_token, toy, options, [[2], [0, 3], [1]], k=20))


def test_blocks_change_nothing(toy, monkeypatch):
    whole = step(x_token, toy, {"name": "p_kl"}, [[0, 1, 2, 3]], k=20)
    monkeypatch.setattr("stages.vocabulary.head.block_size", lambda vocab, device: 5)
    monkeypatch.setitem(PIECE_ELEMENTS, "cpu", 2 * 400)
    close(whole, step(x_token, toy, {"name": "p_kl"}, [[0, 1, 2, 3]], k=20))


@pytest.mark.parametrize("name", NAMES)
def test_junk_in_padding_columns_changes_nothing(views, name):
    padded = with_projection(Toy(*views, TEXTS, padding=(7, 3)), mined(*views))
    before = step(x_token, padded, {"name": name}, [[0, 1]], k=20)
    with torch.no_grad():
        for side, vocab in zip(padded.sides, (300, 400), strict=True):
            side.head.weight[vocab:] = 1e6
    close(before, step(x_token, padded, {"name": name}, [[0, 1]], k=20))


@pytest.mark.parametrize("name", NAMES)
def test_a_projection_that_reaches_little_stays_finite(views, name):
    made = mined(*views)
    made.weights[20:] = 0
    poor = with_projection(Toy(*views, TEXTS), made)
    value, _, gradients = step(x_token, poor, {"name": name}, [[0, 1]], k=20, sharpness=20.0)
    assert np.isfinite(value) and all(torch.isfinite(gradient).all() for gradient in gradients.values())


@pytest.mark.parametrize("name", NAMES)
def test_nothing_to_learn(views, name):
    empty = with_projection(Toy(*views, ["", TEXTS[0]]), mined(*views))  # one token, and all masked
    empty.teacher.loss[:], empty.student.loss[:] = False, False
    value, _, gradients = step(x_token, empty, {"name": name}, [[0, 1]], k=20)
    assert value == 0 and all((gradient == 0).all() for gradient in gradients.values())


def test_settings_out_of_range():
    with pytest.raises(UserError, match="temperature is -1"):
        x_token.check({"name": "p_kl", "temperature": -1.0})


@pytest.mark.parametrize("name", NAMES)
def test_cached_equals_online(tmp_path, name):
    entry = {"name": name, "module": "stages.losses.x_token", "chunks": "unconstrained", "weight": 1.0}
    needs, train = NO_NEEDS | {"top_k": 30, "temperatures": [2.0]}, {"batch_size": 12, "steps": 8}
    cached, online = World(tmp_path / "results").both([entry], needs, {"temperature": 2.0}, False, train, ["mapping"])
    for one, other in zip(cached, online, strict=True):
        assert one[name] == pytest.approx(other[name], rel=1e-4)
    assert cached[-1][name] < cached[0][name]
