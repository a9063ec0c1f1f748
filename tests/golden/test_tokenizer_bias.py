"""Tokenization bias against tokenkit's `compute_tokenizer_info`, and real tokenizers against the definition."""

import json

import numpy as np
import pytest

from stages.alignment.bias import TokenPairs, biases, suffix_pairs
from stages.alignment.covers import CoverFinder
from stages.alignment.statistics import SIDES
from stages.tokenization import ByteView
from stages.tokenization.byte_functions import byte_level
from stages.tokenization.sources import prepare
from stages.tokenization.spec import TokenizerSpec
from tests.conftest import golden_file
from tests.unit.test_bias import Definition, defined_bias, dictionaries, some_counts, unigram


@pytest.fixture(scope="module")
def views(golden):
    folders = [golden_file(golden, f"small_tokenizers/{side}") for side in SIDES]
    return [ByteView.of(prepare(folder, TokenizerSpec(folder.name, source="GPT2")), folder) for folder in folders]


@pytest.fixture(scope="module")
def arrays(golden):
    return np.load(golden_file(golden, "tokenizer_stats.npz"))


def keys_of(pairs):
    return list(zip(*(ids.tolist() for ids in pairs), strict=True))


def test_pairs_and_biases(views, arrays):
    """All of the reference's pairs but those with a special token, which it takes for text; and all of its biases."""
    expected = dict(
        zip(
            keys_of((arrays["pair_teacher_id"], arrays["pair_student_id"])),
            zip(arrays["bias1"], arrays["bias2"], strict=True),
            strict=True,
        )
    )
    special = [key for key in expected if key[0] in views[0].special_ids or key[1] in views[1].special_ids]
    assert len(special) == 3  # "<|endoftext|>" with itself, and with ">" on either side
    pairs = suffix_pairs(*views)
    assert keys_of(pairs) == sorted(expected.keys() - special)
    counts = tuple(arrays[f"counts_{side}"] for side in SIDES)
    found = np.transpose(biases(*views, counts, pairs))
    np.testing.assert_allclose(found, [expected[key] for key in keys_of(pairs)], rtol=1e-5, atol=0)


def test_cover_dictionaries(golden, views):
    facts = json.loads(golden_file(golden, "tokenizer_stats.json").read_text(encoding="utf-8"))
    assert facts["cover_dict_examples"]
    for pair, covers in facts["cover_dict_examples"].items():
        for side, view, token in zip(SIDES, views, pair.split("\t"), strict=True):
            spelled = facts[f"tokens_{side}"]
            ids = {name: i for i, name in enumerate(spelled)}
            (found,) = dictionaries(CoverFinder(view), [view.token_bytes[ids[token]]])
            expected = covers[f"cover_dict_{side}"]
            assert {byte_level(key): sequence[-1] for key, sequence in expected.items()} == found


@pytest.fixture(scope="module")
def real(tokenizers_dir):
    def open_view(name):
        if not (tokenizers_dir / name).is_dir():
            pytest.skip(f"no tokenizer {name} in {tokenizers_dir}")
        return ByteView.load(tokenizers_dir / name)

    return {name: open_view(name) for name in ("qwen1.5", "gpt2", "llama2")}


def test_real_suffix_pairs(real):
    """The reference has 615,362 pairs of qwen1.5 and gpt2: five have a special token spelled as text."""
    teacher, student = real["qwen1.5"], real["gpt2"]
    pairs = suffix_pairs(teacher, student)
    assert len(pairs.teacher_id) == 615_357
    specials = [[view.string_of(i).encode() for i in sorted(view.special_ids)] for view in (teacher, student)]
    left_out = [(t, s) for t in specials[0] for s in [*student.token_bytes, *specials[1]] if s and ends_alike(t, s)]
    left_out += [(t, s) for t in teacher.token_bytes for s in specials[1] if t and ends_alike(t, s)]
    assert len(left_out) == 5, left_out


def ends_alike(one, other):
    return one.endswith(other) or other.endswith(one)


@pytest.mark.parametrize("name", ["gpt2", "llama2"])
def test_real_merges_explain_the_model(real, name):
    assert CoverFinder(real[name]).adjacency is not None


@pytest.mark.parametrize("names", [("qwen1.5", "gpt2"), ("llama2", "gpt2")])
def test_real_biases(real, names):
    """A sample of pairs, common and rare ones, against the definition."""
    views = [real[name] for name in names]
    pairs = suffix_pairs(*views)
    chosen = np.random.default_rng(5).choice(len(pairs.teacher_id), 24, replace=False)
    sample = TokenPairs(*(ids[chosen] for ids in pairs))
    counts = tuple(some_counts(view, seed) for seed, view in enumerate(views))
    definitions = [Definition(view) for view in views]
    probabilities = [unigram(count) for count in counts]
    expected = [defined_bias(*definitions, probabilities, pair) for pair in keys_of(sample)]
    found = np.transpose(biases(*views, counts, sample))
    np.testing.assert_allclose(found, expected, rtol=1e-9, atol=1e-14)
    assert ((found > 0) & (found < 1)).any()
