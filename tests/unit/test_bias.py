"""Cover dictionaries, tokenization bias and suffix pairs against their definitions."""

import json
from bisect import bisect_left, bisect_right
from functools import cache
from pathlib import Path
from tempfile import TemporaryDirectory, mkdtemp

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer, decoders, models, pre_tokenizers

from stages.alignment import BiasTable, align
from stages.alignment.bias import ChunkEnds, TokenPairs, biases, probability_mass, suffix_pairs
from stages.alignment.covers import CoverFinder
from stages.tokenization import ByteView
from stages.tokenization.byte_functions import byte_alphabet
from stages.tokenization.sources import write
from stages.tokenization.training import train_tokenizer
from tests.unit import tokenizers_zoo as zoo

EXPLAINED = ["qwen", "prefixed", "legacy", "gemma", "sentencepiece"]
ASKED = ["unigram", "wordpiece"]
ALPHABET = byte_alphabet()


@cache
def view(name):
    if name != "sentencepiece":
        return zoo.views()[name]
    folder = Path(mkdtemp())
    write(train_tokenizer({"kind": "sentencepiece_bpe", "vocab_size": 600}, lambda: iter(zoo.TEXT), name), folder)
    return ByteView.load(folder)


def dictionaries(finder, strings):
    """Return the cover dictionaries that `finder` finds, as dictionaries."""
    covers = finder.find(strings)
    inside = np.repeat(covers.inside, np.diff(covers.group_offsets))
    found = []
    for number in range(len(strings)):
        entries = covers.entries(np.array([number]))
        pairs = zip(covers.token[entries].tolist(), inside[entries].tolist(), strict=True)
        found.append({finder._view.token_bytes[token][cut:]: token for token, cut in pairs})
        assert len(found[-1]) == len(entries) == covers.sizes()[number]
    return found


class Definition:
    """Cover dictionaries and biases word by word as they are defined, one string at a time."""

    def __init__(self, view):
        self.view = view
        self.bare = Tokenizer(Tokenizer.from_file(str(view.folder / "tokenizer.json")).model)
        in_model = set(self.bare.get_vocab(with_added_tokens=False).values())
        self.tokens = sorted((token, i) for i, token in enumerate(view.token_bytes) if token and i in in_model)
        self.spelled = [token for token, _ in self.tokens]

    def encode(self, strings):
        """The ids of byte strings, each as one pretoken; None where it is no text."""
        texts = [text_of(string, self.view.settings) for string in strings]
        encoded = iter(self.bare.encode_batch_fast([t for t in texts if t is not None], add_special_tokens=False))
        return [None if text is None else next(encoded).ids for text in texts]

    def covers(self, string):
        found = {}
        for cut in range(len(string) - 1, -1, -1):
            (head,) = self.encode([string[:cut]])
            if head is None:
                continue
            low, high = bisect_left(self.spelled, string[cut:]), bisect_right(self.spelled, string[cut:] + b"\xff")
            wholes = [string[:cut] + token for token in self.spelled[low:high]]
            for whole, ids, (_, identity) in zip(wholes, self.encode(wholes), self.tokens[low:high], strict=True):
                if len(whole) > len(string) and ids == [*head, identity]:
                    found[whole[len(string) :]] = identity
        return found


def text_of(string, settings):
    """Bytes as a tokenizer's vocabulary spells them, None where they are no text."""
    try:
        text = string.decode()
    except UnicodeDecodeError:
        return None
    if settings["byte_function"] == "byte_level":
        return "".join(ALPHABET[byte] for byte in string)
    return text.replace(" ", settings["mark"])


def defined_bias(teacher, student, probabilities, pair):
    """Return (bias1, bias2) of one pair by the definition."""
    strings = [side.view.token_bytes[i] for side, i in zip((teacher, student), pair, strict=True)]
    if any(not string.decode(errors="replace").strip() for string in strings):
        return 1.0, 1.0
    found = [side.covers(string) for side, string in zip((teacher, student), strings, strict=True)]
    return tuple(
        sum(p[own[key]] for key in own.keys() - other.keys())
        for p, own, other in zip(probabilities, found, found[::-1], strict=True)
    )


def some_counts(view, seed=0):
    return np.random.default_rng(seed).integers(0, 50, view.vocab_size)


def unigram(counts, smoothing=1e-9):
    smoothed = counts + smoothing * counts.sum()
    return smoothed / smoothed.sum()


