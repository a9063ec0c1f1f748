"""Token alignment against DSKD's `dtw`, and `baseline_minED` against its `min_edit_dis_kld`.

DSKD compares token strings as the vocabularies spell them, so that é is two characters of a byte-level one; ours are
text. Ours are compared where both tokens are ASCII; paths and losses are taken with DSKD's distances everywhere.
"""

import json
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from rapidfuzz.distance import Levenshtein

from stages.alignment.pair import Matches, Pair
from stages.losses import mined
from stages.losses.mapped import Likeliest, gathered
from stages.losses.token_alignment import token_costs, warp
from stages.tokenization import ByteView
from tests.conftest import golden_file
from tests.golden.compare import values

SIDES = ("teacher", "student")
MARKS = ("Ġ", "▁")
IGNORED = -100


@pytest.fixture(scope="module")
def found(golden):
    return dict(np.load(golden_file(golden, "dskd_min_edit.npz")))


@pytest.fixture(scope="module")
def entry(golden):
    return json.loads(golden_file(golden, "dskd_min_edit.json").read_text(encoding="utf-8"))


@pytest.fixture(scope="module")
def pair(golden, entry, found):
    teacher, student = (ByteView.load(golden_file(golden, entry[f"{side}_tokenizer"])) for side in SIDES)
    nothing = np.full(student.vocab_size, -1)
    exact = np.array([teacher.id_of_bytes.get(token, -1) for token in student.token_bytes])
    to_student = found["teacher_to_student_id_mapping"]
    return Pair(
        teacher,
        student,
        Matches(exact, nothing, nothing, nothing >= 0),
        Matches(to_student, to_student, to_student, to_student >= 0),
    )


def aligned_ids(found):
    """The ids of each example that are aligned: where the shifted label is one."""
    return [
        [ids[label != IGNORED] for ids, label in zip(found[f"{side}_input_ids"], found[f"{side}_label"], strict=True)]
        for side in SIDES
    ]


def reference_costs(case):
    """DSKD's: Levenshtein of the strings without the mark of a space."""
    strings = [["".join(c for c in token if c not in MARKS) for token in case[f"{side}_tokens"]] for side in SIDES]
    return np.array([[Levenshtein.distance(a, b) for b in strings[1]] for a in strings[0]], np.int32)


def padded(matrices):
    """Matrices together, so that the padding of the smaller ones is seen to change nothing; and their sizes."""
    sizes = np.array([matrix.shape for matrix in matrices])
    cost = np.zeros((len(matrices), *sizes.max(0)), matrices[0].dtype)
    for whole, matrix in zip(cost, matrices, strict=True):
        whole[: matrix.shape[0], : matrix.shape[1]] = matrix
    return cost, sizes.T


def flat(found, side):
    """DSKD's padded rows as a batch; its labels are shifted, so a label belongs to the row that predicts it."""
    ids, label = found[f"{side}_input_ids"], found[f"{side}_label"]
    trained = np.zeros((len(ids), ids.shape[1] + 1), bool)  # a row more, which a label in the last place predicts
    trained[:, 1:] = label != IGNORED
    ids = np.pad(ids, ((0, 0), (0, 1)))
    ids[:, 1:][label != IGNORED] = label[label != IGNORED]
    offsets = np.arange(len(ids) + 1) * ids.shape[1]
    return SimpleNamespace(ids=ids.reshape(-1), loss=trained.reshape(-1), offsets=offsets)


def lists(first, second):
    """For each place of one side the places of the other that a path joins it to."""
    return [second[first == place].tolist() for place in range(first.max() + 1)]


def test_paths(golden):
    cases = json.loads(golden_file(golden, "dskd_dtw.json").read_text(encoding="utf-8"))
    cost, sizes = padded([np.array(case["cost_matrix"], np.float64) for case in cases])
    path, totals = warp(cost, *sizes)
    for number, case in enumerate(cases):
        here = path.example == number
        teacher, student = path.teacher[here], path.student[here]
        assert np.stack([teacher, student], 1).tolist() == case["matches"] and totals[number] == case["cost"]
        assert lists(teacher, student) == case["map_1"] and lists(student, teacher) == case["map_2"]


