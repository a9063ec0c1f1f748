"""inspect and verify: readable, decoded, one sentence for a wrong path, no heavy import."""

import json
import subprocess
import sys

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from stages import inspect as program
from stages import verify
from stages.artifacts import schemas
from stages.core import artifact
from stages.core.errors import UserError
from tests.unit import tiny


def parquet(rows, schema):
    sink = pa.BufferOutputStream()
    pq.write_table(pa.Table.from_pylist(rows, schema=schema), sink)
    return sink.getvalue().to_pybytes()


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    root = tmp_path_factory.mktemp("inspect") / "results"
    tiny.corpus_artifact(root, "docs")
    tiny.tokenizer_artifact(root, "t", 300)
    signals(root)
    mapping = [
        {
            "student_id": i,
            "student_bytes": b"ab",
            "teacher_id": 2,
            "teacher_bytes": b"abc",
            "kind": "mined",
            "distance": i,
            "normalised_distance": i / 60,
            "confidence": 1 - i / 60,
            "reliable": i < 18,
            "runner_up_id": 1,
            "runner_up_distance": i,
            "prefix_id": -1,
        }
        for i in range(30)
    ]
    mapping[0] |= {"kind": "exact"}
    files = {"mapping.parquet": parquet(mapping, schemas.MAPPING)}
    tiny.publish(
        root / "tokenizer_pairs/t/s/mapping/manifest.json", "mined_mapping", files, {"inputs": {}, "kind": "min"}
    )
    return root


def signals(root):
    ids = [0, 270, 271, 272, 1]
    schema = pa.schema(
        [("example_id", pa.string()), ("input_ids", pa.list_(pa.uint32()))]
        + [(name, pa.list_(pa.float32())) for name in ("observed_logprob", "boundary_logprob", "eos_logprob")]
        + [("topk_ids", pa.binary()), ("topk_logprobs", pa.binary())]
    )
    row = {"example_id": "d:0", "input_ids": ids, "topk_ids": np.arange(270, 280, dtype=np.uint32).tobytes()}
    row["topk_logprobs"] = np.log(np.full(10, 0.25)).astype(np.float16).tobytes()
    row |= {name: [-0.5] * 5 for name in ("observed_logprob", "boundary_logprob", "eos_logprob")}
    tokenizer = artifact.read_manifest(root / "tokenizers/t/manifest.json", "tokenizers/t/manifest.json")
    arguments = {"stage": "teacher_signals", "spec": {"inputs": {}}, "code": "0", "lineage": "1" * 32}
    with artifact.publish(
        root / "teachers/big/docs/part-0000.manifest.json", **arguments, inputs={"tokenizer": tokenizer}
    ) as draft:
        (draft.folder / "part-0000.parquet").write_bytes(parquet([row], schema))


def shown(capsys, path):
    program.main([str(path)])
    return capsys.readouterr().out


def test_corpus_as_text(root, capsys):
    out = shown(capsys, root / "corpora/docs")
    assert "stage     corpus" in out and "nothing upstream" in out and "12 rows" in out
    assert tiny.text(0, 3) in out


def test_signals_are_decoded(root, capsys):
    out = shown(capsys, root / "teachers/big/docs/part-0000.parquet")
    tokens = pq.read_table(root / "tokenizers/t/tokens.parquet").to_pylist()
    assert "tokenizer: tokenizers/t/manifest.json" in out
    for index in (270, 271, 272):
        assert tokens[index]["bytes"].decode() in out
    assert "-0.5" in out and "0.6065" in out and "0.25" in out


def test_mapping_best_worst_and_most_used(root, capsys):
    manifest = root / "tokenizer_pairs/t/s/mapping/manifest.json"
    out = shown(capsys, manifest)
    assert "29 mined, 1 exact; 12 of the mined ones unreliable" in out and '"abc"' in out and 'kind: "min"' in out
    assert "which unreliable ones are used most is not known" in out
    counts = [{"side": "student", "id": i, "bytes": b"ab", "count": 100 + i if i < 25 else 0} for i in range(30)]
    counts += [{"side": "teacher", "id": i, "bytes": b"ab", "count": 1000} for i in range(40)]
    files = {"counts.parquet": parquet(counts, schemas.COUNTS)}
    tiny.publish(root / "tokenizer_pairs/t/s/statistics/c/manifest.json", "tokenizer_stats", files, {"inputs": {}})
    last = shown(capsys, manifest.parent / "mapping.parquet").split("unreliable and used most:")[1].splitlines()
    assert last[1].endswith("uses") and [line.split()[0] for line in last[2:]] == [str(i) for i in range(24, 17, -1)]
    assert last[2].endswith("124")


def test_model_header(root, capsys, tmp_path):
    tiny.llama(tmp_path, 300)
    out = shown(capsys, tmp_path / "model.safetensors")
    assert "model.embed_tokens.weight" in out and "300 x 32" in out and "F32" in out


def test_overview_lists_artifacts(root, capsys):
    out = shown(capsys, root)
    assert "corpora/docs/manifest.json" in out and "mined_mapping" in out


@pytest.mark.parametrize(
    ("path", "sentence"),
    [("nothing/here.parquet", "does not exist"), ("corpora/docs/empty", "holds no manifest")],
)
def test_wrong_path_is_one_sentence(root, path, sentence):
    if "empty" in path:
        (root / path).mkdir(exist_ok=True)
    with pytest.raises(UserError, match=sentence):
        program.main([str(root / path)])


def test_damaged_parquet_is_one_sentence(tmp_path):
    (tmp_path / "cut.parquet").write_bytes(b"PAR1 cut")
    with pytest.raises(UserError, match="cannot be read as Parquet"):
        program.main([str(tmp_path / "cut.parquet")])


def test_no_heavy_import(root):
    code = "import sys; from stages import inspect, verify; inspect.main([sys.argv[1]]); verify.main([sys.argv[2]]); "
    code += "assert not {'torch', 'transformers'} & set(sys.modules)"
    arguments = [sys.executable, "-c", code, str(root / "corpora/docs"), str(root / "corpora/docs/manifest.json")]
    subprocess.run(arguments, check=True, capture_output=True)


def test_verify(tmp_path, capsys):
    root = tmp_path / "results"
    manifest = root / tiny.corpus_artifact(root, "docs")
    tiny.corpus_artifact(root, "more")
    verify.main([str(root)])
    assert "2 artifacts, 4 files: all as written." in capsys.readouterr().out
    path = manifest.parent / "train.parquet"
    content = bytearray(path.read_bytes())
    content[100] ^= 1
    path.write_bytes(content)
    (root / "corpora/more/heldout.parquet").unlink()
    (root / "corpora/more/stray.txt").write_text("x")
    with pytest.raises(SystemExit) as end:
        verify.main([str(root)])
    out = capsys.readouterr().out
    assert end.value.code == 1 and "3 problems" in out
    assert f"damaged  {path}" in out and "missing" in out and "foreign" in out
    with pytest.raises(UserError, match="does not exist"):
        verify.main([str(root / "nowhere")])


def test_verify_sees_a_rebuilt_input(root, tmp_path, capsys):
    import shutil

    copy = tmp_path / "results"
    shutil.copytree(root, copy)
    path = copy / "tokenizers/t/manifest.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"lineage": "2" * 32}))
    with pytest.raises(SystemExit):
        verify.main([str(copy)])
    assert "was rebuilt since" in capsys.readouterr().out
