"""Divergences against tokenkit, DSKD and TRL: values of every case, and gradients by the student's logits.

Reductions of the references (means, sums over what is not padding) are done here: ours return one number per row.
Known defects: tokenkit's `js` does not sum over the vocabulary, and for that reason fails with reduction "sum". Its
cases are compared after the sum that is missing; those that fail, with the rows of the same setting that do not. And
tokenkit drops every token without mass on either side, which is right only if both have none: elsewhere ours are
compared with the definition.
"""

import json

import numpy as np
import pytest
import torch

from stages.losses.divergences import divergence
from tests.conftest import golden_file, golden_folder
from tests.golden.compare import gradients, values
from tests.golden.definitions import divergence as definition
from tests.golden.definitions import softmax

NAMES = {
    "forward_kl": "fkl",
    "reverse_kl": "rkl",
    "skewed_forward_kl": "skl",
    "skewed_reverse_kl": "srkl",
    "adaptive_kl": "akl",
    "js": "js",
    "js_divergence": "js",
}
SETTINGS = ("fn", "kd_temp", "tea_temp", "use_tea_temp", "inf_variant")


def pytest_generate_tests(metafunc):
    folder = golden_folder(metafunc.config)
    file = {"tokenkit": "divergences", "dskd": "dskd_divergences", "trl": "trl_gkd_jsd"}
    for fixture, name in file.items():
        if fixture in metafunc.fixturenames:
            path = folder / f"{name}.json"
            cases = json.loads(path.read_text(encoding="utf-8")) if path.exists() else []
            metafunc.parametrize(fixture, cases, ids=[case["id"] for case in cases])


@pytest.fixture(scope="module")
def arrays(golden):
    return {name: np.load(golden_file(golden, f"{name}.npz")) for name in ARRAYS if (golden / f"{name}.npz").exists()}


ARRAYS = ("divergences", "dskd_divergences", "trl_gkd_jsd")


def rows_of(name, found, case, suffix="", options=None):
    """The divergence of every row and the student's logits that it hangs on."""
    student = torch.tensor(found[f"student_logits{suffix}"], requires_grad=True)
    teacher = torch.tensor(found[f"teacher_logits{suffix}"])
    temperature = case.get("kd_temp", case.get("kd_temperature", case.get("temperature")))
    more = case.get("tea_temp", case.get("teacher_temperature")) if case.get("use_tea_temp") else 1.0
    log_p = torch.log_softmax(teacher / temperature / more, -1)
    log_q = torch.log_softmax(student / temperature, -1)
    return divergence(name, log_p, log_q, options or {}), student


def compare(value, student, found, case, expected):
    values(value.detach(), expected)
    if f"grad_{case['id']}" in found:
        (slope,) = torch.autograd.grad(value.sum(), student)
        gradients(slope, found[f"grad_{case['id']}"])


def test_tokenkit(tokenkit, arrays, golden):
    found, case = arrays["divergences"], tokenkit
    options = {"skew_lambda": case["skew_lambda"]} if "skew_lambda" in case else {}
    options |= {"adaptive_kl_alpha": case["alpha"]} if "alpha" in case else {}
    suffix = "_with_inf" if case["inf_variant"] else ""
    rows, student = rows_of(NAMES[case["fn"]], found, case, suffix, options)
    missing = [np.isinf(found[f"{side}_logits{suffix}"]) for side in ("teacher", "student")]
    if (missing[0] != missing[1]).any():
        compare_with_definition(rows, found, case, suffix, options)
    elif case["fn"].startswith("js"):
        cases = json.loads(golden_file(golden, "divergences.json").read_text(encoding="utf-8"))
        compare_js(rows, student, found, case, cases)
    elif not case.get("finite", True):
        compare_with_definition(rows, found, case, suffix, options)
    else:
        if case["reduction"] == "sum":
            rows = (rows * torch.tensor(found["target"] != case["padding_id"])).sum()
        compare(rows, student, found, case, found[f"out_{case['id']}"])


def compare_with_definition(rows, found, case, suffix, options):
    cooling = case["tea_temp"] if case["use_tea_temp"] else 1.0
    p, q = (
        softmax(found[f"{side}_logits{suffix}"].astype(np.float64) / (case["kd_temp"] * cool))
        for side, cool in (("teacher", cooling), ("student", 1.0))
    )
    values(rows.detach(), definition(NAMES[case["fn"]], p, q, options))


def compare_js(rows, student, found, case, cases):
    """Compare with the sum over the vocabulary that tokenkit leaves out.

    A failing "sum" has no value of its own: the right one is the sum of the rows that the case with the same settings
    and no reduction has, without padding, and its gradient is that case's in these rows. tokenkit's NaN are tokens
    without mass on both sides, whose share is 0. With them the file has no gradient: NaN takes it along, and ours can
    only be shown to be finite.
    """
    alike = [other for other in cases if all(other[key] == case[key] for key in SETTINGS)]
    source = next(other["id"] for other in alike if other["reduction"] == "none")
    kept = found["target"] != case["padding_id"] if "error" in case else np.ones(rows.shape, bool)
    expected = np.nansum(found[f"out_{source}"], -1) * kept
    value = rows * torch.tensor(kept)
    values(value.detach(), expected)
    values(value.sum().item(), expected.sum())
    (slope,) = torch.autograd.grad(value.sum(), student)
    assert torch.isfinite(slope).all()
    if f"grad_{source}" in found:
        gradients(slope, found[f"grad_{source}"] * kept[..., None])


def test_dskd(dskd, arrays):
    found = arrays["dskd_divergences"]
    options = {key: dskd[key] for key in ("skew_lambda", "adaptive_kl_alpha")}
    rows, student = rows_of(NAMES[dskd["kd_objective"]], found, dskd, "", options)
    if dskd["reduction"] == "sum":
        rows = (rows * torch.tensor(found["target"] != -100)).sum()
    compare(rows, student, found, dskd, found[f"out_{dskd['id']}"])


def test_trl(trl, arrays):
    found = arrays["trl_gkd_jsd"]
    rows, student = rows_of("gjsd", found, trl, "", {"jsd_beta": trl["beta"]})
    valid = torch.tensor(found["labels"] != -100)
    expected = found[f"out_{trl['id']}"]
    if trl["reduction"] == "none":
        wanted = expected.sum(-1)
        kept = rows[valid] if trl["labels"] else rows
        values(kept.detach().reshape(wanted.shape), wanted)
        return
    kept = rows[valid] if trl["labels"] else rows
    vocab = student.shape[-1]
    items = trl["num_items_in_batch"]
    if trl["reduction"] == "batchmean":
        value = kept.sum() / (items or (int(valid.sum()) if trl["labels"] else len(rows)))
    elif trl["reduction"] == "sum":
        value = kept.sum()
    else:
        value = kept.sum() / (kept.numel() * vocab)
    compare(value, student, found, trl, expected)