def test_token_paths(entry, pair, found):
    cases = entry["dtw"]
    costs = [reference_costs(case) for case in cases]
    cost, sizes = padded(costs)
    path, totals = warp(cost, *sizes)
    ours = token_costs(pair, *aligned_ids(found))
    for number, case in enumerate(cases):
        here = path.example == number
        assert totals[number] == case["dtw_cost"]
        assert lists(path.teacher[here], path.student[here]) == case["teacher_to_student_positions"]
        assert lists(path.student[here], path.teacher[here]) == case["student_to_teacher_positions"]
        plain = [
            np.array(["".join(c for c in token if c not in MARKS).isascii() for token in case[f"{side}_tokens"]])
            for side in SIDES
        ]
        both = plain[0][:, None] & plain[1][None, :]
        assert (ours[number, : both.shape[0], : both.shape[1]] == costs[number])[both].all()


@pytest.fixture
def joined(entry, pair, found, monkeypatch):
    """(teacher rows, student rows, the other rows of the student) of the product, rows as DSKD's arrays have them."""
    monkeypatch.setattr(mined, "token_costs", lambda *_: padded([reference_costs(case) for case in entry["dtw"]])[0])
    examples = SimpleNamespace(teacher=flat(found, "teacher"), student=flat(found, "student"), pair=pair)
    rows = mined.joined_rows(examples)
    widths = [found[f"{side}_input_ids"].shape[1] for side in ("teacher", "student", "student")]
    return [part - part // (width + 1) for part, width in zip(rows, widths, strict=True)]


def logprobs(logits, temperature):
    return torch.log_softmax(torch.tensor(logits.astype(np.float32)) / temperature, -1).flatten(0, 1)


def test_min_edit(entry, pair, found, joined):
    temperature = entry["kd_temperature"]
    teacher_rows, rows, observed = joined
    valid = found["student_label"].reshape(-1) != IGNORED
    one_hot = found["position_uses_one_hot"].reshape(-1)
    assert sorted(rows.tolist()) == np.flatnonzero(valid & ~one_hot).tolist()
    assert sorted(observed.tolist()) == np.flatnonzero(valid & one_hot).tolist()

    # DSKD keeps some teacher tokens for each student token: the first ones, not the likeliest.
    mapping = np.full(pair.teacher.vocab_size, -1)
    mapping[found["teacher_id_for_those"]] = found["student_ids_with_mapping"][:, None]
    logprob = logprobs(found["teacher_logits"], temperature)[teacher_rows].numpy()
    ids = np.argsort(-logprob, axis=1)
    likeliest = Likeliest(ids, np.take_along_axis(logprob, ids, 1), np.full(len(logprob), -85.0))
    mapped = gathered(likeliest, mapping, logprob.shape[1])
    first = rows < found["student_label"].shape[1]
    aligned = torch.tensor(found["aligned_teacher_logits_first_example"][rows[first]]) / temperature
    dense = torch.full(aligned.shape, -torch.inf).scatter_reduce(
        1, torch.tensor(mapped.ids[first]), torch.tensor(mapped.logprob[first]), "amax"
    )
    values(dense.exp(), torch.softmax(aligned, -1))

    # A one-hot row learns the label. FuseLLM's is the token of the row itself (FuseAI #27), which it has read already.
    following = np.zeros(valid.size + 1, np.int64)
    following[1:] = found["student_label"].reshape(-1)
    prepared = mined.prepare_rows(mapped, rows, observed, following, temperature)
    log_q = logprobs(found["student_logits"], temperature)[torch.tensor(prepared.query.rows)]
    seen = {"candidate_logprob": log_q.gather(1, torch.tensor(prepared.query.candidates))}
    arrays = {name: torch.as_tensor(value) for name, value in prepared.arrays.items()}
    total, parts = mined.loss(seen, arrays, {"divergence": "kl", "kd_temp": temperature})
    per_token = found["kd_per_token"].reshape(-1)
    values(total.item(), found["kd_loss_sum"])
    values(parts["divergence"].item(), per_token[rows].sum())
    values(-seen["candidate_logprob"][len(rows) :, 0], per_token[observed])
    assert parts["compared_rows"] == len(rows) and prepared.count == valid.sum()
