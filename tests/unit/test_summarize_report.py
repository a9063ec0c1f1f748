"""Summary and report on made-up results whose differences are known."""

import json
import re
import subprocess
import sys
from html.parser import HTMLParser

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from stages import report, summarize
from stages.artifacts import schemas
from stages.core import artifact, specs
from stages.summary import collect, graph, headline, page
from tests.unit import tiny

MOVED, SMALLER = "Teacher moved to another tokenizer", "Teacher distilled into a smaller model"
EXPERIMENTS = [
    {"name": "moved-fvt", "label": "FVT only", "story": MOVED, "losses": [], "control": None, "seed": 1},
    {"name": "moved-sft", "label": "FVT + sft", "story": MOVED, "losses": ["sft"], "control": None, "seed": 1},
    {
        "name": "moved-alm",
        "label": "FVT + ALM",
        "story": MOVED,
        "losses": ["alm_space"],
        "control": "moved-sft",
        "seed": 1,
    },
] + [
    {"name": f"{kind}-seed{seed}", "label": label, "story": SMALLER, "losses": losses, "control": control, "seed": seed}
    for seed in (1, 2)
    for kind, label, losses, control in (
        ("small-sft", "sft alone", ["sft"], None),
        ("small-alm", "sft + ALM", ["sft", "alm_space"], f"small-sft-seed{seed}"),
    )
]
for entry in EXPERIMENTS:
    entry["group"] = None if entry["story"] == MOVED else entry["name"].removesuffix(f"-seed{entry['seed']}")
    entry |= {"student": "big" if entry["story"] == MOVED else "small", "teacher": "big", "tokenizer": "bytes-ish"}
LEVELS = {"big": 1.90, "small": 2.31, "moved-fvt": 3.05, "moved-sft": 2.15, "moved-alm": 2.02}
LEVELS |= {"small-sft-seed1": 2.301, "small-alm-seed1": 2.243, "small-sft-seed2": 2.305, "small-alm-seed2": 2.249}
SUFFIX = "manifest.json"


def parquet(rows, schema):
    sink = pa.BufferOutputStream()
    pq.write_table(pa.Table.from_pylist(rows, schema=schema), sink)
    return sink.getvalue().to_pybytes()


def publish(root, manifest, stage, files, inputs=()):
    """An artifact whose inputs are other artifacts of `root`."""
    opened = {f"input{i}": artifact.read_manifest(root / name, name) for i, name in enumerate(inputs)}
    spec = {"inputs": {key: {"manifest": value["name"]} for key, value in opened.items()}, "of": manifest}
    identity = specs.lineage(specs.canonical(spec), "0")
    with artifact.publish(root / manifest, stage=stage, spec=spec, code="0", lineage=identity, inputs=opened) as draft:
        for name, content in files.items():
            (draft.folder / name).write_bytes(content if isinstance(content, bytes) else json.dumps(content).encode())
    return [stage, manifest, list(inputs)]


