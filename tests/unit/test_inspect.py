"""inspect and verify: readable, decoded, one sentence for a wrong path, no heavy import."""

import json
import re
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import yaml

from stages import inspect as program
from stages import verify
from stages.artifacts import schemas
from stages.core import artifact
from stages.core.errors import UserError
from stages.planning import expand, plan, run, sources
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
    shard = root / "teachers/big/docs/part-0000.manifest.json"
    with artifact.publish(shard, **arguments, inputs={"tokenizer": tokenizer}) as draft:
        (draft.folder / "part-0000.parquet").write_bytes(parquet([row], schema))
    shards = [artifact.read_manifest(shard, "teachers/big/docs/part-0000.manifest.json")]
    arguments["stage"] = "teacher_index"
    with artifact.publish(root / "teachers/big/docs/manifest.json", **arguments, inputs={"shards": shards}) as draft:
        (draft.folder / "shards.json").write_text("{}")


def shown(capsys, path):
    program.main([str(path)])
    return capsys.readouterr().out


def test_corpus_as_text(root, capsys):
    out = shown(capsys, root / "corpora/docs")
    assert "stage     corpus" in out and "nothing upstream" in out and "12 rows" in out
    assert tiny.text(0, 3) in out


@pytest.mark.parametrize("name", ["", "manifest.json", "part-0000.parquet", "part-0000.manifest.json"])
def test_signals_are_decoded(root, capsys, name):
    """By the folder of a teacher's signals, its index, a shard or the shard's file."""
    out = shown(capsys, root / "teachers/big/docs" / name)
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


def test_folder_of_several_artifacts_is_listed(root, capsys, tmp_path):
    """Also where one of them has its manifest in the folder itself, as the report and a teacher's head have."""
    copy = tmp_path / "results"
    shutil.copytree(root, copy)
    tiny.publish(copy / "teachers/big/head.manifest.json", "teacher_head", {"head.txt": b"x"})
    out = shown(capsys, copy / "teachers/big")
    assert "head.manifest.json" in out and "docs/part-0000.manifest.json" in out


def readme_paths(repository):
    """The paths in README's commands that look at results."""
    return re.findall(r"python -m stages\.(?:inspect|verify) (\S+)", (repository / "README.md").read_text())


def test_readme_looks_at_what_the_demo_makes(repository, monkeypatch):
    monkeypatch.chdir(repository)
    config = yaml.safe_load((repository / "config/config.yaml").read_text())
    schema = yaml.safe_load((repository / run.SCHEMA).read_text())
    nodes = plan.build(expand.expand(config, schema), sources.Digests(Path("/nonexistent/digests.json")))
    made = {f"results/{config['name']}/{manifest}" for manifest in nodes}
    found = readme_paths(repository)
    assert found
    for path in found:
        assert f"{path}/manifest.json" in made or path == f"results/{config['name']}", path


@pytest.mark.parametrize("module", ["inspect", "verify"])
def test_reader_that_goes_away_ends_the_program_quietly(root, module):
    command = f"{sys.executable} -m stages.{module} {root} | head -n 0; exit ${{PIPESTATUS[0]}}"
    done = subprocess.run(["bash", "-c", command], capture_output=True, text=True)
    assert done.stderr == "" and done.returncode in (0, 128 + signal.SIGPIPE)


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
    copy = tmp_path / "results"
    shutil.copytree(root, copy)
    path = copy / "tokenizers/t/manifest.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"lineage": "2" * 32}))
    with pytest.raises(SystemExit):
        verify.main([str(copy)])
    assert "was rebuilt since" in capsys.readouterr().out
