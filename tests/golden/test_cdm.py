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
from stages.losses.token_alignment import segments, texts_of, token_costs, warp
from stages.tokenization import ByteView
from tests.conftest import golden_file

EXAMPLES = (0, 1)


@pytest.fixture(scope="module")
def found(golden):
    return dict(np.load(golden_file(golden, "cdm_parts.npz")))


@pytest.fixture(scope="module")
def entry(golden):
    return json.loads(golden_file(golden, "cdm_parts.json").read_text())


@pytest.fixture(scope="module")
def pair(golden):
    folder = golden_file(golden, "small_tokenizers")
    teacher, student = ByteView.load(folder / "teacher"), ByteView.load(folder / "student")
    exact = np.array([teacher.id_of_bytes.get(token, -1) for token in student.token_bytes])
    return Pair(teacher, student, Matches(exact, exact, exact, exact >= 0))


def rows_of(logits):
    logprob = torch.log_softmax(torch.tensor(logits.astype(np.float32)), -1).numpy()
    order = np.argsort(-logprob, axis=1, kind="stable")
    return Likeliest(order, np.take_along_axis(logprob, order, 1), np.full(len(logprob), -85.0, np.float32))


def ids_of(view, tokens):
    """The ids of decoded tokens: the golden file has no others, and each is one token of text."""
    return np.array([view.id_of_bytes[token.encode()] for token in tokens])


def weights(found, side, number, vocab):
    rows = rows_of(found[f"{side}_logits_{number}"])
    values = cdm.entropy(torch.tensor(rows.logprob), torch.tensor(rows.rest), vocab).numpy()
    return cdm.entropy_weights(values, np.array([len(values)]))


def warped(found, entry, pair, number):
    case = entry["examples"][number]
    ids = [ids_of(getattr(pair, side), case[f"{side}_tokens"]) for side in ("teacher", "student")]
    cost = token_costs(pair, ids[:1], ids[1:])
    cost = cost * found[f"weight_teacher_{number}"][:, None] * found[f"weight_student_{number}"][None, :]
    return warp(cost, *(np.array([len(side)]) for side in ids)), [len(side) for side in ids]


@pytest.mark.parametrize("number", EXAMPLES)
@pytest.mark.parametrize("side", ["teacher", "student"])
def test_entropy_weights(found, side, number):
    vocab = found[f"{side}_logits_{number}"].shape[1]
    np.testing.assert_array_equal(weights(found, side, number, vocab), found[f"weight_{side}_{number}"])


@pytest.mark.parametrize("number", EXAMPLES)
def test_paths(found, entry, pair, number):
    (path, total), _ = warped(found, entry, pair, number)
    case = entry["examples"][number]
    assert total[0] == case["dtw_cost"]
    for first, second, name in (
        (path.teacher, path.student, "teacher_to_student_positions"),
        (path.student, path.teacher, "student_to_teacher_positions"),
    ):
        assert [second[first == place].tolist() for place in range(first.max() + 1)] == case[name]


@pytest.mark.parametrize("number", EXAMPLES)
def test_places(found, entry, pair, number):
    (path, _), sizes = warped(found, entry, pair, number)
    teacher, student, count = segments(path, *(np.array([size]) for size in sizes))
    groups = entry["examples"][number]["merge_groups"]
    assert [np.flatnonzero(student == place).tolist() for place in range(count)] == groups
    vocab = found[f"teacher_logits_{number}"].shape[1]
    merged = cdm.mean_rows(rows_of(found[f"teacher_logits_{number}"]), teacher, count, vocab)
    expected = torch.log_softmax(torch.tensor(found[f"merged_teacher_{number}"]), -1).numpy()
    np.testing.assert_allclose(merged.logprob, np.take_along_axis(expected, merged.ids, 1), rtol=1e-4, atol=1e-6)
    # The mean of logits is the logits of the mean: here the states are the logits.
    states, weight = cdm.mean_states(
        torch.tensor(found[f"student_logits_{number}"].astype(np.float32)), torch.tensor(student), count
    )
    np.testing.assert_allclose(states, found[f"merged_student_{number}"], rtol=1e-4, atol=1e-6)
    assert weight.tolist() == [len(group) for group in groups]
    same_sets(merged.ids[:, : entry["topk"]], found[f"topk_teacher_{number}"], expected)
    same_sets(states.topk(entry["topk"]).indices.numpy(), found[f"topk_student_{number}"], states.numpy())


def same_sets(ids, expected, values):
    """The same values in the same order: equal logits (they are fp16) may change places."""
    np.testing.assert_allclose(np.take_along_axis(values, ids, 1), np.take_along_axis(values, expected, 1), rtol=1e-6)


def test_mapping(found, entry, pair):
    """The tables that grow over the run, by the script's rules around our search.

    Its slips are done here: a token is open if its student id is 0, the table is carried over, and the ids of all
    teacher tokens without a student token are taken for student ids and left out of the candidates.
    """
    table = found["teacher_to_student_exact_match"].copy()
    texts, size, limit = (texts_of(pair.teacher), texts_of(pair.student)), entry["topk"], entry["similarity_threshold"]
    for number in EXAMPLES:
        added = 0
        for teacher, student in zip(found[f"topk_teacher_{number}"], found[f"topk_student_{number}"], strict=True):
            open_ids = [i for i in teacher[:size].tolist() if table[i] == 0]
            left = student[:size][~np.isin(student[:size], np.flatnonzero(table == 0))].astype(np.int64)
            candidates = np.broadcast_to(left, (len(open_ids), len(left)))
            columns = nearest_in_context((pair.teacher, pair.student), np.array(open_ids, np.int64), candidates, limit)
            for identity, column in zip(open_ids, columns.tolist(), strict=True):
                if column >= 0:
                    theirs = found[f"mapping_after_{number}"][identity]
                    own, chosen, expected = texts[0][identity], texts[1][left[column]], texts[1][theirs]
                    assert Levenshtein.distance(own, chosen) == Levenshtein.distance(own, expected)
                    table[identity] = theirs
                    added += 1
        np.testing.assert_array_equal(table, found[f"mapping_after_{number}"])
        assert added == entry["examples"][number]["n_new_dynamic_pairs"]
