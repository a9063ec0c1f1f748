"""`alm_latents` against tokenkit's `compute_alm_latents_loss`: values and gradients of every case but those with qkv.

Chunks are tokenkit's own: no loss mask, ends of first runs. Its qkv mode, which its models refuse to give, is refused
here; its golden cases are recorded as that.
"""

import json

import numpy as np
import pytest
import torch

from stages.core.errors import UserError
from stages.losses import latents
from stages.losses.chunks import run_ends
from tests.conftest import golden_file, golden_folder

KINDS = {"naive": "unconstrained", "space": "space"}


def pytest_generate_tests(metafunc):
    if "case" in metafunc.fixturenames:
        path = golden_folder(metafunc.config) / "alm_latents.json"
        cases = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else []
        metafunc.parametrize("case", cases, ids=[case["id"] for case in cases])


@pytest.fixture(scope="module")
def arrays(golden):
    return dict(np.load(golden_file(golden, "alm_latents.npz")))


def chunk_ends(segments, columns):
    """Rows [B, columns] of the last token of each chunk's first run, 0 for an empty chunk."""
    return np.stack([run_ends(row.astype(np.int64), columns) for row in segments])


def test_case(case, arrays):
    if "qkv" in case["latents_to_align"]:
        with pytest.raises(UserError, match="qkv"):
            latents.check(case)
        return
    latents.check(case)
    kind = KINDS[case["latents_chunks"]]
    student_ids, teacher_ids = arrays[f"segment_ids_student_{kind}"], arrays[f"segment_ids_teacher_{kind}"]
    columns = arrays[f"align_student_{kind}"].shape[2]
    valid = arrays[f"align_student_{kind}"].any(1)
    example, column = np.nonzero(valid)
    rows = [chunk_ends(ids, columns)[example, column] for ids in (student_ids, teacher_ids)]
    last = case["latents_to_align"] == "last_hidden_state"
    name = "student_last_hidden_small" if case["latents_do_project"] else "student_hidden_states_same_dim"
    given = arrays[name] if case["latents_do_project"] or not last else arrays[name][-1]
    hidden = torch.tensor(given, requires_grad=True)
    layers = hidden if hidden.dim() == 4 else hidden[None]
    states = layers[:, example, rows[0]].transpose(0, 1)
    kernel = torch.tensor(arrays["projector_kernel"], requires_grad=True)
    if case["latents_do_project"]:
        states = states @ kernel + torch.tensor(arrays["projector_bias"])
    known = arrays["teacher_hidden_states"][-1:] if last else arrays["teacher_hidden_states"]
    teacher = torch.tensor(known[:, example, rows[1]]).transpose(0, 1)
    power = teacher.abs().pow(latents.EXPONENTS[case["latents_normalization"]]).sum(0)
    chunks = torch.tensor(float(len(example)))
    value = latents.latent_distance(states, teacher, power, chunks, case["latents_normalization"]).sum() / chunks
    np.testing.assert_allclose(value.item(), case["loss"], rtol=1e-4, atol=1e-6)
    value.backward()
    np.testing.assert_allclose(hidden.grad, arrays[f"grad_student_hidden_{case['id']}"], rtol=1e-3, atol=1e-6)
    if case["latents_do_project"]:
        expected = arrays[f"grad_projector_kernel_{case['id']}"]
        np.testing.assert_allclose(kernel.grad, expected, rtol=1e-3, atol=1e-6)
