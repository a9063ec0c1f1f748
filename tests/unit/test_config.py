"""Every fault of a config gives one sentence that names the key and the fix."""

import copy
from pathlib import Path

import pytest
import yaml

from stages.core.errors import UserError
from stages.planning import check, expand, plan, run, sources

BASE = {
    "name": "test",
    "corpora": {"docs": {"kind": "python_docs"}},
    "tokenizers": {"a": {"source": "org/a"}, "b": {"source": "org/b"}},
    "models": {"big": {"path": "org/big", "tokenizer": "a"}, "small": {"path": "org/small", "tokenizer": "b"}},
    "experiments": {"alm": {"student": "small", "teacher": "big", "corpus": "docs", "losses": ["alm_unconstrained"]}},
    "evaluation": {"suites": {"heldout": {"kind": "bits_per_byte", "corpus": "docs"}}},
}
TRAINED = {"student": "small", "teacher": "big", "corpus": "docs", "losses": ["alm_unconstrained"]}


@pytest.fixture
def schema(repository):
    return yaml.safe_load((repository / run.SCHEMA).read_text())


def changed(path, value):
    config = copy.deepcopy(BASE)
    place = config
    *parents, last = path.split("/")
    for part in parents:
        place = place.setdefault(part, {})
    place[last] = value
    return config


FAULTS = [
    ("experiments/alm/los_weights", [1], ["experiments.alm.los_weights", "did you mean `loss_weights`?"]),
    ("experiments/alm/train", {"learning_rat": 0.1}, ["experiments.alm.train.learning_rat", "`learning_rate`"]),
    ("modles", {}, ["`modles`", "did you mean `models`?"]),
    ("signals", {"top-k": 3}, ["signals.top-k", "`top_k`"]),
    ("experiments/alm/train", {"learning_rate": "1e-5"}, ["experiments.alm.train.learning_rate", "write 1.0e-5"]),
    ("experiments/alm/train", {"steps": -1}, ["experiments.alm.train.steps", "at least 0"]),
    ("experiments/alm/train", {"steps": 2.5}, ["experiments.alm.train.steps", "a whole number"]),
    ("experiments/alm/losses", "sft", ["experiments.alm.losses", "must be a list"]),
    ("experiments/alm/losses", ["alm_unconstrainde"], ["experiments.alm.losses", "did you mean `alm_unconstrained`?"]),
    ("experiments/alm/losses", ["sft", "sft"], ["experiments.alm.losses", "twice"]),
    ("experiments/alm/loss_weights", [1.0, 2.0], ["experiments.alm.loss_weights", "2 numbers for 1 losses"]),
    ("experiments/alm/loss_weights", [0.0], ["experiments.alm.loss_weights", "all 0"]),
    ("experiments/alm/alm_mode", "append_spaces", ["experiments.alm.alm_mode", "`append_space`"]),
    ("experiments/alm", TRAINED | {"alm_diff_fn": "renyi", "renyi_alpha": 1.0}, ["experiments.alm.renyi_alpha"]),
    ("experiments/alm", TRAINED | {"losses": ["fkl"], "temperature": 0}, ["alm.temperature", "more than 0"]),
    ("experiments/alm", TRAINED | {"losses": ["fkl"]}, ["`fkl`", "another tokenizer (`a`) than its student (`b`)"]),
    (
        "experiments/alm",
        TRAINED | {"losses": ["rskd"], "teacher": "small", "temperature": 2.0},
        ["experiments.alm.temperature", "`rskd` draws tokens at temperature 1"],
    ),
    (
        "experiments/alm",
        TRAINED | {"losses": ["gold"], "gold_matched_weight": 3.0},
        ["experiments.alm.gold_matched_weight", "give both"],
    ),
    (
        "experiments/alm",
        TRAINED | {"losses": ["alm_latents"], "latents_to_align": "all_hidden_states", "latents_do_project": True},
        ["experiments.alm.latents_do_project", "change one"],
    ),
    ("experiments/alm/alm_diff_fn", "binary_cee", ["experiments.alm.alm_diff_fn", "did you mean `binary_ce`?"]),
    ("experiments/alm/teacher", "bigg", ["experiments.alm.teacher", "did you mean `big`?"]),
    ("experiments/alm/student", "tiny", ["experiments.alm.student", "known: big, small"]),
    ("experiments/alm/tokenizer", "c", ["experiments.alm.tokenizer", "not in tokenizers"]),
    ("experiments/alm/corpus", "dosc", ["experiments.alm.corpus", "did you mean `docs`?"]),
    ("experiments/alm/train", {"steps": 5, "warmup_steps": 6}, ["warmup_steps", "more than `steps`"]),
    ("experiments/alm/train", {"train_model_mode": "embeddings", "train_embeddings": False}, ["trains nothing"]),
    ("experiments/big", {"student": "small", "losses": ["sft"], "corpus": "docs"}, ["both a model and an experiment"]),
    ("experiments/copy", {"student": "small"}, ["experiments.copy", "copy of its student"]),
    ("experiments/a b", {"student": "small"}, ["`a b`", "file name"]),
    ("corpora/..", {"kind": "python_docs"}, ["`..`", "path separators"]),
    ("models/up/down", {"path": "x", "tokenizer": "a"}, ["models.up"]),
    ("models/a\\b", {"path": "x", "tokenizer": "a"}, ["path separators"]),
    ("name", "results/elsewhere", ["`name`", "path separators"]),
    ("corpora/web", {"kind": "hubb", "path": "x"}, ["corpora.web.kind", "did you mean `hub`?"]),
    ("corpora/web", {"kind": "hub"}, ["corpora.web", "lacks the key `path`"]),
    ("corpora/part", {"kind": "subset", "of": "doc"}, ["corpora.part.of", "did you mean `docs`?"]),
    ("corpora/docs/heldout", 1.0, ["corpora.docs.heldout", "less than 1"]),
    ("models/big", {"tokenizer": "a"}, ["models.big", "exactly one of `path` and `pretrain`"]),
    ("models/big/tokenizer", "z", ["models.big.tokenizer", "not in tokenizers"]),
    ("evaluation/suites/x", {"kind": "lm_eval"}, ["evaluation.suites.x", "names no task"]),
    ("evaluation/models", ["small", "nobody"], ["evaluation.models", "`nobody`"]),
    ("signals", {"space_mask_mode": "space+tabs"}, ["signals.space_mask_mode", "did you mean `tab`?"]),
    ("experiments/alm/matrix", {"seed": 3}, ["experiments.alm.matrix.seed", "list of values"]),
    ("experiments", {"x": {"student": "small", "losses": ["sft"]}}, ["experiments.x", "names no `corpus`"]),
]


