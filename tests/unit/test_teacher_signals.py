"""The teacher_signals and teacher_index programs."""

import itertools
import json

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch

from stages import teacher_index, teacher_signals
from stages.artifacts.schemas import EXAMPLES
from stages.core import artifact
from stages.core.errors import UserError
from stages.signals.reader import open_signals
from stages.signals.schema import columns_for
from stages.tokenization import ByteView
from stages.tokenization.batches import encode_rows, refuse_inexact

from . import tiny

MODEL = {"name": "teacher", "path": None, "revision": None, "digest": None, "dtype": "auto"}
NEEDS = {"boundary": True, "eos": True, "top_k": 3}
SPEC = {
    "model": MODEL,
    "needs": NEEDS,
    "space_mask_mode": "space+special",
    "shards": 3,
    "dtype": "float32",
    "batch_tokens": 150,
}


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    root = tmp_path_factory.mktemp("signals") / "results"
    tiny.corpus_artifact(root, "text", documents=7)
    tiny.tokenizer_artifact(root, "big", 300)
    publish_model(root, "teacher", 310)
    return root


def publish_model(root, name, vocab, damage=None):
    folder = root.parent / name
    model = tiny.llama(folder, vocab)
    if damage:
        damage(model)
        model.save_pretrained(folder)
    tiny.publish(root / f"models/{name}/manifest.json", "pretrain", {path.name: path for path in folder.iterdir()})


def inputs(**changes):
    names = {"corpus": "corpora/text", "tokenizer": "tokenizers/big", "model": "models/teacher"} | changes
    return {name: tiny.entry(f"{folder}/manifest.json") for name, folder in names.items()}


def run(root, shard=0, folder="teacher", **changes):
    spec = SPEC | {"shard": shard, "inputs": inputs(**changes.pop("inputs", {}))} | changes
    teacher_signals.main(tiny.argv(root, f"teachers/{folder}/part-{shard:04d}.manifest.json", spec))


def join(root, shards, folder="teacher"):
    entries = [tiny.entry(f"teachers/{folder}/part-{shard:04d}.manifest.json") for shard in shards]
    teacher_index.main(tiny.argv(root, f"teachers/{folder}/manifest.json", {"inputs": {"shards": entries}}))
    return json.loads((root / f"teachers/{folder}/shards.json").read_text())


def test_row_i_predicts_token_i_plus_1(root):
    """A teacher that knows which token follows which, and nothing else, names the next token in each row."""
    text = "abcdefghijklmnopqrstuvwxyz 0123456789"
    slot = {"role": "text", "text": text, "loss": True}
    row = {"example_id": "0", "document_id": "0", "slots": [slot], "bytes": len(text)}
    table = pa.Table.from_pylist([row | {"starts_document": True, "ends_document": True}], schema=EXAMPLES)
    sink = pa.BufferOutputStream()
    pq.write_table(table, sink)
    tiny.publish(root / "corpora/once/manifest.json", "corpus", {"train.parquet": sink.getvalue().to_pybytes()})
    ids = torch.tensor(encode_rows(ByteView.load(root / "tokenizers/big"), table).ids.astype(np.int64))
    assert len(ids) > 20 and len(ids.unique()) == len(ids)

    def plant(model):
        with torch.no_grad():
            for layer in model.model.layers:
                layer.self_attn.o_proj.weight.zero_()
                layer.mlp.down_proj.weight.zero_()
            states = torch.nn.functional.normalize(model.model.embed_tokens.weight, dim=-1)
            model.lm_head.weight.zero_()
            model.lm_head.weight[ids[1:]] = 20 * states[ids[:-1]]

    publish_model(root, "bigram", 310, plant)
    run(root, folder="bigram", shards=1, inputs={"corpus": "corpora/once", "model": "models/bigram"})
    found = open_signals([root / "teachers/bigram/part-0000.parquet"], columns_for(NEEDS)).rows(0)
    assert found["topk_ids"][:-1, 0].tolist() == found["input_ids"][1:].tolist() == ids[1:].tolist()
    assert (found["observed_logprob"][:-1] > -0.01).all() and (found["topk_ids"][1:, 0] != ids[1:].numpy()).all()


