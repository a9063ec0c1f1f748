"""From lm-eval's tasks to the report: what is compared is the aggregate, and nothing decides by a name."""

import json
from html.parser import HTMLParser

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch

from stages import evaluate, inspect, report, summarize
from stages.artifacts import schemas
from stages.evaluation import scoring
from stages.evaluation.aggregation import FORMULAS
from stages.planning import expand
from stages.summary import collect
from tests.conftest import SHARED
from tests.unit import lm_tasks, tiny
from tests.unit.lm_tasks import ACC, ANSWER, CHOICE, NEXT, ROLLING, Functions


class Text(HTMLParser):
    """The text of a page as a reader sees it, and its tags."""

    def __init__(self, page):
        super().__init__()
        self.parts, self.tags = [], set()
        self.feed(page)
        self.text = "".join(self.parts)

    def handle_data(self, data):
        self.parts.append(data)

    def handle_starttag(self, tag, _):
        self.tags.add(tag)


def entry(name, **facts):
    found = {"name": name, "label": name, "story": "", "losses": ["sft"], "student": "good", "teacher": "good"}
    return found | {"tokenizer": "t", "control": None, "seed": 1, "group": None} | facts


def reported(root, evaluations, experiments, asked=()):
    """Summarize and report; (rows of SUMMARY, rows of COMPARISONS, the page)."""
    inputs = {"evaluations": [tiny.entry(manifest) for manifest in evaluations]}
    spec = {"title": "t", "seed": 0, "experiments": experiments, "comparisons": list(asked), "inputs": inputs}
    summarize.main(tiny.argv(root, "summary/manifest.json", spec))
    page = {"title": "t", "graph": [["evaluate", manifest, []] for manifest in evaluations]}
    page |= {"inputs": inputs | {"summary": tiny.entry("summary/manifest.json")}}
    report.main(tiny.argv(root, "report.manifest.json", page))
    rows = pq.read_table(root / "summary/summary.parquet", schema=collect.SUMMARY).to_pylist()
    pairs = pq.read_table(root / "summary/comparisons.parquet", schema=collect.COMPARISONS).to_pylist()
    return rows, pairs, Text((root / "report.html").read_text())


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    pytest.importorskip("lm_eval")
    world = lm_tasks.World(tmp_path_factory.mktemp("compare"))
    tiny.bpe(world.folder / "tokenizer", 300)
    world.tokenizer(world.folder / "tokenizer")
    model = tiny.llama(world.folder / "good", 300, positions=160)
    with torch.no_grad():
        model.get_output_embeddings().weight *= 12  # as sure of what is wrong as of what is right
    model.save_pretrained(world.folder / "bad")
    world.task("rolling", ROLLING, lm_tasks.items(20))
    world.task("next", NEXT, lm_tasks.items(20))
    world.task("choice", CHOICE, lm_tasks.items(20))
    names = ("exact_match", "bleu", "ter")
    world.task("write", ANSWER | {"metric_list": [{"metric": name} for name in names]})
    world.task("middle", CHOICE | {"metric_list": [ACC[0] | {"aggregation": Functions("middle")}]})
    world.task("one_infinite", CHOICE | {"process_results": Functions("one_infinite")})
    world.task("no_metric", CHOICE | {"process_results": Functions("no_metric")})
    acc = {"metric": "acc", "weight_by_size": False}
    world.task("small", CHOICE, lm_tasks.items(5))
    world.file("group", {"group": "group", "task": ["choice", "small"], "aggregate_metric_list": [acc]})
    if (SHARED / "cases" / "lm-tasks").is_dir():
        world.cases(SHARED / "cases" / "lm-tasks")
    return world


@pytest.fixture(scope="module")
def compared(world):
    """Every kind of suite for two models, of which one is worse, and the report on them."""
    suites = {"lm": ["rolling", "next", "write", "middle", "one_infinite"], "empty": ["no_metric"], "group": ["group"]}
    if (world.tasks / "t_ppl.yaml").exists():
        suites |= {"given": ["t_ppl", "t_two", "t_roll", "t_nan"]}
    made = []
    for name, tasks in suites.items():
        for model in ("good", "bad"):
            world.evaluate(model, tasks, suite=name)
            made.append(f"evaluations/{model}/{name}/manifest.json")
    return reported(world.root, made, [entry("bad", control="good")])


