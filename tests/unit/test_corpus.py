import json
from itertools import pairwise

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given
from hypothesis import strategies as st

from stages import corpus
from stages.artifacts.schemas import EXAMPLES
from stages.artifacts.tables import identity_of, read_table
from stages.core.artifact import file_digest, read_manifest
from stages.core.errors import UserError
from stages.corpora.cutting import Turn, cut_text, cut_turns
from stages.corpora.python_docs import python_documents

TEXT = st.text(st.sampled_from("aaabé🎉 \n\t\r"), max_size=90)


def build(root, name="c", **spec):
    spec = {"max_bytes": 64, "heldout": 0.3, "seed": 1, "inputs": {}} | spec
    arguments = ["--root", str(root), "--manifest", f"corpora/{name}/manifest.json", "--spec", json.dumps(spec)]
    corpus.main(arguments)
    return {split: rows(root, name, split) for split in ("train", "heldout")}


def rows(root, name, split):
    return read_table(root / "corpora" / name / f"{split}.parquet", EXAMPLES).to_pylist()


def listed(path):
    """The files of a spec: as planning lists them, by content."""
    return {str(path): file_digest(path)}


def jsonl(path, *values):
    path.write_text("".join(json.dumps(value, ensure_ascii=False) + "\n" for value in values), encoding="utf-8")
    return listed(path)


def documents(count):
    return [{"text": f"document {i}: " + "word " * (i % 40)} for i in range(count)]


@given(text=TEXT, max_bytes=st.integers(4, 40))
def test_cut_text(text, max_bytes):
    pieces = cut_text(text, max_bytes)
    assert "".join(pieces) == text
    assert all(len(piece.encode()) <= max_bytes for piece in pieces)
    for piece, following in pairwise(pieces):
        assert piece
        window = (piece + following).encode()[:max_bytes]
        if not any(white in window[1:] for white in b" \n\t\r"):
            assert len(piece.encode()) > max_bytes - 4
        else:
            assert piece.endswith("\n") or following[0].isspace() or len(piece.encode()) > max_bytes - 4


def test_cut_text_prefers_newlines_then_words():
    assert cut_text("one two\nthree four", 12) == ["one two\n", "three four"]
    assert cut_text("one\nthree four five", 12) == ["one\nthree", " four five"]
    assert cut_text("北京日本" * 2, 8) == ["北京", "日本", "北京", "日本"]
    assert cut_text("", 8) == [""]


TURNS = st.lists(st.builds(Turn, st.sampled_from(["system", "user", "assistant"]), TEXT, st.booleans()), max_size=8)


@given(turns=TURNS, max_bytes=st.integers(8, 80))
def test_cut_turns(turns, max_bytes):
    examples = cut_turns(turns, max_bytes)
    assert all(sum(len(turn.text.encode()) for turn in example) <= max_bytes for example in examples)
    assert "".join(turn.text for part in examples for turn in part) == "".join(turn.text for turn in turns)
    whole = [turn for turn in turns if len(turn[1].encode()) <= max_bytes]
    assert [turn for example in examples for turn in example if turn[0] != "text"] == whole
    for example in examples:
        assert len(example) == 1 or all(turn.role != "text" for turn in example)


def test_exchanges_stay_together():
    said = (("user", "aaaa"), ("assistant", "bbbb"), ("user", "cccc"), ("assistant", "dddd"))
    turns = [Turn(role, text, role == "assistant") for role, text in said]
    assert cut_turns(turns, 15) == [turns[:2], turns[2:]]
    assert cut_turns(turns, 16) == [turns]
    assert cut_turns([Turn("user", "x" * 20, False), Turn("assistant", "y")], 16) == [
        [Turn("text", "x" * 16, False)],
        [Turn("text", "x" * 4, False)],
        [Turn("assistant", "y")],
    ]


def test_splits_and_ids(tmp_path):
    files = jsonl(tmp_path / "a.jsonl", *documents(60), {"text": "twin"}, {"text": "twin"})
    splits = build(tmp_path, kind="jsonl", files=files)
    ids = [row["example_id"] for split in splits.values() for row in split]
    assert len(ids) == len(set(ids)) and splits["train"] and splits["heldout"]
    assert not {r["document_id"] for r in splits["train"]} & {r["document_id"] for r in splits["heldout"]}
    texts = [row["slots"][0]["text"] for split in splits.values() for row in split]
    assert texts.count("twin") == 2
    for split in splits.values():
        for row in split:
            assert row["bytes"] == len(row["slots"][0]["text"].encode()) <= 64 and row["slots"][0]["loss"]
    manifest = read_manifest(tmp_path / "corpora/c/manifest.json")
    assert manifest["metrics"]["train_examples"] == len(splits["train"]) == manifest["data"]["train.parquet"]["rows"]
    assert manifest["metrics"]["train_bytes"] == sum(row["bytes"] for row in splits["train"])
    assert identity_of(tmp_path / "corpora/c/train.parquet")["lineage"] == manifest["lineage"]


