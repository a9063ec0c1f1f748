"""CDM against the intermediate results of its authors' script; there is no final loss (see the golden README, 9)."""

import json

import numpy as np
import pytest
import torch
from rapidfuzz.distance import Levenshtein

from stages.alignment.pair import Matches, Pair
from stages.losses import cdm
from stages.losses.contextual import nearest_in_context
from stages.losses.mapped import Likeliest
from stages.losses.token_alignment import is_part, segments, texts_of, token_costs, warp
from stages.tokenization import ByteView
from tests.conftest import golden_file, golden_folder
from tests.golden.compare import values

SIDES = ("teacher", "student")
UNKNOWN = "\ufffd"  # how the script's decoded tokens have a part of a character


def pytest_generate_tests(metafunc):
    if "number" in metafunc.fixturenames:
        path = golden_folder(metafunc.config) / "cdm_parts.json"
        examples = json.loads(path.read_text(encoding="utf-8"))["examples"] if path.is_file() else []
        metafunc.parametrize("number", range(len(examples)))


@pytest.fixture(scope="module")
def found(golden):
    return dict(np.load(golden_file(golden, "cdm_parts.npz")))


@pytest.fixture(scope="module")
def entry(golden):
    return json.loads(golden_file(golden, "cdm_parts.json").read_text(encoding="utf-8"))


@pytest.fixture(scope="module")
def pair(golden):
    folder = golden_file(golden, "small_tokenizers")
    teacher, student = (ByteView.load(folder / side) for side in SIDES)
    exact = np.array([teacher.id_of_bytes.get(token, -1) for token in student.token_bytes])
    return Pair(teacher, student, Matches(exact, exact, exact, exact >= 0))


def rows_of(logits):
    logprob = torch.log_softmax(torch.tensor(logits.astype(np.float32)), -1).numpy()
    order = np.argsort(-logprob, axis=1, kind="stable")
    return Likeliest(order, np.take_along_axis(logprob, order, 1), np.full(len(logprob), -85.0, np.float32))


def warped(found, entry, number):
    """The product's path over the script's costs: distances of its strings without spaces, times both weights."""
    case = entry["examples"][number]
    strings = [[token.replace(" ", "") for token in case[f"{side}_tokens"]] for side in SIDES]
    cost = np.array([[Levenshtein.distance(a, b) for b in strings[1]] for a in strings[0]], np.int64)
    cost = cost * found[f"weight_teacher_{number}"][:, None] * found[f"weight_student_{number}"][None, :]
    return warp(cost[None], *(np.array([len(side)]) for side in strings)), [len(side) for side in strings]


@pytest.mark.parametrize("side", SIDES)
def test_entropy_weights(found, side, number):
    logits = found[f"{side}_logits_{number}"]
    rows = rows_of(logits)
    entropies = cdm.entropy(torch.tensor(rows.logprob), torch.tensor(rows.rest), logits.shape[1]).numpy()
    weights = cdm.entropy_weights(entropies, np.array([len(entropies)]))
    np.testing.assert_array_equal(weights, found[f"weight_{side}_{number}"])


def test_costs(entry, pair, number):
    """Distances of the product's texts are those of the script's, where no token is a part of a character."""
    case = entry["examples"][number]
    ids, whole = [], []
    for side in SIDES:
        view = getattr(pair, side)
        ids.append(np.array([view.id_of_bytes.get(token.encode(), 0) for token in case[f"{side}_tokens"]]))
        whole.append(np.array([token.encode() in view.id_of_bytes for token in case[f"{side}_tokens"]]))
    ours = token_costs(pair, ids[:1], ids[1:])[0]
    for i, left in enumerate(case["teacher_tokens"]):
        for j, right in enumerate(case["student_tokens"]):
            if whole[0][i] and whole[1][j] and UNKNOWN not in left + right:
                assert ours[i, j] == Levenshtein.distance(left.replace(" ", ""), right.replace(" ", "")), (left, right)


def test_paths(found, entry, number):
    (path, total), _ = warped(found, entry, number)
    case = entry["examples"][number]
    assert total[0] == case["dtw_cost"]
    for first, second, name in (
        (path.teacher, path.student, "teacher_to_student_positions"),
        (path.student, path.teacher, "student_to_teacher_positions"),
    ):
        assert [second[first == place].tolist() for place in range(first.max() + 1)] == case[name]