@pytest.mark.parametrize(
    ("path", "value", "fragments"), FAULTS, ids=[f"{path}={value}"[:60] for path, value, _ in FAULTS]
)
def test_fault_names_key_and_fix(schema, path, value, fragments):
    with pytest.raises(UserError) as caught:
        expand.expand(changed(path, value), schema)
    message = str(caught.value)
    assert all(fragment in message for fragment in fragments), message
    assert "\n" not in message and len(message) < 400


ENTRIES = {
    "corpora": {"kind": "python_docs"},
    "tokenizers": {"source": "org/a"},
    "models": {"path": "org/x", "tokenizer": "a"},
    "experiments": TRAINED,
    "evaluation/suites": {"kind": "bits_per_byte", "corpus": "docs"},
    "evaluation/tasks": {"corpus": "docs"},
    "resources": {"gpu": 1},
}
NO_TEXT = ["1", "2.5", "yes", "2026-01-01", "null", "0x10", "2026-01-01 10:00:00"]


@pytest.mark.parametrize("name", NO_TEXT)
@pytest.mark.parametrize("section", [*ENTRIES, "experiments/alm/matrix", "experiments/alm/matrix/axis"])
def test_names_that_yaml_reads_as_something_else(schema, section, name):
    """Written as a person writes them; in quotes the same names are fine."""
    entry = ENTRIES.get(section, {"label": "x"})
    parsed = yaml.safe_load(f"{name}: {entry!r}".replace("'", '"'))
    config = changed(section, place_of(section, BASE) | parsed)
    with pytest.raises(UserError, match="to YAML, not text; write it in quotes") as caught:
        expand.expand(config, schema)
    assert section.replace("/", ".") in str(caught.value) and f"`{next(iter(parsed))}`" in str(caught.value)


def place_of(section, config):
    for part in section.split("/"):
        config = config.get(part, {})
    return config


@pytest.mark.parametrize("value", [None, [], "text", 5, True], ids=str)
@pytest.mark.parametrize(
    "place",
    [
        "corpora", "tokenizers", "models", "experiments", "evaluation", "evaluation/suites", "evaluation/tasks",
        "resources", "signals", "corpora/docs", "tokenizers/a", "models/big", "experiments/alm",
        "experiments/alm/matrix", "experiments/alm/train", "experiments/alm/baseline", "evaluation/suites/heldout",
        "evaluation/tasks/t", "resources/distill", "tokenizers/a/train", "models/new/pretrain",
    ],
)  # fmt: skip
def test_sections_that_are_no_mapping(schema, place, value):
    with pytest.raises(UserError) as caught:
        expand.expand(changed(place, value), schema)
    message = str(caught.value)
    assert place.replace("/", ".") in message or place.rpartition("/")[0].replace("/", ".") in message
    assert "\n" not in message


@pytest.mark.parametrize("place", ["corpora/docs/kind", "evaluation/suites/heldout/kind", "experiments/alm/student"])
@pytest.mark.parametrize("value", [None, ["x"], {"a": 1}, 1, yaml.safe_load("2026-01-01")], ids=str)
def test_values_that_are_no_text(schema, place, value):
    with pytest.raises(UserError, match=place.replace("/", r"\.")):
        expand.expand(changed(place, value), schema)


