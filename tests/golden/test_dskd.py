"""Cross-model attention against tokenkit and DSKD: values, parts and gradients of every case.

Both references divide by standard deviations over the whole batch, padding included (tokenkit of the population,
DSKD of the sample), and tokenkit takes means, each term over its own number of tokens; that is done here. Ours scales
by example and sums. Known defects: tokenkit has no `skl` (ours is right where it fails), and reads padding columns of
the projected teacher.
"""

import json

import numpy as np
import pytest
import torch
from torch.nn.functional import nll_loss

from stages.losses.dskd import CrossModelAttention, deviations, keys_and_values
from stages.losses.dual_space import tempered
from tests.conftest import golden_file, golden_folder
from tests.golden.compare import gradients, values
from tests.golden.definitions import divergence as definition
from tests.golden.definitions import softmax

NAMES = {
    "forward_kl": "fkl", "reverse_kl": "rkl", "adaptive_kl": "akl", "skewed_forward_kl": "skl",
    "skewed_reverse_kl": "srkl",
}  # fmt: skip
FILES = {"tokenkit": "tokenkit_dskd", "padded": "tokenkit_dskd_padded_vocab", "dskd": "dskd_cma"}


def pytest_generate_tests(metafunc):
    for fixture, name in FILES.items():
        if fixture in metafunc.fixturenames:
            path = golden_folder(metafunc.config) / f"{name}.json"
            cases = json.loads(path.read_text(encoding="utf-8")) if path.exists() else []
            metafunc.parametrize(fixture, cases, ids=[case["id"] for case in cases])


@pytest.fixture(scope="module")
def figures(golden):
    return {name: dict(np.load(golden_file(golden, f"{name}.npz"))) for name in FILES.values()}


def attention_of(found, kernel):
    """The project's attention with the golden weights; tokenkit's kernels are transposed."""
    student, teacher = found["student_hidden_last"].shape[-1], found["teacher_hidden_last"].shape[-1]
    attention = CrossModelAttention(student, teacher, torch.Generator())
    for name in ("query", "t2s", "s2t"):
        layer, prefix = getattr(attention, name), f"projector_{name}" if kernel else name
        weight = found[f"{prefix}_kernel"].T if kernel else found[f"{prefix}_weight"]
        with torch.no_grad():
            layer.weight.copy_(torch.tensor(weight))
            layer.bias.copy_(torch.tensor(found[f"{prefix}_bias"]))
    return attention


def attend(attention, student, teacher, scales, kept):
    """Projected states [B, n, d_s] and [B, m, d_t], 0 where `kept` (masks of both sides) leaves a token out."""
    (described, hidden), (known, states) = student, teacher
    t2s, s2t = [], []
    for row in range(len(hidden)):
        own, other = (torch.tensor(mask[row]).bool() for mask in kept)
        keys, values = keys_and_values(known[row][other], states[row][other], scales)
        a, b = attention(described[row][own], hidden[row][own], keys, values)
        t2s.append(hidden.new_zeros(len(own), a.shape[1]).index_put((own.nonzero()[:, 0],), a))
        s2t.append(hidden.new_zeros(len(other), b.shape[1]).index_put((other.nonzero()[:, 0],), b))
    return torch.stack(t2s), torch.stack(s2t)


def options_of(case):
    return {key: case[key] for key in ("skew_lambda", "adaptive_kl_alpha")}


def mean(values, mask):
    return (values * mask).sum() / mask.sum()


def tokenkit_terms(case, found, name):
    """(the three terms as tokenkit averages them, the leaves that its gradients are by, its accuracy, the projected
    teacher's logits, where they are right)."""
    leaves = {key: torch.tensor(found[f"student_hidden_{part}"], requires_grad=True) for key, part in PARTS.items()}
    logits = torch.tensor(found["student_logits_unmasked"], requires_grad=True)
    pad = torch.tensor(found["logit_mask_student"])
    embedded, states = (torch.tensor(found[f"teacher_hidden_{part}"]) for part in ("first", "last"))
    known, before = torch.cat([embedded[:, :-1], embedded[:, 1:]], -1), states[:, :-1]
    scales = tuple(x.std(correction=0) for x in (known, before, embedded[:, 1:]))
    described = torch.cat([leaves["s0"][:, :-1], leaves["s0"][:, 1:]], -1)
    attention = attention_of(found, kernel=True)
    kept = [found[f"attention_mask_{side}"][:, 1:] for side in ("student", "teacher")]
    t2s, s2t = attend(attention, (described, leaves["sl"][:, :-1]), (known, before), scales, kept)
    projected = t2s @ torch.tensor(found["student_output_embeddings"]).T
    target = torch.tensor(found["input_ids_student"][:, 1:]).long()
    mask, teacher_mask = (torch.tensor(found[f"loss_mask_{side}"][:, 1:]) for side in ("student", "teacher"))
    masked = projected + pad
    ce = -torch.log_softmax(masked, -1).gather(-1, target[..., None])[..., 0]
    right = (projected.argmax(-1) == target) * mask  # padding columns can win there
    options = options_of(case) | {"kd_temp": case["kd_temp"]}
    teacher = projected.detach()
    kd = tempered(name, teacher, (logits + pad)[:, :-1], options, case["teacher_temperature"])
    back = s2t @ torch.tensor(found["teacher_output_embeddings"]).T
    s2t_kd = tempered("kl", torch.tensor(found["teacher_logits"])[:, :-1], back, options)
    parts = {
        "t2s_ce_loss": mean(ce, mask),
        "t2s_kd_loss": (kd * right).mean() / (right.float().mean() + 1e-8),
        "s2t_kd_loss": mean(s2t_kd, teacher_mask),
    }
    leaves |= {"logits": logits} | {
        f"projector_{layer}_{kind}": getattr(getattr(attention, layer), part)
        for layer in ("query", "t2s", "s2t")
        for kind, part in (("kernel", "weight"), ("bias", "bias"))
    }
    return parts, leaves, mean(right.float(), mask), teacher.numpy(), right.numpy()


