"""Rows as people publish them: read, or counted and said, or one sentence that says what the file is."""

import bz2
import gzip
import io
import json
import lzma
import zipfile

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from stages.core.artifact import read_manifest
from stages.core.errors import UserError
from stages.corpora import files
from stages.planning import sources

from ..conftest import SHARED
from .test_corpus import build, jsonl, listed

ROWS = [{"text": "first"}, {"text": "naïve 北京 👍"}, {"text": "third\nline"}]
LINES = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in ROWS).encode()
ARRAY = json.dumps(ROWS, indent=1).encode()


@pytest.fixture
def cases():
    if not (SHARED / "cases").is_dir():
        pytest.skip(f"no shared cases: {SHARED / 'cases'} does not exist")
    return SHARED / "cases"


def texts(tmp_path, kind, path, **spec):
    """The texts of a corpus made of one file, its turns joined by |; and the metrics of its manifest."""
    place = {"files": listed(path)} if kind != "hub" else {"path": str(path)}
    rows = build(tmp_path, kind=kind, heldout=0.0, **{"max_bytes": 512} | place | spec)["train"]
    metrics = read_manifest(tmp_path / "corpora/c/manifest.json")["metrics"]
    return ["|".join(slot["text"] for slot in row["slots"]) for row in rows], metrics


def refused(tmp_path, kind, path, sentence, **spec):
    with pytest.raises(UserError, match=sentence) as caught:
        texts(tmp_path, kind, path, **spec)
    assert "\n" not in str(caught.value) and str(caught.value).endswith(".")
    assert not (tmp_path / "corpora").exists() or not list((tmp_path / "corpora").glob("*/manifest.json"))


# ---- null, and columns that nobody asked for


def test_given_null_texts(cases, tmp_path, capsys):
    found, metrics = texts(tmp_path, "jsonl", cases / "null-text/text_null.jsonl")
    assert found == ["first document", "third"] and (metrics["rows"], metrics["empty_rows"]) == (3, 1)
    assert "1 empty rows left out: no text in them" in capsys.readouterr().out
    found, metrics = texts(tmp_path, "parquet", cases / "null-text/large_string.parquet")
    assert found == ["a", "b"] and metrics["empty_rows"] == 1
    found, metrics = texts(tmp_path, "jsonl", cases / "null-text/both_columns.jsonl", train_on="all")
    assert found == ["plain", "q|r"] and "empty_rows" not in metrics


@pytest.mark.parametrize(
    ("rows", "spec", "expected", "empty"),
    [
        ([{"text": ""}, {"text": "a"}], {}, ["a"], 1),
        ([{"id": 1}, {"text": "a", "id": 2}], {}, ["a"], 1),
        ([None, {"text": "a"}], {}, ["a"], 1),
        ([{"text": float("nan")}, {"text": "a"}], {}, ["a"], 1),
        ([{"messages": [], "text": "a"}], {}, ["a"], 0),
        ([{"messages": [{"role": "user", "content": ""}], "text": "a"}], {}, ["a"], 0),
        ([{"chat": None, "body": "a"}], {"messages": "chat", "column": "body"}, ["a"], 0),
        ([{"chat": [{"role": "user", "content": "q"}], "body": "a"}], {"messages": "chat", "column": "body"}, ["q"], 0),
        ([{"text": "b", "body": None}, {"text": "b", "body": "a"}], {"column": "body"}, ["a"], 1),
    ],
)
def test_the_filled_column_counts(tmp_path, rows, spec, expected, empty):
    jsonl(tmp_path / "a.jsonl", *rows)
    found, metrics = texts(tmp_path, "jsonl", tmp_path / "a.jsonl", train_on="all", **spec)
    assert found == expected and metrics["rows"] == len(rows) and metrics.get("empty_rows", 0) == empty


def test_column_that_no_row_has(tmp_path):
    jsonl(tmp_path / "a.jsonl", {"body": "x", "id": 1}, {"id": 2})
    refused(tmp_path, "jsonl", tmp_path / "a.jsonl", "no column txt; it has body, id", column="txt")


def test_documents_in_which_nothing_is_trained_on_are_counted(tmp_path, capsys):
    question = {"messages": [{"role": "user", "content": "q"}]}
    jsonl(tmp_path / "a.jsonl", question, {"messages": [*question["messages"], {"role": "assistant", "content": "a"}]})
    found, metrics = texts(tmp_path, "jsonl", tmp_path / "a.jsonl", train_on="assistant")
    assert found == ["q|a"] and metrics["untrained_documents"] == 1
    assert "1 untrained documents left out" in capsys.readouterr().out


