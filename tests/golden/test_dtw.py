"""Token alignment against DSKD's `dtw`, and `baseline_minED` against its `min_edit_dis_kld`."""

import json
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from stages.alignment.pair import Matches, Pair
from stages.losses import mined
from stages.losses.mapped import Likeliest, gathered
from stages.losses.token_alignment import token_costs, warp
from stages.tokenization import ByteView
from tests.conftest import golden_file


@pytest.fixture(scope="module")
def found(golden):
    return dict(np.load(golden_file(golden, "dskd_min_edit.npz")))


@pytest.fixture(scope="module")
def views(golden):
    folder = golden_file(golden, "small_tokenizers")
    return ByteView.load(folder / "teacher"), ByteView.load(folder / "student")


@pytest.fixture(scope="module")
def pair(views, found):
    teacher, student = views
    nothing = np.full(student.vocab_size, -1)
    exact = np.array([teacher.id_of_bytes.get(token, -1) for token in student.token_bytes])
    to_student = found["teacher_to_student_id_mapping"]
    return Pair(
        teacher,
        student,
        Matches(exact, nothing, nothing, nothing >= 0),
        Matches(to_student, to_student, to_student, to_student >= 0),
    )


def flat(found, side):
    """DSKD's padded rows as a batch; its labels are shifted, so a label belongs to the row that predicts it."""
    ids, label = found[f"{side}_input_ids"], found[f"{side}_label"]
    trained = np.zeros(ids.shape, bool)
    trained[:, 1:] = label[:, :-1] != -100
    offsets = np.arange(len(ids) + 1) * ids.shape[1]
    return SimpleNamespace(ids=ids.reshape(-1), loss=trained.reshape(-1), offsets=offsets)


def lists(first, second):
    """For each place of one side the places of the other that a path joins it to."""
    return [second[first == place].tolist() for place in range(first.max() + 1)]


def test_paths(golden):
    """All matrices at once, so that the padding of the smaller ones is seen to change nothing."""
    cases = json.loads(golden_file(golden, "dskd_dtw.json").read_text())
    matrices = [np.array(case["cost_matrix"]) for case in cases]
    sizes = np.array([matrix.shape for matrix in matrices])
    cost = np.zeros((len(cases), *sizes.max(0)))
    for padded, matrix in zip(cost, matrices, strict=True):
        padded[: matrix.shape[0], : matrix.shape[1]] = matrix
    path, totals = warp(cost, *sizes.T)
    for number, case in enumerate(cases):
        here = path.example == number
        teacher, student = path.teacher[here], path.student[here]
        assert np.stack([teacher, student], 1).tolist() == case["matches"] and totals[number] == case["cost"]
        assert lists(teacher, student) == case["map_1"] and lists(student, teacher) == case["map_2"]


def test_token_paths(golden, pair, found):
    """The costs are those of the token strings without their space marks."""
    cases = json.loads(golden_file(golden, "dskd_min_edit.json").read_text())["dtw"]
    sides = [
        [ids[label != -100] for ids, label in zip(found[f"{side}_input_ids"], found[f"{side}_label"], strict=True)]
        for side in ("teacher", "student")
    ]
    sizes = [np.array([len(ids) for ids in side]) for side in sides]
    path, totals = warp(token_costs(pair, *sides), *sizes)
    for number, case in enumerate(cases):
        here = path.example == number
        assert totals[number] == case["dtw_cost"]
        assert lists(path.teacher[here], path.student[here]) == case["teacher_to_student_positions"]
        assert lists(path.student[here], path.teacher[here]) == case["student_to_teacher_positions"]


def test_min_edit(golden, pair, found):
    temperature = json.loads(golden_file(golden, "dskd_min_edit.json").read_text())["kd_temperature"]
    examples = SimpleNamespace(teacher=flat(found, "teacher"), student=flat(found, "student"), pair=pair)
    teacher_rows, rows, observed = mined.joined_rows(examples)
    valid = found["student_label"].reshape(-1) != -100
    one_hot = found["position_uses_one_hot"].reshape(-1)
    assert sorted(rows.tolist()) == np.flatnonzero(valid & ~one_hot).tolist()
    assert sorted(observed.tolist()) == np.flatnonzero(valid & one_hot).tolist()

    # DSKD keeps one teacher token for each student token: the first, not the likeliest.
    mapping = np.full(pair.teacher.vocab_size, -1)
    mapping[found["teacher_id_for_those"][:, 0]] = found["student_ids_with_mapping"]
    logits = torch.tensor(found["teacher_logits"].astype(np.float32)).flatten(0, 1)[teacher_rows]
    logprob = torch.log_softmax(logits / temperature, -1).numpy()
    ids = np.broadcast_to(np.arange(logprob.shape[1]), logprob.shape)
    mapped = gathered(Likeliest(ids, logprob, np.full(len(logprob), -85.0)), mapping, logprob.shape[1])
    first = rows < found["student_label"].shape[1]
    aligned = torch.tensor(found["aligned_teacher_logits_first_example"][rows[first]]) / temperature
    dense = torch.full(aligned.shape, -torch.inf).scatter_reduce(
        1, torch.tensor(mapped.ids[first]), torch.tensor(mapped.logprob[first]), "amax"
    )
    np.testing.assert_allclose(dense.exp(), torch.softmax(aligned, -1), rtol=1e-4, atol=1e-6)

    prepared = mined.prepare_rows(mapped, rows, observed, examples.student.ids, temperature)
    student = torch.log_softmax(torch.tensor(found["student_logits"].astype(np.float32)) / temperature, -1)
    log_q = student.flatten(0, 1)[torch.tensor(prepared.query.rows)].gather(1, torch.tensor(prepared.query.candidates))
    arrays = {name: torch.as_tensor(value) for name, value in prepared.arrays.items()}
    total, _ = mined.loss({"candidate_logprob": log_q}, arrays, {"divergence": "kl", "kd_temp": temperature})
    np.testing.assert_allclose(total.item(), found["kd_loss_sum"], rtol=1e-4, atol=1e-6)
    # The reference with float32 logits overwrites the student's in place: a loss of 0, which ours is not.
    assert found["kd_loss_sum_when_logits_are_fp32"] == 0 and prepared.count == valid.sum()


def test_one_hot_is_the_token_that_follows(found, pair):
    """FuseLLM's fallback is the token of the row itself (FuseAI #27), which the row has read already.

    Right is the label: DSKD's value at those rows is the cross entropy of the token that follows, not of the row's own.
    """
    log_q = torch.log_softmax(torch.tensor(found["student_logits"].astype(np.float32)) / 2, -1).flatten(0, 1)
    examples = SimpleNamespace(teacher=flat(found, "teacher"), student=flat(found, "student"), pair=pair)
    _, _, observed = mined.joined_rows(examples)
    ids = torch.tensor(examples.student.ids)
    prepared = mined.prepare_rows(
        gathered(Likeliest(np.zeros((0, 1), np.int64), np.zeros((0, 1)), np.zeros(0)), pair.to_student.nearest, 400),
        np.zeros(0, np.int64),
        observed,
        examples.student.ids,
        2.0,
    )
    target = torch.tensor(prepared.query.candidates[:, 0])
    right = -log_q[observed].gather(1, target[:, None])[:, 0]
    wrong = -log_q[observed].gather(1, ids[observed][:, None])[:, 0]
    np.testing.assert_allclose(right, found["kd_per_token"].reshape(-1)[observed], rtol=1e-4)
    assert (target == ids[observed + 1]).all() and (right - wrong).abs().min() > 1e-3
