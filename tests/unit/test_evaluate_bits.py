"""Bits per byte: equal to a plain forward pass, independent of batches, every byte once, errors over documents."""

import json

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch
from tokenizers import pre_tokenizers
from transformers import AutoModelForCausalLM

from stages import evaluate
from stages.core.errors import UserError
from stages.evaluation import bits_per_byte, scoring
from stages.models.description import describe
from stages.tokenization import ByteView
from stages.tokenization.batches import length_batches
from tests.unit import tiny
from tests.unit import tokenizers_zoo as zoo


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    root = tmp_path_factory.mktemp("bits") / "results"
    tiny.tokenizer_artifact(root, "t", 300)
    tiny.corpus_artifact(root, "docs", documents=3)
    tiny.llama(root.parent / "llama", 300)
    tiny.llama(root.parent / "gemma2", 310, kind="gemma2", tied=True)
    return root


def evaluated(root, name, corpus="docs", tokenizer="t", **suite):
    spec = {
        "model": {"name": name, "path": str(root.parent / name), "dtype": "auto"},
        "suite": {"kind": "bits_per_byte", "limit": None} | suite,
        "seed": 0,
        "inputs": {
            "tokenizer": tiny.entry(f"tokenizers/{tokenizer}/manifest.json"),
            "corpus": tiny.entry(f"corpora/{corpus}/manifest.json"),
        },
    }
    evaluate.main(tiny.argv(root, f"evaluations/{name}/bpb/manifest.json", spec))
    folder = root / f"evaluations/{name}/bpb"
    return json.loads((folder / "results.json").read_text()), pq.read_table(folder / "samples.parquet").to_pylist()


@pytest.mark.parametrize("name", ["llama", "gemma2"])
def test_equals_a_plain_forward_pass(root, name):
    results, samples = evaluated(root, name)
    model = AutoModelForCausalLM.from_pretrained(root.parent / name).eval()
    view = ByteView.load(root / "tokenizers/t")
    for row, sample in zip(pq.read_table(root / "corpora/docs/heldout.parquet").to_pylist(), samples, strict=True):
        text = row["slots"][0]["text"]
        ids = [view.start_id, *view.encode_texts([text])[0].ids.tolist()]
        with torch.no_grad():
            log_p = model(torch.tensor([ids])).logits[0, :-1, : view.vocab_size].double().log_softmax(-1)
        bits = -log_p[torch.arange(len(ids) - 1), torch.tensor(ids[1:])].sum().item() / np.log(2)
        assert sample["example_id"] == row["example_id"]
        assert sample["bits"] == pytest.approx(bits, rel=1e-5)
        assert sample["bytes"] == len(text.encode()) and sample["tokens"] == len(ids) - 1
    (row,) = results["results"]
    total = sum(sample["bits"] for sample in samples) / sum(sample["bytes"] for sample in samples)
    assert row["value"] == pytest.approx(total, rel=1e-9) and row["n"] == 3 and row["task"] == "docs"
    assert row["stderr"] > 0 and not row["higher_is_better"] and results["inexact_examples"] == 0
    total = results["model"]["parameters"]
    assert total == sum(p.numel() for p in model.parameters()) > results["model"]["non_embedding_parameters"]
    assert (
        results["forward_flops_per_byte"]
        > 2 * results["model"]["non_embedding_parameters"] * results["tokens_per_byte"]
    )


def test_limit(root):
    assert len(evaluated(root, "llama", limit=2)[1]) == 2


def test_batches_do_not_change_the_bits(root):
    model = AutoModelForCausalLM.from_pretrained(root.parent / "llama").eval()
    random = np.random.default_rng(0)
    lengths = random.integers(2, 40, 12)
    offsets = np.concatenate(([0], np.cumsum(lengths)))
    ids = random.integers(0, 300, offsets[-1]).astype(np.int32)
    scored = np.ones(len(ids), bool)
    scored[offsets[:-1]] = False
    scored[5] = False
    described = describe(model, "tiny", 300, "t")
    one = scoring.token_bits(described, ids, offsets, scored, batch_tokens=1)
    all_ = scoring.token_bits(described, ids, offsets, scored, batch_tokens=10000)
    np.testing.assert_allclose(one, all_, rtol=1e-5, atol=1e-6)
    assert one[5] == 0 and (one[offsets[:-1]] == 0).all() and (one[scored] > 0).all()


def test_length_batches_hold_every_row_once():
    lengths = np.random.default_rng(1).integers(1, 50, 100)
    batches = list(length_batches(lengths, 120))
    assert sorted(np.concatenate(batches).tolist()) == list(range(100))
    assert all(len(rows) * lengths[rows].max() <= 120 for rows in batches)


def test_error_is_over_documents():
    values, sizes = np.array([10.0, 12.0, 30.0, 8.0]), np.array([10, 10, 20, 10])
    ratio, error, count = bits_per_byte.ratio_with_error(values, sizes, ["a", "a", "b", "c"])
    assert ratio == pytest.approx(60 / 50) and count == 3
    residuals = np.array([22 - 24, 30 - 24, 8 - 12])
    assert error == pytest.approx(np.sqrt(3 / 2 * (residuals**2).sum()) / 50)
    assert bits_per_byte.ratio_with_error(values[:2], sizes[:2], ["a", "a"])[1] == 0


def test_too_long_an_example_is_one_sentence(root):
    tiny.corpus_artifact(root, "long", documents=1, examples=1, words=900)
    with pytest.raises(UserError, match=r"tokens but model 'llama' takes at most 512: cut the corpus shorter"):
        evaluated(root, "llama", corpus="long")


def test_text_that_the_tokenizer_cannot_write_is_one_sentence(root):
    folder = zoo.save(zoo.word_piece(pre_tokenizers.Metaspace()), unk_token="[UNK]", eos_token="[SEP]")
    tiny.publish(root / "tokenizers/wordpiece/manifest.json", "tokenizer", {p.name: p for p in folder.iterdir()})
    with pytest.raises(UserError, match="does not reproduce the text of 5 of 6 examples"):
        evaluated(root, "llama", tokenizer="wordpiece")


def test_mean_context():
    assert bits_per_byte.mean_context(np.array([3])) == 2
