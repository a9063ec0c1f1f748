"""The stage tokenizer_bias, its settings in the plan, and training with what it makes."""

import json
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
import yaml

from stages import inspect, tokenizer_bias, tokenizer_stats
from stages.alignment.statistics import SIDES
from stages.artifacts.schemas import BIAS, COUNTS
from stages.artifacts.tables import read_table
from stages.core import artifact
from stages.core.errors import UserError
from stages.planning import expand, plan, run, sources
from stages.tokenization import ByteView
from tests.unit import tiny
from tests.unit.test_bias import Definition, defined_bias, unigram
from tests.unit.test_distill import ALM, World


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    return World(tmp_path_factory.mktemp("bias") / "results")


@pytest.fixture(scope="module")
def signals(world):
    return world.signals()


def made(world, pairs, teacher=None, student=None, name=None, **settings):
    """Run tokenizer_stats and tokenizer_bias; the bias artifact's manifest path."""
    inputs = {"teacher_tokenizer": teacher or world.teacher_tokenizer, "tokenizer": student or world.tokenizer}
    inputs["corpus"] = world.corpus
    folder = f"tokenizer_pairs/{name or pairs}"
    world.run(tokenizer_stats.main, f"{folder}/statistics/manifest.json", {}, **inputs)
    inputs["statistics"] = f"{folder}/statistics/manifest.json"
    world.run(tokenizer_bias.main, f"{folder}/bias/manifest.json", {"pairs": pairs} | settings, **inputs)
    return f"{folder}/bias/manifest.json"


UNBIASED = ALM | {"name": "alm_unbiased", "chunks": "unbiased"}


def unbiased(threshold):
    return {"loss": {"tokenizer_pair_bias_threshold": threshold}}


def test_stage(world, capsys):
    paths = {pairs: (world.root / made(world, pairs)).with_name("bias.parquet") for pairs in ("chunk_ends", "all")}
    rows = {
        pairs: {(row["teacher_id"], row["student_id"]): row for row in read_table(path, BIAS).to_pylist()}
        for pairs, path in paths.items()
    }
    assert set(rows["chunk_ends"]) < set(rows["all"])
    assert all(rows["all"][key] == row for key, row in rows["chunk_ends"].items())
    assert all(row["teacher_count"] > 0 and row["student_count"] > 0 for row in rows["chunk_ends"].values())
    assert any(0 < row["bias1"] < 1 for row in rows["chunk_ends"].values())
    assert (
        pq.read_table(paths["all"]).num_rows
        == artifact.read_manifest(paths["all"].with_name("manifest.json"))["metrics"]["pairs"]
    )
    inspect.main([str(paths["all"].parent)])
    assert "pairs without bias; the most used with one" in capsys.readouterr().out


