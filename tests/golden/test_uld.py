"""ULD against tokenkit (tokenkit_sft_uld) and DSKD (dskd_uld): values and gradients, with all tokens in the signals.

tokenkit compares row i with row i of both sides wherever the student's attention mask is 1 and averages; DSKD first
moves both sides so that their first label comes first, compares where both have a label and sums. Both are the places
that `position_pairs` pairs.
"""

import json
from types import SimpleNamespace

import numpy as np
import torch

from stages.losses import uld
from tests.conftest import golden_file, golden_folder
from tests.golden.compare import gradients, values
from tests.unit.dense import evaluate, signals_of


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


def pytest_generate_tests(metafunc):
    if "case" in metafunc.fixturenames:
        path = golden_folder(metafunc.config) / "tokenkit_sft_uld.json"
        cases = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else []
        cases = [case for case in cases if case["id"].startswith("uld_")]
        metafunc.parametrize("case", cases, ids=[case["id"] for case in cases])


def test_tokenkit(golden, case):
    arrays, number = np.load(golden_file(golden, "tokenkit_sft_uld.npz")), case["id"].removeprefix("uld_")
    mask = arrays["uld_attention_mask_student"].astype(bool)
    sides = arrays[f"uld_teacher_logits_{number}"], arrays[f"uld_student_logits_{number}"]
    assert [side.shape[-1] for side in sides] == [case["V_teacher"], case["V_student"]]
    total, count, logits = evaluated(*sides, mask, mask)
    assert count == mask.sum()
    values((total / count).item(), case["loss"])
    (total / count).backward()
    gradients(logits.grad, arrays[f"uld_grad_{number}"])


def test_dskd(golden):
    arrays = np.load(golden_file(golden, "dskd_uld.npz"))
    rows = [arrays[f"{side}_target"] != -100 for side in ("teacher", "student")]
    total, count, logits = evaluated(arrays["teacher_logits"], arrays["student_logits"], *rows)
    moved = [arrays[f"{side}_target_after_rotation"] != -100 for side in ("teacher", "student")]
    assert count == (moved[0] & moved[1]).sum()
    values(total.item(), arrays["uld_loss"])
    total.backward()
    gradients(logits.grad, arrays["grad_student_logits"])