def test_base_is_accepted_and_filled(schema):
    full = expand.expand(copy.deepcopy(BASE), schema)
    experiment = full["experiments"]["alm"]
    assert experiment["tokenizer"] == "b"
    assert experiment["loss_weights"] == [1.0]
    assert experiment["binarization_temp"] == 5.0
    assert experiment["train"]["b2"] == 0.95
    assert full["evaluation"]["models"] == ["big", "small", "alm"]


def test_shipped_configs_are_valid(schema, repository):
    for path in sorted((repository / "config").glob("*.yaml")):
        config = yaml.safe_load(path.read_text())
        nodes = plan.build(expand.expand(config, schema), sources.Digests(Path("/nonexistent/digests.json")))
        assert any(node.stage == "report" for node in nodes.values()), path


def test_matrix_gives_one_experiment_for_each_combination():
    entry = {
        "student": "s",
        "train": {"steps": 1},
        "matrix": {"m": {"x": {"train": {"b1": 0.5}}, "y": {}}, "seed": [1, 2]},
    }
    expanded = expand.expand_matrices({"e": entry})
    assert list(expanded) == ["e-x-seed1", "e-x-seed2", "e-y-seed1", "e-y-seed2"]
    assert expanded["e-x-seed2"] == {"student": "s", "train": {"steps": 1, "b1": 0.5}, "seed": 2}


def test_matrix_axis_may_be_a_nested_key():
    expanded = expand.expand_matrices({"e": {"train": {"steps": 1}, "matrix": {"train.learning_rate": [0.1]}}})
    assert expanded == {"e-learning_rate0.1": {"train": {"steps": 1, "learning_rate": 0.1}}}


def test_two_experiments_with_one_name_are_refused():
    with pytest.raises(UserError, match="two experiments are called `e-seed1`"):
        expand.expand_matrices({"e-seed1": {}, "e": {"matrix": {"seed": [1]}}})


def test_one_key_twice_in_a_file_is_refused(tmp_path):
    path = tmp_path / "config.yaml"
    path.write_text("experiments:\n  a: {student: x}\n  b: {}\n  a: {student: y}\n")
    with pytest.raises(UserError, match=r"line 4: `a` was already given in line 2"):
        check.refuse_duplicate_keys([path])


def test_missing_model_folder_is_refused(schema, tmp_path):
    config = changed("models/big/path", str(tmp_path / "nothing"))
    with pytest.raises(UserError, match=r"models.big.path.*does not exist"):
        plan.build(expand.expand(config, schema), sources.Digests(tmp_path / "digests.json"))


def test_folder_without_weights_is_refused(schema, tmp_path):
    (tmp_path / "config.json").write_text("{}")
    config = changed("models/big/path", str(tmp_path))
    with pytest.raises(UserError, match=r"no .safetensors weights"):
        plan.build(expand.expand(config, schema), sources.Digests(tmp_path / "digests.json"))


def test_data_file_that_matches_nothing_is_refused(schema, tmp_path):
    config = changed("corpora/docs", {"kind": "jsonl", "path": str(tmp_path / "*.jsonl")})
    with pytest.raises(UserError, match=r"corpora.docs.path.*no file matches"):
        plan.build(expand.expand(config, schema), sources.Digests(tmp_path / "digests.json"))


ARCHITECTURE = {"hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}


@pytest.mark.parametrize("train", [None, {}, {"steps": 7}, {"train_model_mode": "full"}], ids=str)
def test_model_from_scratch_trains_all_weights(schema, train):
    recipe = {"corpus": "docs", "architecture": ARCHITECTURE} | ({} if train is None else {"train": train})
    config = changed("models/new", {"tokenizer": "a", "pretrain": recipe})
    config["evaluation"]["models"] = ["new"]
    nodes = plan.build(expand.expand(config, schema), sources.Digests(Path("/nonexistent/digests.json")))
    assert nodes["models/new/manifest.json"].spec["train"]["train_model_mode"] == "full"


@pytest.mark.parametrize(
    ("train", "fragments"),
    [
        ({"train_model_mode": "lora"}, ["models.new.pretrain.train.train_model_mode", "full"]),
        ({"train_model_mode": "embeddings"}, ["models.new.pretrain.train.train_model_mode", "full"]),
        ({"steps": 5, "warmup_steps": 6}, ["models.new.pretrain.train.warmup_steps", "more than `steps`"]),
        ({"stepz": 5}, ["models.new.pretrain.train.stepz", "did you mean `steps`?"]),
    ],
)
def test_models_from_scratch_are_checked_as_experiments_are(schema, train, fragments):
    recipe = {"corpus": "docs", "architecture": ARCHITECTURE, "train": train}
    with pytest.raises(UserError) as caught:
        expand.expand(changed("models/new", {"tokenizer": "a", "pretrain": recipe}), schema)
    assert all(fragment in str(caught.value) for fragment in fragments), caught.value
