"""MinED against tokenkit's `compute_baseline_mined_loss`, values and gradients, k the whole vocabulary.

tokenkit masks a token by the mask of the token after it, also where the row before it is read, and counts the
denominator wrongly; both are done here, not in the product, whose count is that of the rows that are summed over.
"""

import json

import numpy as np
import pytest
import torch

from stages.losses import mined
from stages.losses.chunks import run_ends
from stages.losses.mapped import Likeliest, spread
from tests.conftest import golden_file, golden_folder
from tests.golden.compare import gradients, values


def pytest_generate_tests(metafunc):
    if "case" in metafunc.fixturenames:
        path = golden_folder(metafunc.config) / "tokenkit_mined_loss.json"
        cases = json.loads(path.read_text()) if path.is_file() else []
        metafunc.parametrize("case", cases, ids=[case["id"] for case in cases])


@pytest.fixture(scope="module")
def found(golden):
    return dict(np.load(golden_file(golden, "tokenkit_mined_loss.npz")))


def reference_columns(found, side, case):
    """[B, tokens] chunk ids by tokenkit's mask, and the counts [B, columns] of tokens that have a row before them."""
    mask = found[f"loss_mask_{side}" if case["loss_mask"] == "attn" else f"loss_mask_{side}_{case['loss_mask']}"]
    kept = np.append(mask[:, 1:], np.ones_like(mask[:, :1]), axis=1)
    chunk = np.where(kept, found[f"segment_ids_{side}"], -1)
    columns = found["align_teacher_unconstrained"].shape[2]
    return chunk, np.stack([np.bincount(row[row >= 0], minlength=columns) for row in chunk[:, 1:]])


def reference_rows(found, case):
    """(teacher rows, student rows, rows before one-hot tokens), flat, and what tokenkit divides by."""
    (teacher, in_teacher), (student, in_student) = (
        reference_columns(found, side, case) for side in ("teacher", "student")
    )
    single = (in_teacher == 1) & (in_student == 1)
    rows = [np.zeros(0, np.int64)] * 2
    for number, chunk in enumerate((teacher, student)):
        length = chunk.shape[1]
        ends = np.stack([run_ends(row, single.shape[1]) for row in chunk.astype(np.int64)])
        example, column = np.nonzero(single)
        rows[number] = example * length + ends[example, column]
    scored = student[:, 1:]
    apart = (scored >= 0) & ~np.take_along_axis(single, np.maximum(scored, 0), 1)
    example, place = np.nonzero(apart)
    # The defect: `teacher_count == 1 & student_single` is `teacher_count == (1 & student_single)`.
    wrong = in_teacher == (in_student == 1)
    others = (scored >= 0) & ~np.take_along_axis(wrong, np.maximum(scored, 0), 1)
    return rows[0], rows[1], example * student.shape[1] + place, int(wrong.sum()), int(others.sum())


def test_case(case, found):
    teacher_rows, rows, observed, wrong_single, wrong_observed = reference_rows(found, case)
    assert len(rows) == case["scalar_report"]["mined_one_to_one_mask_sum"]
    assert len(observed) == case["scalar_report"]["mined_onehot_mask_sum"]
    temperature, vocab = case["kd_temp"], found["teacher_logits"].shape[-1]
    logprob = torch.log_softmax(torch.tensor(found["teacher_logits"]).flatten(0, 1) / temperature, -1).numpy()
    top = Likeliest(np.broadcast_to(np.arange(vocab), logprob.shape), logprob, np.full(len(logprob), -85.0))
    real = len(found["mined_mapping"])  # columns above are padding: tokenkit masks them, here they do not exist
    mapped = spread(Likeliest(*(part[teacher_rows] for part in top)), found["mined_mapping"].astype(np.int64), vocab)
    prepared = mined.prepare_rows(mapped, rows, observed, found["input_ids_student"].reshape(-1), temperature)

    logits = torch.tensor(found["student_logits_unmasked"], requires_grad=True)
    log_q = torch.log_softmax(logits[..., :real] / temperature, -1).flatten(0, 1)[torch.tensor(prepared.query.rows)]
    student = {"candidate_logprob": log_q.gather(1, torch.tensor(prepared.query.candidates))}
    arrays = {name: torch.as_tensor(value) for name, value in prepared.arrays.items()}
    total, _ = mined.loss(student, arrays, {"divergence": "kl", "kd_temp": temperature})
    value = total / (wrong_single + wrong_observed)
    values(value.item(), case["loss"])
    (gradient,) = torch.autograd.grad(value, logits)
    gradients(gradient, found[f"grad_{case['id']}"])
    assert (
        prepared.count
        == case["scalar_report"]["mined_one_to_one_mask_sum"] + (case["scalar_report"]["mined_onehot_mask_sum"])
    )
