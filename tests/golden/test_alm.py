"""ALM against tokenkit's `compute_alm_loss`: every case of alm_loss.json, values and gradients.

Each case is computed twice. `reference_tables` builds the chunks by tokenkit's rules (dense column arithmetic,
its conventions and its defects), so that our loss has to reproduce value and gradient. Then the project's own
`merge_chunks` runs on the same tokens; where the two differ, the defect is named and the right value derived.
"""

import json

import numpy as np
import pytest
import torch

from stages.losses import alm
from stages.losses.chunks import Chunks, merge_chunks, run_ends
from tests.conftest import golden_file, golden_folder
from tests.golden.compare import gradients, values


def pytest_generate_tests(metafunc):
    if "group" in metafunc.fixturenames:
        path = golden_folder(metafunc.config) / "alm_loss.json"
        cases = json.loads(path.read_text()) if path.is_file() else {}
        pairs = [(group, case) for group, entry in cases.items() for case in entry["cases"]]
        metafunc.parametrize("group,case", pairs, ids=[f"{group}-{case['id']}" for group, case in pairs])


@pytest.fixture(scope="module")
def loaded(golden):
    entries = json.loads((golden / "alm_loss.json").read_text())
    files = {group: golden_file(golden, entry["inputs_file"]) for group, entry in entries.items()}
    return {group: (entry, dict(np.load(files[group]))) for group, entry in entries.items()}


def statistics(logits, ids, space, eos):
    """Row i: log-probabilities of token i + 1, of the boundary and of eos, flat over the batch."""
    logprobs = torch.log_softmax(logits, -1).clamp(max=0)
    following = torch.tensor(np.roll(ids, -1, axis=1), dtype=torch.int64)
    return {
        "observed_logprob": logprobs.gather(-1, following[..., None])[..., 0].flatten(),
        "boundary_logprob": logprobs[..., torch.tensor(space)].logsumexp(-1).clamp(max=0).flatten(),
        "eos_logprob": logprobs[..., eos].flatten(),
    }


def masked(segments, loss_mask):
    scored = np.where(loss_mask, segments, -1).astype(np.int64)
    first_run = scored.copy()  # tokenkit finds the end of a chunk with token 0 in the matrix, but never scores it
    scored[:, 0] = -1
    return scored, first_run


def flat(segments, columns):
    """Chunk ids of a batch of rows -> global ids, `columns` per row."""
    return np.where(segments >= 0, segments + columns * np.arange(len(segments))[:, None], -1).reshape(-1)


