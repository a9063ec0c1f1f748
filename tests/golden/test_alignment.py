"""Chunk ids against tokenkit's `align.py`, for every align_*.json of the golden folder.

An example is clean when the reference has no way to go wrong on it: no token that counts is one of its replacement
strings (`_defect`). Clean examples must agree exactly, for all three chunk kinds. On the others the reference drops or
shifts chunks, and has none where we have none; there the right value is full coverage, with the same bytes on both
sides of every chunk.
"""

import json
from functools import cache
from pathlib import Path

import numpy as np
import pytest

from stages.alignment import BiasTable, align
from stages.tokenization import ByteView
from stages.tokenization.encoding import SCALE, EncodedBatch
from stages.tokenization.sources import prepare
from stages.tokenization.spec import TokenizerSpec
from tests.conftest import golden_folder, tokenizers_folder

KINDS = ("unconstrained", "space", "unbiased")
ROLES = ("user", "assistant")


def pytest_generate_tests(metafunc):
    if "case" in metafunc.fixturenames:
        files = sorted(golden_folder(metafunc.config).glob("align_*.json"))
        metafunc.parametrize("case", files, ids=[file.stem for file in files])


@cache
def view_of_kind(folder: Path, kind: str | None):
    """A tokenizer with the special tokens and chat pieces of a model kind, or with its own."""
    if not folder.is_dir():
        pytest.skip(f"no tokenizer {folder.name} in {folder.parent}")
    return ByteView.of(prepare(folder, TokenizerSpec(folder.name, source=kind)), folder)


@pytest.fixture
def setting(case, request):
    data = json.loads(case.read_text(encoding="utf-8"))
    folder = tokenizers_folder(request.config)
    views = [view_of_kind(folder / data[side], data[f"model_kind_{side}"]) for side in ("teacher", "student")]
    return data, views


def _masked(example, side):
    count = sum(example[f"mask_{side}"])
    assert all(example[f"mask_{side}"][:count])
    return example[f"ids_{side}"][:count], example[f"tokens_{side}"][:count]


def _defect(data, example) -> str | None:
    """Return which documented oddity of the reference an example runs into, None for a clean one."""
    found = []
    for side in ("teacher", "student"):
        replaced = {token for tokens in data[f"replacements_{side}"].values() if tokens for token in tokens}
        _, tokens = _masked(example, side)
        found.append([(i, token) for i, token in enumerate(tokens) if token in replaced])
    if not any(found):
        return None
    if example["encoding"] == "chat":
        return "chat: skipped specials shift the running length"
    openings = [data[f"replacements_{side}"]["<|<bos>|>"] or () for side in ("teacher", "student")]
    starts = [any(i == 0 and token in bos for i, token in side) for side, bos in zip(found, openings, strict=True)]
    if starts[0] != starts[1]:
        return "bos on one side only: nearly all chunks are dropped"
    if example["encoding"] == "direct_encode":
        return "eos: replacement strings of other length on the two sides"
    return "a template word or a lone newline in plain text"


def _runs(view, example, side):
    """Return [(slot, is text, ids)] of one side's tokens that count."""
    ids, _ = _masked(example, side)
    if example["encoding"] == "chat":
        return _chat_runs(view, ids)
    start = 1 if ids and ids[0] in view.special_ids else 0
    stop = len(ids) - 1 if len(ids) > start and ids[-1] in view.special_ids else len(ids)
    return [(0, False, ids[:start]), (2, True, ids[start:stop]), (4, False, ids[stop:])]


def _chat_runs(view, ids):
    template = view.chat_pieces(ROLES)
    runs, at = [(0, False, template.start)], len(template.start)
    assert ids[:at] == template.start
    for number, (header, end) in enumerate(template.turns):
        assert ids[at : at + len(header)] == header
        begin = at + len(header)
        at = next(i for i in range(begin, len(ids)) if ids[i : i + len(end)] == end)
        runs += [(3 * number + 1, False, header), (3 * number + 2, True, ids[begin:at]), (3 * number + 3, False, end)]
        at += len(end)
    assert at == len(ids)
    return runs


def _contents(runs, view):
    return [view.join(ids) for _, is_text, ids in runs if is_text]


