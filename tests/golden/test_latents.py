"""`alm_latents` against tokenkit's `compute_alm_latents_loss`: values and gradients of every case.

Chunks are tokenkit's own: no loss mask, ends of first runs. `n_prefix_layers` of the student have no counterpart: the
product leaves out as many states as the student has more. What it reads of the teacher are states 0 to `num_layers`.

tokenkit's qkv, which its models refuse to give, is refused here. Its number is the same distance of other states, in
which the reference knows squares alone and has no epsilon; it is made of the product's.
"""

import json
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from torch import nn

from stages.core.errors import UserError
from stages.losses import latents
from stages.losses.chunks import run_ends
from tests.conftest import golden_file, golden_folder
from tests.golden.compare import gradients, values

KINDS = {"naive": "unconstrained", "space": "space"}


def pytest_generate_tests(metafunc):
    if "case" in metafunc.fixturenames:
        path = golden_folder(metafunc.config) / "alm_latents.json"
        cases = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else []
        metafunc.parametrize("case", cases, ids=[case["id"] for case in cases])


@pytest.fixture(scope="module")
def arrays(golden):
    return dict(np.load(golden_file(golden, "alm_latents.npz")))


def chunk_ends(arrays, kind):
    """Flat rows of the last token of each chunk's first run, of both sides; for columns with student tokens."""
    example, column = np.nonzero(arrays[f"align_student_{kind}"].any(1))
    rows = []
    for side in ("teacher", "student"):
        ids = arrays[f"segment_ids_{side}_{kind}"].astype(np.int64)
        ends = np.stack([run_ends(row, arrays[f"align_{side}_{kind}"].shape[2]) for row in ids])
        rows.append(ends[example, column] + example * ids.shape[1])
    return rows


def flat(states):
    """Layers of states [L, B, T, d] as [B * T, L, d]."""
    return torch.as_tensor(states).permute(1, 2, 0, 3).flatten(0, 1)


def distance(arrays, case, teacher, student, projector=None):
    """The product's mean distance of states [L, B, T, d] at chunk ends."""
    rows = chunk_ends(arrays, KINDS[case["latents_chunks"]])
    at_ends = flat(teacher)[rows[0]]
    power = at_ends.double().abs().pow(latents.EXPONENTS[case["latents_normalization"]]).sum(0)
    count = len(rows[1])
    given = {
        "teacher": at_ends.flatten(1),
        "rows": torch.as_tensor(rows[1]),
        "power": power.flatten(),
        "chunks": torch.tensor(float(count)),
    }
    head = SimpleNamespace(weight=torch.zeros(1, at_ends.shape[2]))
    seen = {
        "hidden": flat(student)[:, -1],
        "hidden_states": flat(student),
        "projectors": projector or nn.Identity(),
        "sides": SimpleNamespace(teacher=SimpleNamespace(head=head)),
    }
    total, _ = latents.loss(seen, given, case)
    return total / count


def hidden_part(arrays, case):
    """(the distance of hidden states, the student's states it is of, the projector)."""
    layers, prefix = case["num_layers"], case["n_prefix_layers"]
    projector = None
    if case["latents_do_project"]:
        kernel = arrays["projector_kernel"]
        projector = nn.Linear(*kernel.shape)
        with torch.no_grad():
            projector.weight.copy_(torch.tensor(kernel.T))
            projector.bias.copy_(torch.tensor(arrays["projector_bias"]))
        student = torch.tensor(arrays["student_last_hidden_small"], requires_grad=True)
    elif "last_hidden_state" in case["latents_to_align"]:
        student = torch.tensor(arrays["student_hidden_states_same_dim"][-1], requires_grad=True)
    else:
        student = torch.tensor(arrays["student_hidden_states_same_dim"], requires_grad=True)
        aligned = case | {"latents_to_align": "all_hidden_states"}
        teacher = arrays["teacher_hidden_states"][: layers + 1]
        return distance(arrays, aligned, teacher, student[: prefix + layers + 1]), student, None
    aligned = case | {"latents_to_align": "last_hidden_state"}
    return distance(arrays, aligned, arrays["teacher_hidden_states"][-1:], student[None], projector), student, projector


def qkv_part(arrays, case):
    teacher, prefix = arrays["teacher_qkv"], case["n_prefix_layers"]
    student = arrays["student_qkv"][prefix : prefix + len(teacher)]
    aligned = case | {"latents_to_align": "all_hidden_states"}
    if case["latents_normalization"].startswith("l2"):
        return distance(arrays, aligned, teacher, student)
    # Squares in no unit: the product's are in units of the teacher's mean square.
    rows = chunk_ends(arrays, KINDS[case["latents_chunks"]])
    scale = flat(teacher)[rows[0]].double().square().mean((0, 2))
    layers = [
        distance(arrays, aligned | {"latents_normalization": "l2"}, teacher[i : i + 1], student[i : i + 1])
        for i in range(len(teacher))
    ]
    return (torch.stack(layers) * scale).mean()


def test_case(case, arrays):
    value, qkv = torch.zeros(()), "qkv" in case["latents_to_align"]
    student = projector = None
    if "hidden_state" in case["latents_to_align"]:
        value, student, projector = hidden_part(arrays, case)
    if qkv:
        with pytest.raises(UserError, match="qkv"):
            latents.check(case)
        value = value + qkv_part(arrays, case)
    else:
        latents.check(case)
    values(value.item(), case["loss"])
    if f"grad_student_hidden_{case['id']}" in arrays:
        value.backward()
        gradients(student.grad, arrays[f"grad_student_hidden_{case['id']}"])
    if f"grad_projector_kernel_{case['id']}" in arrays:
        gradients(projector.weight.grad.T, arrays[f"grad_projector_kernel_{case['id']}"])