def test_the_worse_is_never_called_better(compared):
    rows, pairs, _ = compared
    values = {(row["model"], row["suite"], row["task"], row["metric"], row["filter"]): row for row in rows}
    assert len(values) == len(rows)
    for row in pairs:
        a, b = (values[row[side], row["suite"], row["task"], row["metric"], row["filter"]] for side in "ab")
        assert (row["value_a"], row["value_b"]) == (a["value"], b["value"])
        if row["better"]:
            first_is_more = a["value"] > b["value"]
            assert row["better"] == ("a" if first_is_more == a["higher_is_better"] else "b")
        if row["verdict"] != "no paired comparison":
            assert (
                row["difference"] == pytest.approx(a["value"] - b["value"])
                and row["low"] <= row["difference"] <= row["high"]
            )
        else:
            assert row["reason"] and row["low"] is row["p"] is None
    control = {(row["task"], row["metric"]): row for row in pairs if row["kind"] == "control" and row["suite"] == "lm"}
    for metric in (("rolling", "word_perplexity"), ("rolling", "bits_per_byte"), ("next", "perplexity")):
        assert control[metric]["better"] == "b", metric
    assert control["middle", "acc"]["reason"] == "the metric is not made of the values of single documents"
    assert control["one_infinite", "acc"]["reason"] == "a value is missing"


def test_intervals_are_those_of_the_aggregate(world, compared):
    """Against draws of the documents that lm-eval scored, aggregated here."""
    _, pairs, _ = compared
    wanted = {"word_perplexity": "perplexity", "bits_per_byte": "bits_per_byte"}
    for row in pairs:
        if row["kind"] != "control" or row["task"] != "rolling" or row["metric"] not in wanted:
            continue
        samples = {}
        for model in ("bad", "good"):
            table = pq.read_table(world.root / f"evaluations/{model}/lm/samples.parquet").to_pylist()
            samples[model] = [one for one in table if (one["task"], one["metric"]) == ("rolling", row["metric"])]
        draws = np.random.default_rng(4).integers(20, size=(4000, 20))
        side = {}
        for model, part in samples.items():
            values, weights = (np.array([one[key] for one in part]) for key in ("value", "weight"))
            side[model] = FORMULAS[wanted[row["metric"]]](values[draws].sum(1) / weights[draws].sum(1))
        low, high = np.quantile(side["bad"] - side["good"], (0.02, 0.98))
        assert row["low"] == pytest.approx(low, rel=0.2) and row["high"] == pytest.approx(high, rel=0.2)


def test_the_page_names_filters_and_what_is_missing(world, compared):
    rows, _, page = compared
    assert "no_metric" not in {row["task"] for row in rows}
    assert "gives no metric" in page.text and "nan, no finite number, and left empty" in page.text
    if any(row["suite"] == "given" for row in rows):
        assert "exact match (strict-match)" in page.text and "exact match (flexible-extract)" in page.text
        two = [(row["filter"], row["n"]) for row in rows if row["task"] == "t_two" and row["model"] == "good"]
        assert sorted(two) == [("flexible-extract", 16), ("strict-match", 16)]
    figures = json.loads((world.root / "summary/manifest.json").read_text())["data"]
    assert not any("figure" in facts for facts in figures.values())  # lm-eval's bits per byte are no suite of ours


def test_one_model_alone_and_no_evaluation_at_all_give_a_report(world, compared):
    rows, pairs, page = reported(world.root, ["evaluations/good/lm/manifest.json"], [])
    assert rows and not pairs and "Nothing to compare" in page.text
    rows, pairs, page = reported(world.root, ["evaluations/good/empty/manifest.json"], [])
    assert not rows and not pairs and "gives no metric" in page.text
    rows, pairs, _ = reported(world.root, [], [entry("bad", control="good")])
    assert not rows and not pairs


def test_documents_of_other_models_are_not_mixed_up(world, compared):
    """A suite of which one model scored fewer documents (its limit changed) is not compared in pairs."""
    world.evaluate("good", ["choice"], suite="odd")
    world.evaluate("bad", ["choice"], suite="odd", limit=7)
    made = [f"evaluations/{model}/odd/manifest.json" for model in ("good", "bad")]
    _, pairs, page = reported(world.root, made, [entry("bad", control="good")])
    assert {row["reason"] for row in pairs} == {"not the same documents"}
    assert "There is no paired comparison: not the same documents." in page.text


def made_up(root, name, suite, rows, kind="lm_eval"):
    """An evaluation whose per-document values are given: {(metric, filter): values}."""
    results, samples = [], []
    for (metric, kind_of), values in rows.items():
        result = {"task": "t", "metric": metric, "filter": kind_of, "value": float(np.mean(values)), "stderr": 0.1}
        result |= {"n": len(values), "higher_is_better": True, "aggregation": "mean", "leads": not results}
        results.append(result)
        place = {"task": "t", "subtask": "t", "metric": metric, "filter": kind_of, "weight": 1.0}
        samples += [place | {"doc_id": i, "value": float(value)} for i, value in enumerate(values)]
    sink = pa.BufferOutputStream()
    pq.write_table(pa.Table.from_pylist(samples, schema=schemas.TASK_SAMPLES), sink)
    files = {"results.json": json.dumps({"suite": kind, "notes": [], "results": results}).encode()}
    files["samples.parquet"] = sink.getvalue().to_pybytes()
    manifest = f"evaluations/{name}/{suite}/manifest.json"
    tiny.publish(root / manifest, "evaluate", files, spec={"of": manifest})
    return manifest


