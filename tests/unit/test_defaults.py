"""A loss or a stage that is called without a setting does what the config's default would make it do."""

import importlib
import pkgutil

import pytest
import yaml

from stages import cloze_task, corpus, losses, pretrain
from stages.planning import check
from stages.training import modes

MODULES = [importlib.import_module(f"stages.losses.{found.name}") for found in pkgutil.iter_modules(losses.__path__)]
SETTINGS = [(module, key) for module in MODULES for key in getattr(module, "DEFAULTS", {})]


@pytest.fixture(scope="module")
def kinds(repository):
    path = repository / "workflow" / "schemas" / "config.schema.yaml"
    return yaml.safe_load(path.read_text(encoding="utf-8"))["$defs"]


@pytest.fixture(scope="module")
def known(kinds):
    """The schema's entry for each setting of an experiment or of its `baseline`."""
    return kinds["baseline"]["properties"] | kinds["experiment"]["properties"]


@pytest.mark.parametrize(("module", "key"), SETTINGS, ids=[f"{m.__name__.split('.')[-1]}-{k}" for m, k in SETTINGS])
def test_a_default_is_the_schema_s(module, key, known):
    assert key in known, "no config can set it"
    default = known[key]["default"]
    if default is not None:  # null: the module's own
        assert module.DEFAULTS[key] == default
        assert isinstance(module.DEFAULTS[key], bool) == isinstance(default, bool)


def filled(kinds, name, value):
    return check.validate(value, {"$defs": kinds}, name, name)


def test_training_defaults_are_the_schema_s(kinds):
    """Of an experiment, and of a model that is trained from scratch: what the stage does without a setting."""
    experiment = filled(kinds, "experiment", {"student": "x"})
    schema = experiment["train"] | {key: experiment["baseline"][key] for key in ("gradnorm_alpha", "gradnorm_lr")}
    schema["multitask_aggregation_fn"] = experiment["multitask_aggregation_fn"]
    assert schema == modes.DEFAULTS
    recipe = {"corpus": "c", "architecture": {"hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}}
    model = filled(kinds, "model_pretrain", {"tokenizer": "t", "pretrain": recipe})
    assert modes.settings_of(model["pretrain"]["train"]) == pretrain.settings_of({})


def test_defaults_of_other_stages_are_the_schema_s(kinds):
    assert {key: filled(kinds, "task", {"corpus": "c"})[key] for key in cloze_task.DEFAULTS} == cloze_task.DEFAULTS
    initialize = filled(kinds, "experiment", {"student": "x"})["initialize"]
    assert initialize == {"method": "fvt", "output_embeddings_mode": "preserve"}
    assert filled(kinds, "corpus_files", {"path": "x"})["train_on"] == corpus.TRAIN_ON
