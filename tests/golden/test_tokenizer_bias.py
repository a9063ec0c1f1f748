"""Tokenization bias against tokenkit's `compute_tokenizer_info`, and real tokenizers against the definition."""

import json
from bisect import bisect_left
from collections import Counter

import numpy as np
import pytest

from stages.alignment.bias import TokenPairs, biases, probability_mass, suffix_pairs
from stages.alignment.covers import CoverFinder
from stages.alignment.statistics import SIDES
from stages.tokenization import ByteView
from stages.tokenization.byte_functions import byte_level
from stages.tokenization.sources import prepare
from stages.tokenization.spec import TokenizerSpec
from tests.conftest import golden_file, golden_folder, tokenizers_folder
from tests.unit.test_bias import Definition, defined_bias, dictionaries, some_counts, unigram

SAMPLE, SMOOTHING = 24, 1e-6  # of pairs of real tokenizers


def pytest_generate_tests(metafunc):
    """Real tokenizers: each pair that a file of alignments names, in either order once."""
    if "names" in metafunc.fixturenames:
        files = sorted(golden_folder(metafunc.config).glob("align_*.json"))
        entries = [json.loads(file.read_text(encoding="utf-8")) for file in files]
        pairs = {frozenset((e["teacher"], e["student"])): (e["teacher"], e["student"]) for e in entries}
        metafunc.parametrize("names", pairs.values(), ids=["-".join(names) for names in pairs.values()])


@pytest.fixture(scope="module")
def views(golden):
    folders = [golden_file(golden, f"small_tokenizers/{side}") for side in SIDES]
    return [ByteView.of(prepare(folder, TokenizerSpec(folder.name, source="GPT2")), folder) for folder in folders]


@pytest.fixture(scope="module")
def arrays(golden):
    return np.load(golden_file(golden, "tokenizer_stats.npz"))


@pytest.fixture(scope="module")
def facts(golden):
    return json.loads(golden_file(golden, "tokenizer_stats.json").read_text(encoding="utf-8"))


def keys_of(pairs):
    return list(zip(*(ids.tolist() for ids in pairs), strict=True))


def test_probabilities(views, arrays, facts):
    for side, view in zip(SIDES, views, strict=True):
        counts = arrays[f"counts_{side}"]
        one = np.ones(view.vocab_size, np.int64)
        found = probability_mass(counts, one, counts, facts["additive_smoothing_constant"])
        np.testing.assert_allclose(found, arrays[f"probs_{side}"], rtol=1e-5, atol=0)


def test_pairs_and_biases(views, arrays, facts):
    """All of the reference's pairs but those with a special token, which it takes for text; and all of its biases."""
    expected = dict(
        zip(
            keys_of((arrays["pair_teacher_id"], arrays["pair_student_id"])),
            zip(arrays["bias1"], arrays["bias2"], strict=True),
            strict=True,
        )
    )
    special = [key for key in expected if key[0] in views[0].special_ids or key[1] in views[1].special_ids]
    pairs = suffix_pairs(*views)
    assert keys_of(pairs) == sorted(expected.keys() - special)
    counts = tuple(arrays[f"counts_{side}"] for side in SIDES)
    found = np.transpose(biases(*views, counts, pairs, facts["additive_smoothing_constant"]))
    np.testing.assert_allclose(found, [expected[key] for key in keys_of(pairs)], rtol=1e-5, atol=0)
    for side, view, ids in zip(SIDES, views, pairs, strict=True):
        blank = arrays[f"is_space_only_{side}"][ids]
        assert (found[blank] == 1).all(), view.name


def test_cover_dictionaries(views, facts):
    compared = 0
    for pair, covers in facts["cover_dict_examples"].items():
        for side, view, token in zip(SIDES, views, pair.split("\t"), strict=True):
            identity = facts[f"tokens_{side}"].index(token)
            if identity in view.special_ids:
                continue
            (found,) = dictionaries(CoverFinder(view), [view.token_bytes[identity]])
            expected = covers[f"cover_dict_{side}"]
            assert {byte_level(key): sequence[-1] for key, sequence in expected.items()} == found
            compared += 1
    assert compared


@pytest.fixture
def real(names, request):
    folders = [tokenizers_folder(request.config) / name for name in names]
    if not all(folder.is_dir() for folder in folders):
        pytest.skip(f"no tokenizers {' and '.join(names)} in {folders[0].parent}")
    return [ByteView.load(folder) for folder in folders]


def with_ending(tokens, ending):
    """How many of tokens, reversed and sorted, end in `ending`."""
    begin = bisect_left(tokens, ending[::-1])
    return bisect_left(tokens, ending[::-1] + b"\xff" * 512) - begin


def test_real(real):
    """As many pairs as there are by sorting all tokens from their ends; a sample's biases are the definition's."""
    pairs = suffix_pairs(*real)
    tokens = [[token for token in view.token_bytes if token] for view in real]
    ordered = [sorted(token[::-1] for token in side) for side in tokens]
    expected = sum(with_ending(ordered[1], token) for token in tokens[0])
    expected += sum(with_ending(ordered[0], token) for token in tokens[1])
    counts = [Counter(side) for side in tokens]
    expected -= sum(count * counts[1][token] for token, count in counts[0].items())  # equal ones count in both
    assert len(pairs.teacher_id) == expected

    chosen = np.random.default_rng(5).choice(expected, min(SAMPLE, expected), replace=False)
    sample = TokenPairs(*(ids[chosen] for ids in pairs))
    for t, s in keys_of(sample):
        left, right = real[0].token_bytes[t], real[1].token_bytes[s]
        assert left.endswith(right) or right.endswith(left)
    counts = tuple(some_counts(view, seed) for seed, view in enumerate(real))
    probabilities = [unigram(count, SMOOTHING) for count in counts]
    definitions = [Definition(view) for view in real]
    expected = [defined_bias(*definitions, probabilities, pair) for pair in keys_of(sample)]
    found = np.transpose(biases(*real, counts, sample, SMOOTHING))
    np.testing.assert_allclose(found, expected, rtol=1e-9, atol=1e-14)