def bits_evaluation(root, name, inputs, rng):
    sizes = np.random.default_rng(0).integers(300, 900, 40)
    difficulty = np.random.default_rng(1).normal(0, 0.25, 40)
    rows = [
        {"example_id": f"d{i}:0", "document_id": f"d{i}", "bytes": int(n), "tokens": int(n // 4)}
        | {"bits": float(n * (LEVELS[name] + difficulty[i] + rng.normal(0, 0.03)))}
        for i, n in enumerate(sizes)
    ]
    value = sum(row["bits"] for row in rows) / sizes.sum()
    result = {"task": "python-docs", "metric": "bits_per_byte", "value": value, "stderr": 0.04, "n": 40}
    result |= {"filter": "none", "higher_is_better": False, "aggregation": "mean", "leads": True}
    facts = {"forward_flops_per_byte": 4e5 if name.startswith("small") else 1.6e6, "suite": "bits_per_byte"}
    files = {"results.json": facts | {"notes": [], "results": [result]}}
    files["samples.parquet"] = parquet(rows, schemas.SCORES)
    return publish(root, f"evaluations/{name}/bpb/{SUFFIX}", "evaluate", files, inputs)


def task_evaluation(root, name, inputs, rng):
    right = rng.random(200) < 0.25 + 0.2 * (3.2 - LEVELS[name])
    rows = [
        {"task": "cloze", "subtask": "cloze", "doc_id": i, "filter": "none", "metric": "acc"}
        | {"value": float(ok), "weight": 1.0}
        for i, ok in enumerate(right)
    ]
    result = {
        "task": "cloze",
        "metric": "acc",
        "value": float(right.mean()),
        "stderr": 0.034,
        "n": 200,
        "higher_is_better": True,
        "filter": "none",
        "aggregation": "mean",
        "leads": True,
    }
    notes = [{"task": "cloze", "note": "<em>two</em> of 200 were odd"}] if name == "small" else []
    files = {"results.json": {"suite": "lm_eval", "notes": notes, "results": [result]}}
    files["samples.parquet"] = parquet(rows, schemas.TASK_SAMPLES)
    return publish(root, f"evaluations/{name}/cloze/{SUFFIX}", "evaluate", files, inputs)


def statistics_files():
    sides = {
        side: {
            "name": f"{side}-tok",
            "vocab_size": size,
            "tokens": 51234,
            "bytes_per_token": per,
            "bytes_per_token_interval": [per - 0.1, per + 0.1],
            "tokens_per_word": 1.4,
            "tokens_per_word_interval": None,
        }
        for side, size, per in (("teacher", 2048, 3.4), ("student", 1024, 2.7))
    }
    alignment = {"example_id": "d:0", "text": "return the value of x"}
    alignment["teacher"] = {"tokens": ["<s>", "return", " the", " value", " of", " x\n"], "chunks": [-1, 0, 1, 2, 3, 4]}
    alignment["student"] = {"tokens": ["<s>", "re", "turn", " the", " val", "ue", " of", " ", "x\n"]}
    alignment["student"]["chunks"] = [-1, 0, 0, 1, 2, 2, 3, 4, 4]
    summary = {
        "examples": 12,
        "bytes": 174000,
        "sides": sides,
        "overlap": {"tokens": 731, "share_of_teacher_vocabulary": 0.36},
        "chunks": {"unconstrained": {"chunks": 9, "bytes_per_chunk": 4.1, "shares": {"1-1": 0.5, "n-m": None}}},
        "advice": ["Both <cut> alike.", "X-Token: prefer P-KL to H-KL."],
    }
    fertility = [
        {"class": name, "side": side, "bytes": size, "bytes_per_token": per, "tokens_per_word": None, "documents": 12}
        | {f"bytes_per_token_{end}": None if name == "Han" else per + sign for end, sign in (("low", -1), ("high", 1))}
        for name, size in (("all", 174000), ("Latin", 173997), ("Han", 3))
        for side, per in (("teacher", 3.4), ("student", 2.7))
    ]
    coverage = [
        {"side": side, "group": name, "types": 10, "matched_types": 4, "uses": uses, "matched_uses": uses // 3}
        | {"unmatched": [b" <i>", b"\xff"]}
        for side in ("teacher", "student")
        for name, uses in (("multi-digit numerals", 0), ("punctuation", 300))
    ]
    counts = [{"side": "student", "id": i, "bytes": b"x", "count": 10 * i} for i in range(96)]
    return {
        "summary.json": summary,
        "alignments.json": [alignment] * 3,
        "counts.parquet": parquet(counts, schemas.COUNTS),
        "fertility.parquet": parquet(fertility, schemas.FERTILITY),
        "coverage.parquet": parquet(coverage, schemas.COVERAGE),
    }


def mapping_rows():
    pairs = [(b" retur", b" return"), (b"<b>&amp", b"amp"), (b"valu", b"value"), (b"\xe2\x80", b"\xe2")] * 4
    rows = [
        {
            "student_id": i,
            "student_bytes": a,
            "teacher_id": i,
            "teacher_bytes": b,
            "kind": "mined",
            "distance": 1 + i // 4,
            "normalised_distance": (1 + i // 4) / (len(a) + len(b)),
            "reliable": i < 8,
        }
        for i, (a, b) in enumerate(pairs)
    ]
    exact = {"student_bytes": b"x", "teacher_id": 1, "teacher_bytes": b"x", "kind": "exact", "distance": 0}
    exact |= {"normalised_distance": 0.0, "reliable": True}
    return rows + [exact | {"student_id": len(pairs) + i} for i in range(80)]


def build(root):
    """A results folder like that of the demo; (specs of summarize and report)."""
    rng = np.random.default_rng(7)
    nodes = [publish(root, f"corpora/python-docs/{SUFFIX}", "corpus", {"train.parquet": b"x" * 5000})]
    corpus = nodes[0][1]
    for name in ("bpe-2k", "bytes-ish"):
        nodes.append(publish(root, f"tokenizers/{name}/{SUFFIX}", "tokenizer", {"tokenizer.json": {}}, [corpus]))
    own, target = f"tokenizers/bpe-2k/{SUFFIX}", f"tokenizers/bytes-ish/{SUFFIX}"
    models = {name: f"models/{name}/{SUFFIX}" for name in ("big", "small")}
    for name, manifest in models.items():
        nodes.append(
            publish(root, manifest, "pretrain", {"config.json": {}}, [corpus, own if name == "big" else target])
        )
    shards = [f"teachers/big/python-docs/part-000{i}.{SUFFIX}" for i in range(3)]
    for shard in shards:
        nodes.append(
            publish(root, shard, "teacher_signals", {f"{shard[-23:-14]}.parquet": b"y"}, [corpus, own, models["big"]])
        )
    index = f"teachers/big/python-docs/{SUFFIX}"
    nodes.append(publish(root, index, "teacher_index", {"shards.json": []}, shards))
    start = f"initialized/big/bytes-ish/fvt/{SUFFIX}"
    nodes.append(publish(root, start, "initialize", {"config.json": {}}, [own, target, models["big"]]))
    pair = "tokenizer_pairs/bpe-2k/bytes-ish"
    mapping, statistics = f"{pair}/mapping/{SUFFIX}", f"{pair}/statistics/python-docs/{SUFFIX}"
    files = {"mapping.parquet": parquet(mapping_rows(), schemas.MAPPING)}
    nodes.append(publish(root, mapping, "mined_mapping", files, [own, target]))
    nodes.append(publish(root, statistics, "tokenizer_stats", statistics_files(), [own, target, corpus]))
    places = dict(models)
    for entry in EXPERIMENTS:
        before = start if entry["story"] == MOVED else models["small"]
        places[entry["name"]] = before
        if entry["losses"]:
            lines = [
                {"step": step, "loss": 1.0}
                | {loss: 2.0 + 3.0 * np.exp(-step / 60) + i * 0.2 for i, loss in enumerate(entry["losses"])}
                for step in range(10, 210, 10)
            ]
            content = "".join(json.dumps(line) + "\n" for line in lines).encode()
            inputs = [before, corpus, target] + ([index] if entry["control"] else [])
            places[entry["name"]] = f"students/{entry['name']}/{SUFFIX}"
            nodes.append(publish(root, places[entry["name"]], "distill", {"metrics.jsonl": content}, inputs))
    nodes.append(publish(root, f"tasks/cloze/{SUFFIX}", "cloze_task", {"cloze.yaml": b"task: cloze"}, [corpus]))
    for name, place in places.items():
        nodes.append(bits_evaluation(root, name, [place, corpus], rng))
        nodes.append(task_evaluation(root, name, [place, f"tasks/cloze/{SUFFIX}"], rng))
    inputs = {
        key: [tiny.entry(manifest) for stage, manifest, _ in nodes if stage == kind]
        for key, kind in (
            ("evaluations", "evaluate"),
            ("students", "distill"),
            ("models", "pretrain"),
            ("statistics", "tokenizer_stats"),
            ("mappings", "mined_mapping"),
        )
    }
    title = "Moving a model of Python's documentation"
    summary = {"title": title, "seed": 0, "experiments": EXPERIMENTS, "inputs": inputs}
    nodes.append(["summarize", f"summary/{SUFFIX}", [item["manifest"] for part in inputs.values() for item in part]])
    return summary, {"title": title, "graph": nodes, "inputs": {"summary": tiny.entry(f"summary/{SUFFIX}")} | inputs}


def made(root):
    summary, page_spec = build(root)
    summarize.main(tiny.argv(root, f"summary/{SUFFIX}", summary))
    report.main(tiny.argv(root, f"report.{SUFFIX}", page_spec))
    return root


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    return made(tmp_path_factory.mktemp("report") / "results")


def test_summary_rows(root):
    rows = pq.read_table(root / "summary/summary.parquet", schema=collect.SUMMARY).to_pylist()
    assert len(rows) == 2 * (2 + len(EXPERIMENTS))
    row = next(row for row in rows if row["model"] == "moved-alm" and row["metric"] == "bits_per_byte")
    assert row["label"] == "FVT + ALM" and row["story"] == MOVED and row["method"] == "alm_space"
    assert row["low"] == pytest.approx(row["value"] - 1.959964 * 0.04) and row["suite"] == "bpb" and row["n"] == 40
    assert {row["label"] for row in rows if row["story"] == SMALLER} >= {"sft alone, seed 1", "sft + ALM, seed 2"}


def test_comparisons_are_paired_and_combine_seeds(root):
    rows = pq.read_table(root / "summary/comparisons.parquet", schema=collect.COMPARISONS).to_pylist()
    bits = {(row["a"], row["b"], row["kind"]): row for row in rows if row["metric"] == "bits_per_byte"}
    alm = bits["moved-alm", "moved-sft", "control"]
    assert alm["verdict"] == "difference" and alm["better"] == "a" and alm["p"] < 0.01
    assert alm["difference"] == pytest.approx(-0.13, abs=0.02) and alm["low"] < alm["difference"] < alm["high"] < 0
    # Documents differ by 0.25 bits per byte; pairing leaves only the 0.03 of noise.
    assert alm["high"] - alm["low"] < 0.05
    both = bits["small-alm", "small-sft", "control"]
    assert both["seeds"] == 2 and both["difference"] == pytest.approx(-0.057, abs=0.02)
    assert bits["small-alm-seed1", "small-sft-seed1", "control"]["seeds"] == 1
    assert ("moved-alm", "moved-fvt", "start") in bits and ("small-sft-seed1", "small", "start") in bits
    noise = bits["small-sft", "small", "start"]
    assert noise["verdict"] == "within noise" and noise["better"] == ""


class Page(HTMLParser):
    VOID = ("meta", "br", "rect", "path", "use", "link")

    def __init__(self):
        super().__init__()
        self.stack, self.ids, self.outside = [], [], []

    def handle_starttag(self, tag, attributes):
        facts = dict(attributes)
        self.ids += [facts["id"]] if "id" in facts else []
        self.outside += [v for k, v in attributes if k in ("src", "href", "xlink:href") and not v.startswith("#")]
        if tag not in self.VOID:
            self.stack.append(tag)

    def handle_startendtag(self, tag, attributes):
        facts = dict(attributes)
        self.ids += [facts["id"]] if "id" in facts else []

    def handle_endtag(self, tag):
        if tag not in self.VOID:
            assert self.stack.pop() == tag


def test_report_is_one_whole_page(root):
    text = (root / "report.html").read_text()
    parsed = Page()
    parsed.feed(text)
    assert parsed.stack == [] and parsed.outside == []
    known = r'xmlns(:\w+)?="[^"]+"|http://(www\.w3\.org|purl\.org|creativecommons\.org|matplotlib\.org)[^"<]*'
    assert "http" not in re.sub(known, "", text)
    linked = set(re.findall(r'(?:href="|url\()#([\w-]+)', text))
    assert all(parsed.ids.count(name) == 1 for name in linked)  # figures do not borrow each other's shapes
    for expected in (
        "What the teacher added",
        "within noise",
        "FVT + ALM",
        "▲",
        "bpe-2k → bytes-ish",
        "·retur",
        "transformers",
    ):
        assert expected in text
    assert "&lt;b&gt;&amp;amp" in text  # a token is text, never markup
    assert "&lt;em&gt;two&lt;/em&gt; of 200 were odd" in text  # a note of an evaluation
    assert "prefer P-KL" in text and "&lt;cut&gt;" in text and "·&lt;i&gt;" in text
    assert "33.3 %" in text and "2.6 \u2013 2.8" in text and "100.00 %" in text and "0.00 %" in text
    assert text.count("<svg") == 7


def test_same_results_same_figures(root, tmp_path):
    again = made(tmp_path / "results")
    first, second = (artifact.read_manifest(place / "summary" / SUFFIX)["data"] for place in (root, again))
    assert {name: facts["sha256"] for name, facts in first.items()} == {
        name: facts["sha256"] for name, facts in second.items()
    }
    assert {name for name in first if name.endswith(".svg")} == {
        "bpb-bars.svg", "bpb-compute.svg", "learning-curves.svg", "fertility.svg",
        "fertility-by-class.svg", "mapping-distance.svg",
    }  # fmt: skip


ROW = {
    "a": "x", "b": "y", "label_a": "X", "label_b": "Y", "kind": "control", "story": "s", "suite": "bpb", "task": "docs",
    "suite_kind": "bits_per_byte", "metric": "bits_per_byte", "filter": "none", "leads": True, "value_a": 2.0,
    "value_b": 2.1, "difference": -0.1, "low": -0.15, "high": -0.05, "n": 40, "seeds": 1, "within_seeds": False,
    "better": "a", "verdict": "difference", "reason": "",
}  # fmt: skip


def test_headline_sentences():
    text = headline.sentence(ROW, "bits per byte")
    assert text.startswith(
        "X: 2.000 bits per byte, against 2.100 for Y. The teacher's signal improves it by 0.100 (95 %"
    )
    noise = ROW | {"verdict": "within noise", "better": "", "high": 0.02}
    assert "-0.100 is within noise (95 % interval -0.150 to +0.020)" in headline.sentence(noise, "bits per byte")
    seeds = [ROW | {"a": name, "within_seeds": True} for name in ("p", "q")] + [ROW | {"seeds": 2}, noise | {"a": "z"}]
    (section,) = headline.sections(seeds)
    assert section["lead"].endswith("against the same training on the text alone: 1 better, 1 within noise.")
    assert len(section["stories"][0]["items"]) == 2


def test_headline_says_what_it_does_not_know():
    nothing = ROW | {"verdict": "no paired comparison", "better": "", "reason": "a value is missing", "value_a": None}
    assert "X: - bits per byte" in headline.sentence(nothing, "bits per byte")
    assert "no paired comparison: a value is missing" in headline.sentence(nothing, "bits per byte")
    unknown = ROW | {"better": "", "task": "t", "suite_kind": "lm_eval"}
    assert "They differ by -0.100" in headline.sentence(unknown, "score")
    (section,) = headline.sections([nothing, unknown | {"suite_kind": "bits_per_byte"}])
    assert section["lead"].endswith("1 not compared in pairs, 1 different.")


def test_headline_is_on_bits_per_byte_of_this_project_whatever_metrics_are_called():
    ours = ROW | {"metric": "anything"}
    theirs = ROW | {"suite": "z", "suite_kind": "lm_eval", "task": "t"}
    (section,) = headline.sections([theirs, ours])
    (item,) = section["stories"][0]["items"]
    assert "2.000 anything" in item["text"]
    (section,) = headline.sections([theirs, theirs | {"metric": "acc", "leads": False}])
    assert [item["text"][:29] for item in section["stories"][0]["items"]] == ["X: 2.000 bits per byte of t, "]


def test_layers_follow_inputs():
    nodes = [
        ["b", "b/manifest.json", ["a/manifest.json"]],
        ["a", "a/manifest.json", []],
        ["c", "c/manifest.json", ["b/manifest.json"]],
    ]
    assert graph.layers(nodes) == {"b/manifest.json": 1, "a/manifest.json": 0, "c/manifest.json": 2}


def test_chunk_columns_keep_every_token():
    example = statistics_files()["alignments.json"][0]
    columns = page.chunks(example)
    for side in ("teacher", "student"):
        assert [token for column in columns for token in column[side]] == [
            page.visible(t) for t in example[side]["tokens"]
        ]
    assert [column["chunk"] for column in columns] == [-1, 0, 1, 2, 3, 4]


def test_no_torch(root):
    summary, page_spec = build(root)
    code = "import sys, json; from stages import summarize, report; a = json.loads(sys.stdin.read()); "
    code += "summarize.main(a[0]); report.main(a[1]); assert not {'torch', 'transformers'} & set(sys.modules)"
    arguments = [tiny.argv(root, f"summary/{SUFFIX}", summary), tiny.argv(root, f"report.{SUFFIX}", page_spec)]
    subprocess.run([sys.executable, "-c", code], input=json.dumps(arguments), text=True, check=True)
