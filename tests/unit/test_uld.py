"""ULD: which rows meet, what a top-k cache keeps of it, and the programs from signals to a trained student."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from stages.core.errors import UserError
from stages.losses import uld
from stages.losses.sft import target_rows
from stages.signals.schema import NO_NEEDS

from . import tiny
from .dense import evaluate, step, toy_examples
from .programs import World
from .toy_pair import Toy, close, view

CHUNK = {"uld_alignment": "chunk"}
TEXTS = [tiny.text(i, 9 + i) for i in range(4)]
TRAIN = {"batch_size": 12, "steps": 8}  # every step sees the whole corpus


@pytest.fixture(scope="module")
def views(tmp_path_factory):
    root = tmp_path_factory.mktemp("views")
    return view(root / "teacher", 400), view(root / "student", 300)


@pytest.fixture(scope="module")
def toy(views):
    return Toy(*views, TEXTS)


def test_rows_that_meet():
    teacher = np.array([-1, 0, 0, 1, 2, -1, 4])
    student = np.array([-1, 0, 1, 1, -1, 3, 4])
    rows = uld.chunk_pairs(teacher, student)
    assert [side.tolist() for side in rows] == [[0, 2, 5], [0, 1, 5]]  # chunks 0, 1 and 4


@pytest.mark.parametrize("alignment", uld.ALIGNMENTS)
def test_one_tokenizer_pairs_every_row_with_itself(views, alignment):
    same = Toy(views[0], views[0], TEXTS, masked=(2,))
    examples = toy_examples(same, [0, 1, 2, 3], 400)
    prepared = uld.prepare(examples, {"uld_alignment": alignment, "kind": "unconstrained"})
    rows = target_rows(examples.student.loss, examples.student.offsets)
    assert prepared.query.rows.tolist() == rows.tolist() and prepared.count == len(rows) > 0
    right = np.exp(np.take(examples.signals["topk_logprobs"], rows, 0))
    np.testing.assert_array_equal(prepared.arrays["probability"], right)


def test_positions_are_counted_from_the_first_trained_token(toy):
    examples = toy_examples(toy, [0, 1], 400)
    for batch, first in ((examples.teacher, 3), (examples.student, 5)):
        batch.loss[batch.offsets[0] : batch.offsets[0] + first] = False
    rows = uld.position_pairs(examples.teacher, examples.student)
    sizes = [np.diff(batch.offsets) for batch in (examples.teacher, examples.student)]
    number = min(sizes[0][0] - 3, sizes[1][0] - 5)
    assert rows[0][:number].tolist() == list(range(2, 2 + number))
    assert rows[1][:number].tolist() == list(range(4, 4 + number))
    assert len(rows[0]) == number + min(sizes[0][1], sizes[1][1]) - 1


@given(
    seed=st.integers(0, 2**16),
    sizes=st.tuples(st.integers(2, 12), st.integers(2, 12)),
    k=st.integers(1, 12),
)
@settings(max_examples=60, deadline=None)
def test_what_is_not_listed_is_bounded(seed, sizes, k):
    source = torch.Generator().manual_seed(seed)
    p, q = (torch.softmax(2 * torch.randn(4, size, generator=source), -1) for size in sizes)
    padded = [torch.nn.functional.pad(side, (0, max(sizes) - side.shape[1])) for side in (p, q)]
    dense = (padded[0].sort(-1, descending=True).values - padded[1].sort(-1, descending=True).values).abs().sum(-1)
    listed = [side.topk(min(k, side.shape[1]), -1).values for side in (p, q)]
    rests = [uld.rest_of(side, size) for side, size in zip(listed, sizes, strict=True)]
    found = uld.sorted_l1(*listed, *rests)
    assert (found <= dense + 1e-6).all()
    if k >= sizes[0]:
        torch.testing.assert_close(found, dense)


def test_permutations_and_shifts(views, toy):
    """Names of tokens play no part; places do."""
    logits = torch.randn(len(toy.student.ids), views[1].vocab_size, generator=torch.Generator().manual_seed(0))
    order = torch.randperm(logits.shape[1], generator=torch.Generator().manual_seed(1))
    examples = toy_examples(toy, range(4), 400)
    for options in ({}, CHUNK | {"kind": "unconstrained"}):
        (value, _, _), (permuted, _, _) = (evaluate(uld, examples, z, options) for z in (logits, logits[:, order]))
        shifted, _, _ = evaluate(uld, examples, logits.roll(1, 0), options)
        torch.testing.assert_close(permuted, value)
        assert abs(shifted - value) > 1e-3


@pytest.mark.parametrize("options", [{}, CHUNK])
def test_a_split_batch_gives_the_same_gradient(toy, options):
    whole = step(uld, toy, options, [[0, 1, 2, 3]], k=20)
    close(whole, step(uld, toy, options, [[2], [0, 3], [1]], k=20))
    assert 0 < whole[0] < 2


@pytest.mark.parametrize("options", [{}, CHUNK])
def test_junk_in_padding_columns_changes_nothing(views, options):
    padded = Toy(*views, TEXTS, padding=(7, 3))
    before = step(uld, padded, options, [[0, 1]], k=20)
    with torch.no_grad():
        for side, vocab in zip(padded.sides, (300, 400), strict=True):
            side.head.weight[vocab:] = 1e6
    after = step(uld, padded, options, [[0, 1]], k=20)
    close(before, after)
    assert (after[2]["head"][300:] == 0).all()


@pytest.mark.parametrize("options", [{}, CHUNK])
def test_nothing_to_learn(views, options):
    empty = Toy(*views, ["", TEXTS[0]])  # one token, and all masked
    empty.teacher.loss[:], empty.student.loss[:] = False, False
    value, _, gradients = step(uld, empty, options, [[0, 1]], k=20)
    assert value == 0 and all((gradient == 0).all() for gradient in gradients.values())


def test_unknown_alignment():
    with pytest.raises(UserError, match="uld_alignment is 'dtw'"):
        uld.check({"uld_alignment": "dtw"})


@pytest.mark.parametrize("options", [{}, CHUNK])
def test_cached_equals_online(tmp_path, options):
    entry = {"name": "baseline_uld", "module": "stages.losses.uld", "chunks": "unconstrained", "weight": 1.0}
    cached, online = World(tmp_path / "results").both([entry], NO_NEEDS | {"top_k": 30}, options, False, TRAIN)
    for one, other in zip(cached, online, strict=True):
        assert one["baseline_uld"] == pytest.approx(other["baseline_uld"], rel=1e-4)
    assert cached[-1]["baseline_uld"] < cached[0]["baseline_uld"]