@pytest.mark.parametrize("name", EXPLAINED)
def test_merges_decide_what_the_model_would(name):
    """The same cover dictionaries from the merges alone and from the model itself, for every token."""
    finder, asking = CoverFinder(view(name)), CoverFinder(view(name))
    assert finder.adjacency is not None
    asking.adjacency = None
    strings = sorted({token for token in view(name).token_bytes if token})
    found = dictionaries(finder, strings)
    assert found == dictionaries(asking, strings)
    assert sum(map(len, found)) > 500


@pytest.mark.parametrize("name", [*EXPLAINED, *ASKED])
def test_cover_dictionaries_are_as_defined(name):
    definition, finder = Definition(view(name)), CoverFinder(view(name))
    assert (finder.adjacency is not None) == (name in EXPLAINED)
    tokens = sorted({token for token in view(name).token_bytes if token})
    strings = [*tokens[::7], b"the", " naïve".encode(), "北".encode(), "北".encode()[:2], b"\x97", b"e  ", b"zq"]
    assert dictionaries(finder, strings) == [definition.covers(string) for string in strings]


@st.composite
def merges(draw):
    """Merges over few characters as training makes them; with or without the other splits of each token beside them."""
    symbols, made = list("abcĠ"), []
    for _ in range(draw(st.integers(1, 14))):
        left, right = draw(st.sampled_from(symbols)), draw(st.sampled_from(symbols))
        if left + right not in symbols and len(left + right) <= 6:
            symbols.append(left + right)
            made.append((left, right))
    if not draw(st.booleans()):
        return made
    splits = [[(whole[:cut], whole[cut:]) for cut in range(1, len(whole))] for whole in map("".join, made)]
    return [pair for pairs in splits for pair in pairs if set(pair) <= set(symbols)]


def tokenizer_of(merges, folder):
    vocabulary = dict.fromkeys([*ALPHABET, *map("".join, merges)])
    model = models.BPE(vocab={token: i for i, token in enumerate(vocabulary)}, merges=merges)
    tokenizer = Tokenizer(model)
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.decoder = decoders.ByteLevel()
    return ByteView.load(zoo.save(tokenizer, folder))


@settings(max_examples=100, deadline=None)
@given(merges(), merges(), st.integers(0, 9))
def test_random_models(first, second, seed):
    """Random merges, explained or not: dictionaries, pairs and biases are as defined."""
    with TemporaryDirectory() as one, TemporaryDirectory() as other:
        views = [tokenizer_of(first, Path(one)), tokenizer_of(second, Path(other))]
        definitions = [Definition(view) for view in views]
        finder = CoverFinder(views[0])
        # Where several merges make a token, it may need parts of a later rank: then the model is asked.
        assert finder.adjacency is not None or len(set(map("".join, first))) < len(first)
        strings = [token for token in views[0].token_bytes[-16:] if token] + [b"aab", b"abcabc", b"aaaa", b"c a"]
        assert dictionaries(finder, strings) == [definitions[0].covers(string) for string in strings]
        keys = [pair for pair in zip(*suffix_pairs(*views), strict=True) if max(pair) >= 256]
        pairs = TokenPairs(*np.array(keys, np.int64).reshape(-1, 2).T)
        counts = tuple(some_counts(view, seed) for view in views)
        probabilities = [unigram(count) for count in counts]
        expected = [defined_bias(*definitions, probabilities, pair) for pair in keys]
        found = np.transpose(biases(*views, counts, pairs))
        np.testing.assert_allclose(found, np.reshape(expected, (-1, 2)), rtol=1e-9, atol=1e-14)


def test_whole_words_are_looked_up_first(tmp_path):
    """With `ignore_merges` (Llama 3), a pretoken that is a token needs no merges: the model has to be asked."""
    path = zoo.save(zoo.byte_level(("<|endoftext|>",), size=300), tmp_path) / "tokenizer.json"
    tokenizer = json.loads(path.read_text())
    tokenizer["model"]["ignore_merges"] = True
    for word in ("thew", "Ġtheory", "hex", "he"):
        tokenizer["model"]["vocab"].setdefault(word, len(tokenizer["model"]["vocab"]))
    path.write_text(json.dumps(tokenizer))
    finder, definition = CoverFinder(ByteView.load(tmp_path)), Definition(ByteView.load(tmp_path))
    assert finder.adjacency is None
    strings = [b"th", b" the", b"the", b"he", b"h", b"thew", b"a the"]
    found = dictionaries(finder, strings)
    assert found == [definition.covers(string) for string in strings]
    assert b"ory" in found[1] and b"w" in found[2]


