"""GOLD against TRL's `ULDLoss`: every case of trl_gold_uld.json, value and gradient, with all tokens in the signals.

`reference` is the reference's loss in float64, its cross entropy and its mean of the examples' means included, and is
compared with the file. What it compares is laid out as a sequence of (row, token) pairs for our loss, so that its
strategies differ in that alone:

- "bayesian": the token at position p with the row p - 1 that predicts it; a group's last row is multiplied by the
  probabilities of its earlier tokens. The chain rule, and what the product does.
- "observed", TRL's default: position p with row p, which predicts token p + 1 (off by one), and a group's first row is
  multiplied by the probabilities of its later tokens. Only this file does that.

The reference takes no probability to be below 1e-8, neither in the logarithms of matched tokens nor of the tokens that
a group is multiplied by: that ends the gradient of every token of a long chunk. The right value has no such floor.
`reference` has it at a height: at 1e-8 it gives the file's numbers, at 0 ours; where both agree ours are the file's.
"""

import json
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from stages.alignment import align
from stages.losses import gold
from stages.losses.chunks import merge_chunks
from stages.tokenization.encoding import SCALE, EncodedBatch
from tests.conftest import golden_file, golden_folder
from tests.golden.compare import gradients, values
from tests.unit.dense import answer, signals_of, tensors

SIDES = ("student", "teacher")
FLOOR = 1e-8
IGNORED = -100


def pytest_generate_tests(metafunc):
    path = golden_folder(metafunc.config) / "trl_gold_uld.json"
    found = json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}
    if "case" in metafunc.fixturenames:
        cases = found.get("cases", [])
        metafunc.parametrize("case", cases, ids=[case["id"] for case in cases])
    if "example" in metafunc.fixturenames:
        metafunc.parametrize("example", range(len(found.get("alignment_groups_per_example", []))))


@pytest.fixture(scope="module")
def arrays(golden):
    return dict(np.load(golden_file(golden, "trl_gold_uld.npz")))


@pytest.fixture(scope="module")
def listed(golden):
    """For each example the groups of both sides, counted from the first answer token."""
    content = json.loads(golden_file(golden, "trl_gold_uld.json").read_text(encoding="utf-8"))
    return content["alignment_groups_per_example"]


def answers(arrays, side, example, skip_last=False):
    """Positions of the answer's tokens."""
    found = np.flatnonzero(arrays[f"{side}_labels"][example] != IGNORED)
    return found[: len(found) - skip_last].tolist()


def by_bytes(spans, ends):
    """TRL's `_align_by_byte_offsets`: [(student positions, teacher positions)] that end at the same byte."""
    groups, here, at = [], ([], []), [0, 0]
    while all(at[side] < len(spans[side]) for side in (0, 1)):
        now = [int(ends[side][spans[side][at[side]]]) for side in (0, 1)]
        for side in (0, 1):
            if now[side] <= now[1 - side]:
                here[side].append(spans[side][at[side]])
                at[side] += 1
        if now[0] == now[1]:
            groups.append(here)
            here = ([], [])
    rest = tuple([*part, *span[i:]] for part, span, i in zip(here, spans, at, strict=True))
    return groups + ([rest] if all(rest) else [])


def groups_of(case, arrays, example):
    """Positions of each group on both sides, by the rules of the reference."""
    spans = [answers(arrays, side, example, case[f"uld_skip_{side}_eos"]) for side in SIDES]
    if not case["use_extended_uld"]:
        groups = [([s], [t]) for s, t in zip(*spans, strict=False)]
    else:
        groups = by_bytes(spans, [arrays[f"{side}_byte_offsets"][example][:, 1] for side in SIDES])
    # No row predicts a token at position 0: its group is left out.
    first = case["uld_token_merge_strategy"] == "bayesian" and any(span[:1] == [0] for span in spans)
    return groups[1:] if first else groups


def merged_rows(probability, ids, groups, strategy, floor, shift):
    """The reference's `_merge_probabilities_with_alignment_groups`, float64 [groups, V].

    `shift`: how many rows before a token's own position the row is that stands for it.
    """
    rows = []
    for group in groups:
        bayesian = strategy == "bayesian"
        row = probability[group[-1 if bayesian else 0] - shift]
        for p in group[:-1] if bayesian else group[1:]:
            row = row * probability[p - shift, ids[p]].clamp_min(floor)
        rows.append(row)
    return torch.stack(rows)


def generalised_jsd(p, q, beta):
    if beta in (0, 1):
        return (q * (q.log() - p.log()) if beta else p * (p.log() - q.log())).sum()
    middle = (beta * p + (1 - beta) * q).log()
    return (beta * p * (p.log() - middle) + (1 - beta) * q * (q.log() - middle)).sum()


def sorted_l1(p, q):
    width = max(p.shape[1], q.shape[1])
    p, q = (torch.nn.functional.pad(x.sort(-1, descending=True).values, (0, width - x.shape[1])) for x in (p, q))
    return (p - q).abs().sum()