CHAT = [{"role": "user", "content": "q"}, {"role": "assistant", "content": "a"}]
TURN = pa.struct([("role", pa.string()), ("content", pa.large_string()), ("weight", pa.float64())])


@pytest.mark.parametrize(
    "column",
    [
        pa.array(["a", None, "b"], pa.large_string()),
        pa.array(["a", None, "b"], pa.string_view()),
        pa.array(["a", None, "b"], pa.binary()),
        pa.array(["a", None, "b"]).dictionary_encode(),
    ],
    ids=lambda column: str(column.type),
)
def test_text_of_every_arrow_type(tmp_path, column):
    odd = {"d": pa.array([{"x": 1}, None, {"x": 2}]), "e": pa.array([b"\xff", None, b""])}
    pq.write_table(pa.table({"text": column} | odd), tmp_path / "a.parquet")
    found, metrics = texts(tmp_path, "parquet", tmp_path / "a.parquet")
    assert found == ["a", "b"] and metrics["empty_rows"] == 1


@pytest.mark.parametrize("kind", [pa.list_, pa.large_list, lambda turn: pa.list_(turn, 2)], ids=["list", "large", "2"])
def test_chats_of_every_arrow_type(tmp_path, kind):
    pq.write_table(pa.table({"messages": pa.array([CHAT, None], kind(TURN))}), tmp_path / "a.parquet")
    found, metrics = texts(tmp_path, "parquet", tmp_path / "a.parquet", train_on="all")
    assert found == ["q|a"] and metrics["empty_rows"] == 1


# ---- formats


def zstd(data):
    return pa.compress(data, codec="zstd", asbytes=True)


def lz4(data):
    sink = pa.BufferOutputStream()
    with pa.CompressedOutputStream(sink, "lz4") as stream:
        stream.write(data)
    return sink.getvalue().to_pybytes()


PUBLISHED = {
    "plain": LINES,
    "gzip": gzip.compress(LINES),
    "gzip in parts": gzip.compress(LINES[:20]) + gzip.compress(LINES[20:]),
    "bzip2": bz2.compress(LINES),
    "xz": lzma.compress(LINES),
    "zstd": zstd(LINES),
    "zstd in parts": zstd(LINES[:20]) + zstd(LINES[20:]),
    "lz4": lz4(LINES),
    "byte order mark": b"\xef\xbb\xbf" + LINES,
    "windows": LINES.replace(b"\n", b"\r\n"),
    "blank lines": b"\n" + LINES.replace(b"\n", b"\n\n"),
    "utf-16": LINES.decode().encode("utf-16"),
    "utf-16-be": LINES.decode().encode("utf-16-be"),
    "utf-32": LINES.decode().encode("utf-32"),
    "array": ARRAY,
    "array in one line": json.dumps(ROWS).encode(),
    "array, byte order mark": b"\xef\xbb\xbf" + ARRAY,
    "array, utf-16": ARRAY.decode().encode("utf-16"),
    "array, gzip": gzip.compress(ARRAY),
    "objects over many lines": "\n".join(json.dumps(row, indent=2) for row in ROWS).encode(),
}


@pytest.mark.parametrize("name", PUBLISHED)
def test_published_forms_are_read(tmp_path, name):
    """The name of the file says nothing: what is in it does."""
    (tmp_path / "a.jsonl").write_bytes(PUBLISHED[name])
    found, metrics = texts(tmp_path, "jsonl", tmp_path / "a.jsonl")
    assert found == [row["text"] for row in ROWS] and metrics["rows"] == len(ROWS)


def test_given_forms(cases, tmp_path):
    with gzip.open(cases / "not-jsonl/gz.jsonl.gz", "rt") as stream:
        expected = [json.loads(line)["text"] for line in stream]
    assert texts(tmp_path, "jsonl", cases / "not-jsonl/gz.jsonl.gz")[0] == expected
    expected = [row["text"] for row in json.loads((cases / "not-jsonl/array.json").read_text())]
    assert texts(tmp_path, "jsonl", cases / "not-jsonl/array.json")[0] == expected


def test_compressed_text(tmp_path):
    for data in ("Zeile\n" * 3).encode(), gzip.compress(("Zeile\n" * 3).encode()), ("Zeile\n" * 3).encode("utf-16"):
        (tmp_path / "a.txt").write_bytes(data)
        assert texts(tmp_path, "txt", tmp_path / "a.txt")[0] == ["Zeile\n" * 3]


def test_array_is_not_held_as_a_whole():
    """Of a large array only the object at hand is read: the stream is not asked for more."""
    rows = [{"text": "x" * 50_000} for _ in range(400)]
    stream = io.BytesIO(json.dumps(rows).encode())
    read = files.json_rows(stream, "a.json")
    assert next(read) == rows[0] and stream.tell() < 1_000_000
    assert list(read) == rows[1:]


