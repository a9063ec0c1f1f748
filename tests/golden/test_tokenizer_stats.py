"""Token counts and boundary masks against tokenkit's `compute_tokenizer_info` and `get_space_mask`."""

import json

import numpy as np
import pytest

from stages.alignment.statistics import SIDES, PairStatistics
from stages.tokenization import ByteView
from stages.tokenization.sources import prepare
from stages.tokenization.spec import TokenizerSpec
from tests.conftest import golden_file


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
    for start in range(0, len(documents), 7):
        batch = documents[start : start + 7]
        slots = [[{"role": "text", "text": text, "loss": True}] for text in batch]
        statistics.add(slots, statistics.encode(slots), [True] * len(slots))
    for side in SIDES:
        assert (statistics.counts[side] == arrays[f"counts_{side}"]).all()
        assert statistics.counts[side].sum() > 0


# The reference has tab and newline swapped: its mode `tab` marks tokens that start with the newline byte and `newline`
# those that start with the tab byte (golden README, section 5). Our masks say what their names say.
@pytest.mark.parametrize(
    ("mode", "golden_name"),
    [
        ("space", "space"),
        ("space+tab+newline+special", "space_tab_newline_special"),
        ("newline", "tab"),
        ("tab", "newline"),
    ],
)
@pytest.mark.parametrize("side", SIDES)
def test_boundary_masks(views, arrays, side, mode, golden_name):
    assert (views[side].boundary_mask(mode) == arrays[f"space_mask_{golden_name}_{side}"]).all()