def example_reference(case, arrays, example, logits, floor):
    """(the distillation loss of one example, its two parts) in float64."""
    groups, strategy = groups_of(case, arrays, example), case["uld_token_merge_strategy"]
    if not groups:
        return logits.sum() * 0, {}
    teacher = torch.tensor(arrays["teacher_logits"][example]).double()
    q, p = (
        merged_rows(
            torch.softmax(side_logits / case[f"uld_{side}_temperature"], -1),
            arrays[f"{side}_input_ids"][example],
            [group[number] for group in groups],
            strategy,
            floor,
            int(strategy == "bayesian"),
        )
        for number, (side, side_logits) in enumerate((("student", logits), ("teacher", teacher)))
    )
    if not case["uld_use_hybrid_loss"]:
        return sorted_l1(p, q) / len(groups), {}
    paired = [torch.tensor(arrays[f"matched_{side}_ids"]) for side in ("teacher", "student")]
    alone = [
        torch.ones(x.shape[1], dtype=torch.bool).index_fill(0, i, False) for x, i in zip((p, q), paired, strict=True)
    ]
    jsd = generalised_jsd(p[:, paired[0]].clamp_min(floor), q[:, paired[1]].clamp_min(floor), case["beta"])
    parts = {"matched": jsd / len(groups), "unmatched": sorted_l1(p[:, alone[0]], q[:, alone[1]]) / len(groups)}
    weight, other = case["uld_hybrid_matched_weight"], case["uld_hybrid_unmatched_weight"]
    if weight is None:
        weight = len(paired[0]) / p.shape[1]
        other = 1 - weight
    return weight * parts["matched"] + other * parts["unmatched"], parts


def laid_out(logits, ids, groups, strategy, shift):
    """(logits, ids, chunks) of a sequence in which the row before a token is the one the reference takes for it."""
    rows, tokens, chunks = [], [0], [-1]
    for number, group in enumerate(groups):
        for p in group if strategy == "bayesian" else [*group[1:], group[0]]:
            rows.append(logits[p - shift])
            tokens.append(ids[p])
            chunks.append(number)
    return torch.stack([*rows, torch.zeros_like(rows[0])]), np.array(tokens), np.array(chunks)


def example_product(case, arrays, example, logits):
    """The same by the product."""
    groups, strategy = groups_of(case, arrays, example), case["uld_token_merge_strategy"]
    if not groups:
        return logits.sum() * 0, {}
    teacher = torch.tensor(arrays["teacher_logits"][example])
    own, theirs = (
        laid_out(
            side_logits / case[f"uld_{side}_temperature"],
            arrays[f"{side}_input_ids"][example],
            [group[number] for group in groups],
            strategy,
            int(strategy == "bayesian"),
        )
        for number, (side, side_logits) in enumerate((("student", logits), ("teacher", teacher)))
    )
    images = np.full(teacher.shape[-1], -1)
    images[arrays["matched_teacher_ids"]] = arrays["matched_student_ids"]
    options = {
        "jsd_beta": case["beta"],
        "gold_hybrid": case["uld_use_hybrid_loss"],
        "gold_matched_weight": case["uld_hybrid_matched_weight"],
        "gold_unmatched_weight": case["uld_hybrid_unmatched_weight"],
    }
    chunks = merge_chunks(theirs[2], own[2], np.zeros(len(groups), int))
    signals = signals_of(theirs[0], theirs[1], teacher.shape[-1])
    prepared = gold.prepare_chunks(chunks, signals, own[1], images, logits.shape[-1], options)
    assert prepared.count == len(groups)
    total, parts = gold.loss(answer(prepared.query, own[0]), tensors(prepared.arrays), options)
    return total / len(groups), {name: part / len(groups) for name, part in parts.items()}


def whole(case, arrays, dtype, of_example):
    """(the loss, its distilled part, the last example's parts, the gradient) with `of_example` for each example."""
    logits = torch.tensor(arrays["student_logits"]).to(dtype).requires_grad_()
    labels = torch.tensor(arrays["student_labels"])[:, 1:].flatten()
    entropy = torch.nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1), labels)
    found = [of_example(case, arrays, i, logits[i]) for i in range(len(logits))]
    distilled = case["uld_distillation_weight"] * torch.stack([value for value, _ in found]).mean()
    total = case["uld_crossentropy_weight"] * entropy + distilled
    (gradient,) = torch.autograd.grad(total, logits, retain_graph=True)
    (alone,) = torch.autograd.grad(distilled, logits)
    parts = {name: part.item() for name, part in found[-1][1].items()}
    return SimpleNamespace(loss=total.item(), distilled=distilled.item(), parts=parts, gradient=gradient, alone=alone)