def regroup(chunk, size):
    return np.where(chunk >= 0, chunk // size, -1)


def last_of_first_run(valid):
    """[rows, n] bool -> position of the end of the first run of True, 0 when there is none (argmax of all False)."""
    return np.argmax(valid & ~np.append(valid[:, 1:], np.zeros_like(valid[:, :1]), axis=1), axis=1)


def reference_tables(case, segments_teacher, segments_student, mask_teacher, mask_student, boundary, columns, gcounts):
    """Return [(Chunks, size)] by tokenkit's rules and its mean denominator over all columns."""
    rows = len(segments_teacher)
    teacher, run_teacher = masked(segments_teacher, mask_teacher)
    student, run_student = masked(segments_student, mask_student)
    starts_t = np.arange(rows)[:, None] * segments_teacher.shape[1]
    starts_s = np.arange(rows)[:, None] * segments_student.shape[1]
    counts = np.stack([np.bincount(r[r >= 0], minlength=columns) for r in teacher])
    end_t = run_ends(flat(run_teacher, columns), rows * columns).reshape(rows, columns)
    end_s = run_ends(flat(run_student, columns), rows * columns).reshape(rows, columns)
    end_t, end_s = np.where(end_t > 0, end_t, starts_t), np.where(end_s > 0, end_s, starts_s)
    column = np.broadcast_to(np.arange(columns), (rows, columns)).copy()
    # A column without teacher tokens is invalid: its student tokens count for nothing.
    filled = np.take_along_axis(counts, np.maximum(student, 0), 1) > 0
    student = np.where((student >= 0) & filled, student, -1)
    if "merge_by_space_prob" in case["alm_mode"]:
        breaks = np.exp(boundary[end_t]) > case["tokenizer_pair_bias_threshold"]
        merged = np.cumsum(breaks, axis=1) - breaks  # boundaries strictly before; empty columns take part
        member = (merged[:, :, None] == column[:, None, :]) & (counts > 0)[:, :, None]
        last = np.stack([last_of_first_run(member[row].T) for row in range(rows)])
        column = merged
        end_t, end_s = np.take_along_axis(end_t, last, 1), np.take_along_axis(end_s, last, 1)
        matrix = member.astype(np.int64)
        counts = np.einsum("bc,bcd->bd", counts, matrix)
        gcounts = np.einsum("bc,bcd->bd", counts, matrix)  # merged a second time: the defect
    tables, sizes = [], case["distill_chunk_sizes"]
    denominators = []
    to_column = lambda seg: np.where(seg >= 0, np.take_along_axis(column, np.maximum(seg, 0), 1), -1)  # noqa: E731
    for size in sizes:
        grouped = counts.reshape(rows, -1, size)
        blocks = grouped.shape[1]
        ends = []
        for end in (end_t, end_s):
            last = np.where(grouped > 0, np.arange(size), 0).max(-1)[..., None]  # the last non-empty column
            ends.append(np.take_along_axis(end.reshape(rows, blocks, size), last, 2).reshape(-1))
        total = grouped.sum(-1).reshape(-1)
        keep = np.where(total > 0, np.cumsum(total > 0) - 1, -1)
        kept = total > 0
        ids = [np.append(keep, -1)[flat(regroup(to_column(seg), size), blocks)] for seg in (teacher, student)]
        tables.append(Chunks(ids[0], ids[1], ends[0][kept], ends[1][kept], total[kept]))
        denominators.append(gcounts.reshape(len(gcounts), -1, size).sum(-1).reshape(-1))
    return tables, denominators, rows * columns, sizes


def options_of(case):
    names = ("alm_mode", "alm_diff_fn", "binarization_temp", "renyi_alpha")
    names += ("distill_main_path_numerator", "distill_main_path_denominator")
    return {name: case[name] for name in names} | {"merge_threshold": case["tokenizer_pair_bias_threshold"]}


def summed(tables, signals, boundary, student, options):
    total, count = 0.0, 0.0
    for table in tables:
        prepared = alm.prepare_chunks(table, signals["observed_logprob"], boundary, options)
        arrays = {name: torch.as_tensor(value) for name, value in prepared.arrays.items()}
        total = total + alm.loss(student, arrays, options)[0]
        count += prepared.count
    return total, count


def test_case(group, case, loaded):
    entry, z = loaded[group]
    kind, mask, options = case["chunk_kind"], case["loss_mask"], options_of(case)
    alm.check(options)
    teacher = statistics(
        torch.tensor(z["teacher_logits"]),
        z["input_ids_teacher"],
        z["space_mask_teacher"],
        entry["eos_token_id_teacher"],
    )
    signals = {name: value.numpy() for name, value in teacher.items()}
    logits = torch.tensor(z["student_logits"], requires_grad=True)
    student = statistics(logits, z["input_ids_student"], z["space_mask_student"], entry["eos_token_id_student"])
    boundary = signals["eos_logprob" if "eos_as_space" in case["alm_mode"] else "boundary_logprob"]
    seg_t, seg_s = z[f"segment_ids_teacher_{kind}"], z[f"segment_ids_student_{kind}"]
    mask_t, mask_s = z[f"loss_mask_teacher_{mask}"], z[f"loss_mask_student_{mask}"]
    columns = z[f"align_teacher_{kind}"].shape[2]
    if case["global_batch"]:
        gseg, gmask = z[f"global_segment_ids_teacher_{kind}"], z["global_loss_mask_teacher"]
    else:
        gseg, gmask = seg_t, mask_t
    gcounts = np.stack([np.bincount(r[r >= 0], minlength=columns) for r in masked(gseg, gmask)[0]])

    tables, denominators, size_one, sizes = reference_tables(
        case, seg_t, seg_s, mask_t, mask_s, boundary, columns, gcounts
    )
    total, _ = summed(tables, signals, boundary, student, options)
    denominator = np.concatenate(denominators)
    if case["distill_main_path_denominator"] == "chunk_count":
        denominator = denominator > 0
    elements = sum(size_one // size for size in sizes)
    mean_denominator = denominator.mean()
    if case["loss"] == "nan" or np.isnan(float(case["loss"])):
        # Reference defect: the counts merged twice are all zero, so it divides by zero. Right: our count below is not.
        assert mean_denominator == 0
    else:
        value = total / elements / mean_denominator / len(sizes)
        values(value.item(), case["loss"])
        if f"grad_student_logits_{case['id']}" in z:
            (gradient,) = torch.autograd.grad(value, logits, retain_graph=True)
            expected = z[f"grad_student_logits_{case['id']}"]
            # A chunk as likely to both sides has a gradient of nothing but rounding: it is that of the others.
            gradients(gradient, expected, of=np.abs(expected).max(keepdims=True))

    # The project's own chunks on the same tokens.
    example = np.repeat(np.arange(len(seg_t)), columns)
    ours = merge_chunks(
        flat(masked(seg_t, mask_t)[0], columns),
        flat(masked(seg_s, mask_s)[0], columns),
        example,
        boundary,
        case["tokenizer_pair_bias_threshold"] if "merge_by_space_prob" in case["alm_mode"] else None,
    )
    mine, count = summed([ours], signals, boundary, student, options)
    assert torch.isfinite(mine) and count > 0
    (gradient,) = torch.autograd.grad(mine / count, logits)
    assert torch.isfinite(gradient).all()
    check_difference(
        case, ours, mine, count, signals, boundary, student, options, seg_t, seg_s, mask_t, mask_s, columns
    )


def torn(case, segments, mask):
    """Whether an empty column lies between chunks that the reference may merge."""
    if "merge_by_space_prob" not in case["alm_mode"]:
        return False
    filled = [np.unique(row[row >= 0]) for row in masked(segments, mask)[0]]
    return any(len(row) and row[-1] - row[0] >= len(row) for row in filled)


def check_difference(
    case, ours, mine, count, signals, boundary, student, options, seg_t, seg_s, mask_t, mask_s, columns
):
    """Our chunks are the reference's ones, except where it lets empty or half-empty columns take part."""
    single = case | {"distill_chunk_sizes": [1], "global_batch": False}
    gcounts = np.zeros((len(seg_t), columns), np.int64)
    (table,), _, _, _ = reference_tables(single, seg_t, seg_s, mask_t, mask_s, boundary, columns, gcounts)
    theirs, _ = summed([table], signals, boundary, student, options)
    scored_t, scored_s = (flat(masked(s, m)[0], columns) for s, m in ((seg_t, mask_t), (seg_s, mask_s)))
    both = np.intersect1d(scored_t[scored_t >= 0], scored_s[scored_s >= 0])
    half_empty = np.setdiff1d(scored_t[scored_t >= 0], both)
    if not torn(case, seg_t, mask_t) and not len(half_empty):
        # Same members, so the same numerator; the right denominator counts every merged chunk once.
        assert np.array_equal(ours.teacher, table.teacher) and np.array_equal(ours.student, table.student)
        assert np.array_equal(ours.teacher_end, table.teacher_end) and np.array_equal(ours.count, table.count)
        np.testing.assert_allclose(mine.item(), theirs.item(), rtol=1e-5, atol=0)
        by_chunk = case["distill_main_path_denominator"] == "chunk_count"
        assert count == (len(table.count) if by_chunk else table.count.sum())
    else:
        # Reference defects: an empty column breaks a merge with the boundary mass of row 0, a chunk with student
        # tokens on no side counts as log-likelihood 0. Right: only chunks scored on both sides, joined when adjacent.
        assert np.array_equal(ours.teacher >= 0, np.isin(scored_t, both))
        assert np.array_equal(ours.student >= 0, np.isin(scored_s, both))
        assert ours.count.sum() == np.isin(scored_t, both).sum()