def zipped(data):
    sink = io.BytesIO()
    with zipfile.ZipFile(sink, "w") as archive:
        archive.writestr("a.jsonl", data)
    return sink.getvalue()


def parquet(data):
    sink = pa.BufferOutputStream()
    pq.write_table(pa.table({"text": [data]}), sink)
    return sink.getvalue().to_pybytes()


OTHERS = {
    "csv": (b"id,text\n1,hello\n", "text or a table such as CSV, not JSON"),
    "quoted csv": (b'"id";"text"\n1;"hello"\n', "text or a table such as CSV, not JSON"),
    "prose": (b"Call me Ishmael.", "text or a table such as CSV, not JSON.*`kind: txt`"),
    "parquet": (parquet("x"), "a Parquet file: set `kind: parquet`"),
    "zip": (zipped(LINES), "a zip archive"),
    "tar": (bytes(257) + b"ustar", "a tar archive"),
    "tar.gz": (gzip.compress(bytes(257) + b"ustar"), "a tar archive"),
    "html": (b"<!DOCTYPE html><title>404</title>", "HTML or XML, perhaps an error page"),
    "lfs": (b"version https://git-lfs.github.com/spec/v1\noid sha256:0\n", "a Git LFS pointer"),
    "pickle": (b"\x80\x04\x95", "a Python pickle"),
    "cut gzip": (gzip.compress(LINES * 99)[:-30], r"cannot be read to its end \(EOFError"),
    "cut xz": (lzma.compress(LINES * 99)[:-30], r"cannot be read to its end \(EOFError"),
    "cut zstd": (zstd(LINES * 99)[:-8], r"cannot be read to its end"),
    "cut array": (ARRAY[:-30], r"object \d is (cut off|not JSON)"),
    "array with a fault": (b'[{"text": "a"}, {"text" 5}]', r"object 2 is not JSON \(Expecting ':'"),
    "array of more than objects": (b'[{"text": "a"}, 5]', r"object 2 is a JSON int"),
    "latin-1": ('{"text": "é"}\n'.encode("latin-1"), r"byte 10 \(line 1\) is not UTF-8"),
    "cut utf-16": (LINES.decode().encode("utf-16")[:-1], r"is not UTF-16"),
}


@pytest.mark.parametrize("name", OTHERS)
def test_other_files_are_named(tmp_path, name):
    data, sentence = OTHERS[name]
    (tmp_path / "a.jsonl").write_bytes(data)
    refused(tmp_path, "jsonl", tmp_path / "a.jsonl", rf"a\.jsonl.* {sentence}")


def test_no_parquet_is_named(tmp_path):
    (tmp_path / "a.parquet").write_bytes(LINES)
    refused(
        tmp_path, "parquet", tmp_path / "a.parquet", r"a\.parquet cannot be read.*no Parquet file; set another `kind`"
    )


# ---- data sets of the Hub, as local folders


@pytest.fixture
def hub(tmp_path, monkeypatch):
    """A folder for a data set, and a cache of its own."""
    import datasets

    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    (tmp_path / "set").mkdir()
    return tmp_path / "set"


both = pytest.mark.parametrize("streaming", [False, True], ids=["whole", "streamed"])


@both
def test_given_data_set_of_mixed_types(cases, hub, tmp_path, streaming):
    assert texts(tmp_path, "hub", cases / "mixed-types", streaming=streaming)[0] == ["a", "b", "c"]


@both
def test_only_the_text_column_matters(hub, tmp_path, streaming):
    """Other columns differ between files and within one, are missing, and are of types without a common one."""
    for number, column in enumerate([pa.array([1]), pa.array(["x"]), pa.array([{"x": [1]}]), pa.array([b"\xff"])]):
        pq.write_table(pa.table({"text": [str(number)], "d": column}), hub / f"train-{number}.parquet")
    pq.write_table(pa.table({"text": pa.array(["4", None], pa.large_string())}), hub / "train-4.parquet")
    found, metrics = texts(tmp_path, "hub", hub, streaming=streaming)
    assert found == list("01234") and metrics["empty_rows"] == 1


@both
def test_values_of_one_column_of_mixed_types(hub, tmp_path, streaming):
    jsonl(hub / "train.jsonl", *({"text": str(i), "d": d} for i, d in enumerate([None, 1, "x", [1], {"x": 1}, [[]]])))
    assert texts(tmp_path, "hub", hub, streaming=streaming)[0] == list("012345")


