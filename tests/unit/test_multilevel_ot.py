"""MultiLevelOT against a plain computation with all logits, its invariants, and the programs."""

import numpy as np
import pytest
import torch

from stages.losses import multilevel_ot
from stages.signals.schema import NO_NEEDS
from stages.vocabulary.blocks import PIECE_ELEMENTS

from . import tiny
from .dense import step, teacher_logits, toy_examples
from .programs import World
from .toy_pair import Toy, close, view

TEXTS = [tiny.text(i, 9 + i) for i in range(4)]


@pytest.fixture(scope="module")
def views(tmp_path_factory):
    root = tmp_path_factory.mktemp("views")
    return view(root / "teacher", 400), view(root / "student", 300)


@pytest.fixture(scope="module")
def toy(views):
    return Toy(*views, TEXTS)


def plain(toy, chosen):
    """(the loss, its gradient by the student's states), from the definition."""
    total, leaf = 0.0, toy.hidden.detach().clone().requires_grad_()
    student = toy.sides.student.head.layer(leaf[:, -1])[:, : toy.pair.student.vocab_size]
    for number in chosen:
        examples = toy_examples(toy, [number], 5)
        rows = slice(*toy.student.offsets[number : number + 2])
        sides = []
        for logits in (teacher_logits(toy, examples)[:-1], student[rows][:-1]):  # nothing follows the last row
            probability = torch.softmax(logits / (logits.std(-1, keepdim=True) + 1e-4), -1)
            columns = probability.detach().sum(0).sort(descending=True).indices[:50]
            sides.append(probability[:, columns])
        p, q = sides
        n = min(len(p), len(q))
        token = (p[:n] - q[:n]).abs().sum(-1).mean()
        logarithmic = -(p[:n] * q[:n].log()).sum(-1).mean()
        softened = [torch.softmax(side / 2, -1) for side in (q, p)]
        cost = (softened[0][:, None] - softened[1][None]).abs().sum(-1)
        plan = torch.exp(-cost / 0.1)
        for _ in range(10):
            plan = plan / plan.sum(1, keepdim=True)
            plan = plan / plan.sum(0, keepdim=True)
        total = total + token + 0.1 * logarithmic + 0.1 * 0.001 * (plan * cost).sum()
    value = total / len(chosen)
    return value.item(), torch.autograd.grad(value, leaf)[0]


def test_values_and_gradients(toy):
    value, parts, gradients = step(multilevel_ot, toy, {}, [[0, 1, 2, 3]])
    right, slope = plain(toy, range(4))
    assert value == pytest.approx(right, rel=1e-5)
    torch.testing.assert_close(gradients["hidden"], slope, rtol=1e-3, atol=1e-6)
    assert 0 < parts["token"] < value and parts["sequence"] > 0


def test_a_block_may_end_within_an_example(toy, monkeypatch):
    whole = step(multilevel_ot, toy, {}, [[0, 1, 2, 3]])
    monkeypatch.setattr("stages.vocabulary.head.block_size", lambda vocab, device: 5)
    monkeypatch.setitem(PIECE_ELEMENTS, "cpu", 2 * 400)
    close(whole, step(multilevel_ot, toy, {}, [[0, 1, 2, 3]]))


def test_a_split_batch_gives_the_same_gradient(toy):
    close(step(multilevel_ot, toy, {}, [[0, 1, 2, 3]]), step(multilevel_ot, toy, {}, [[2], [0, 3], [1]]))


def test_names_of_tokens_play_no_part(views):
    toy = Toy(*views, TEXTS)
    before = step(multilevel_ot, toy, {}, [[0, 1]])
    with torch.no_grad():
        for side, vocab in zip(toy.sides, (300, 400), strict=True):
            order = torch.randperm(vocab, generator=torch.Generator().manual_seed(vocab))
            side.head.weight.copy_(side.head.weight[order])
    after = step(multilevel_ot, toy, {}, [[0, 1]])
    assert after[0] == pytest.approx(before[0], rel=1e-5)
    torch.testing.assert_close(after[2]["hidden"], before[2]["hidden"], rtol=1e-3, atol=1e-6)


def test_junk_in_padding_columns_changes_nothing(views):
    padded = Toy(*views, TEXTS, padding=(7, 3))
    before = step(multilevel_ot, padded, {}, [[0, 1]])
    with torch.no_grad():
        for side, vocab in zip(padded.sides, (300, 400), strict=True):
            side.head.weight[vocab:] = 1e6
    close(before, step(multilevel_ot, padded, {}, [[0, 1]]))


def test_a_student_that_is_the_teacher_moves_nothing(views):
    same = Toy(views[0], views[0], TEXTS, sizes=(6, 6))
    examples = toy_examples(same, range(4), 5)
    states = torch.tensor((examples.signals["hidden"].astype(np.uint32) << 16).view(np.float32))
    with torch.no_grad():
        same.hidden[:, -1] = states
        same.sides.student.head.weight.copy_(same.sides.teacher.head.weight)
    _, parts, _ = step(multilevel_ot, same, {}, [[0, 1, 2, 3]])
    assert parts["token"] == pytest.approx(0, abs=1e-5)


def test_sinkhorn_plan_of_equal_places():
    """One unit of mass for each place of the teacher; the cost of a place is its distance where all places agree."""
    p, q = torch.eye(4)[[0, 0, 0]], torch.eye(4)[[1, 1]]
    one = torch.softmax(torch.eye(4)[0] / 2, -1) - torch.softmax(torch.eye(4)[1] / 2, -1)
    assert multilevel_ot.sinkhorn_cost(p, q).item() == pytest.approx(3 * one.abs().sum().item(), rel=1e-5)
    assert multilevel_ot.sinkhorn_cost(p, torch.eye(4)[[0]]).item() == pytest.approx(0, abs=1e-6)


def test_nothing_to_learn(views):
    empty = Toy(*views, ["", TEXTS[0]])  # one token, and all masked
    empty.teacher.loss[:], empty.student.loss[:] = False, False
    value, parts, gradients = step(multilevel_ot, empty, {}, [[0, 1]])
    assert value == 0 and parts == {"token": 0, "sequence": 0}
    assert all((gradient == 0).all() for gradient in gradients.values())


def test_cached_equals_online(tmp_path):
    entry = {"name": "multilevel_ot", "module": "stages.losses.multilevel_ot", "chunks": None, "weight": 1.0}
    train = {"batch_size": 12, "steps": 8}
    cached, online = World(tmp_path / "results").both([entry], NO_NEEDS | {"hidden": True}, {}, True, train)
    for one, other in zip(cached, online, strict=True):
        assert one["multilevel_ot"] == pytest.approx(other["multilevel_ot"], rel=1e-3)
    assert cached[-1]["multilevel_ot"] < cached[0]["multilevel_ot"]
