"""ALM and SFT: the small golden table, finite gradients, merging, and splitting a batch."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from stages.core.errors import UserError
from stages.losses import alm, sft
from stages.losses.chunks import merge_chunks, scored_chunks

MODES = ["", "append_space", "merge_by_space_prob", "merge_by_space_prob+append_space", "eos_as_space+append_space"]
# Computed with tokenkit's JAX losses on the tensors of `det` (reference section 16.1), relative tolerance 1e-4.
TABLE = {
    "binary_ce": [0.175558, 0.220520, 0.405783, 0.429283, 0.268015],
    "abs": [1.738555, 1.664233, 2.973077, 2.238556, 2.029266],
    "reverse_binary_kl": [0.00893967, 0.00380137, 0.00300622, 0.00205341, 0.00551861],
    "binary_kl_temp_limit": [0.681900, 0.424880, 0.338467, 0.236404, 0.723330],
    "abs_exp": [0.0167457, 0.0158031, 0.0257575, 0.0192699, 0.0190402],
    "renyi": [0.0805403, 0.00940078, 3.9754e-6, 1.2575e-6, 0.00643477],
    "joschu_k2": [2.28944e-4, 1.99280e-4, 4.58487e-4, 3.27845e-4, 3.79155e-4],
    "joschu_k3": [2.29245e-4, 1.98051e-4, 4.55986e-4, 3.24445e-4, 3.73637e-4],
}
REFERENCE = {"binarization_temp": 100.0, "renyi_alpha": 0.5}
WEIGHTED = {
    ("token_count", "token_count"): 0.232280,
    ("token_count", "chunk_count"): 0.298645,
    ("chunk_count", "token_count"): 0.171516,
    ("log1p_token_count", "token_count"): 0.143523,
    ("log1p_token_count", "chunk_count"): 0.184530,
}


def det(shape, a, b):
    k = np.arange(np.prod(shape), dtype=np.float64)
    return torch.tensor((a * np.sin(1.3 * k + b) + 0.5 * np.cos(0.37 * k)).astype(np.float32).reshape(shape))


def ranges(spans, length):
    chunk = np.full(length, -1)
    for number, (start, end) in enumerate(spans):
        chunk[start:end] = number
    return chunk


def side(length, vocab, scale, phase, step, space, eos, spans, masked):
    logits = det((2, length, vocab), scale, phase)
    ids = (step * np.arange(2 * length) + 1) % vocab
    logprobs = torch.log_softmax(logits, -1).reshape(2 * length, vocab)
    following = torch.tensor(np.roll(ids, -1))
    loss = np.ones(2 * length, bool)
    loss[masked] = False
    chunk = np.concatenate([ranges(spans, length), ranges(spans[:4], length)])
    chunk[length:] += np.where(chunk[length:] >= 0, len(spans), 0)
    signals = {
        "observed_logprob": logprobs.gather(1, following[:, None])[:, 0],
        "boundary_logprob": logprobs[:, space].logsumexp(-1),
        "eos_logprob": logprobs[:, eos],
    }
    offsets = np.array([0, length, 2 * length])
    return signals, scored_chunks(chunk, loss, offsets), loss, offsets


def small_example():
    teacher = side(6, 7, 2, 0.1, 3, [1, 3], 2, [(0, 1), (1, 2), (2, 4), (4, 5), (5, 6)], [11])
    student = side(8, 5, 2, 0.9, 2, [2, 4], 3, [(0, 1), (1, 3), (3, 5), (5, 6), (6, 8)], [14, 15])
    return teacher, student, np.repeat([0, 1], [5, 4])


def evaluate(options, teacher, student, example):
    signals = {name: value.numpy() for name, value in teacher[0].items()}
    boundary = signals["eos_logprob" if "eos_as_space" in options["alm_mode"] else "boundary_logprob"]
    threshold = options["merge_threshold"] if "merge" in options["alm_mode"] else None
    chunks = merge_chunks(teacher[1], student[1], example, boundary, threshold)
    prepared = alm.prepare_chunks(chunks, signals["observed_logprob"], boundary, options)
    arrays = {name: torch.as_tensor(value) for name, value in prepared.arrays.items()}
    return alm.loss(student[0], arrays, options)[0] / prepared.count, prepared


@pytest.mark.parametrize("name", TABLE)
def test_table(name):
    teacher, student, example = small_example()
    for mode, expected in zip(MODES, TABLE[name], strict=True):
        options = {"alm_mode": mode, "alm_diff_fn": name, "merge_threshold": 0.3} | REFERENCE
        value, _ = evaluate(options, teacher, student, example)
        assert value.item() == pytest.approx(expected, rel=1e-4), mode


def test_weights_and_sft():
    teacher, student, example = small_example()
    for (numerator, denominator), expected in WEIGHTED.items():
        options = {"alm_mode": "append_space", "merge_threshold": 0.3} | REFERENCE
        options |= {"distill_main_path_numerator": numerator, "distill_main_path_denominator": denominator}
        assert evaluate(options, teacher, student, example)[0].item() == pytest.approx(expected, rel=1e-4)
    rows = sft.target_rows(student[2], student[3])
    total, _ = sft.loss(student[0], {"rows": torch.tensor(rows)}, {})
    assert total.item() / len(rows) == pytest.approx(2.393205, rel=1e-5)


@pytest.mark.parametrize("name", alm.DIFFERENCES)
@pytest.mark.parametrize("temperature", [1.0, 5.0, 100.0])
def test_extremes_stay_finite(name, temperature):
    values = [0.0, -1e-7, -1e-3, -1.0, -50.0, -1e4]
    teacher = torch.tensor([a for a in values for _ in values])
    student = torch.tensor(values * len(values), requires_grad=True)
    for alpha in (0.5, 2.0):
        options = {"binarization_temp": temperature, "renyi_alpha": alpha}
        result = alm.DIFFERENCES[name](teacher, student, options)
        (gradient,) = torch.autograd.grad(result.sum(), student)
        assert torch.isfinite(result).all() and torch.isfinite(gradient).all()
        equal = torch.tensor([value for value in values if value > -100], requires_grad=True)
        (gradient,) = torch.autograd.grad(alm.DIFFERENCES[name](equal.detach(), equal, options).sum(), equal)
        if name != "binary_kl_temp_limit":
            assert gradient.abs().max() < 2e-2, "no gradient where teacher and student agree"


def test_gradients_are_those_of_the_formulas():
    source = torch.Generator().manual_seed(1)
    teacher = -torch.rand(40, generator=source, dtype=torch.float64) * 8 - 0.01
    student = (-torch.rand(40, generator=source, dtype=torch.float64) * 8 - 0.01).requires_grad_()
    for function in alm.DIFFERENCES.values():
        torch.autograd.gradcheck(
            lambda b, f=function: f(teacher, b, {"binarization_temp": 3.0, "renyi_alpha": 0.5}), (student,)
        )


def test_merging_keeps_to_its_rules():
    teacher = np.array([-1, 0, 0, 1, 2, -1, 3, 4])
    student = np.array([-1, 0, 1, 1, 2, 2, -1, 4])
    boundary = np.log(np.array([0.9, 0.9, 0.05, 0.5, 0.05, 0.9, 0.05, 0.05]))
    chunks = merge_chunks(teacher, student, np.array([0, 0, 0, 0, 0]), boundary, 0.1)
    # 0 joins 1; the boundary after 1 parts it from 2; 3 has no student token and parts 2 from 4.
    assert chunks.teacher.tolist() == [-1, 0, 0, 0, 1, -1, -1, 2]
    assert chunks.student.tolist() == [-1, 0, 0, 0, 1, 1, -1, 2]
    assert chunks.teacher_end.tolist() == [3, 4, 7] and chunks.student_end.tolist() == [3, 5, 7]
    assert chunks.count.tolist() == [3, 1, 1]
    apart = merge_chunks(teacher, student, np.array([0, 1, 1, 1, 1]), np.full(8, -50.0), 0.1)
    assert apart.count.tolist() == [2, 2, 1], "chunks of different examples are never joined"
    empty = merge_chunks(np.full(3, -1), np.full(2, -1), np.zeros(0, int), np.zeros(3), 0.1)
    assert not len(empty.count)


@settings(max_examples=60, deadline=None)
@given(st.integers(0, 2**31), st.floats(0.05, 0.95))
def test_merged_chunks_part_the_tokens_as_defined(seed, threshold):
    random = np.random.default_rng(seed)
    teacher, student, example = [], [], []
    for number in range(random.integers(0, 12)):
        teacher += [number] * random.integers(0, 3) + [-1] * random.integers(0, 2)
        student += [number] * random.integers(0, 3)
        example.append(number // 4)
    teacher, student, example = (np.array(side, int) for side in (teacher, student, example))
    boundary = np.log(random.random(len(teacher)))
    chunks = merge_chunks(teacher, student, example, boundary, threshold)
    both = set(teacher[teacher >= 0]) & set(student[student >= 0])
    group, expected, before = -1, {}, None
    for number in sorted(both):
        end = np.flatnonzero(teacher == number)[-1]
        joined = before is not None and before[0] == number - 1 and example[before[0]] == example[number]
        if not (joined and np.exp(boundary[before[1]]) <= threshold):
            group += 1
        expected[number], before = group, (number, end)
    assert [expected.get(c, -1) for c in teacher] == chunks.teacher.tolist()
    assert [expected.get(c, -1) for c in student] == chunks.student.tolist()
    assert len(chunks.count) == group + 1 and chunks.count.sum() == (chunks.teacher >= 0).sum()


def test_unknown_settings():
    for options, word in (
        ({"alm_mode": "append_space+merge"}, "'merge'"),
        ({"alm_diff_fn": "kl"}, "'kl'"),
        ({"distill_main_path_numerator": "one"}, "'one'"),
        ({"distill_main_path_denominator": "log1p_token_count"}, "log1p"),
        ({"binarization_temp": 0.0}, "binarization_temp"),
        ({"alm_diff_fn": "renyi", "renyi_alpha": 1}, "renyi_alpha"),
    ):
        with pytest.raises(UserError, match=word):
            alm.check(options)
    alm.check({"alm_mode": ""})
    assert alm.needs({"alm_mode": ""}).teacher == {"observed_logprob"}
    assert alm.needs({"alm_mode": "eos_as_space+append_space"}).student == {"observed_logprob", "eos_logprob"}
    assert alm.needs({"alm_mode": "merge_by_space_prob"}).student == {"observed_logprob"}
