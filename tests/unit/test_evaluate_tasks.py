"""The cloze task and lm-eval: built deterministically, works from any folder, one sentence for an unknown task."""

import json
import shutil

import numpy as np
import pyarrow.parquet as pq
import pytest

from stages import cloze_task, evaluate
from stages.core.artifact import read_manifest
from stages.core.errors import UserError
from stages.evaluation import cloze
from tests.unit import tiny

TASK = {"name": "next", "items": 8, "context_bytes": 80, "continuation_bytes": 24, "seed": 3}


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    root = tmp_path_factory.mktemp("cloze") / "results"
    corpus = tiny.corpus_artifact(root, "docs")
    cloze_task.main(tiny.argv(root, "tasks/next/manifest.json", TASK | {"inputs": {"corpus": tiny.entry(corpus)}}))
    folder = root.parent / "tokenizer"
    tiny.bpe(folder, 300)
    files = {path.name: path for path in folder.iterdir()}
    tiny.publish(root / "tokenizers/t/manifest.json", "tokenizer", files)
    tiny.llama(root.parent / "model", 300)
    return root


def test_items_are_true_continuations_and_other_documents(root):
    items = [json.loads(line) for line in (root / "tasks/next/items.jsonl").read_text().splitlines()]
    rows = pq.read_table(root / "corpora/docs/heldout.parquet").to_pylist()
    documents = {}
    for row in rows:
        documents[row["document_id"]] = documents.get(row["document_id"], "") + row["slots"][0]["text"]
    assert len(items) == 8
    for item in items:
        whole = documents[item["document"]]
        assert f"{item['context']} {item['choices'][item['label']]}" in whole
        assert len(set(item["choices"])) == 4
        assert len(item["context"].encode()) <= 80
        for index, choice in enumerate(item["choices"]):
            if index != item["label"]:
                assert any(choice in text for name, text in documents.items() if name != item["document"])
    assert len({item["document"] for item in items}) == 6
    assert len({item["label"] for item in items}) > 1


def test_same_seed_same_items(root):
    again = tiny.argv(
        root, "tasks/again/manifest.json", TASK | {"inputs": {"corpus": tiny.entry("corpora/docs/manifest.json")}}
    )
    cloze_task.main(again)
    assert (root / "tasks/again/items.jsonl").read_bytes() == (root / "tasks/next/items.jsonl").read_bytes()


def test_windows_cut_at_single_spaces_inside_limits():
    text = "ein  Satz über naïve Wörter " * 30
    found = cloze.windows(4, text, 60, 20)
    assert len(found) > 5
    for window in found:
        assert f"{window.context} {window.continuation}" in text
        assert 30 <= len(window.context.encode()) <= 60
        assert len(window.continuation.encode()) >= 20
        assert window.context == window.context.strip() and window.continuation == window.continuation.strip()


def test_questions_need_other_documents():
    pool = cloze.windows(0, "one two three four five six " * 40, 40, 10)
    assert cloze.questions(pool, 5, np.random.default_rng(0)) == []


def test_too_many_items_is_one_sentence(root):
    spec = TASK | {"items": 10000, "inputs": {"corpus": tiny.entry("corpora/docs/manifest.json")}}
    with pytest.raises(UserError, match="asks for 10000 items"):
        cloze_task.main(tiny.argv(root, "tasks/more/manifest.json", spec))


def run_suite(root, suite, name="suite", tasks=("tasks/next/manifest.json",)):
    spec = {
        "model": {"name": "tiny", "path": str(root.parent / "model"), "dtype": "auto"},
        "suite": {"kind": "lm_eval", "limit": None, "num_fewshot": None, "batch_size": 4} | suite,
        "seed": 0,
        "inputs": {
            "tokenizer": tiny.entry("tokenizers/t/manifest.json"),
            "tasks": [tiny.entry(task) for task in tasks],
        },
    }
    evaluate.main(tiny.argv(root, f"evaluations/tiny/{name}/manifest.json", spec))
    return root / f"evaluations/tiny/{name}"


def test_built_task_runs_from_any_folder(root, monkeypatch, tmp_path):
    pytest.importorskip("lm_eval")
    monkeypatch.chdir(tmp_path)
    moved = tmp_path / "moved" / "results"
    shutil.copytree(root, moved)
    shutil.copytree(root.parent / "model", moved.parent / "model")
    folder = run_suite(moved, {"tasks": []})
    results = json.loads((folder / "results.json").read_text())
    by_metric = {row["metric"]: row for row in results["results"]}
    assert by_metric["acc"]["task"] == "next" and by_metric["acc"]["n"] == 8
    assert 0 <= by_metric["acc"]["value"] <= 1 and by_metric["acc"]["stderr"] > 0
    samples = pq.read_table(folder / "samples.parquet").to_pylist()
    accuracy = [row["value"] for row in samples if row["metric"] == "acc"]
    assert len(accuracy) == 8 and np.mean(accuracy) == pytest.approx(by_metric["acc"]["value"])
    manifest = read_manifest(folder / "manifest.json")
    assert manifest["metrics"]["results"] == results["results"]


def test_task_of_an_include_path(root, tmp_path):
    pytest.importorskip("lm_eval")
    folder = tmp_path / "own"
    folder.mkdir()
    source = (root / "tasks/next/next.yaml").read_text().replace("task: next", "task: own")
    (folder / "own.yaml").write_text(source.replace("items.jsonl", str(root / "tasks/next/items.jsonl")))
    out = run_suite(root, {"tasks": ["own"], "include_path": str(folder), "limit": 4}, "own", tasks=())
    rows = json.loads((out / "results.json").read_text())["results"]
    assert {row["task"] for row in rows} == {"own"} and rows[0]["n"] == 4


def test_unknown_task_is_one_sentence(root):
    pytest.importorskip("lm_eval")
    with pytest.raises(UserError, match="lm-eval has no task 'arc_eazy'; nearest: arc_easy"):
        run_suite(root, {"tasks": ["arc_eazy"]}, "unknown", tasks=())
    assert not (root / "evaluations/tiny/unknown/manifest.json").exists()