def test_stage_smooths_as_told(world):
    """Against the definition with that constant; 1e-9 where nothing is said."""
    found = {}
    for constant in (None, 1e-9, 0.01):
        settings = {} if constant is None else {"additive_smoothing_constant": constant}
        path = made(world, "all", name=f"smoothed-{constant}", **settings)
        found[constant] = read_table((world.root / path).with_name("bias.parquet"), BIAS).to_pylist()
    assert found[None] == found[1e-9]
    views = [ByteView.load((world.root / place).parent) for place in (world.teacher_tokenizer, world.tokenizer)]
    counts = [np.zeros(view.vocab_size, np.int64) for view in views]
    statistics = read_table(world.root / "tokenizer_pairs/smoothed-0.01/statistics/counts.parquet", COUNTS)
    for side, count in zip(SIDES, counts, strict=True):
        count[:] = [row["count"] for row in statistics.to_pylist() if row["side"] == side]
    probabilities = [unigram(count, 0.01) for count in counts]
    definitions = [Definition(view) for view in views]
    rows = found[0.01][:: len(found[0.01]) // 40]
    expected = [defined_bias(*definitions, probabilities, (row["teacher_id"], row["student_id"])) for row in rows]
    np.testing.assert_allclose([(row["bias1"], row["bias2"]) for row in rows], expected, rtol=1e-9, atol=1e-14)
    assert [row["bias1"] for row in rows] != [row["bias1"] for row in found[None][:: len(found[None]) // 40]]


def test_a_negative_smoothing_is_refused(world):
    with pytest.raises(UserError, match=r"additive_smoothing_constant is -1e-09; it must be a number from 0 on"):
        made(world, "all", name="refused", additive_smoothing_constant=-1e-9)


def test_statistics_of_other_tokenizers_are_refused(world):
    made(world, "all", name="mixed")
    inputs = {"teacher_tokenizer": world.tokenizer, "tokenizer": world.teacher_tokenizer, "corpus": world.corpus}
    inputs["statistics"] = "tokenizer_pairs/mixed/statistics/manifest.json"
    with pytest.raises(UserError, match=r"counts 400 tokens of the teacher, whose tokenizer .* has 300"):
        world.run(tokenizer_bias.main, "tokenizer_pairs/mixed/refused/manifest.json", {"pairs": "all"}, **inputs)


def test_training_without_bias(world, signals):
    """With every boundary accepted it is alm_unconstrained; with none but slot ends, it compares whole slots."""
    bias = made(world, "chunk_ends")
    world.distill("free", [UNBIASED], signals=signals, bias=bias, **unbiased(1.0))
    world.distill("shortest", [ALM], signals=signals)
    world.distill("unbiased", [UNBIASED], signals=signals, bias=bias, **unbiased(1e-4))
    losses = {name: world.metrics(name)[0] for name in ("free", "shortest", "unbiased")}
    assert losses["free"]["alm_unbiased"] == losses["shortest"]["alm_unconstrained"]
    assert losses["unbiased"]["alm_unbiased"] > 0 and losses["unbiased"] != losses["free"]


def test_all_pairs_and_chunk_ends_train_alike(world, signals):
    for pairs in ("all", "chunk_ends"):
        world.distill(f"with-{pairs}", [UNBIASED], signals=signals, bias=made(world, pairs), **unbiased(1e-3))
    assert world.metrics("with-all") == world.metrics("with-chunk_ends")


def test_bias_of_another_pair_is_refused(world, signals):
    other = world.named(tiny.tokenizer_artifact(world.root, "other", 350))
    bias = made(world, "chunk_ends", teacher=other, name="other")
    with pytest.raises(UserError, match=r"bias/.* was made with another teacher_tokenizer") as caught:
        world.distill("refused", [UNBIASED], signals=signals, bias=bias, **unbiased(1e-4))
    assert "\n" not in str(caught.value) and not (world.root / "students/refused").exists()
    assert json.loads((world.root / bias).read_text())["metrics"]["pairs"] > 0


def planned(repository, losses, more=None, **settings):
    """Return the nodes of the demo with one more experiment, and that experiment's own."""
    config = yaml.safe_load((repository / "config/config.yaml").read_text())
    extra = {"student": "teacher", "tokenizer": "spbpe", "corpus": "transfer", "losses": losses}
    extra |= more or {}
    config["experiments"] = config["experiments"] | {"extra": extra}
    schema = yaml.safe_load((repository / run.SCHEMA).read_text())
    nodes = plan.build(expand.expand(config | settings, schema), sources.Digests(Path("/nonexistent/digests.json")))
    return nodes, nodes["students/extra/manifest.json"]


def test_plan(repository):
    """Only an experiment that asks for bias statistics has any, and no other experiment is another for it."""
    without, _ = planned(repository, ["sft"])
    nodes, student = planned(repository, ["alm_unbiased"])
    (bias,) = (node for node in nodes.values() if node.stage == "tokenizer_bias")
    assert not any(node.stage == "tokenizer_bias" for node in without.values())
    assert bias.manifest in student.inputs and bias.spec["pairs"] == "chunk_ends"
    assert [nodes[name].stage for name in bias.inputs] == ["tokenizer", "tokenizer", "corpus", "tokenizer_stats"]
    assert student.spec["loss"]["tokenizer_pair_bias_threshold"] == 1e-4
    students = [name for name, node in without.items() if node.stage == "distill" and name != student.manifest]
    assert students and all(nodes[name] == without[name] for name in students)
    chosen, _ = planned(repository, ["alm_unbiased"], tokenizer_bias={"pairs": "all"})
    assert chosen[bias.manifest].spec["pairs"] == "all"
    mapped = {"side_path_mapping_mode": "bias_threshold"}
    whole, student = planned(repository, ["alm_side_path"], mapped)
    assert whole[bias.manifest].spec["pairs"] == "all" and bias.manifest in student.inputs
    with pytest.raises(UserError, match=r"tokenizer_bias.pairs.*corpus"):
        planned(repository, ["alm_unbiased"], tokenizer_bias={"pairs": "corpus"})


def test_plan_of_the_smoothing(repository):
    """tokenkit's name and default; part of what the statistics are, whichever pairs they are of."""
    nodes, _ = planned(repository, ["alm_unbiased"])
    (bias,) = (node for node in nodes.values() if node.stage == "tokenizer_bias")
    assert bias.spec["additive_smoothing_constant"] == 1e-9
    for losses, more in (("alm_unbiased", {}), ("alm_side_path", {"side_path_mapping_mode": "bias_threshold"})):
        other, _ = planned(repository, [losses], more, tokenizer_bias={"additive_smoothing_constant": 0.5})
        assert other[bias.manifest].spec["additive_smoothing_constant"] == 0.5
    for wrong, word in (
        (-1, "at least 0"),
        ("1e-9", "1.0e-5"),
        (None, "empty"),
        (True, "true or false"),
        (float("nan"), "finite"),
        (float("inf"), "finite"),
    ):
        with pytest.raises(UserError, match=rf"tokenizer_bias.additive_smoothing_constant.*{word}"):
            planned(repository, ["alm_unbiased"], tokenizer_bias={"additive_smoothing_constant": wrong})
