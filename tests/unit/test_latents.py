"""Hidden-state distances: definition, what a split or a mask does to them, wrong shapes, and training on them."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st

from stages.core.errors import UserError
from stages.losses import latents
from stages.losses.chunks import merge_chunks
from stages.planning import expand, plan, run, sources
from stages.planning.methods import method_of, options_of, signal_needs

from . import programs, tiny
from .toy_pair import Toy, close, view

TEXTS = [tiny.text(3, 12), tiny.text(5, 4), "café naïve", tiny.text(8, 20)]
LATENTS = {"name": "alm_latents", "module": "stages.losses.latents", "chunks": "unconstrained", "weight": 1.0}


@pytest.fixture(scope="module")
def views(tmp_path_factory):
    folder = tmp_path_factory.mktemp("views")
    return view(folder / "teacher", 400), view(folder / "student", 300)


def reference(toy, options):
    """The loss by its definition, chunk by chunk in float64."""
    options = latents.DEFAULTS | options
    examples = toy.examples(range(len(TEXTS)))
    chunks = merge_chunks(*examples.chunks(latents.CHUNKS[options["latents_chunks"]]))
    bits = examples.signals["hidden_states"][chunks.teacher_end].astype(np.uint32) << 16
    size = toy.sides.teacher.head.weight.shape[1]
    teacher = bits.view(np.float32).astype(np.float64).reshape(len(bits), -1, size)
    student = toy.hidden.detach().double().numpy()[chunks.student_end]
    prefix = student.shape[1] - teacher.shape[1]
    student = np.stack([student[:, i + prefix] for i in range(teacher.shape[1])], 1)
    exponent = int(options["latents_normalization"][1])
    size = (np.abs(teacher) ** exponent).mean(0)
    if "channelwise" not in options["latents_normalization"]:
        size = size.mean(-1, keepdims=True)
    return (np.abs(student - teacher) ** exponent / size).mean()


@pytest.mark.parametrize("normalization", latents.EXPONENTS)
@pytest.mark.parametrize(("align", "layers"), [("last_hidden_state", 1), ("all_hidden_states", 3)])
@pytest.mark.parametrize("chunks", latents.CHUNKS)
def test_definition(views, normalization, align, layers, chunks):
    toy = Toy(*views, TEXTS, sizes=(4, 4), layers=layers)
    options = {"latents_normalization": normalization, "latents_to_align": align, "latents_chunks": chunks}
    value, _, gradients = toy.evaluate(latents, options, [range(4)])
    assert value == pytest.approx(reference(toy, options), rel=1e-5)
    assert set(gradients) == {"hidden"}


def deeper(views, layers, more, size=4):
    """A toy whose teacher has `layers` states, and its student so many more."""
    toy = Toy(*views, TEXTS, sizes=(size, size), layers=layers + more)
    toy.bits = toy.bits[:, : layers * size]
    return toy


@pytest.mark.parametrize("normalization", latents.EXPONENTS)
@pytest.mark.parametrize(("layers", "more"), [(3, 1), (2, 4), (1, 2)])
def test_a_deeper_student(views, normalization, layers, more):
    """Its first states are free; splitting the batch changes nothing."""
    toy = deeper(views, layers, more)
    options = {"latents_normalization": normalization, "latents_to_align": "all_hidden_states"}
    whole = toy.evaluate(latents, options, [range(4)])
    assert whole[0] == pytest.approx(reference(toy, options), rel=1e-5)
    assert (whole[2]["hidden"][:, :more] == 0).all() and (whole[2]["hidden"][:, more:] != 0).any(0).all()
    close(toy.evaluate(latents, options, [[2, 0], [1, 3]]), whole)


def test_a_deeper_student_that_ends_as_the_teacher_has_no_distance(views):
    toy = deeper((views[0], views[0]), 3, 2)
    bits = (toy.bits.astype(np.uint32) << 16).view(np.float32).reshape(len(toy.bits), 3, 4)
    with torch.no_grad():
        toy.hidden[:, 2:] = torch.tensor(bits)
    assert toy.evaluate(latents, {"latents_to_align": "all_hidden_states"}, [range(4)])[0] == 0


@settings(max_examples=20, deadline=None)
@given(
    order=st.permutations(range(4)),
    cut=st.integers(1, 3),
    normalization=st.sampled_from(sorted(latents.EXPONENTS)),
    projects=st.booleans(),
)
def test_a_split_batch_has_the_same_gradient(views, order, cut, normalization, projects):
    toy = Toy(*views, TEXTS, sizes=(6, 5) if projects else (5, 5))
    options = {"latents_normalization": normalization, "latents_do_project": projects}
    whole = toy.evaluate(latents, options, [range(4)])
    close(toy.evaluate(latents, options, [order[:cut], order[cut:]]), whole)
    assert ("weight" in whole[2]) == projects


def test_the_teacher_itself_has_no_distance(views):
    toy = Toy(views[0], views[0], TEXTS, sizes=(4, 4))
    bits = toy.bits.astype(np.uint32) << 16
    with torch.no_grad():
        toy.hidden.copy_(torch.tensor(bits.view(np.float32))[:, None])
    assert toy.evaluate(latents, {}, [range(4)])[0] == 0
    scaled = {"latents_normalization": "l2"}
    with torch.no_grad():
        toy.hidden.mul_(2)
    assert toy.evaluate(latents, scaled, [range(4)])[0] == pytest.approx(1, rel=1e-4)


def test_what_is_not_trained_does_not_count(views):
    toy = Toy(*views, TEXTS, sizes=(4, 4), masked={1, 2})
    value, _, gradients = toy.evaluate(latents, {}, [range(4)])
    close(toy.evaluate(latents, {}, [[0, 3]]), (value, None, gradients))
    starts = toy.student.offsets
    assert (gradients["hidden"][starts[1] : starts[3]] == 0).all() and gradients["hidden"].abs().sum() > 0


@pytest.mark.parametrize("texts", [["a"], [""], TEXTS[:1]])
def test_nothing_to_compare_is_zero(views, texts):
    toy = Toy(*views, texts, sizes=(4, 4), masked={0})
    value, _, gradients = toy.evaluate(latents, {}, [range(len(texts))])
    assert value == 0 and (gradients["hidden"] == 0).all()


def test_wrong_settings_and_shapes(views):
    for options, word in (
        ({"latents_to_align": "qkv"}, "qkv"),
        ({"latents_normalization": "l3"}, "l3"),
        ({"latents_chunks": "greedy"}, "greedy"),
        ({"latents_to_align": "all_hidden_states", "latents_do_project": True}, "latents_do_project"),
    ):
        with pytest.raises(UserError, match=word):
            latents.check(options)
    with pytest.raises(UserError, match=r"6 numbers \(teacher\) and 5 \(student\): set latents_do_project"):
        Toy(*views, TEXTS).evaluate(latents, {}, [range(4)])
    every = {"latents_to_align": "all_hidden_states"}
    toy = Toy(*views, TEXTS, sizes=(4, 6), layers=3)
    with pytest.raises(UserError, match=r"4 numbers \(teacher\) and 6 \(student\): align last_hidden_state with"):
        toy.evaluate(latents, every, [range(4)])
    toy = Toy(*views, TEXTS, sizes=(4, 4), layers=4)
    toy.hidden = toy.hidden[:, 1:].detach().requires_grad_()
    with pytest.raises(UserError, match="the teacher has 3, the student 2: align last_hidden_state"):
        toy.evaluate(latents, every, [range(4)])


def planned(repository, teacher, student, **entry):
    """Plan the demo with an experiment that aligns hidden states, between models of (layers, size)."""
    config = yaml.safe_load((repository / "config/config.yaml").read_text())
    for name, model in (("deep", teacher), ("shallow", student)):
        if not isinstance(model, Path):
            architecture = {"num_hidden_layers": model[0], "hidden_size": model[1], "num_attention_heads": 4}
            model = {"tokenizer": "spbpe", "pretrain": {"corpus": "transfer", "architecture": architecture}}
        else:
            model = {"tokenizer": "spbpe", "path": str(model)}
        config["models"] |= {name: model}
    extra = {"student": "shallow", "teacher": "deep", "corpus": "transfer", "losses": ["alm_latents"]}
    config["experiments"] |= {"extra": extra | entry}
    schema = yaml.safe_load((repository / run.SCHEMA).read_text())
    return plan.build(expand.expand(config, schema), sources.Digests(Path("/nonexistent/digests.json")))


EVERY = {"latents_to_align": "all_hidden_states"}
PROJECTED = {"latents_do_project": True}


@pytest.mark.parametrize(
    ("teacher", "student", "entry", "sentence"),
    [
        ((4, 64), (2, 64), EVERY, "least the teacher's layers, but the teacher `deep` has 4, the student `shallow` 2"),
        ((2, 64), (4, 32), EVERY, "the teacher `deep` has 64, the student `shallow` 32; align last_hidden_state with"),
        ((2, 64), (4, 32), {}, "the teacher `deep` has 64, the student `shallow` 32; set latents_do_project: true"),
        ((2, 64), (4, 64), EVERY, None),
        ((4, 64), (2, 64), {}, None),
        ((2, 64), (4, 32), PROJECTED, None),
        ((4, 64), (2, 32), {"losses": ["alm_space"]}, None),
    ],
)  # fmt: skip
def test_what_cannot_be_compared_is_refused_at_planning(repository, teacher, student, entry, sentence):
    if sentence is None:
        assert "students/extra/manifest.json" in planned(repository, teacher, student, **entry)
        return
    with pytest.raises(UserError, match=r"^Config: `experiments\.extra") as caught:
        planned(repository, teacher, student, **entry)
    assert sentence in str(caught.value)


@pytest.mark.parametrize(
    "config",
    [{"num_hidden_layers": 4, "hidden_size": 64}, {"text_config": {"num_hidden_layers": 4, "hidden_size": 64}}],
)
def test_a_folder_tells_its_shape(repository, tmp_path, config):
    (tmp_path / "config.json").write_text(json.dumps(config))
    (tmp_path / "model.safetensors").write_bytes(b"")
    with pytest.raises(UserError, match="the teacher `deep` has 4, the student `shallow` 2"):
        planned(repository, tmp_path, (2, 64), **EVERY)
    (tmp_path / "config.json").write_text("{}")
    assert planned(repository, tmp_path, (2, 64), **EVERY)


def test_plan_asks_for_what_the_loss_needs():
    entry = {"losses": ["alm_latents"], "teacher_distribution": "top_k"} | latents.DEFAULTS
    for change, column, head in (
        ({}, "hidden", False),
        ({"latents_do_project": True}, "hidden", True),
        ({"latents_to_align": "all_hidden_states"}, "hidden_states", True),
    ):
        method, needs = method_of("alm_latents", entry | change), signal_needs([entry | change], 0)
        asked = latents.needs(options_of(["alm_latents"], entry | change))
        assert {name for name in ("hidden", "hidden_states") if needs[name]} == {column} == asked.teacher
        assert method.head == head == asked.teacher_head


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    return programs.World(tmp_path_factory.mktemp("latents") / "results")


@pytest.mark.parametrize(
    "options",
    [{}, {"latents_do_project": True, "latents_chunks": "space"}, {"latents_to_align": "all_hidden_states"}],
    ids=["last", "project", "all"],
)
def test_trains_cached_and_online(world, options):
    column = "hidden_states" if "latents_to_align" in options else "hidden"
    head = len(options) > 0
    cached, online = world.both([LATENTS], {column: True}, latents.DEFAULTS | options, head)
    assert all(line["alm_latents"] > 0 for line in cached)
    assert cached[-1]["alm_latents"] < cached[0]["alm_latents"]
    for one, other in zip(cached, online, strict=True):
        assert one["alm_latents"] == pytest.approx(other["alm_latents"], rel=1e-4)


def test_a_deeper_student_trains_cached_and_online(world, tmp_path):
    deep = programs.World(tmp_path / "results")
    deep.student = deep.model("deep", 300, 5, layers=4)
    cached, online = deep.both([LATENTS], {"hidden_states": True}, latents.DEFAULTS | EVERY, True)
    assert 0 < cached[-1]["alm_latents"] < cached[0]["alm_latents"]
    assert [line["alm_latents"] for line in cached] == pytest.approx([line["alm_latents"] for line in online], rel=1e-4)
    deep.student = deep.model("flat", 300, 5, layers=1)
    with pytest.raises(UserError, match="the teacher has 2, the student 1: align last_hidden_state"):
        deep.both([LATENTS], {"hidden_states": True}, latents.DEFAULTS | EVERY, True)


def test_micro_batches_change_nothing(world):
    lines = []
    for most in (10**6, 16):
        train = {"max_tokens": most, "steps": 1, "batch_size": 8}
        lines.append(world.both([LATENTS], {"hidden": True}, latents.DEFAULTS, False, train)[0][0])
    for key, value in lines[0].items():
        assert lines[1][key] == pytest.approx(value, rel=1e-5), key
