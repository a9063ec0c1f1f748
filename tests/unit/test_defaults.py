"""A loss that is called without a setting does what the config's default would make it do."""

import importlib
import pkgutil

import pytest
import yaml

from stages import losses

MODULES = [importlib.import_module(f"stages.losses.{found.name}") for found in pkgutil.iter_modules(losses.__path__)]
SETTINGS = [(module, key) for module in MODULES for key in getattr(module, "DEFAULTS", {})]


@pytest.fixture(scope="module")
def known(repository):
    """The schema's entry for each setting of an experiment or of its `baseline`."""
    path = repository / "workflow" / "schemas" / "config.schema.yaml"
    kinds = yaml.safe_load(path.read_text(encoding="utf-8"))["$defs"]
    return kinds["baseline"]["properties"] | kinds["experiment"]["properties"]


@pytest.mark.parametrize(("module", "key"), SETTINGS, ids=[f"{m.__name__.split('.')[-1]}-{k}" for m, k in SETTINGS])
def test_a_default_is_the_schema_s(module, key, known):
    assert key in known, "no config can set it"
    default = known[key]["default"]
    if default is not None:  # null: the module's own
        assert module.DEFAULTS[key] == default
        assert isinstance(module.DEFAULTS[key], bool) == isinstance(default, bool)