def masses(case, arrays):
    """Float64 [B, T, 1]: the student's probability of the group that a row is multiplied into, as it is averaged."""
    logits = torch.tensor(arrays["student_logits"]).double()
    probability = torch.softmax(logits / case["uld_student_temperature"], -1)
    strategy, result = case["uld_token_merge_strategy"], np.zeros((*logits.shape[:2], 1))
    shift = int(strategy == "bayesian")
    for example, ids in enumerate(arrays["student_input_ids"]):
        groups = [group for group, _ in groups_of(case, arrays, example)]
        for group in groups:
            mass = merged_rows(probability[example], ids, [group], strategy, 0.0, shift).sum()
            result[example, [p - shift for p in group]] = mass / len(groups) / len(logits)
    return case["uld_distillation_weight"] * result


def test_case(case, arrays):
    theirs = whole(case, arrays, torch.float64, lambda *of: example_reference(*of, FLOOR))
    values(theirs.loss, case["loss"])
    values(theirs.distilled, case["distillation_loss"])
    for name, part in theirs.parts.items():
        values(part, case[f"last_example_{name}_loss"])
    expected = arrays[f"grad_{case['id']}"]
    gradients(theirs.gradient, expected)

    right = whole(case, arrays, torch.float64, lambda *of: example_reference(*of, 0.0))
    ours = whole(case, arrays, torch.float32, example_product)
    values(ours.loss, right.loss)
    values(ours.distilled, right.distilled)
    for name, part in right.parts.items():
        values(ours.parts[name], part)
    gradients(ours.gradient, right.gradient)
    gradients(ours.alone, right.alone, of=masses(case, arrays))  # rows of long chunks too, however small
    same = torch.isclose(theirs.gradient, right.gradient, rtol=1e-6, atol=0).all(-1)
    gradients(ours.gradient[same], expected[same])


def encoded(arrays, side, example):
    """The answer as a batch of the product: tokens without bytes at its end are a slot of their own."""
    span = answers(arrays, side, example)
    bounds = arrays[f"{side}_byte_offsets"][example][span].astype(np.int64)
    bounds -= bounds[0, 0]
    text = bounds[:, 1] > bounds[:, 0]
    size = bounds[text, 1].max()
    ends = np.where(text, SCALE * bounds[:, 1], SCALE * (size + 1))
    ids = arrays[f"{side}_input_ids"][example][span].astype(np.int32)
    everything = np.ones(len(ids), bool)
    slots = np.where(text, 2, 4).astype(np.int32)
    width = np.array([SCALE * (size + 2)])
    first = np.zeros(len(ids), np.uint8)
    return EncodedBatch(ids, np.array([0, len(ids)]), ends, slots, everything, np.ones(1, bool), width, first)


def test_groups(arrays, listed, example):
    """The reference's groups are our chunks, as far as both sides end at one byte."""
    teacher, student, counts = align(*(encoded(arrays, side, example) for side in ("teacher", "student")), scored=False)
    groups = listed[example]
    pairs = list(zip(groups["student_groups"], groups["teacher_groups"], strict=True))
    ends = {side: arrays[f"{side}_byte_offsets"][example][answers(arrays, side, example)][:, 1] for side in SIDES}
    closed = [(s, t) for s, t in pairs if s and t and ends["student"][s[-1]] == ends["teacher"][t[-1]]]
    found = [(np.flatnonzero(student == c).tolist(), np.flatnonzero(teacher == c).tolist()) for c in range(counts[0])]
    assert found == closed


def merged_by_the_product(rows, tokens, chunks):
    """Probabilities [groups, V] of the merged rows, as `gold` prepares them of a teacher."""
    vocab = rows.shape[1]
    number = int(chunks.max()) + 1
    same = merge_chunks(chunks, chunks, np.zeros(number, int))
    prepared = gold.prepare_chunks(same, signals_of(rows, tokens, vocab), tokens, np.arange(vocab), vocab, {})
    ids = torch.as_tensor(prepared.query.candidates[prepared.arrays["last"], 1:])
    found = torch.as_tensor(prepared.arrays["logprob"] + prepared.arrays["before"][:, None]).exp()
    return torch.zeros(number, vocab).scatter(1, ids, found)


@pytest.mark.parametrize("strategy", ["bayesian", "observed"])
def test_merged_rows(arrays, listed, example, strategy):
    """The rows that the reference merges, unnormalised; the file has both strategies on rows of the tokens themselves.

    There neither has a right row: they are off by one. The product's are one row earlier.
    """
    start = answers(arrays, "student", example)[0]
    groups = [[p + start for p in group] for group in listed[example]["student_groups"] if group]
    logits, ids = torch.tensor(arrays["student_logits"][example]), arrays["student_input_ids"][example]
    probability = torch.softmax(logits.double(), -1)
    for shift in (0, 1):
        kept = [group for group in groups if group[0] >= shift]
        theirs, right = (merged_rows(probability, ids, kept, strategy, floor, shift) for floor in (FLOOR, 0.0))
        found = merged_by_the_product(*laid_out(logits, ids, kept, strategy, shift))
        np.testing.assert_allclose(found, right, rtol=1e-4, atol=0)
        if not shift:
            np.testing.assert_allclose(theirs, arrays[f"merged_student_probs_{example}_{strategy}"], rtol=1e-4, atol=0)
