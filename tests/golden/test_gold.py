"""GOLD against TRL's `ULDLoss`: every case of trl_gold_uld.json, value and gradient, with all tokens in the signals.

The reference's cross entropy (weight 0.3 of every loss) is added here, and its mean of the examples' means is taken.
What it compares is laid out as a sequence of (row, token) pairs for our loss, so that its strategies differ in that
alone:

- "bayesian": the token at position p with the row p - 1 that predicts it; a group's last row is multiplied by the
  probabilities of its earlier tokens. The chain rule, and what the product does.
- "observed", TRL's default: position p with row p, which predicts token p + 1 (off by one), and a group's first row is
  multiplied by the probabilities of its later tokens. Only this file does that; that it is wrong is shown at the end.

The reference takes no probability to be below 1e-8 in the logarithms of matched tokens. Of the student that would end
the gradient of every token of a long chunk, so the product does not; of the teacher it changes a few gradients of
reverse KL (beta 1) by less than 1e-5 here, which this file reproduces.
"""

import json

import numpy as np
import pytest
import torch

from stages.losses import gold
from stages.losses.chunks import merge_chunks
from tests.conftest import golden_file, golden_folder
from tests.unit.dense import answer, signals_of, tensors

VALUES, GRADIENTS = {"rtol": 1e-4, "atol": 1e-6}, {"rtol": 1e-3, "atol": 1e-6}
FLOOR = np.log(1e-8).astype(np.float32)


def pytest_generate_tests(metafunc):
    path = golden_folder(metafunc.config) / "trl_gold_uld.json"
    found = json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}
    if "case" in metafunc.fixturenames:
        cases = found.get("cases", [])
        metafunc.parametrize("case", cases, ids=[case["id"] for case in cases])
    if "merged" in metafunc.fixturenames:
        metafunc.parametrize("merged", range(len(found.get("alignment_groups_per_example", []))), indirect=True)


@pytest.fixture(scope="module")
def arrays(golden):
    return dict(np.load(golden_file(golden, "trl_gold_uld.npz")))


def positions(labels, skip_eos):
    found = np.flatnonzero(labels != -100)
    return found[: len(found) - skip_eos]


def groups_of(case, arrays, example):
    """Positions of each group on both sides, by the rules of the reference."""
    spans = [
        positions(arrays[f"{side}_labels"][example], case[f"uld_skip_{side}_eos"]) for side in ("student", "teacher")
    ]
    if not case["use_extended_uld"]:
        return [([s], [t]) for s, t in zip(*spans, strict=False)]
    ends = [
        arrays[f"{side}_byte_offsets"][example][span, 1]
        for side, span in zip(("student", "teacher"), spans, strict=True)
    ]
    groups, here, at = [], [[], []], [0, 0]
    while at[0] < len(spans[0]) and at[1] < len(spans[1]):
        now = [int(end[i]) for end, i in zip(ends, at, strict=True)]
        for side in (0, 1):
            if now[side] <= now[1 - side]:
                here[side].append(spans[side][at[side]])
                at[side] += 1
        if now[0] == now[1]:
            groups.append(tuple(here))
            here = [[], []]
    here = [part + list(span[i:]) for part, span, i in zip(here, spans, at, strict=True)]
    return groups + ([tuple(here)] if here[0] and here[1] else [])


def laid_out(logits, ids, groups, strategy, shift=None):
    """(logits, ids, chunks) of a sequence in which the row before a token is the one the reference takes for it."""
    rows, tokens, chunks = [], [0], [-1]
    shift = int(strategy == "bayesian") if shift is None else shift
    for number, group in enumerate(groups):
        for p in group if strategy == "bayesian" else [*group[1:], group[0]]:
            rows.append(logits[p - shift])
            tokens.append(ids[p])
            chunks.append(number)
    return torch.stack([*rows, torch.zeros_like(rows[0])]), np.array(tokens), np.array(chunks)


def example_loss(case, arrays, example, logits, strategy, floor):
    """(the mean over groups of the distillation loss, its parts) of one example."""
    groups = groups_of(case, arrays, example)
    teacher = torch.tensor(arrays["teacher_logits"][example])
    teacher_ids, student_ids = (arrays[f"{side}_input_ids"][example] for side in ("teacher", "student"))
    theirs = laid_out(teacher / case["uld_teacher_temperature"], teacher_ids, [group for _, group in groups], strategy)
    own = laid_out(logits / case["uld_student_temperature"], student_ids, [group for group, _ in groups], strategy)
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
    prepared.arrays["logprob"] = np.maximum(prepared.arrays["logprob"], floor - prepared.arrays["before"][:, None])
    found = answer(prepared.query, own[0])
    total, parts = gold.loss(found, tensors(prepared.arrays), options)
    return total / len(groups), {name: part / len(groups) for name, part in parts.items()}


def whole_loss(case, arrays, logits, strategy, floor=FLOOR):
    labels = torch.tensor(arrays["student_labels"])[:, 1:].flatten()
    entropy = torch.nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1), labels)
    parts = [example_loss(case, arrays, i, logits[i], strategy, floor) for i in range(len(logits))]
    distilled = case["uld_distillation_weight"] * torch.stack([value for value, _ in parts]).mean()
    return case["uld_crossentropy_weight"] * entropy + distilled, distilled, parts[-1][1]