def _batch(view, runs, sizes):
    """Lay golden ids out as `encode_examples` does; `sizes` are the bytes of the text slots, without a dummy space."""
    ids, ends, slots, unit, sizes = [], [], [], 0, list(sizes)
    previous = -1
    for slot, is_text, run in runs:
        # Header and end of turn that a kind does not have still take their unit.
        unit += slot - previous - 1
        previous = slot
        size = sizes.pop(0) if is_text else 1
        lengths = view.lengths[run].astype(np.int64) if run else np.zeros(0, np.int64)
        if is_text and lengths.sum() == size + 1:
            lengths[0] -= 1
        byte_ends = np.cumsum(lengths)
        if is_text:
            assert not run or byte_ends[-1] == size
            ends += [SCALE * (unit + int(end)) + (end == 0) for end in byte_ends]
        else:
            ends += [SCALE * unit + 1] * (len(run) - 1) + [SCALE * (unit + 1)] * bool(run)
        ids += run
        slots += [slot] * len(run)
        unit += size
    ids = np.array(ids, np.int32)
    offsets = np.array([0, len(ids)])
    everything = np.ones(len(ids), bool)
    return EncodedBatch(
        ids, offsets, np.array(ends, np.int64), np.array(slots, np.int32), everything, np.ones(1, bool),
        np.array([SCALE * (unit + 1)]), view.first_bytes[ids],
    )  # fmt: skip


def _aligned(data, views, example, kind):
    runs = [_runs(view, example, side) for view, side in zip(views, ("teacher", "student"), strict=True)]
    contents = [_contents(r, view) for r, view in zip(runs, views, strict=True)]
    # The shorter rendering of a slot has no dummy space.
    sizes = [min(len(a), len(b)) for a, b in zip(*contents, strict=True)]
    if example["encoding"] != "chat":
        assert sizes == [len(example["text"].encode())] or all(view.prefix_space for view in views)
        sizes = [len(example["text"].encode())]
    batches = [_batch(view, r, sizes) for view, r in zip(views, runs, strict=True)]
    entries = np.array(data["bias_entries_teacher_id_student_id_bias1_bias2"]).reshape(-1, 4)
    ids = entries[:, :2].astype(np.int64)
    bias = BiasTable.over(ids[:, 0], ids[:, 1], entries[:, 2], entries[:, 3], data["bias_threshold"])
    return batches, align(*batches, kind, bias, scored=False)


@pytest.mark.parametrize("kind", KINDS)
def test_clean_examples_agree_and_on_others_the_reference_only_loses(setting, kind):
    data, views = setting
    for example in data["examples"]:
        _, found = _aligned(data, views, example, kind)
        defect = _defect(data, example)
        for side, ours in zip(("teacher", "student"), found, strict=False):
            where = (example["encoding"], example["name"], side, defect)
            theirs = np.array(example[kind][f"segment_ids_{side}"])
            assert (theirs[len(ours) :] == -1).all(), where
            theirs = theirs[: len(ours)]
            assert (ours[theirs >= 0] >= 0).all(), where
            assert defect is not None or ours.tolist() == theirs.tolist(), where


@pytest.mark.parametrize("kind", [*KINDS, "greedy"])
def test_every_example_is_covered_with_equal_bytes(setting, kind):
    data, views = setting
    for example in data["examples"]:
        batches, chunks = _aligned(data, views, example, kind)
        where = (example["encoding"], example["name"], _defect(data, example))
        slots = [set(batch.slot.tolist()) for batch in batches]
        for batch, found in zip(batches, chunks[:2], strict=True):
            common = np.isin(batch.slot, list(slots[0] & slots[1]))
            assert (found[common] >= 0).all(), where
            assert (found[~common] == -1).all(), where
        for chunk in range(int(chunks[2][0])):
            spans = []
            for batch, found in zip(batches, chunks[:2], strict=True):
                inside = np.flatnonzero(found == chunk)
                before = batch.ends[inside[0] - 1] if inside[0] else 0
                spans.append((batch.slot[inside[0]], batch.slot[inside[-1]], batch.ends[inside[-1]], before // SCALE))
            assert spans[0][:3] == spans[1][:3], where


def test_encoding_gives_the_reference_ids(setting):
    data, views = setting
    compared = 0
    for example in data["examples"]:
        for view, side in zip(views, ("teacher", "student"), strict=True):
            ids, _ = _masked(example, side)
            if example["encoding"] != "chat":
                text_ids = _runs(view, example, side)[1][2]
                found = view.encode_texts([example["text"]])[0]
                assert found.exact and found.ids.tolist() == text_ids, (example["encoding"], example["name"], side)
                compared += 1
            elif (
                view.prefix_space is None
            ):  # the reference puts a dummy space before every turn, we only before the first
                contents = _contents(_runs(view, example, side), view)
                slots = [{"role": r, "text": c.decode(), "loss": True} for r, c in zip(ROLES, contents, strict=True)]
                assert view.encode_examples([slots]).ids.tolist() == ids
    assert compared