CONFIG = {
    "seed10k": {"student": "s"},
    "seed20k": {"student": "s"},
    "x-seed1": {"student": "s"},
    "x-seed2": {"student": "s"},
    "m": {"student": "s", "label": "M", "matrix": {"way": {"sft": {}, "alm": {"label": "A"}}, "seed": [1, 2]}},
    "m-sft": {"student": "s"},
    "only": {"student": "s", "matrix": {"seed": [3]}},
    "seeds": {"student": "s", "matrix": {"run": {"one": {"seed": 1}, "two": {"seed": 2}}}},
    "other": {"student": "s", "matrix": {"train.seed10k": [1, 2]}},
}


def test_a_matrix_knows_its_seeds():
    groups = expand.seed_groups(CONFIG)
    assert groups == {
        "m-sft-seed1": "m-sft", "m-sft-seed2": "m-sft", "m-alm-seed1": "m-alm", "m-alm-seed2": "m-alm",
        "only-seed3": "only", "seeds-one": "seeds", "seeds-two": "seeds",
    }  # fmt: skip
    assert groups.keys() < expand.expand_matrices(CONFIG).keys()


def test_seeds_are_put_together_by_the_matrix_and_not_by_names(tmp_path):
    root = tmp_path / "results"
    groups = expand.seed_groups(CONFIG)
    names = [name for name in expand.expand_matrices(CONFIG) if not name.startswith("other")]
    random = np.random.default_rng(0)
    experiments, made = [], [made_up(root, "s", "suite", {("acc", "none"): random.random(20)})]
    for name in names:
        label = {"m-sft-seed1": "M", "m-sft-seed2": "M", "m-alm-seed1": "A", "m-alm-seed2": "A"}.get(name, name)
        facts = {"label": label, "group": groups.get(name), "seed": 2 if name.endswith("2") else 1}
        experiments.append(entry(name, control="s", student="s", **facts))
        made.append(made_up(root, name, "suite", {("acc", "none"): random.random(20) + 0.2}))
    _, pairs, page = reported(root, made, experiments)
    control = [row for row in pairs if row["kind"] == "control"]
    together = {row["a"]: (row["label_a"], row["seeds"]) for row in control if row["seeds"] > 1}
    assert together == {"m-sft": ("M", 2), "m-alm": ("A", 2), "seeds": ("seeds", 2)}
    shown = {row["label_a"] for row in control if not row["within_seeds"]}
    assert shown == {"seed10k", "seed20k", "x-seed1", "x-seed2", "m-sft", "M", "A", "only-seed3", "seeds"}
    assert {row["label_a"] for row in control if row["within_seeds"]} == {
        "M, seed 1", "M, seed 2", "A, seed 1", "A, seed 2", "seeds-one", "seeds-two",
    }  # fmt: skip
    assert sum(row["a"] == "m-sft" for row in control) == 2  # the experiment of that name, and the group
    for name in ("seed10k: ", "seed20k: ", "M: ", "x-seed1: "):
        assert name in page.text
    for row in (row for row in control if row["seeds"] == 2):
        members = [one for one in control if groups.get(one["a"]) == row["a"]]
        assert row["difference"] == pytest.approx(np.mean([one["difference"] for one in members]))


def test_bits_that_are_not_finite_are_left_empty(tmp_path, capfd, monkeypatch):
    root = tmp_path / "results"
    tiny.tokenizer_artifact(root, "t", 300)
    corpus = tiny.corpus_artifact(root, "docs")
    token_bits, made = scoring.token_bits, []
    for name, value in (("whole", 1.0), ("nan", np.nan), ("endless", np.inf)):
        tiny.llama(root.parent / name, 300)

        def spoilt(*given, value=value):
            return token_bits(*given) * np.where(np.arange(len(given[1])) == 9, value, 1)

        monkeypatch.setattr(scoring, "token_bits", spoilt)
        spec = {"model": {"name": name, "path": str(root.parent / name), "dtype": "auto"}, "seed": 0}
        spec |= {"suite": {"kind": "bits_per_byte", "limit": None}}
        spec |= {"inputs": {"tokenizer": tiny.entry("tokenizers/t/manifest.json"), "corpus": tiny.entry(corpus)}}
        made.append(f"evaluations/{name}/bpb/manifest.json")
        evaluate.main(tiny.argv(root, made[-1], spec))
    assert "note: docs: the model gives no finite bits to 1 of 12 examples" in capfd.readouterr().err
    rows, pairs, page = reported(root, made, [entry("nan", control="whole"), entry("endless", control="whole")])
    assert [row["value"] is None for row in rows] == [False, True, True]
    assert {row["verdict"] for row in pairs} == {"no paired comparison"} and "no finite bits" in page.text
    assert inspect.main([str(root / "evaluations/nan/bpb")]) is None