def test_case(case, arrays):
    logits = torch.tensor(arrays["student_logits"], requires_grad=True)
    total, distilled, last = whole_loss(case, arrays, logits, case["uld_token_merge_strategy"])
    np.testing.assert_allclose(distilled.item(), case["distillation_loss"], **VALUES)
    np.testing.assert_allclose(total.item(), case["loss"], **VALUES)
    for name, part in last.items():
        np.testing.assert_allclose(part.item(), case[f"last_example_{name}_loss"], **VALUES)
    total.backward()
    np.testing.assert_allclose(logits.grad, arrays[f"grad_{case['id']}"], **GRADIENTS)
    with torch.no_grad():
        _, without_floor, _ = whole_loss(case, arrays, logits, case["uld_token_merge_strategy"], np.float32(-np.inf))
    np.testing.assert_allclose(without_floor, case["distillation_loss"], **VALUES)


def test_groups(golden, arrays):
    listed = json.loads(golden_file(golden, "trl_gold_uld.json").read_text(encoding="utf-8"))
    case = next(case for case in listed["cases"] if case["use_extended_uld"] and case["uld_skip_student_eos"])
    for example, groups in enumerate(listed["alignment_groups_per_example"]):
        starts = [positions(arrays[f"{side}_labels"][example], 0)[0] for side in ("student", "teacher")]
        found = groups_of(case | {"uld_skip_teacher_eos": True}, arrays, example)
        for side, (name, start) in enumerate(zip(("student", "teacher"), starts, strict=True)):
            expected = [[int(p + start) for p in group] for group in groups[f"{name}_groups"]]
            assert [list(map(int, group[side])) for group in found] == expected[: len(found)]


@pytest.fixture
def merged(request, golden, arrays):
    """(example, the student's logits, its ids, positions of each group) of the rows that the reference merges."""
    example = request.param
    listed = json.loads(golden_file(golden, "trl_gold_uld.json").read_text(encoding="utf-8"))
    start = positions(arrays["student_labels"][example], 0)[0]
    groups = [
        [int(p + start) for p in group] for group in listed["alignment_groups_per_example"][example]["student_groups"]
    ]
    return example, torch.tensor(arrays["student_logits"][example]), arrays["student_input_ids"][example], groups


def merged_by_the_product(rows, tokens, chunks):
    """Probabilities [groups, V] of the merged rows, as `gold` prepares them of a teacher."""
    vocab = rows.shape[1]
    number = int(chunks.max()) + 1
    same = merge_chunks(chunks, chunks, np.zeros(number, int))
    prepared = gold.prepare_chunks(same, signals_of(rows, tokens, vocab), tokens, np.arange(vocab), vocab, {})
    ids = torch.as_tensor(prepared.query.candidates[prepared.arrays["last"], 1:])
    found = torch.as_tensor(prepared.arrays["logprob"] + prepared.arrays["before"][:, None]).exp()
    return torch.zeros(number, vocab).scatter(1, ids, found)


def test_the_right_value_of_a_merged_row(merged):
    """At the token that follows, a merged row is the probability of its chunk: the chain rule, and only "bayesian".

    Derivation: P(t1..tn | before) = prod P(t_i | before, t1..t_(i-1)), and the row before t_i is the one that predicts
    it. TRL's default reads the row of t_i itself and gives another number for every chunk.
    """
    _, logits, ids, groups = merged
    logprob = torch.log_softmax(logits, -1)
    for strategy, row in (("bayesian", -1), ("observed", 0)):
        rows, tokens, chunks = laid_out(logits, ids, groups, strategy)
        sequence = torch.log_softmax(rows, -1)
        for number, group in enumerate(groups):
            places = np.flatnonzero(chunks == number) - 1
            chained = sum(sequence[p, tokens[p + 1]] for p in places)
            right = sum(logprob[p - 1, ids[p]] for p in group)
            shifted = sum(logprob[p, ids[p]] for p in group)
            torch.testing.assert_close(chained, right if row else shifted)
            assert abs(right - shifted) > 1e-2


def test_merged_rows(merged, arrays):
    """The rows that the reference merges are ours, unnormalised: they add up to the probability of the beginning.

    The file has both strategies on the same rows, those of the tokens themselves.
    """
    example, logits, ids, groups = merged
    logprob = torch.log_softmax(logits, -1)
    for strategy in ("bayesian", "observed"):
        found = merged_by_the_product(*laid_out(logits, ids, groups, strategy, shift=0))
        np.testing.assert_allclose(found, arrays[f"merged_student_probs_{example}_{strategy}"], **VALUES)
        for row, group in zip(found, groups, strict=True):
            others = group[:-1] if strategy == "bayesian" else group[1:]
            before = sum((logprob[p, ids[p]] for p in others), torch.zeros(()))
            torch.testing.assert_close(row.sum(), before.exp())


def test_the_right_merged_rows(merged, arrays):
    """Ours: the row that predicts a chunk's last token, times the probability of its tokens before that one.

    All of them one row earlier than in the file, where the strategies are off by one and so no row of either is right.
    """
    example, logits, ids, groups = merged
    probability = torch.softmax(logits.double(), -1)
    found = merged_by_the_product(*laid_out(logits, ids, groups, "bayesian"))
    for number, group in enumerate(groups):
        right = probability[group[-1] - 1].clone()
        for p in group[:-1]:
            right *= probability[p - 1, ids[p]]
        np.testing.assert_allclose(found[number], right, **VALUES)
        for strategy in ("bayesian", "observed"):
            file = arrays[f"merged_student_probs_{example}_{strategy}"][number]
            assert not np.allclose(right, file, **VALUES), (number, strategy)