@both
@pytest.mark.parametrize("name", ["train.jsonl.gz", "train.json"])
def test_data_set_of_other_forms(hub, tmp_path, streaming, name):
    (hub / name).write_bytes(gzip.compress(LINES) if name.endswith("gz") else ARRAY)
    assert texts(tmp_path, "hub", hub, streaming=streaming)[0] == [row["text"] for row in ROWS]


@both
def test_data_set_that_the_library_reads(hub, tmp_path, streaming):
    (hub / "train.csv").write_text("id,text\n1,one\n2,\n3,three\n")
    found, metrics = texts(tmp_path, "hub", hub, streaming=streaming)
    assert found == ["one", "three"] and metrics["empty_rows"] == 1


@both
def test_splits_names_and_samples(hub, tmp_path, streaming):
    for name in ("train", "test"):
        jsonl(hub / f"{name}.jsonl", *({"text": f"{name} {i}"} for i in range(9)))
    found = texts(tmp_path, "hub", hub, streaming=streaming, split="test", sample=4)[0]
    assert len(found) == 4 and all(text.startswith("test") for text in found)
    if streaming:
        assert found == [f"test {i}" for i in range(4)]
    else:
        assert texts(tmp_path, "hub", hub, split="test[:2]")[0] == ["test 0", "test 1"]
    refused(tmp_path / "x", "hub", hub, r"Data set .*/set cannot be loaded .*split", streaming=streaming, split="none")


@both
def test_damaged_data_set_is_named(hub, tmp_path, streaming):
    (hub / "train-0.jsonl").write_bytes(LINES)
    (hub / "train-1.jsonl").write_bytes(LINES + b"{broken\n")
    refused(tmp_path, "hub", hub, r"train-1\.jsonl: line 4 is not JSON", streaming=streaming)
    refused(tmp_path, "hub", tmp_path / "nowhere", "Data set .*/nowhere cannot be loaded", streaming=streaming)
    (tmp_path / "empty").mkdir()
    refused(tmp_path, "hub", tmp_path / "empty", "Data set .*/empty cannot be loaded", streaming=streaming)


@pytest.mark.parametrize("error", [TypeError("cannot cast"), AssertionError(), RuntimeError("x\ny"), KeyError("z")])
def test_whatever_the_library_raises_is_one_sentence(hub, tmp_path, monkeypatch, error):
    import datasets

    def broken(*_, **__):
        raise datasets.exceptions.DatasetGenerationError("An error occurred while generating the dataset") from error

    monkeypatch.setattr(datasets, "load_dataset_builder", broken)
    sentence = rf"cannot be loaded \(DatasetGenerationError: .* \({type(error).__name__}: \S+.*\)\)"
    refused(tmp_path, "hub", hub, sentence)


def test_connection_that_breaks_in_a_stream(hub, tmp_path, monkeypatch):
    import fsspec

    (hub / "train.jsonl").write_bytes(LINES * 10_000)

    class Broken(io.BytesIO):
        def readinto(self, buffer):
            if self.tell() > 100_000:
                raise ConnectionError("connection reset")
            return super().readinto(buffer)

    monkeypatch.setattr(fsspec, "open", lambda path, mode: Broken((hub / "train.jsonl").read_bytes()))
    refused(tmp_path, "hub", hub, r"ConnectionError: connection reset\): .*out of reach", streaming=True)


# ---- paths


@pytest.mark.parametrize("name", ["chat [1].jsonl", "what?.jsonl", "a*b.jsonl", "[ab].jsonl"])
def test_path_that_exists_is_that_file(tmp_path, name):
    (tmp_path / name).write_text('{"text": "x"}\n')
    (tmp_path / "a.jsonl").write_text('{"text": "y"}\n')
    digests = sources.Digests(tmp_path / "digests.json")
    assert list(sources.data_files("c", str(tmp_path / name), digests)) == [str(tmp_path / name)]
    assert set(sources.data_files("c", [str(tmp_path / "?.jsonl"), str(tmp_path / name)], digests)) == {
        str(tmp_path / "a.jsonl"),
        str(tmp_path / name),
    }


def test_given_brackets(cases, tmp_path):
    path = cases / "brackets/chat [1].jsonl"
    found = sources.data_files("c", str(path), sources.Digests(tmp_path / "digests.json"))
    rows = [json.loads(line) for line in path.read_text().splitlines()]
    expected = ["|".join(turn["content"] for turn in row["messages"]) for row in rows]
    (only,) = found
    assert texts(tmp_path, "jsonl", path.parent / only, train_on="all")[0] == expected


def test_folder_instead_of_files(tmp_path):
    with pytest.raises(UserError, match=r"corpora\.c\.path.*is a folder"):
        sources.data_files("c", str(tmp_path), sources.Digests(tmp_path / "digests.json"))