def test_signals_are_the_models_predictions(root):
    from transformers import AutoModelForCausalLM

    for shard in range(3):
        run(root, shard)
    index = join(root, [2, 0, 1])
    assert [part["rows"] for part in index["parts"]] == [4, 5, 5] and index["needs"] == NEEDS
    paths = [root / "teachers/teacher" / part["file"] for part in index["parts"]]
    signals = open_signals(paths, columns_for(NEEDS))
    corpus = pq.read_table(root / "corpora/text/train.parquet").to_pylist()
    assert signals.example_ids == [row["example_id"] for row in corpus]
    view = ByteView.load(root / "tokenizers/big")
    mask = torch.tensor(view.boundary_mask("space+special"))
    model = AutoModelForCausalLM.from_pretrained(root / "models/teacher").eval()
    for number, row in enumerate(corpus):
        ids = view.encode_examples([row["slots"]], [row["ends_document"]]).ids
        got = signals.rows(number)
        assert np.array_equal(got["input_ids"], ids) and got["exact"]
        with torch.no_grad():
            logprobs = torch.log_softmax(
                model(input_ids=torch.tensor(ids[None], dtype=torch.long)).logits[0, :, :300], -1
            )
        observed = logprobs[:-1].gather(1, torch.tensor(ids[1:, None], dtype=torch.long))[:, 0]
        np.testing.assert_allclose(got["observed_logprob"], np.append(observed, 0), rtol=1e-4, atol=1e-5)
        np.testing.assert_allclose(got["boundary_logprob"], logprobs[:, mask].logsumexp(-1), rtol=1e-4, atol=1e-5)
        np.testing.assert_allclose(got["eos_logprob"], logprobs[:, view.eos_id], rtol=1e-4, atol=1e-5)
        assert (got["topk_ids"][:, 0] == logprobs.argmax(-1).numpy()).all()


def test_what_signals_lose_is_measured(root):
    for shard in range(3):
        run(root, shard)
    join(root, [0, 1, 2])
    errors = artifact.read_manifest(root / "teachers/teacher/manifest.json")["metrics"]["signal_error"]
    tops = [row for row in errors if row["signal"] == "top_k"]
    assert [row["size"] for row in tops] == [2**n for n in range(9)]
    assert all(a["kl"] > b["kl"] > 0 for a, b in itertools.pairwise(tops))
    hidden = next(row for row in errors if row["signal"] == "hidden")
    assert hidden["bytes_per_token"] == 64 and 0 <= hidden["kl"] < 1e-3 < tops[-1]["kl"]


def test_rerun_gives_the_same_bytes(root):
    run(root, 1, "again")
    first = artifact.read_manifest(root / "teachers/again/part-0001.manifest.json")["data"]
    run(root, 1, "again")
    assert artifact.read_manifest(root / "teachers/again/part-0001.manifest.json")["data"] == first


def test_more_shards_than_examples(root):
    for shard in range(20):
        run(root, shard, "many", shards=20)
    assert sum(part["rows"] for part in join(root, range(20), "many")["parts"]) == 14


def test_wrong_teachers_are_refused(root):
    publish_model(root, "small", 290)
    with pytest.raises(UserError, match=r"290 embedding rows but tokenizer .* has 300 ids"):
        run(root, inputs={"model": "models/small"})
    publish_model(root, "short", 300, lambda model: setattr(model.config, "max_position_embeddings", 20))
    with pytest.raises(
        UserError, match=r"Example train\d:\d has \d+ tokens but model 'teacher' takes at most 20: .* max_bytes: \d+"
    ):
        run(root, inputs={"model": "models/short"})
    publish_model(root, "broken", 300, lambda model: model.model.norm.weight.data.fill_(float("nan")))
    with pytest.raises(UserError, match="logits that are not finite"):
        run(root, inputs={"model": "models/broken"})
    with pytest.raises(UserError, match="shard is 3"):
        run(root, 3)


def test_index_refuses_what_does_not_belong_together(root):
    run(root, 0, "mixed")
    run(root, 1, "mixed")
    with pytest.raises(UserError, match=r"shards \[0, 1\] but are cut into 3"):
        join(root, [0, 1], "mixed")
    run(root, 2, "mixed", space_mask_mode="space")
    with pytest.raises(UserError, match="another boundary tokens"):
        join(root, [0, 1, 2], "mixed")
    (root / "teachers/mixed/part-0001.parquet").unlink()
    run(root, 2, "mixed")
    with pytest.raises(UserError, match=r"part-0001.parquet is missing"):
        join(root, [0, 1, 2], "mixed")


def test_inexact_text_is_refused():
    with pytest.raises(UserError, match="'lossy' does not reproduce the text of 2 of 3 examples, b first"):
        refuse_inexact(np.array([True, False, False]), ["a", "b", "c"], "lossy")
