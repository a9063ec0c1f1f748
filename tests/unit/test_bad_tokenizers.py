"""Tokenizer folders that are wrong or odd: one sentence, or an exact behaviour that is written down here."""

import json

import numpy as np
import pytest
from tokenizers import AddedToken, Tokenizer, normalizers

from stages import tokenizer
from stages.alignment.statistics import PairStatistics
from stages.artifacts.schemas import TOKENS
from stages.artifacts.tables import read_table
from stages.core.errors import UserError
from stages.models.description import usable
from stages.tokenization import ByteView
from tests.unit import tiny
from tests.unit import tokenizers_zoo as zoo

SPECIALS = ("<|endoftext|>", "<|im_start|>", "<|im_end|>")


def folder_of(path, change=lambda definition: None, **config):
    """A byte-level BPE tokenizer of 400 tokens whose tokenizer.json was edited."""
    definition = json.loads(zoo.byte_level(SPECIALS).to_str())
    change(definition)
    path.mkdir(exist_ok=True)
    (path / "tokenizer.json").write_text(json.dumps(definition))
    (path / "tokenizer_config.json").write_text(json.dumps({"eos_token": SPECIALS[0]} | config))
    return path


def run(root, source):
    """Run the tokenizer program on a folder; nothing may be published when it refuses."""
    spec = {"tokenizer": str(source), "revision": None, "digest": None, "inputs": {}}
    try:
        tokenizer.main(tiny.argv(root, "tokenizers/t/manifest.json", spec))
    except UserError as error:
        assert not (root / "tokenizers/t/manifest.json").exists()
        assert "\n" not in str(error) and str(error).endswith(".")
        raise
    return root / "tokenizers/t"


def holes_from_350(definition):
    """Ids 350 to 369 are nobody's."""
    vocabulary = definition["model"]["vocab"]
    definition["model"]["vocab"] = {token: i if i < 350 else i + 20 for token, i in vocabulary.items()}


def added(identity, content="<|new|>", special=True):
    flags = dict.fromkeys(("single_word", "lstrip", "rstrip", "normalized"), False)
    return {"id": identity, "content": content, **flags, "special": special}


def test_missing_folder(tmp_path):
    with pytest.raises(UserError, match=r"Tokenizer \S+/nowhere is neither a folder nor a Hub id"):
        run(tmp_path / "results", tmp_path / "nowhere")
    with pytest.raises(UserError, match=r"has no tokenizer\.json"):
        ByteView.load(tmp_path / "nowhere")


@pytest.mark.parametrize("files", [("vocab.json", "merges.txt"), ("tokenizer.model", "tokenizer_config.json"), ()])
def test_folder_of_a_slow_tokenizer(tmp_path, files):
    for name in files:
        (tmp_path / name).write_text("{}")
    with pytest.raises(UserError, match=r"has no tokenizer\.json; save it as a fast tokenizer"):
        run(tmp_path / "results", tmp_path)


@pytest.mark.parametrize(
    ("content", "sentence"),
    [
        (b"", "cannot be read as JSON"),
        (b'{"model": {"type": "BPE", "voc', "cannot be read as JSON"),
        (b"\xff\xfe\x00", "cannot be read as JSON"),
        (b"[1, 2]", "holds a list, expected a JSON object"),
        (b'{"version": "1.0"}', "has no model"),
        (b'{"model": {"type": "BPE"}}', "not as transformers writes them"),
        (b'{"model": {"type": "BPE", "vocab": {"a": -1}, "merges": []}}', "tokenizers library cannot read"),
        (b'{"model": {"type": "BPE", "vocab": {"a": 0}, "merges": [["a", "b"]]}}', "tokenizers library cannot read"),
    ],
)
def test_damaged_tokenizer(tmp_path, content, sentence):
    folder = folder_of(tmp_path / "source")
    (folder / "tokenizer.json").write_bytes(content)
    with pytest.raises(UserError, match=sentence):
        run(tmp_path / "results", folder)


