"""Wrong input, given to the programs as a run gives it: one sentence, and nothing is published."""

import shutil

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from stages import distill, evaluate, pretrain, teacher_signals, tokenizer, tokenizer_stats
from stages.artifacts.schemas import EXAMPLES
from stages.core.errors import UserError

from . import tiny
from . import tokenizers_zoo as zoo
from .test_distill import ALM, LOSS, MODEL, SFT, TRAIN, World

ARCHITECTURE = {"hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 32}


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    return World(tmp_path_factory.mktemp("bad") / "results")


@pytest.fixture(scope="module")
def signals(world):
    return world.signals(shards=1)


def run_each(world, corpus, positions=512, short=None):
    """Yield (name, a call that runs the program) of each program that reads a corpus with a model."""
    signal = {"model": MODEL, "needs": {"boundary": True, "eos": True, "top_k": 0}, "dtype": "auto"}
    signal |= {"shard": 0, "shards": 1, "batch_tokens": 200, "space_mask_mode": LOSS["space_mask_mode"]}
    teacher = {"tokenizer": world.teacher_tokenizer, "model": world.teacher}
    suite = {"model": MODEL | {"name": "student"}, "suite": {"kind": "bits_per_byte"}, "seed": 0}
    recipe = {"architecture": ARCHITECTURE | {"max_position_embeddings": positions}, "train": TRAIN, "seed": 1}
    student = {"tokenizer": world.tokenizer, "corpus": corpus}
    init = short or world.student
    programs = {
        "teacher_signals": (
            teacher_signals.main,
            signal,
            teacher | {"model": short or world.teacher, "corpus": corpus},
        ),
        "evaluate": (evaluate.main, suite, student | {"model": init}),
        "pretrain": (pretrain.main, recipe, student),
    }
    for name, (main, spec, inputs) in programs.items():
        yield name, lambda main=main, spec=spec, inputs=inputs: world.run(main, "bad/manifest.json", spec, **inputs)
    yield "distill", lambda: world.distill("bad", [SFT], init=init, corpus=corpus)
    online = {"corpus": corpus, "teacher_artifact": short or world.teacher}
    yield "online", lambda: world.distill("bad", [ALM], teacher="online", **online)


def refused(world, call, sentence):
    with pytest.raises(UserError, match=sentence) as caught:
        call()
    assert "\n" not in str(caught.value) and str(caught.value).endswith((".", ")"))
    assert not list((world.root / "bad").glob("*")) and not (world.root / "students/bad/manifest.json").exists()


def test_tokenizer_without_a_byte_view(world):
    folder = zoo.save(zoo.bert_uncased(), unk_token="[UNK]", eos_token="[SEP]")
    spec = {"tokenizer": str(folder), "revision": None, "digest": None}
    refused(world, lambda: world.run(tokenizer.main, "bad/manifest.json", spec), "loses text: 'Hello")


def test_example_longer_than_a_model(world):
    short = {}
    for name, vocab in (("small", 300), ("large", 400)):
        tiny.llama(world.root.parent / name, vocab, positions=40)
        files = {path.name: path for path in (world.root.parent / name).iterdir()}
        tiny.publish(world.root / f"models/{name}/manifest.json", "pretrain", files)
        short[vocab] = f"models/{name}/manifest.json"
    sentence = r"Example \w+:\d has \d+ tokens but model '\w+' takes at most 40: .* max_bytes: \d+"
    for name, call in run_each(world, world.corpus, positions=40, short=short[300]):
        if name in ("evaluate", "pretrain", "distill"):
            refused(world, call, sentence)
    for name, call in run_each(world, world.corpus, short=short[400]):
        if name in ("teacher_signals", "online"):
            refused(world, call, sentence)


def test_empty_corpus(world):
    sink = pa.BufferOutputStream()
    pq.write_table(EXAMPLES.empty_table(), sink)
    empty = {f"{split}.parquet": sink.getvalue().to_pybytes() for split in ("train", "heldout")}
    tiny.publish(world.root / "corpora/empty/manifest.json", "corpus", empty)
    calls = dict(run_each(world, "corpora/empty/manifest.json"))
    refused(world, calls["evaluate"], "no held-out examples")
    refused(world, calls["pretrain"], "no training examples")
    refused(world, calls["distill"], "no training examples")
    assert calls["teacher_signals"]()["metrics"]["examples"] == 0  # as a shard of few examples may be
    shutil.rmtree(world.root / "bad")


def test_damaged_corpus(world):
    made = world.named(tiny.corpus_artifact(world.root, "holed"))
    for split in ("train", "heldout"):
        path = world.root / f"corpora/holed/{split}.parquet"
        content = path.read_bytes()
        path.write_bytes(content[:40] + bytes(len(content) - 80) + content[-40:])
    calls = dict(run_each(world, made))
    pair = {"teacher_tokenizer": world.teacher_tokenizer, "tokenizer": world.tokenizer, "corpus": made}
    calls["stats"] = lambda: world.run(tokenizer_stats.main, "bad/manifest.json", {}, **pair)
    for call in calls.values():
        refused(world, call, r"\.parquet cannot be read as Parquet .* damaged or cut off")
    (world.root / "corpora/holed/train.parquet").write_bytes(b"PAR1")
    refused(world, calls["distill"], r"train\.parquet holds 4 bytes instead of \d+")


def test_damaged_signals(world, signals):
    path = world.root / "teachers/teacher/part-0000.parquet"
    content = path.read_bytes()
    try:
        path.write_bytes(content[:40] + bytes(len(content) - 80) + content[-40:])
        refused(world, lambda: world.distill("bad", signals=signals), r"part-0000\.parquet cannot be read as Parquet")
        path.write_bytes(content[:-1])
        refused(world, lambda: world.distill("bad", signals=signals), r"part-0000\.parquet holds \d+ bytes instead")
    finally:
        path.write_bytes(content)


def test_cached_signals_that_are_not_finite(world, monkeypatch):
    """As another writer might leave them: our own refuses them before they are written (test_signals)."""

    def spoil(signals, *_):
        signals["observed_logprob"][7] = np.nan

    monkeypatch.setattr("stages.signals.compute.check_finite", spoil)
    spoiled = world.signals(shards=1, name="spoiled")
    sentence = r"teachers/spoiled hold observed_logprob nan in example \S+, which is not finite: remove that folder"
    refused(world, lambda: world.distill("bad", signals=spoiled), sentence)


def test_fewer_rows_than_tokens(world):
    spec = {"model": MODEL | {"name": "student"}, "suite": {"kind": "bits_per_byte"}, "seed": 0}
    inputs = {"tokenizer": world.teacher_tokenizer, "model": world.student, "corpus": world.corpus}
    sentence = "'student' has 300 embedding rows but tokenizer '.*' has 400 ids"
    refused(world, lambda: world.run(evaluate.main, "bad/manifest.json", spec, **inputs), sentence)
    wrong = {"teacher": "online", "teacher_tokenizer": world.tokenizer, "tokenizer": world.teacher_tokenizer}
    refused(world, lambda: world.distill("bad", **wrong), sentence)


def test_unknown_loss_module():
    with pytest.raises(UserError, match=r"'stages\.losses\.none', which does not exist"):
        distill.import_losses({"losses": [SFT | {"module": "stages.losses.none"}]})