def joined_places(case):
    """[(teacher places, student places)] that the script's positions connect: where its groups overlap, as one."""
    places = []
    for teacher, students in enumerate(case["teacher_to_student_positions"]):
        if places and places[-1][1][-1] >= students[0]:
            places[-1][0].append(teacher)
            places[-1][1].extend(student for student in students if student > places[-1][1][-1])
        else:
            places.append(([teacher], list(students)))
    return places


def test_places(found, entry, number):
    (path, _), sizes = warped(found, entry, number)
    case = entry["examples"][number]
    teacher, student, count = segments(path, *(np.array([size]) for size in sizes))
    places = joined_places(case)
    for side, expected in ((teacher, [t for t, _ in places]), (student, [s for _, s in places])):
        assert [np.flatnonzero(side == place).tolist() for place in range(count)] == expected
    logits = {side: found[f"{side}_logits_{number}"].astype(np.float32) for side in SIDES}
    merged = cdm.mean_rows(rows_of(logits["teacher"]), teacher, count, logits["teacher"].shape[1])
    # The mean of logits is the logits of the mean: here the states are the logits.
    states, weight = cdm.mean_states(torch.tensor(logits["student"]), torch.tensor(student), count)
    assert weight.tolist() == [len(students) for _, students in places]
    for place, (teachers, students) in enumerate(places):
        mean = {"teacher": logits["teacher"][teachers].mean(0), "student": logits["student"][students].mean(0)}
        if students in case["merge_groups"]:
            group = case["merge_groups"].index(students)
            values(mean["teacher"], found[f"merged_teacher_{number}"][group])
            values(mean["student"], found[f"merged_student_{number}"][group])
            for side, ids in (
                ("teacher", merged.ids[place]),
                ("student", (-states[place]).argsort(stable=True).numpy()),
            ):
                expected = found[f"topk_{side}_{number}"][group][: entry["topk"]]
                # The same values in the same order: equal logits (they are fp16) may change places.
                values(mean[side][ids[: entry["topk"]]], mean[side][expected])
        expected = torch.log_softmax(torch.tensor(mean["teacher"]), -1).numpy()
        values(merged.logprob[place], expected[merged.ids[place]])
        values(states[place], mean["student"])


def test_mapping(found, entry, pair):
    """The tables that grow over the run, by the script's rules around our search.

    Its slips are done here: a token is open if its student id is 0, the table is carried over, and the ids of teacher
    tokens without a student token when the example starts are taken for student ids and left out of the candidates.
    Parts of characters, which all look alike to it, are near to nothing for us.
    """
    table = found["teacher_to_student_exact_match"].copy()
    texts, size, limit = (texts_of(pair.teacher), texts_of(pair.student)), entry["topk"], entry["similarity_threshold"]
    for number, case in enumerate(entry["examples"]):
        after, left_out, added = found[f"mapping_after_{number}"], np.flatnonzero(table == 0), 0
        for teacher, student in zip(found[f"topk_teacher_{number}"], found[f"topk_student_{number}"], strict=True):
            open_ids = [i for i in teacher[:size].tolist() if table[i] == 0]
            left = student[:size][~np.isin(student[:size], left_out)].astype(np.int64)
            candidates = np.broadcast_to(left, (len(open_ids), len(left)))
            columns = nearest_in_context((pair.teacher, pair.student), np.array(open_ids, np.int64), candidates, limit)
            for identity, column in zip(open_ids, columns.tolist(), strict=True):
                theirs, own = after[identity], texts[0][identity]
                if column >= 0:
                    chosen, expected = texts[1][left[column]], texts[1][theirs]
                    assert normalised(own, chosen) == normalised(own, expected)
                elif theirs in left and is_part(own):
                    assert is_part(texts[1][theirs])
                else:
                    continue
                table[identity] = theirs
                added += 1
        np.testing.assert_array_equal(table, after)
        assert added == case["n_new_dynamic_pairs"]


def normalised(own, other):
    return Levenshtein.distance(own, other) / (len(own) + len(other))
