import json
import warnings
from pathlib import Path

import pytest

from stages import corpus, mined_mapping, tokenizer, tokenizer_stats
from stages.artifacts.schemas import COUNTS, MAPPING, PROJECTION, REVERSE_MAPPING, TOKENS
from stages.artifacts.tables import read_table
from stages.core.artifact import file_digest, read_manifest
from stages.core.errors import UserError
from stages.tokenization import ByteView
from tests.unit import tokenizers_zoo as zoo

TEXTS = [
    "Hello  world\n\n  x\ty",
    " lead",
    "日本 🎉 e\u0301",
    "user assistant\n\nsystem",
    "\n",
    "trail ",
    "the user's naïve café",
]
PARENT = {"corpus": {"manifest": "corpora/c/manifest.json"}}


@pytest.fixture(scope="module")
def root(tmp_path_factory) -> Path:
    """A root with a corpus and two trained tokenizers."""
    root = tmp_path_factory.mktemp("results")
    (root / "a.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in [*zoo.TEXT, *TEXTS]))
    spec = {
        "kind": "jsonl",
        "files": {str(root / "a.jsonl"): file_digest(root / "a.jsonl")},
        "max_bytes": 256,
        "heldout": 0.1,
        "inputs": {},
    }
    run(corpus, root, "corpora/c", spec)
    for kind in ("byte_bpe", "sentencepiece_bpe"):
        train = {"kind": kind, "vocab_size": 420, "special": ["<|extra|>"]}
        run(tokenizer, root, f"tokenizers/{kind}", {"train": train, "inputs": PARENT})
    return root


def run(program, root, place, spec):
    program.main(["--root", str(root), "--manifest", f"{place}/manifest.json", "--spec", json.dumps(spec)])
    return root / place


@pytest.mark.parametrize("kind", ["byte_bpe", "sentencepiece_bpe"])
def test_trained_tokenizers(root, kind):
    folder = root / "tokenizers" / kind
    view = ByteView.load(folder)
    assert view.vocab_size <= 420 and view.special_named("<|extra|>") in view.special_ids
    tokens = view.encode_texts([*TEXTS, "<|extra|> </s> <unk> <0x41> ▁ 龍"])
    assert all(item.exact for item in tokens)
    assert len(tokens[-3].ids) < len("user assistant\n\nsystem")
    run(tokenizer, root, f"again/{kind}", read_manifest(folder / "manifest.json")["spec"])
    for name, facts in read_manifest(folder / "manifest.json")["data"].items():
        again = read_manifest(root / "again" / kind / "manifest.json")["data"][name]
        assert again == facts or name == "byte_view.json" or name == "tokens.parquet", name


@pytest.mark.parametrize("kind", ["byte_bpe", "sentencepiece_bpe"])
def test_tokens_table(root, kind):
    view = ByteView.load(root / "tokenizers" / kind)
    table = read_table(root / "tokenizers" / kind / "tokens.parquet", TOKENS).to_pylist()
    assert [row["bytes"] for row in table] == view.token_bytes
    assert {row["id"]: row["role"] for row in table if row["role"]} == view.role_of
    assert table[view.eos_id]["text"] == view.string_of(view.eos_id)


@pytest.mark.parametrize(
    "spec", ["", ":source=Qwen2:target=Llama3", ":conversion=byte", ":conversion=manual_add_prefix_space"]
)
def test_transformers_gives_the_same_ids(tmp_path, spec):
    from transformers import AutoTokenizer

    source = zoo.views()["qwen"].folder
    folder = run(tokenizer, tmp_path, "tokenizers/t", {"tokenizer": f"{source}{spec}", "digest": "x", "inputs": {}})
    view = ByteView.load(folder)
    with warnings.catch_warnings(action="ignore"):
        theirs = AutoTokenizer.from_pretrained(str(folder))
    assert len(theirs) == view.vocab_size
    for text, tokens in zip(TEXTS, view.encode_texts(TEXTS), strict=True):
        assert theirs(text, add_special_tokens=False)["input_ids"] == tokens.ids.tolist()
    assert theirs.eos_token_id == view.eos_id and theirs.pad_token_id == view.roles.get("pad")
    messages = [{"role": "user", "content": "hi there"}, {"role": "assistant", "content": "hello"}]
    slots = [{"role": m["role"], "text": m["content"], "loss": True} for m in messages]
    rendered = theirs.apply_chat_template(messages, tokenize=True, return_dict=False)
    assert view.encode_examples([slots]).ids.tolist() == rendered
    prompt = theirs.apply_chat_template(messages[:1], tokenize=True, add_generation_prompt=True, return_dict=False)
    assert view.encode_prompts([slots[:1]]).ids.tolist() == prompt


def test_user_errors(root, tmp_path, monkeypatch):
    import huggingface_hub

    def offline(*arguments, **settings):
        raise huggingface_hub.errors.LocalEntryNotFoundError("no network")

    monkeypatch.setattr(huggingface_hub, "snapshot_download", offline)
    with pytest.raises(UserError, match="org/absent is neither a folder nor a Hub id"):
        run(tokenizer, tmp_path, "tokenizers/t", {"tokenizer": "org/absent", "inputs": {}})
    small = {"train": {"kind": "byte_bpe", "vocab_size": 100}, "inputs": PARENT}
    with pytest.raises(UserError, match="vocab_size 100 does not hold 256 bytes"):
        run(tokenizer, root, "tokenizers/small", small)
    with pytest.raises(UserError, match="unknown kind 'wordpiece'"):
        run(tokenizer, root, "tokenizers/w", {"train": {"kind": "wordpiece", "vocab_size": 400}, "inputs": PARENT})


def test_hub_tokenizer_is_fetched_without_weights(tmp_path, monkeypatch):
    import huggingface_hub

    asked = {}

    def snapshot_download(name, **settings):
        asked.update(settings, name=name)
        return str(zoo.views()["qwen"].folder)

    monkeypatch.setattr(huggingface_hub, "snapshot_download", snapshot_download)
    run(tokenizer, tmp_path, "tokenizers/t", {"tokenizer": "org/name:source=Qwen2", "revision": "abc", "inputs": {}})
    assert asked["name"] == "org/name" and asked["revision"] == "abc"
    assert not any("safetensors" in pattern or "bin" in pattern for pattern in asked["allow_patterns"])


def pair(root, **more):
    names = {"teacher_tokenizer": "byte_bpe", "tokenizer": "sentencepiece_bpe"}
    return {"inputs": {key: {"manifest": f"tokenizers/{name}/manifest.json"} for key, name in names.items()} | more}


def test_statistics(root):
    folder = run(tokenizer_stats, root, "tokenizer_pairs/a/b/statistics/c", pair(root, **PARENT))
    table = read_table(folder / "counts.parquet", COUNTS).to_pylist()
    summary = json.loads((folder / "summary.json").read_text())
    text = "".join(slot["text"] for row in corpus_rows(root) for slot in row["slots"])
    assert summary["bytes"] == len(text.encode())
    for side, name in (("teacher", "byte_bpe"), ("student", "sentencepiece_bpe")):
        view = ByteView.load(root / "tokenizers" / name)
        own = [row for row in table if row["side"] == side]
        assert [row["bytes"] for row in own] == view.token_bytes
        assert sum(row["count"] for row in own) == summary["sides"][side]["tokens"]
    (first, *_) = drawn = json.loads((folder / "alignments.json").read_text())
    assert len(drawn) == 6 and len(first["teacher"]["tokens"]) == len(first["teacher"]["chunks"])
    run(tokenizer_stats, root, "tokenizer_pairs/a/b/statistics/again", pair(root, **PARENT))
    data = [read_manifest(folder.parent / name / "manifest.json")["data"] for name in ("c", "again")]
    assert data[0] == data[1]


def test_mapping(root):
    folder = run(mined_mapping, root, "tokenizer_pairs/a/b/mapping", {"max_distance": 0.3} | pair(root))
    teacher, student = (ByteView.load(root / "tokenizers" / name) for name in ("byte_bpe", "sentencepiece_bpe"))
    table = read_table(folder / "mapping.parquet", MAPPING).to_pylist()
    assert [row["student_id"] for row in table] == list(range(student.vocab_size))
    for row in table:
        assert row["student_bytes"] == student.token_bytes[row["student_id"]]
        known = row["teacher_id"] >= 0
        assert row["teacher_bytes"] == (teacher.token_bytes[row["teacher_id"]] if known else None)
        assert (row["kind"] == "none") == (not known) and (row["distance"] == 0) == (
            row["kind"] in ("exact", "special")
        )
    reverse = read_table(folder / "reverse.parquet", REVERSE_MAPPING).to_pylist()
    assert [row["teacher_bytes"] for row in reverse] == teacher.token_bytes
    weights = read_table(folder / "projection.parquet", PROJECTION)
    sums = weights.group_by("student_id").aggregate([("weight", "sum")]).to_pylist()
    assert {row["student_id"] for row in sums} >= {row["student_id"] for row in table if row["kind"] == "exact"}
    assert all(abs(row["weight_sum"] - 1) < 1e-6 for row in sums)
    assert table[student.eos_id]["teacher_id"] == teacher.eos_id
    extra = student.special_named("<|extra|>")
    assert table[extra]["teacher_id"] == teacher.special_named("<|extra|>")
    metrics = read_manifest(folder / "manifest.json")["metrics"]
    assert sum(metrics[kind] for kind in ("exact", "mined", "special", "none")) == len(table)
    assert metrics["unreliable"] == sum(row["kind"] == "mined" and not row["reliable"] for row in table)
    run(mined_mapping, root, "tokenizer_pairs/a/b/again", {"max_distance": 0.3} | pair(root))
    data = [read_manifest(folder.parent / name / "manifest.json")["data"] for name in ("mapping", "again")]
    assert data[0] == data[1]


def corpus_rows(root):
    from stages.artifacts.schemas import EXAMPLES

    return read_table(root / "corpora/c/train.parquet", EXAMPLES).to_pylist()


def test_these_programs_do_not_import_torch_or_transformers(root):
    import subprocess
    import sys

    code = (
        "import sys; from stages import corpus, mined_mapping, tokenizer_stats, tokenizer\n"
        "import stages.alignment.statistics, stages.alignment.mapping, stages.tokenization.training\n"
        "assert not {'torch', 'transformers', 'datasets'} & set(sys.modules)"
    )
    subprocess.run([sys.executable, "-c", code], check=True, cwd=Path(__file__).parents[2])