PARTS = {"s0": "first", "sl": "last"}


def defined_student_space(case, found, name):
    """The student's divergence from the projected teacher, by its definition, as tokenkit averages it."""
    _, _, _, projected, right = tokenkit_terms(case, found, name)
    p, q = (
        softmax(logits.astype(np.float64) / (case["kd_temp"] * cooling))
        for logits, cooling in (
            (projected, case["teacher_temperature"]),
            ((found["student_logits_unmasked"] + found["logit_mask_student"])[:, :-1], 1.0),
        )
    )
    return (definition(name, p, q, options_of(case)) * right).mean() / (right.mean() + 1e-8)


def test_tokenkit(tokenkit, figures):
    found, case = figures["tokenkit_dskd"], tokenkit
    parts, leaves, accuracy, _, _ = tokenkit_terms(case, found, case["divergence"])
    value = sum(parts.values())
    values(parts["t2s_kd_loss"].item(), defined_student_space(case, found, case["divergence"]))
    if "error" in case:
        return
    for name, part in parts.items():
        values(part.item(), case["scalar_report"][name], name)
    values(accuracy.item(), case["scalar_report"]["t2s_acc"])
    values(value.item(), case["loss"])
    if f"grad_logits_{case['id']}" not in found:
        return
    value.backward()
    for name, leaf in leaves.items():
        gradient = leaf.grad.T if name.endswith("kernel") else leaf.grad
        gradients(gradient, found[f"grad_{name}_{case['id']}"], name)


def test_padded_vocabulary(padded, figures):
    """The reference lets padding columns of the projected teacher take part: forward KL explodes. Ours has none."""
    found, case = figures["tokenkit_dskd_padded_vocab"], padded
    parts, _, _, _, _ = tokenkit_terms(case, found, case["divergence"])
    for name, part in parts.items():
        values(part.item(), case["scalar_report"][name], name)
    real = np.isclose(found["logit_mask_student"], 0)
    cut = found | {
        "student_logits_unmasked": found["student_logits_unmasked"][..., real],
        "student_output_embeddings": found["student_output_embeddings"][real],
        "logit_mask_student": found["logit_mask_student"][real],
    }
    right, _, _, _, _ = tokenkit_terms(case, cut, case["divergence"])
    values(right["t2s_kd_loss"].item(), defined_student_space(case, cut, case["divergence"]))
    for name in ("t2s_ce_loss", "s2t_kd_loss"):
        values(right[name].item(), case["scalar_report"][name], name)


def test_dskd(dskd, figures):
    found, case = figures["dskd_cma"], dskd
    labels, ids = (
        {side: found[f"{side}_{name}"] for side in ("student", "teacher")} for name in ("label", "input_ids")
    )
    masks = {side: label != -100 for side, label in labels.items()}
    described = {}
    for side, mask in masks.items():
        table = torch.tensor(found[f"{side}_embed_tokens"])
        pair = [table[torch.tensor(np.where(mask, tokens, 0)).long()] for tokens in (ids[side], labels[side])]
        described[side] = torch.cat(pair, -1)
    hidden = torch.tensor(found["student_hidden_last"], requires_grad=True)
    logits = torch.tensor(found["student_logits"], requires_grad=True)
    states = torch.tensor(found["teacher_hidden_last"])
    attention = attention_of(found, kernel=False)
    scales = deviations(described["teacher"], states)
    kept = (masks["student"], masks["teacher"])
    t2s, s2t = attend(attention, (described["student"], hidden), (described["teacher"], states), scales, kept)
    projected = t2s @ torch.tensor(found["student_lm_head"]).T
    mask, target = torch.tensor(masks["student"]), torch.tensor(labels["student"]).long()
    expected = found[f"t2s_logits_{case['id']}"]
    values(projected.detach()[mask], expected[masks["student"]])
    options = options_of(case) | {"kd_temp": case["kd_temperature"]}
    right = (projected.argmax(-1) == target) * mask
    name = NAMES[case["kd_objective"]]
    kd = tempered(name, projected.detach(), logits, options, case["teacher_temperature"])
    back = s2t @ torch.tensor(found["teacher_lm_head"]).T
    s2t_kd = tempered("kl", torch.tensor(found["teacher_logits"]), back, options)
    parts = {
        "t2s_ce_loss": nll_loss(torch.log_softmax(projected, -1)[mask], target[mask], reduction="sum"),
        "t2s_kd_loss": (kd * right).sum(),
        "s2t_kd_loss": (s2t_kd * torch.tensor(masks["teacher"])).sum(),
    }
    for key, part in parts.items():
        values(part.item(), case["log"][key], key)
    assert right.sum().item() == case["log"]["t2s_acc"]
    value = sum(parts.values())
    values(value.item(), found[f"loss_{case['id']}"])
    value.backward()
    leaves = {"student_hidden": hidden, "student_logits": logits} | {
        f"{layer}_weight": getattr(attention, layer).weight for layer in ("query", "s2t", "t2s")
    }
    for key, leaf in leaves.items():
        gradients(leaf.grad, found[f"grad_{key}_{case['id']}"], key)
