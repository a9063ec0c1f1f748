"""The initialize stage on tiny models: what from_pretrained opens is what the plan says."""

import json

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from stages import initialize
from stages.core.artifact import read_manifest
from stages.core.errors import UserError
from stages.tokenization import ByteView
from tests.unit import tiny

SOURCE, TARGET = 320, 380


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    root = tmp_path_factory.mktemp("initialize") / "results"
    tiny.tokenizer_artifact(root, "source", SOURCE)
    tiny.tokenizer_artifact(root, "target", TARGET, specials=("<begin>", "<end>"))
    return root


def initialized(root, model, name="student", **settings):
    spec = {"method": "fvt", "output_embeddings_mode": "preserve", "seed": 5} | settings
    spec["model"] = {"name": "base", "path": str(model), "dtype": "auto"}
    spec.setdefault(
        "inputs",
        {
            "tokenizer": tiny.entry("tokenizers/target/manifest.json"),
            "source_tokenizer": tiny.entry("tokenizers/source/manifest.json"),
        },
    )
    initialize.main(tiny.argv(root, f"initialized/{name}/manifest.json", spec))
    return root / "initialized" / name


@pytest.mark.parametrize("kind,tied", [("llama", False), ("gemma2", True), ("qwen2", False), ("qwen2", True)])
def test_students_open(root, tmp_path, kind, tied):
    base = tiny.llama(tmp_path / "base", SOURCE + 16, kind=kind, tied=tied, dtype="bfloat16")
    folder = initialized(root, tmp_path / "base", f"{kind}-{tied}")
    student, info = AutoModelForCausalLM.from_pretrained(folder, output_loading_info=True)
    assert not info["missing_keys"] and not info["unexpected_keys"] and not info["mismatched_keys"]
    target = ByteView.load(root / "tokenizers/target")
    rows, head = student.get_input_embeddings().weight, student.get_output_embeddings().weight
    assert rows.shape[0] == head.shape[0] == student.config.vocab_size == target.vocab_size == TARGET
    assert rows.dtype == torch.bfloat16 and torch.isfinite(rows).all()
    assert (head is rows) == tied == student.config.tie_word_embeddings
    assert (student.config.bos_token_id, student.config.eos_token_id) == (target.start_id, target.eos_id)
    assert student.generation_config.eos_token_id == target.eos_id
    opened = AutoTokenizer.from_pretrained(folder)
    probe = "don't split 12345 this  way\n\n naïve 日本語"
    assert len(opened) == TARGET and opened(probe).input_ids == target.encode_texts([probe])[0].ids.tolist()
    for row in pq.read_table(folder / "provenance.parquet").to_pylist():
        if row["rule"] in ("copy", "special"):
            (place,) = row["source_ids"]
            assert torch.equal(rows[row["id"]], base.get_input_embeddings().weight[place])
            assert torch.equal(head[row["id"]], base.get_output_embeddings().weight[place])
        np.testing.assert_allclose(row["norm"], rows[row["id"]].float().norm().item(), rtol=1e-5)
    assert torch.equal(student.model.layers[0].mlp.up_proj.weight, base.model.layers[0].mlp.up_proj.weight)
    manifest = read_manifest(folder / "manifest.json")
    rules = manifest["metrics"]["rows_by_rule"]
    assert sum(rules.values()) == TARGET and rules["special"] == 2 and rules["copy"] > 256
    assert "padding" not in rules and "random" not in rules


def test_same_bytes_twice_and_same_function_for_the_same_tokenizer(root, tmp_path):
    base = tiny.llama(tmp_path / "base", SOURCE)
    inputs = {name: tiny.entry("tokenizers/source/manifest.json") for name in ("tokenizer", "source_tokenizer")}
    folders = [initialized(root, tmp_path / "base", f"same{i}", inputs=inputs) for i in (1, 2)]
    first, second = (read_manifest(folder / "manifest.json")["data"] for folder in folders)
    assert {name: facts["sha256"] for name, facts in first.items()} == {
        name: facts["sha256"] for name, facts in second.items()
    }
    student = AutoModelForCausalLM.from_pretrained(folders[0])
    ids = torch.arange(20)[None]
    assert torch.equal(student(ids).logits, base.eval()(ids).logits)


def test_untie(root, tmp_path):
    tiny.llama(tmp_path / "base", SOURCE, tied=True)
    folder = initialized(root, tmp_path / "base", "untied", output_embeddings_mode="untie")
    student = AutoModelForCausalLM.from_pretrained(folder)
    head, rows = student.get_output_embeddings().weight, student.get_input_embeddings().weight
    assert head is not rows and torch.equal(head, rows) and not student.config.tie_word_embeddings


@pytest.mark.parametrize("method", ["random", "mean"])
def test_baselines(root, tmp_path, method):
    base = tiny.llama(tmp_path / "base", SOURCE)
    folder = initialized(root, tmp_path / "base", method, method=method)
    rows = AutoModelForCausalLM.from_pretrained(folder).get_input_embeddings().weight
    assert set(pq.read_table(folder / "provenance.parquet")["rule"].to_pylist()) == {method}
    if method == "mean":
        assert torch.allclose(rows[7], base.get_input_embeddings().weight.mean(0))
    else:
        assert not torch.equal(rows[7], rows[8])


def test_model_input_artifact(root, tmp_path):
    tiny.llama(tmp_path / "base", SOURCE)
    files = {path.name: path for path in (tmp_path / "base").iterdir()}
    tiny.publish(root / "models/made/manifest.json", "pretrain", files)
    inputs = {
        "tokenizer": tiny.entry("tokenizers/target/manifest.json"),
        "source_tokenizer": tiny.entry("tokenizers/source/manifest.json"),
        "model": tiny.entry("models/made/manifest.json"),
    }
    assert (initialized(root, "", "from-artifact", inputs=inputs) / "model.safetensors").is_file()


def test_too_few_rows_is_one_sentence(root, tmp_path):
    tiny.llama(tmp_path / "base", SOURCE - 10)
    with pytest.raises(UserError, match=rf"has {SOURCE - 10} embedding rows but tokenizer .* has {SOURCE} ids"):
        initialized(root, tmp_path / "base", "few")
    assert not (root / "initialized/few/manifest.json").exists()


def test_wrong_places_are_one_sentence(root, tmp_path):
    with pytest.raises(UserError, match="cannot be loaded from"):
        initialized(root, tmp_path / "nothing", "none")
    tiny.llama(tmp_path / "base", SOURCE)
    (tmp_path / "base" / "model.safetensors").write_bytes(b"cut off")
    with pytest.raises(UserError, match="cannot be loaded from"):
        initialized(root, tmp_path / "base", "cut")
    with pytest.raises(UserError, match="Unknown initialisation method 'fvtt'"):
        initialized(root, tmp_path / "base", "cut", method="fvtt")


def test_values_that_are_not_finite_are_refused(root, tmp_path):
    base = tiny.llama(tmp_path / "base", SOURCE)
    with torch.no_grad():
        base.get_input_embeddings().weight[5] = float("nan")
    base.save_pretrained(tmp_path / "base")
    with pytest.raises(UserError, match="not finite"):
        initialized(root, tmp_path / "base", "nan")


def test_configuration_is_plain_json(root, tmp_path):
    tiny.llama(tmp_path / "base", SOURCE)
    folder = initialized(root, tmp_path / "base", "config")
    assert json.loads((folder / "config.json").read_text())["vocab_size"] == TARGET
    assert {path.name for path in folder.iterdir()} >= {
        "config.json",
        "generation_config.json",
        "tokenizer.json",
        "run.json",
    }