def test_document_flags(tmp_path):
    files = jsonl(tmp_path / "a.jsonl", {"text": "word " * 30})
    split = build(tmp_path, kind="jsonl", files=files, heldout=0.0)["train"]
    assert [(row["starts_document"], row["ends_document"]) for row in split] == [
        (True, False),
        (False, False),
        (False, True),
    ]
    assert "".join(row["slots"][0]["text"] for row in split) == "word " * 30


def test_more_documents_move_none(tmp_path):
    few = build(tmp_path, "few", kind="jsonl", files=jsonl(tmp_path / "a.jsonl", *documents(30)))
    more = build(tmp_path, "more", kind="jsonl", files=jsonl(tmp_path / "b.jsonl", *documents(60)))
    for split in few:
        assert {r["example_id"] for r in few[split]} <= {r["example_id"] for r in more[split]}


def test_two_runs_are_identical(tmp_path):
    files = jsonl(tmp_path / "a.jsonl", *documents(40))
    for name in ("one", "two"):
        build(tmp_path, name, kind="jsonl", files=files, sample=20)
    digests = [read_manifest(tmp_path / f"corpora/{name}/manifest.json")["data"] for name in ("one", "two")]
    assert digests[0] == digests[1]


def test_sample_takes_so_many_and_nests(tmp_path):
    files = jsonl(tmp_path / "a.jsonl", *documents(60))
    found = [
        {r["document_id"] for split in build(tmp_path, kind="jsonl", files=files, sample=n).values() for r in split}
        for n in (10, 20)
    ]
    assert [len(ids) for ids in found] == [10, 20] and found[0] <= found[1]


def test_subset_samples_train_and_keeps_heldout(tmp_path):
    whole = build(tmp_path, "whole", kind="jsonl", files=jsonl(tmp_path / "a.jsonl", *documents(80)))
    inputs = {"corpus": {"manifest": "corpora/whole/manifest.json"}}
    spec = json.dumps({"kind": "subset", "fraction": 0.4, "seed": 1, "inputs": inputs})
    corpus.main(["--root", str(tmp_path), "--manifest", "corpora/part/manifest.json", "--spec", spec])
    assert rows(tmp_path, "part", "heldout") == whole["heldout"]
    part = rows(tmp_path, "part", "train")
    chosen = {row["document_id"] for row in part}
    assert part == [row for row in whole["train"] if row["document_id"] in chosen]
    sizes, longest = (sum(row["bytes"] for row in split) for split in (part, whole["train"])), 0
    for document in {row["document_id"] for row in whole["train"]} - chosen:
        longest = max(longest, sum(row["bytes"] for row in whole["train"] if row["document_id"] == document))
    kept, total = sizes
    # At most the share of the bytes, and no document that is left out would have fitted in the end.
    assert 0.4 * total - longest < kept <= 0.4 * total
    nothing = json.dumps({"kind": "subset", "fraction": 1e-9, "seed": 1, "inputs": inputs})
    with pytest.raises(UserError, match="fraction"):
        corpus.main(["--root", str(tmp_path), "--manifest", "corpora/none/manifest.json", "--spec", nothing])


CHAT = [{"role": "user", "content": "q1"}, {"role": "assistant", "content": "a1"}, {"role": "user", "content": "q2"},
        {"role": "assistant", "content": "a2"}]  # fmt: skip


@pytest.mark.parametrize(
    ("train_on", "loss"),
    [("all", [True] * 4), ("assistant", [False, True, False, True]), ("last_answer", [False, False, False, True])],
)
def test_chats(tmp_path, train_on, loss):
    files = jsonl(tmp_path / "a.jsonl", {"messages": CHAT})
    (row,) = build(tmp_path, kind="jsonl", files=files, train_on=train_on, heldout=0.0)["train"]
    assert [slot["loss"] for slot in row["slots"]] == loss
    assert [(s["role"], s["text"]) for s in row["slots"]] == [(m["role"], m["content"]) for m in CHAT]


def test_other_chat_shapes(tmp_path):
    parts = [{"role": "user", "content": [{"type": "text", "text": "h"}, "i"]}, {"from": "gpt", "value": "ho"}]
    files = jsonl(tmp_path / "a.jsonl", {"conversation": parts})
    (row,) = build(tmp_path, kind="jsonl", files=files, messages="conversation", train_on="assistant", heldout=0.0)[
        "train"
    ]
    assert [(s["role"], s["text"]) for s in row["slots"]] == [("user", "hi"), ("assistant", "ho")]