@pytest.mark.parametrize("names", [("qwen", "gpt2"), ("legacy", "qwen"), ("unigram", "gpt2")])
def test_biases_are_as_defined(names):
    views = [view(name) for name in names]
    definitions, counts = [Definition(v) for v in views], tuple(some_counts(v, k) for k, v in enumerate(views))
    pairs = TokenPairs(*(ids[::11] for ids in suffix_pairs(*views)))
    probabilities = [unigram(count) for count in counts]
    expected = [defined_bias(*definitions, probabilities, pair) for pair in zip(*pairs, strict=True)]
    found = np.transpose(biases(*views, counts, pairs))
    np.testing.assert_allclose(found, expected, rtol=1e-9, atol=1e-14)
    assert (found == 0).any() and ((found > 0) & (found < 1)).any()


@pytest.mark.parametrize("name", ["qwen", "legacy", "unigram"])
def test_a_tokenizer_has_no_bias_against_itself(name):
    one = view(name)
    ids = np.array([i for i, token in enumerate(one.token_bytes) if token])
    bias1, bias2 = biases(one, one, (some_counts(one), some_counts(one)), TokenPairs(ids, ids))
    blank = np.array([not one.token_bytes[i].decode(errors="replace").strip() for i in ids])
    assert (bias1 == blank).all() and (bias2 == blank).all() and blank.any()


@pytest.mark.parametrize("names", [("qwen", "gpt2"), ("legacy", "gemma"), ("unigram", "qwen")])
def test_suffix_pairs(names):
    teacher, student = (view(name) for name in names)
    expected = [
        (t, s)
        for t, left in enumerate(teacher.token_bytes)
        for s, right in enumerate(student.token_bytes)
        if left and right and (left.endswith(right) or right.endswith(left))
    ]
    assert list(zip(*(ids.tolist() for ids in suffix_pairs(teacher, student)), strict=True)) == expected


def test_mass():
    counts = np.array([3, 0, 1, 0])
    mass = probability_mass(counts, np.ones(4, np.int64), counts)
    np.testing.assert_allclose(mass, unigram(counts), rtol=1e-12)
    assert mass.sum() == pytest.approx(1, rel=1e-12) and mass[1] > 0
    np.testing.assert_allclose(probability_mass(np.zeros(1), np.array([2]), np.zeros(4, np.int64)), [0.5])


@pytest.mark.parametrize("smoothing", [0.0, 1e-9, 0.02, 3.0])
def test_smoothing(smoothing):
    """The constant of tokenkit's `additive_smoothing_constant`: a share of all occurrences, added to each token's."""
    counts = np.array([3, 0, 1, 0])
    found = probability_mass(counts, np.ones(4, np.int64), counts, smoothing)
    np.testing.assert_allclose(found, unigram(counts, smoothing), rtol=1e-12)
    np.testing.assert_allclose(found, (counts / 4 + smoothing) / (1 + 4 * smoothing), rtol=1e-12)


@pytest.mark.parametrize("names", [("qwen", "gpt2"), ("legacy", "qwen"), ("unigram", "legacy"), ("qwen", "wordpiece")])
def test_chunk_ends_are_what_alignment_asks_for(names):
    """All pairs and those at chunk ends give one alignment, and no fewer pairs would."""
    teacher, student = (view(name) for name in names)
    examples = [zoo.plain(text) for text in [*zoo.TEXT[:4], "naïve 北京, the\n\nrest  of it"]]
    examples.append(zoo.chat(("user", "the other's steps"), ("assistant", "Hello there")))
    ends = ChunkEnds(teacher, student)
    for start in range(0, len(examples), 2):
        ends.add(examples[start : start + 2])
    every, found = suffix_pairs(teacher, student), ends.pairs()
    keys = [set(zip(*(ids.tolist() for ids in pairs), strict=True)) for pairs in (every, found)]
    assert keys[1] and keys[1] < keys[0]
    batches = [side.encode_examples(examples) for side in (teacher, student)]
    kept = batches[0].exact & batches[1].exact
    assert kept.any()
    rest = [example for example, exact in zip(examples, kept, strict=True) if exact]
    batches = [side.encode_examples(rest) for side in (teacher, student)]
    bans = [BiasTable.over(*pairs, np.ones(len(pairs[0])), np.ones(len(pairs[0])), 0.5) for pairs in (every, found)]
    for left, right in zip(*(align(*batches, "unbiased", ban) for ban in bans), strict=True):
        assert (left == right).all()
    free = align(*batches, "unbiased", BiasTable.over(*found, *[np.zeros(len(found[0]))] * 2, 0.5))[2]
    assert (align(*batches, "unbiased", bans[1])[2] < free).any()
