"""MinED distances against tokenkit's `compute_mined_mapping`, for every mined_*.json of the golden folder.

The reference compares special tokens as ordinary strings, so they are among the choices here; ties are the reference's
list order there, so a choice is right when it is one of the candidates. Its strings are byte-level ones: a special with
other characters has no bytes by them, and is left out.
"""

import json

from rapidfuzz.distance import Levenshtein

from stages.alignment.mapping import nearest_tokens
from stages.tokenization.byte_functions import byte_alphabet, byte_level
from tests.conftest import golden_folder
from tests.golden.compare import model_kinds
from tests.golden.test_alignment import view_of_kind


def pytest_generate_tests(metafunc):
    files = sorted(golden_folder(metafunc.config).glob("mined_*.json"))
    metafunc.parametrize("mined", files, ids=[file.stem for file in files])


def test_distances_and_candidates(mined, golden, tokenizers_dir):
    data = json.loads(mined.read_text(encoding="utf-8"))
    name = data["original_vocab"]
    view = view_of_kind(tokenizers_dir / name, model_kinds(golden).get(name))
    choices = view.id_of_bytes | {view.string_of(i).encode(): i for i in view.special_ids}
    strings = {identity: token for token, identity in choices.items()}
    alphabet = set(byte_alphabet())
    rows = [row for row in data["rows"] if set(row[0]) <= alphabet]
    assert rows
    found = nearest_tokens([byte_level(row[0]) for row in rows], choices)
    for (token, distance, _, candidates, _), (identity, nearest) in zip(rows, found, strict=True):
        assert nearest == distance == Levenshtein.distance(byte_level(token), strings[identity]), token
        assert candidates is None or strings[identity] in {byte_level(c) for c in candidates}, token
