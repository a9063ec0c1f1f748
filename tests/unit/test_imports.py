"""The rooms of stages/: imports go one way, and no two modules import each other, not even for types."""

import ast
from graphlib import CycleError, TopologicalSorter

import pytest

# Each room imports those of earlier lines alone, or others of its own line.
ORDER = (
    ("core",),
    ("artifacts", "planning", "tokenization"),
    ("alignment", "corpora", "inspection", "vocabulary"),
    ("models",),
    ("embeddings", "losses", "signals"),
    ("evaluation", "generation", "training"),
    ("summary",),
)


@pytest.fixture(scope="module")
def imports(repository):
    """Module -> the project modules that it imports anywhere in its text."""
    root = repository / "stages"
    modules = {}
    for path in root.rglob("*.py"):
        name = ".".join(("stages", *path.relative_to(root).with_suffix("").parts)).removesuffix(".__init__")
        modules[name] = path
    found = {}
    for name, path in modules.items():
        named = set()
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.ImportFrom) and node.module:
                named |= {node.module} | {f"{node.module}.{alias.name}" for alias in node.names}
            elif isinstance(node, ast.Import):
                named |= {alias.name for alias in node.names}
        found[name] = {other for other in named if other in modules and other != name}
    return found


def room(module):
    """The folder of a module of the library; None for a program."""
    parts = module.split(".")
    return parts[1] if len(parts) > 2 or parts[-1] in LEVEL else None


LEVEL = {name: number for number, line in enumerate(ORDER) for name in line}


def pairs(imports):
    return [(name, other) for name, others in imports.items() for other in others]


def test_rooms_import_one_way(imports):
    assert {room(name) for name in imports} - {None} == set(LEVEL)
    inner = [(a, b) for a, b in pairs(imports) if room(a) and room(b) and room(a) != room(b)]
    assert not [f"{a} imports {b}" for a, b in inner if LEVEL[room(b)] > LEVEL[room(a)]]


def test_programs_are_imported_by_nothing(imports):
    assert not [f"{a} imports {b}" for a, b in pairs(imports) if room(b) is None and b != "stages"]


def test_no_circle(imports):
    # Whoever imports a module imports its package too, which may name the module again: that is no circle of concepts.
    graph = {name: set() for name in imports}
    for a, b in pairs(imports):
        if not f"{a}.".startswith(f"{b}.") and not f"{b}.".startswith(f"{a}."):
            graph[a].add(b)
    try:
        TopologicalSorter(graph).prepare()
    except CycleError as error:
        pytest.fail(" -> ".join(error.args[1]))


@pytest.mark.parametrize("low", ["signals", "evaluation", "generation"])
def test_training_is_nothing_to_those_who_serve_it(imports, low):
    assert not [f"{a} imports {b}" for a, b in pairs(imports) if room(a) == low and room(b) == "training"]


ASKED = {"get_text_config", "generation_config", "get_input_embeddings", "get_output_embeddings", "base_model"}


def test_only_models_looks_at_the_attributes_of_a_model(repository):
    """What is assumed of a model is asked in `stages/models`, by everything else of its description."""
    found = [
        f"{path.name}, line {node.lineno}: {node.attr}"
        for path in (repository / "stages").rglob("*.py")
        if path.parent.name != "models"
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8")))
        if isinstance(node, ast.Attribute)
        and (node.attr in ASKED or (node.attr == "config" and _is_a_model(node.value)))
    ]
    assert not found


def _is_a_model(node):
    """Whether an expression is called as models are: model, teacher, student, ....model."""
    name = node.attr if isinstance(node, ast.Attribute) else getattr(node, "id", "")
    return name in ("model", "teacher", "student", "outer")