def test_holes_have_no_bytes_and_are_never_used(tmp_path):
    view = ByteView.load(run(tmp_path / "results", folder_of(tmp_path / "source", holes_from_350)))
    holes = range(350, 370)
    assert view.vocab_size == 420 and not view.special_ids & set(holes)
    assert {view.token_bytes[i] for i in holes} == {None} and not view.lengths[holes].any()
    rows = read_table(tmp_path / "results/tokenizers/t/tokens.parquet", TOKENS).to_pylist()
    assert [row["id"] for row in rows] == list(range(420)) and all(rows[i]["role"] is None for i in holes)
    whole = ByteView.load(folder_of(tmp_path / "whole"))
    statistics = PairStatistics(whole, view)
    examples = [zoo.plain(text) for text in zoo.TEXT]
    statistics.add(examples, statistics.encode(examples), [True] * len(examples))
    places = np.where(np.arange(400) < 350, np.arange(400), np.arange(400) + 20)
    assert (statistics.counts["student"][places] == statistics.counts["teacher"]).all()
    assert not statistics.counts["student"][holes].any()
    summary = statistics.summary()
    assert summary["overlap"]["share_of_student_vocabulary"] == 1
    assert sum(row["types"] for row in summary["coverage"] if row["side"] == "student") == 400 - len(SPECIALS)


def test_ids_that_the_library_reads_otherwise_are_refused(tmp_path):
    results = tmp_path / "results"
    with pytest.raises(UserError, match=r"reads id 400 for '<\|new\|>' instead of 500"):
        run(results, folder_of(tmp_path / "gap", lambda definition: definition["added_tokens"].append(added(500))))
    # Behind holes the library counts on from the number of tokens, into ids that the model has given away.
    with pytest.raises(UserError, match=r"reads id 400 for '<pad>' instead of 420"):
        run(results, folder_of(tmp_path / "holes", holes_from_350, pad_token="<pad>"))

    def doubled(definition):
        vocabulary = definition["model"]["vocab"]
        vocabulary["Ġthe"] = vocabulary["Ġ"]

    with pytest.raises(UserError, match=r"reads id \d+ for 'Ġthe', which 'Ġ' has"):
        run(results, folder_of(tmp_path / "double", doubled))


def test_added_tokens_beyond_the_embedding(tmp_path):
    def change(definition):
        definition["added_tokens"] += [added(400), added(401, "<x>", special=False)]

    view = ByteView.load(run(tmp_path / "results", folder_of(tmp_path / "source", change)))
    assert view.vocab_size == 402 and view.token_bytes[401] == b"<x>" and 400 in view.special_ids
    assert view.encode_texts(["a<x><|new|>"])[0].ids.tolist().count(401) == 1
    model = tiny.llama(tmp_path / "model", 400)
    with pytest.raises(UserError, match=r"'m' has 400 embedding rows but tokenizer '.*' has 402 ids"):
        usable(view, model, "m")


@pytest.mark.parametrize(
    ("normalizer", "lost"),
    [
        (normalizers.Lowercase(), "'Hello' comes back as 'hello'"),
        (normalizers.Strip(), "' lead' comes back as 'lead'"),
        (normalizers.StripAccents(), "comes back as"),
        (normalizers.Replace("\t", " "), r"'tab\\there' comes back as 'tab here'"),
        (normalizers.Sequence([normalizers.NFKC(), normalizers.Lowercase()]), "'Hello' comes back as 'hello'"),
    ],
)
def test_normalizers_that_change_bytes_are_refused(tmp_path, normalizer, lost):
    def change(definition):
        made = Tokenizer.from_str(json.dumps(definition))
        made.normalizer = normalizer
        definition["normalizer"] = json.loads(made.to_str())["normalizer"]

    with pytest.raises(UserError, match=f"loses text: .*{lost}"):
        run(tmp_path / "results", folder_of(tmp_path / "source", change))


def test_a_normalizer_that_changes_rare_text_is_counted(tmp_path):
    """The probes cannot hold everything: text that does not come back is inexact, and the statistics say how much."""

    def change(definition):
        made = Tokenizer.from_str(json.dumps(definition))
        made.normalizer = normalizers.Replace("``", '"')
        definition["normalizer"] = json.loads(made.to_str())["normalizer"]

    view = ByteView.load(run(tmp_path / "results", folder_of(tmp_path / "source", change)))
    statistics = PairStatistics(zoo.views()["qwen"], view)
    examples = [zoo.plain("so ``it'' is"), zoo.plain("so it is")]
    statistics.add(examples, statistics.encode(examples), [True, True])
    summary = statistics.summary()
    failures = {side: facts["round_trip_failures"] for side, facts in summary["sides"].items()}
    assert failures == {"teacher": 0, "student": 1} and summary["bytes"] == 20


def test_flags_of_added_tokens_that_eat_whitespace_are_dropped(tmp_path):
    made = zoo.byte_level(SPECIALS)
    made.add_tokens([AddedToken("<think>", lstrip=True, rstrip=True)])
    view = ByteView.load(zoo.save(made, tmp_path, eos_token=SPECIALS[0]))
    tokens = view.encode_texts(["a <think> b"])[0]
    assert tokens.exact and view.join(tokens.ids) == b"a <think> b"
