"""Token counts and boundary masks against tokenkit's `compute_tokenizer_info` and `get_space_mask`."""

import json
import re

import numpy as np
import pytest

from stages.alignment.statistics import SIDES, PairStatistics
from stages.tokenization import ByteView
from stages.tokenization.sources import prepare
from stages.tokenization.spec import TokenizerSpec
from tests.conftest import golden_file, golden_folder

BATCH = 7
# The reference has tab and newline swapped: its mode `tab` marks tokens that start with the newline byte and `newline`
# those that start with the tab byte (golden README, section 5). Our masks say what their names say.
SWAPPED = {"tab": "newline", "newline": "tab"}


def pytest_generate_tests(metafunc):
    if "mask" in metafunc.fixturenames:
        path = golden_folder(metafunc.config) / "tokenizer_stats.npz"
        names = np.load(path).files if path.is_file() else []
        metafunc.parametrize("mask", [name for name in names if name.startswith("space_mask_")])


@pytest.fixture(scope="module")
def views(golden):
    folders = [golden_file(golden, f"small_tokenizers/{side}") for side in SIDES]
    return {f.name: ByteView.of(prepare(f, TokenizerSpec(f.name, source="GPT2")), f) for f in folders}


@pytest.fixture(scope="module")
def arrays(golden):
    return np.load(golden_file(golden, "tokenizer_stats.npz"))


def test_counts(golden, views, arrays):
    documents = json.loads(golden_file(golden, "tokenizer_stats.json").read_text(encoding="utf-8"))["corpus_documents"]
    statistics = PairStatistics(views["teacher"], views["student"])
    for start in range(0, len(documents), BATCH):
        batch = documents[start : start + BATCH]
        slots = [[{"role": "text", "text": text, "loss": True}] for text in batch]
        statistics.add(slots, statistics.encode(slots), [True] * len(slots))
    for side in SIDES:
        assert (statistics.counts[side] == arrays[f"counts_{side}"]).all()
        assert statistics.counts[side].sum() > 0


def test_boundary_masks(views, arrays, mask):
    words, side = re.fullmatch(r"space_mask_(\w+)_(teacher|student)", mask).groups()
    mode = "+".join(SWAPPED.get(word, word) for word in words.split("_"))
    assert (views[side].boundary_mask(mode) == arrays[mask]).all()
