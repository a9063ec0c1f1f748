"""Side path against tokenkit's `compute_alm_side_path_loss`: all cases, values and gradients; k is the vocabulary."""

import json

import numpy as np
import pytest
import torch

from stages.losses import side_path
from stages.losses.chunks import run_ends
from stages.losses.mapped import Likeliest
from tests.conftest import golden_file, golden_folder
from tests.golden.compare import gradients, values


def pytest_generate_tests(metafunc):
    if "case" in metafunc.fixturenames:
        path = golden_folder(metafunc.config) / "alm_side_path.json"
        cases = json.loads(path.read_text()) if path.is_file() else []
        metafunc.parametrize("case", cases, ids=[case["id"] for case in cases])


@pytest.fixture(scope="module")
def found(golden):
    return dict(np.load(golden_file(golden, "alm_side_path.npz")))


def reference_ends(segments, mask, columns):
    """The end of each chunk after tokens are dropped that a masked token follows; the last one is kept always."""
    kept = np.append(mask[:, 1:], np.ones_like(mask[:, :1]), axis=1)
    rows, length = segments.shape
    chunk = np.where(kept & (segments >= 0), segments + columns * np.arange(rows)[:, None], -1).ravel().astype(np.int64)
    ends = run_ends(chunk, rows * columns)
    filled = np.bincount(chunk[chunk >= 0], minlength=rows * columns) > 0
    # tokenkit reads the first row of the example where a chunk has no token
    return np.where(filled, ends, np.repeat(np.arange(rows) * length, columns)), filled


def whole(logits):
    """The teacher's rows with every token known."""
    logprob = torch.log_softmax(torch.tensor(logits), -1).numpy()
    ids = np.broadcast_to(np.arange(logprob.shape[1]), logprob.shape)
    return Likeliest(ids, logprob, np.full(len(logprob), -85.0, np.float32))


def test_case(case, found):
    kind = case["chunk_kind"]
    columns = found[f"align_teacher_{kind}"].shape[2]
    sides = [
        reference_ends(found[f"segment_ids_{side}_{kind}"], found[f"loss_mask_{side}"], columns)
        for side in ("teacher", "student")
    ]
    (teacher_end, _), (student_end, filled) = sides
    top = whole(found["teacher_logits"].reshape(-1, found["teacher_logits"].shape[-1])[teacher_end[filled]])
    mapping = np.full(found["student_logits"].shape[-1], -1, np.int64)
    mapping[found["student_mapping"]] = found["teacher_mapping"]
    prepared = side_path.prepare_rows(top, student_end[filled], mapping, found["teacher_logits"].shape[-1])

    logits = torch.tensor(found["student_logits"], requires_grad=True)
    logprob = torch.log_softmax(logits, -1).flatten(0, 1)[torch.tensor(prepared.query.rows)]
    student = {"candidate_logprob": logprob.gather(1, torch.tensor(prepared.query.candidates))}
    arrays = {name: torch.as_tensor(value) for name, value in prepared.arrays.items()}
    total, masses = side_path.loss(student, arrays, case)
    value = total / prepared.count
    values(value.item(), case["loss"])
    for side in ("teacher", "student"):
        mass = masses[f"{side}_matched_mass"].item() / prepared.count
        assert mass == pytest.approx(case["scalar_report"][f"{side}_side_path_aligned_pmass"], rel=1e-4)
    value.backward()
    expected = found[f"grad_student_logits_{case['id']}"]
    # A row's matched tokens can cancel to nothing but rounding: it is that of the greatest row.
    gradients(logits.grad, expected, of=np.abs(expected).max(keepdims=True))