def test_other_fields_of_messages_are_kept(tmp_path):
    function = {"type": "function", "function": {"name": "weather", "arguments": {"days": 2, "city": "Brno"}}}
    asked = [
        {"role": "user", "content": "Weather?", "weight": None},
        {"role": "assistant", "content": None, "tool_calls": [function], "reasoning": "a call"},
        {"role": "tool", "tool_call_id": "c1", "content": "18 C"},
        {"role": "assistant", "content": "It is 18 C.", "tool_calls": []},
    ]
    files = jsonl(tmp_path / "a.jsonl", {"messages": asked})
    (row,) = build(tmp_path, kind="jsonl", files=files, train_on="assistant", heldout=0.0)["train"]
    assert [(slot["role"], slot["text"], slot["loss"]) for slot in row["slots"]] == [
        ("user", "Weather?", False), ("assistant", "<think>\na call\n</think>\n\n", True), ("tool", "18 C", False),
        ("assistant", "It is 18 C.", True),
    ]  # fmt: skip
    fields = [slot["extra"] and json.loads(slot["extra"]) for slot in row["slots"]]
    given = {"reasoning_content": "a call", "tool_calls": [function], "content": None}
    assert fields == [None, given, {"tool_call_id": "c1"}, None]
    assert row["bytes"] == sum(len(slot["text"]) for slot in row["slots"])


def test_an_answer_that_is_only_a_call_is_trained_on(tmp_path):
    call = {"function": {"name": "f", "arguments": "{}"}}
    rows_ = [[{"role": "user", "content": "q"}, {"role": "assistant", "content": None, "tool_calls": [call]}]]
    rows_.append([{"role": "user", "content": "other"}, {"role": "assistant", "content": None}])
    files = jsonl(tmp_path / "a.jsonl", *({"messages": messages} for messages in rows_))
    (row,) = build(tmp_path, kind="jsonl", files=files, train_on="assistant", heldout=0.0)["train"]
    assert row["slots"][0]["text"] == "q" and row["slots"][1]["loss"]


@pytest.mark.parametrize(
    "part",
    [
        {"type": "image_url", "image_url": {"url": "x.png"}},
        {"type": "image"},
        {"type": "input_audio", "input_audio": {"data": "", "format": "wav"}},
        {"type": "text", "text": None},
    ],
)
def test_rows_with_parts_that_are_no_text_are_left_out_and_counted(tmp_path, capsys, part):
    content = [part, {"type": "text", "text": "What is it?"}]
    seen = [
        {"role": "user", "content": content},
        {"role": "assistant", "content": [{"type": "text", "text": "A cat."}]},
    ]
    files = jsonl(tmp_path / "a.jsonl", {"messages": seen}, {"messages": CHAT})
    (row,) = build(tmp_path, kind="jsonl", files=files, heldout=0.0, train_on="all")["train"]
    assert row["slots"][0]["text"] == "q1"
    assert read_manifest(tmp_path / "corpora/c/manifest.json")["metrics"]["refused_rows"] == 1
    assert "1 refused rows left out" in capsys.readouterr().out


def test_untrained_examples_are_left_out(tmp_path):
    long = [{"role": "user", "content": "q" * 60}, {"role": "assistant", "content": "a" * 60}]
    files = jsonl(tmp_path / "a.jsonl", {"messages": long})
    split = build(tmp_path, kind="jsonl", files=files, train_on="assistant", heldout=0.0)["train"]
    assert [[slot["text"] for slot in row["slots"]] for row in split] == [["a" * 60]]
    only = jsonl(tmp_path / "b.jsonl", {"messages": [{"role": "user", "content": "q"}]})
    with pytest.raises(UserError, match="train_on=assistant"):
        build(tmp_path, kind="jsonl", files=only, train_on="assistant", heldout=0.0)


def test_parquet_and_txt(tmp_path):
    pq.write_table(pa.table({"body": [row["text"] for row in documents(20)]}), tmp_path / "a.parquet")
    found = build(tmp_path, kind="parquet", files=listed(tmp_path / "a.parquet"), column="body", heldout=0.0)["train"]
    assert "".join(r["slots"][0]["text"] for r in found) == "".join(row["text"] for row in documents(20))
    text = "A line of the play.\n" * 40
    (tmp_path / "a.txt").write_text(text)
    splits = build(tmp_path, kind="txt", files=listed(tmp_path / "a.txt"))
    assert splits["train"] and splits["heldout"]
    assert sum(row["bytes"] for split in splits.values() for row in split) == len(text)
    assert sum(row["ends_document"] for split in splits.values() for row in split) == 1


