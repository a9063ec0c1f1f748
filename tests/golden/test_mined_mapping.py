"""MinED distances against tokenkit's `compute_mined_mapping`, for every mined_*.json of the golden folder.

The reference compares special tokens as ordinary strings, so they are among the choices here; ties are the reference's
list order there, so a choice is right when it is one of the candidates.
"""

import json

from stages.alignment.mapping import nearest_tokens
from stages.tokenization.byte_functions import byte_level
from tests.conftest import golden_folder
from tests.golden.test_alignment import _view

KINDS = {"gpt2": "GPT2", "qwen1.5": "Qwen2", "llama2": "TinyLlama"}


def pytest_generate_tests(metafunc):
    files = sorted(golden_folder(metafunc.config).glob("mined_*.json"))
    metafunc.parametrize("mined", files, ids=[file.stem for file in files])


def test_distances_and_candidates(mined, tokenizers_dir):
    data = json.loads(mined.read_text(encoding="utf-8"))
    name = data["original_vocab"]
    view = _view(tokenizers_dir / name, KINDS.get(name))
    choices = view.id_of_bytes | {view.string_of(i).encode(): i for i in view.special_ids}
    strings = {identity: token for token, identity in choices.items()}
    found = nearest_tokens([byte_level(row[0]) for row in data["rows"]], choices)
    for (token, distance, _, candidates, _), (identity, nearest) in zip(data["rows"], found, strict=True):
        assert nearest == distance, token
        assert candidates is None or strings[identity] in {byte_level(c) for c in candidates}, token
    assert data["rows"]
