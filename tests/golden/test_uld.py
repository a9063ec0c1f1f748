"""ULD against tokenkit (tokenkit_sft_uld) and DSKD (dskd_uld): values and gradients, with all tokens in the signals.

tokenkit compares row i with row i of both sides wherever the student's attention mask is 1 and averages; DSKD first
moves both sides so that their first label comes first, compares where both have a label and sums. Both are the places
that `position_pairs` pairs.
"""

import json
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from stages.losses import uld
from tests.conftest import golden_file
from tests.unit.dense import evaluate, signals_of

VALUES, GRADIENTS = {"rtol": 1e-4, "atol": 1e-6}, {"rtol": 1e-3, "atol": 1e-6}


def batch(rows):
    """Examples whose row i is compared where `rows` [B, n] says so: n + 1 tokens each, the one after it trained on."""
    loss = np.concatenate([np.zeros((len(rows), 1), bool), rows], 1)
    offsets = np.arange(len(rows) + 1) * loss.shape[1]
    return SimpleNamespace(ids=np.zeros(loss.size, np.int64), offsets=offsets, loss=loss.reshape(-1))


def flat(logits):
    """Logits [B, n, V] as those of n + 1 tokens an example."""
    return torch.cat([logits, torch.zeros_like(logits[:, :1])], 1).flatten(0, 1)


def evaluated(teacher, student, teacher_rows, student_rows):
    both = batch(teacher_rows), batch(student_rows)
    signals = signals_of(flat(torch.tensor(teacher)), both[0].ids, teacher.shape[-1])
    pair = SimpleNamespace(student=SimpleNamespace(vocab_size=student.shape[-1]))
    examples = SimpleNamespace(teacher=both[0], student=both[1], signals=signals, pair=pair)
    logits = torch.tensor(student, requires_grad=True)
    total, _, count = evaluate(uld, examples, flat(logits), {"uld_alignment": "position"})
    return total, count, logits


@pytest.mark.parametrize("number", [0, 1, 2])
def test_tokenkit(golden, number):
    arrays = np.load(golden_file(golden, "tokenkit_sft_uld.npz"))
    (case,) = (
        case
        for case in json.loads(golden_file(golden, "tokenkit_sft_uld.json").read_text(encoding="utf-8"))
        if case["id"] == f"uld_{number}"
    )
    mask = arrays["uld_attention_mask_student"].astype(bool)
    sides = arrays[f"uld_teacher_logits_{number}"], arrays[f"uld_student_logits_{number}"]
    assert [side.shape[-1] for side in sides] == [case["V_teacher"], case["V_student"]]
    total, count, logits = evaluated(*sides, mask, mask)
    assert count == mask.sum()
    np.testing.assert_allclose((total / count).item(), case["loss"], **VALUES)
    (total / count).backward()
    np.testing.assert_allclose(logits.grad, arrays[f"uld_grad_{number}"], **GRADIENTS)


def test_dskd(golden):
    arrays = np.load(golden_file(golden, "dskd_uld.npz"))
    rows = [arrays[f"{side}_target"] != -100 for side in ("teacher", "student")]
    total, count, logits = evaluated(arrays["teacher_logits"], arrays["student_logits"], *rows)
    moved = [arrays[f"{side}_target_after_rotation"] != -100 for side in ("teacher", "student")]
    assert count == (moved[0] & moved[1]).sum()
    np.testing.assert_allclose(total.item(), arrays["uld_loss"], **VALUES)
    total.backward()
    np.testing.assert_allclose(logits.grad, arrays["grad_student_logits"], **GRADIENTS)