def test_user_errors(tmp_path):
    cases = []
    (tmp_path / "bad.jsonl").write_bytes(b'{"text": "ok"}\n{"text": "\xff"}\n')
    cases.append(("jsonl", "bad.jsonl", {}, r"bad\.jsonl: byte 25 \(line 2\) is not UTF-8"))
    (tmp_path / "bad.txt").write_bytes(b"ok\n\xff")
    cases.append(("txt", "bad.txt", {}, r"byte 3 \(line 2\) is not UTF-8"))
    (tmp_path / "cut.jsonl").write_text('{"text": "ok"}\n{"text": \n')
    cases.append(("jsonl", "cut.jsonl", {}, r"line 2 is not JSON"))
    jsonl(tmp_path / "list.jsonl", [1])
    cases.append(("jsonl", "list.jsonl", {}, r"line 1 is a JSON list"))
    jsonl(tmp_path / "col.jsonl", {"body": "x", "id": 1})
    cases.append(("jsonl", "col.jsonl", {}, r"no column text; it has body, id"))
    cases.append(("jsonl", "col.jsonl", {"column": "id"}, r"found int, expected text"))
    jsonl(tmp_path / "half.jsonl", {"text": "x"})
    (tmp_path / "half.jsonl").write_text('{"text": "a\\ud800"}\n')
    cases.append(("jsonl", "half.jsonl", {}, r"character 1 is half of a surrogate pair"))
    jsonl(tmp_path / "role.jsonl", {"messages": [{"role": ["user"], "content": "x"}]})
    cases.append(("jsonl", "role.jsonl", {}, r"role of a message is \['user'\]"))
    jsonl(tmp_path / "parts.jsonl", {"messages": [{"role": "user", "content": ["x", 5]}]})
    cases.append(("jsonl", "parts.jsonl", {}, r"leaves no training text"))
    (tmp_path / "deep.jsonl").write_text("[" * 100_000)
    cases.append(("jsonl", "deep.jsonl", {}, r"line 1 is not JSON"))
    (tmp_path / "cut.parquet").write_bytes(b"PAR1 nothing")
    cases.append(("parquet", "cut.parquet", {}, r"cannot be read as Parquet"))
    pq.write_table(pa.table({"text": [f"text {i} " * 9 for i in range(3000)]}), tmp_path / "whole.parquet")
    whole = (tmp_path / "whole.parquet").read_bytes()
    (tmp_path / "short.parquet").write_bytes(whole[:-100])
    cases.append(("parquet", "short.parquet", {}, r"short\.parquet cannot be read as Parquet"))
    (tmp_path / "holed.parquet").write_bytes(whole[:200] + bytes(5000) + whole[5200:])
    cases.append(("parquet", "holed.parquet", {}, r"holed\.parquet cannot be read as Parquet"))
    latin = pa.array([b"ok", b"caf\xe9"], pa.binary()).cast(pa.string(), safe=False)
    pq.write_table(pa.table({"text": latin}), tmp_path / "latin.parquet")
    cases.append(("parquet", "latin.parquet", {}, r"latin\.parquet holds text that is not UTF-8"))
    pq.write_table(pa.table({"text": pa.array([None, None], pa.string())}), tmp_path / "null.parquet")
    cases.append(("parquet", "null.parquet", {}, r"leaves no training text"))
    pq.write_table(pa.table({"body": ["x"]}), tmp_path / "col.parquet")
    cases.append(("parquet", "col.parquet", {}, r"no column text; it has body"))
    (tmp_path / "empty.txt").write_text("")
    cases.append(("txt", "empty.txt", {}, r"leaves no training text"))
    for kind, name, extra, message in cases:
        with pytest.raises(UserError, match=message):
            build(tmp_path, kind=kind, files=listed(tmp_path / name), heldout=0.0, **extra)
        assert not (tmp_path / "corpora/c/manifest.json").exists()


def test_files_that_changed_since_planning_are_refused(tmp_path):
    files = jsonl(tmp_path / "a.jsonl", *documents(20))
    build(tmp_path, kind="jsonl", files=files)
    before = (tmp_path / "corpora/c/train.parquet").read_bytes()
    (tmp_path / "a.jsonl").write_text('{"text": "another"}\n')
    with pytest.raises(UserError, match=r"a\.jsonl was changed since the run was planned"):
        build(tmp_path, kind="jsonl", files=files)
    (tmp_path / "a.jsonl").unlink()
    with pytest.raises(UserError, match=r"a\.jsonl does not exist"):
        build(tmp_path, kind="jsonl", files=files)
    assert (tmp_path / "corpora/c/train.parquet").read_bytes() == before


def test_any_document_fits_max_bytes(tmp_path):
    files = jsonl(tmp_path / "a.jsonl", {"text": "x" * 100_000}, {"text": "日" * 50_000})
    found = build(tmp_path, kind="jsonl", files=files, heldout=0.0)["train"]
    assert max(row["bytes"] for row in found) <= 64
    assert sum(row["bytes"] for row in found) == 250_000


def test_python_documents_are_real_text():
    found = python_documents()
    first = [next(found) for _ in range(3)]
    assert all(len(text) > 100 and text == text.strip() + "\n" for text in first)
