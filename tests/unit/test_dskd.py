"""Dual-space distillation: definitions against dense float64, what a split changes, closed forms, and training."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from stages.core.errors import UserError
from stages.losses import dskd, dskd_eta, same_tokenizer
from stages.losses.divergences import divergence
from stages.losses.dskd_eta import ClosedForm, closed_form, pseudo_inverse
from stages.planning.methods import METHODS, method_of, options_of, signal_needs
from stages.signals.schema import to_float32
from stages.vocabulary.blocks import Shape
from stages.vocabulary.head import Head, Sides

from . import programs, tiny
from .toy_pair import Toy, close, view

TEXTS = [tiny.text(3, 12), tiny.text(5, 4), "café naïve", tiny.text(8, 20)]
MODULES = {"baseline_dskd": dskd, "dskd_eta": dskd_eta}
EVERY = range(len(TEXTS))
FKL = {"divergence": "kl", "kd_temp": 1.0}


@pytest.fixture(scope="module")
def views(tmp_path_factory):
    folder = tmp_path_factory.mktemp("views")
    return view(folder / "teacher", 400), view(folder / "student", 300)


def rows_of(batch, example):
    """Flat rows of an example that predict a trained token."""
    first, end = batch.offsets[example], batch.offsets[example + 1]
    return [i for i in range(first, end - 1) if batch.loss[i + 1]]


def teacher_states(toy):
    return torch.tensor(to_float32(toy.bits)).double()


def dense(logits, teacher, options, cooling=1.0):
    """Divergence of rows of logits, float64."""
    log_p = torch.log_softmax(teacher / options["kd_temp"] / cooling, -1)
    return divergence(options["divergence"], log_p, torch.log_softmax(logits / options["kd_temp"], -1), options)


def attention_terms(toy, attention, options):
    """DSKD's sums by its formulas, on batches of one example; and how often the projected teacher is right."""
    weights = [side.head.weight.detach().double()[: side.head.shape.vocab] for side in toy.sides]
    embeddings = [side.embed.weight.detach().double() for side in toy.sides]
    matrix = {name: parameter.detach().double() for name, parameter in attention.named_parameters()}
    project = lambda name, x: x @ matrix[f"{name}.weight"].T + matrix[f"{name}.bias"]  # noqa: E731
    terms = dict.fromkeys(("t2s_ce", "t2s_kd", "s2t_kd", "t2s_accuracy"), 0.0)
    states = teacher_states(toy)
    for example in EVERY:
        rows, teacher_rows = rows_of(toy.student, example), rows_of(toy.teacher, example)
        ids = [torch.tensor(batch.ids).long() for batch in (toy.student, toy.teacher)]
        target = ids[0][1:][rows]
        described = torch.cat([embeddings[0][ids[0][rows]], embeddings[0][target]], 1)
        following = embeddings[1][ids[1][1:][teacher_rows]]
        known = torch.cat([embeddings[1][ids[1][teacher_rows]], following], 1)
        hidden, teacher = toy.hidden.detach().double()[rows, -1], states[teacher_rows]
        scores = project("query", described) @ (known / known.std()).T / (2 * teacher.shape[1]) ** 0.5
        values = teacher / teacher.std() + following / following.std()
        t2s = scores.softmax(1) @ project("t2s", values) @ weights[0].T
        s2t = scores.T.softmax(1) @ project("s2t", hidden) @ weights[1].T
        right = t2s.argmax(1) == target
        terms["t2s_accuracy"] += right.sum().item()
        terms["t2s_ce"] += torch.nn.functional.cross_entropy(t2s, target, reduction="sum").item()
        kd = dense(hidden @ weights[0].T, t2s, options, options["teacher_temperature"])
        terms["t2s_kd"] += kd[right].sum().item()
        terms["s2t_kd"] += dense(s2t, teacher @ weights[1].T, options | {"divergence": "kl"}).sum().item()
    return terms


@pytest.mark.parametrize("name", ["kl", "rkl", "srkl", "js", "tvd"])
def test_attention_is_dskd_with_batches_of_one(views, name):
    toy = Toy(*views, TEXTS)
    options = dskd.DEFAULTS | {"divergence": name, "kd_temp": 1.5, "teacher_temperature": 0.7}
    attention = toy.projectors(dskd, options)
    with torch.no_grad():  # make the projected teacher right somewhere
        toy.sides.student.head.weight[toy.student.ids[5]] *= 6
        attention.t2s.bias.copy_(toy.sides.student.head.weight[toy.student.ids[5]])
    value, parts, gradients = toy.evaluate(dskd, options, [EVERY], attention)
    expected = attention_terms(toy, attention, options)
    count = sum(len(rows_of(toy.student, example)) for example in EVERY)
    assert 0 < expected["t2s_accuracy"] < count
    for key, total in expected.items():
        assert parts[key] == pytest.approx(total / count, rel=1e-4), key
    assert value == pytest.approx(sum(parts[key] for key in ("t2s_ce", "t2s_kd", "s2t_kd")), rel=1e-5)
    assert {"hidden", "query.weight", "t2s.weight", "s2t.weight"} <= set(gradients)
    assert toy.sides.student.embed.weight.grad is None, "the student's embeddings are fixed in the attention"


@settings(max_examples=15, deadline=None)
@given(order=st.permutations(range(4)), cut=st.integers(1, 3), name=st.sampled_from(sorted(MODULES)))
def test_a_split_batch_has_the_same_gradient(views, order, cut, name):
    """No example sees another, and no number of a step is a micro-batch's own."""
    toy, module = Toy(*views, TEXTS), MODULES[name]
    projectors = toy.projectors(module, {})
    whole = toy.evaluate(module, FKL, [EVERY], projectors)
    whole = whole[0], whole[1], {key: gradient.clone() for key, gradient in whole[2].items()}
    parts = toy.evaluate(module, FKL, [order[:cut], order[cut:]], projectors)
    close(parts, whole, atol=2e-6)
    assert parts[1] == pytest.approx(whole[1], rel=1e-4)


@pytest.mark.parametrize("module", MODULES.values(), ids=MODULES)
def test_padding_rows_change_nothing(views, module):
    results = []
    for junk in (0.0, 1e3):
        toy = Toy(*views, TEXTS, padding=(7, 5))
        # Without padding the random rows would be others: the same rows, with junk below them.
        for part in toy.sides:
            with torch.no_grad():
                part.head.weight[part.head.shape.vocab :] = junk
                part.embed.weight[part.head.shape.vocab :] = junk
        results.append(toy.evaluate(module, {}, [EVERY]))
        assert (results[-1][2]["head"][views[1].vocab_size :] == 0).all()
    close(*results)


@pytest.mark.parametrize("module", MODULES.values(), ids=MODULES)
@pytest.mark.parametrize("texts", [["a"], [""], TEXTS[:1]])
def test_nothing_to_compare_is_zero(views, module, texts):
    toy = Toy(*views, texts, masked={0})
    value, _, gradients = toy.evaluate(module, {}, [range(len(texts))])
    assert value == 0 and (gradients["hidden"] == 0).all()


@pytest.mark.parametrize("module", MODULES.values(), ids=MODULES)
def test_what_is_not_trained_does_not_count(views, module):
    toy = Toy(*views, TEXTS, masked={1})
    projectors = toy.projectors(module, {})
    value, _, gradients = toy.evaluate(module, {}, [EVERY], projectors)
    first, end = toy.student.offsets[1:3]
    assert (gradients["hidden"][first:end] == 0).all() and gradients["hidden"].abs().sum() > 0
    assert toy.evaluate(module, {}, [[0, 2, 3]], projectors)[0] == pytest.approx(value, rel=1e-5)


def twins(view):
    """A pair with one tokenizer and one pair of matrices; states differ."""
    toy = Toy(view, view, TEXTS, sizes=(6, 6))
    head = toy.sides.teacher.head
    copy = torch.nn.Linear(6, view.vocab_size, bias=False)
    copy.load_state_dict(head.layer.state_dict())
    toy.sides = Sides(toy.sides.student._replace(head=Head(copy, head.shape)), toy.sides.teacher)
    return toy


def test_closed_form_of_equal_matrices_is_the_identity(views):
    toy = twins(views[0])
    maps = toy.projectors(dskd_eta, {})
    for found in (maps.t2s.weight, maps.to_teacher(toy.sides.student.head)):
        np.testing.assert_allclose(found.detach(), np.eye(6), atol=1e-5)


@settings(max_examples=30, deadline=None)
@given(st.integers(0, 2**31), st.integers(1, 5), st.integers(1, 5), st.integers(1, 40))
def test_closed_form_is_least_squares(seed, source_size, target_size, tokens):
    source = torch.Generator().manual_seed(seed)
    a, b = (torch.randn(tokens, size, generator=source) for size in (source_size, target_size))
    found = closed_form(a, pseudo_inverse(b))
    expected = a.double().numpy().T @ np.linalg.pinv(b.double().numpy().T)
    np.testing.assert_allclose(found, expected, rtol=1e-3, atol=1e-4 * max(1, np.abs(expected).max()))


def test_projected_states_keep_the_logits_of_shared_tokens(views):
    """Where the student's space can hold them: a teacher of 4 numbers in a student's 5. Also with scaled logits."""
    toy = Toy(*views, TEXTS, sizes=(4, 5))
    own, other = (
        Head(side.head.layer, Shape(side.head.shape.vocab, scale))
        for side, scale in zip(toy.sides, (3, 0.5), strict=True)
    )
    exact = toy.pair.to_teacher.exact
    ids = torch.tensor(np.flatnonzero(exact >= 0))
    with torch.no_grad():  # shared tokens of the teacher are those of the student in another basis
        other.weight[exact[ids]] = own.weight[ids] @ torch.randn(5, 4, generator=torch.Generator().manual_seed(3))
        maps = ClosedForm(own, other, ids, torch.tensor(exact[ids]))
        states = torch.randn(3, 4)
        np.testing.assert_allclose(
            own.logits(maps.t2s(states))[:, ids], other.logits(states)[:, exact[ids]], rtol=1e-3, atol=1e-4
        )


def test_eta_of_twins_is_forward_kl(views):
    toy = twins(views[0])
    value, parts, gradients = toy.evaluate(dskd_eta, FKL, [EVERY])
    options = {"name": "fkl", "teacher_distribution": "exact"}
    plain = toy.evaluate(same_tokenizer, options, [EVERY], torch.nn.Identity())
    assert parts["s2t_kd"] == pytest.approx(plain[0], rel=1e-4)
    assert parts["t2s_kd"] == pytest.approx(plain[0], rel=1e-4) and parts["t2s_agreement"] == 1
    assert value == pytest.approx(2 * plain[0] + parts["t2s_ce"], rel=1e-4)
    # States learn from both terms alike, the output layer from the student's space alone.
    _, _, alone = toy.evaluate(same_tokenizer, options, [EVERY], torch.nn.Identity())
    alone = {name: gradient.clone() for name, gradient in alone.items()}
    _, _, gradients = toy.evaluate(dskd_eta, FKL, [EVERY])
    np.testing.assert_allclose(gradients["hidden"], 2 * alone["hidden"], rtol=1e-3, atol=1e-6)
    np.testing.assert_allclose(gradients["head"], alone["head"], rtol=1e-3, atol=1e-6)


def common_rows(toy, views):
    """Rows (student's, teacher's) before each trained token that both sides have at the same bytes of a text."""
    found = []
    for example in EVERY:
        sides = []
        for known, batch in ((views[1], toy.student), (views[0], toy.teacher)):
            at, rows = 0, {}
            for place in range(batch.offsets[example], batch.offsets[example + 1]):
                identity = batch.ids[place]
                content = known.token_bytes[identity]
                if place > batch.offsets[example] and batch.loss[place]:
                    rows[at, known.role_of[identity] if content is None else content] = place - 1
                at += len(content or b"")
            sides.append(rows)
        found += [(sides[0][key], sides[1][key]) for key in sides[0] if key in sides[1]]
    return np.array(found).T


def eta_terms(toy, views, t2s, hidden, weight, options):
    """The three terms by their formulas, all logits at once in float64; how many rows agree, and how many there are.

    `t2s` [d_s, d_t], `hidden` [tokens, d_s] and `weight` [V_s, d_s] may ask for gradients.
    """
    rows, teacher_rows = common_rows(toy, views)
    teacher_weight = toy.sides.teacher.head.weight.double()
    states = teacher_states(toy)[teacher_rows]
    teacher = states @ teacher_weight.T
    label = torch.tensor(toy.pair.to_student.exact)[teacher.argmax(1)]
    known = label >= 0
    rows, states, teacher, label = rows[known.numpy()], states[known], teacher[known], label[known]
    exact = toy.pair.to_teacher.exact
    shared = np.flatnonzero(exact >= 0)
    back = weight.detach()[shared].T @ torch.linalg.pinv(teacher_weight[exact[shared]]).T
    projected = states @ t2s.T @ weight.detach().T
    agree = projected.argmax(1) == label
    own = hidden[rows]
    terms = {
        "t2s_ce": torch.nn.functional.cross_entropy(projected, label, reduction="sum"),
        "t2s_kd": dense((own @ weight.T)[agree], projected.detach()[agree], options).sum(),
        "s2t_kd": dense(own @ back @ teacher_weight.T, teacher, options).sum(),
    }
    return terms, int(agree.sum()), len(rows)


@pytest.mark.parametrize("name", ["kl", "rkl", "srkl", "js", "tvd"])
def test_eta_is_its_formulas_on_two_tokenizers(views, name):
    """Shared tokens of the teacher are near those of the student in another basis, so that some rows agree."""
    toy, options = Toy(*views, TEXTS), {"divergence": name, "kd_temp": 1.5}
    own, other = (side.head for side in toy.sides)
    exact = toy.pair.to_teacher.exact
    shared, source = np.flatnonzero(exact >= 0), torch.Generator().manual_seed(3)
    with torch.no_grad():
        turned = own.weight[shared] @ torch.randn(5, 6, generator=source)
        other.weight[exact[shared]] = turned + 0.3 * torch.randn(turned.shape, generator=source)
    maps = toy.projectors(dskd_eta, options)
    start = other.weight[exact[shared]].double().T @ torch.linalg.pinv(own.weight[shared].detach().double()).T
    np.testing.assert_allclose(maps.t2s.weight.detach(), start.T, rtol=1e-3, atol=1e-4)
    value, parts, gradients = toy.evaluate(dskd_eta, options, [EVERY], maps)
    leaves = {
        "t2s.weight": maps.t2s.weight.detach().double(),
        "hidden": toy.hidden.detach().double(),
        "head": own.weight.detach().double(),
    }
    t2s, hidden, weight = (leaf.requires_grad_() for leaf in leaves.values())
    terms, agree, count = eta_terms(toy, views, t2s, hidden[:, -1], weight, options)
    assert 0 < agree < count
    assert parts["t2s_agreement"] == pytest.approx(agree / count, rel=1e-6)
    for key, term in terms.items():
        assert parts[key] == pytest.approx(term.item() / count, rel=1e-4), key
    total = sum(terms.values()) / count
    assert value == pytest.approx(total.item(), rel=1e-4)
    for key, slope in zip(leaves, torch.autograd.grad(total, list(leaves.values())), strict=True):
        np.testing.assert_allclose(gradients[key], slope, rtol=1e-3, atol=1e-6, err_msg=key)


def test_eta_aligns_equal_tokens_and_labels_by_bytes(views):
    toy = Toy(*views, TEXTS)
    examples = toy.examples(EVERY)
    rows, teacher_rows = dskd_eta.aligned_rows(*examples.chunks("unconstrained"))
    content = [
        [v.token_bytes[i] or v.role_of[i] for i in batch.ids[places + 1]]
        for v, batch, places in ((views[1], toy.student, rows), (views[0], toy.teacher, teacher_rows))
    ]
    assert content[0] == content[1] and 0 < len(rows) < (toy.student.loss).sum()
    histories = [
        [v.join(i for i in batch.ids[batch.offsets[of(batch, p)] : p + 1] if v.token_bytes[i] is not None) for p in ps]
        for v, batch, ps in ((views[1], toy.student, rows), (views[0], toy.teacher, teacher_rows))
    ]
    assert histories[0] == histories[1]
    prepared = dskd_eta.prepare(examples, {})
    likeliest = examples.signals["topk_ids"][teacher_rows, 0]
    labels = toy.pair.to_student.exact[likeliest]
    assert 0 < prepared.count == (labels >= 0).sum() < len(rows), "a token the student lacks is no label"
    for label, identity in zip(labels, likeliest, strict=True):
        if label >= 0 and views[0].token_bytes[identity] is not None:
            assert views[1].token_bytes[label] == views[0].token_bytes[identity]


def of(batch, row):
    return int(np.searchsorted(batch.offsets, row, side="right")) - 1


def test_rows_predict_the_next_token(views):
    """A teacher's state that gives the next token all mass is the student's target at the same bytes."""
    toy = Toy(*views, TEXTS)
    examples = toy.examples(EVERY)
    following = np.append(toy.teacher.ids[1:], 0)
    examples.signals["topk_ids"] = following[:, None].astype(np.uint32)
    prepared = dskd_eta.prepare(examples, {})
    np.testing.assert_array_equal(prepared.arrays["label"], toy.student.ids[prepared.arrays["rows"] + 1])
    tokens = dskd.prepare(examples, {}).arrays
    np.testing.assert_array_equal(tokens["tokens"][:, 1], toy.student.ids[tokens["rows"] + 1])
    assert tokens["sizes"].sum(0).tolist() == [len(tokens["tokens"]), len(tokens["teacher_tokens"])]


def test_wrong_settings(views):
    for module, options, word in (
        (dskd, {"divergence": "klx"}, "klx"),
        (dskd, {"kd_temp": 0}, "kd_temp"),
        (dskd, {"teacher_temperature": -1}, "teacher_temperature"),
        (dskd_eta, {"divergence": "ce"}, "ce"),
        (dskd_eta, {"kd_temp": -2}, "kd_temp"),
        (dskd_eta, {"skew_lambda": 2}, "skew_lambda"),
    ):
        with pytest.raises(UserError, match=word):
            module.check(options)
    toy = Toy(*views, TEXTS)
    toy.pair.to_teacher.exact[:] = -1
    with pytest.raises(UserError, match="share none"):
        toy.projectors(dskd_eta, {})


def test_projectors_are_drawn_from_the_generator(views):
    toy = Toy(*views, TEXTS)
    one, same, other = (toy.projectors(dskd, {}, seed).state_dict() for seed in (1, 1, 2))
    assert all(torch.equal(one[name], same[name]) and not torch.equal(one[name], other[name]) for name in one)
    assert one["query.weight"].shape == (12, 10) and one["t2s.weight"].shape == (5, 6)
    assert one["query.weight"].abs().max() <= 10**-0.5


def test_plan_asks_for_what_the_losses_need():
    baseline = {"divergence": "srkl", "kd_temp": 2.0, "teacher_temperature": 1.0, "skew_lambda": 0.1}
    entry = {"teacher_distribution": "top_k", "jsd_beta": 0.5, "baseline": baseline | {"adaptive_kl_alpha": 0.5}}
    for name, module in MODULES.items():
        needs, asked = signal_needs([entry | {"losses": [name]}], 0), module.needs(options_of([name], entry))
        assert METHODS[name].module == module.__name__
        assert needs["hidden"] and method_of(name, entry).head and asked.teacher_head
        assert needs["top_k"] == int("topk_ids" in asked.teacher)
        assert set(METHODS[name].pair) == asked.pair


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    return programs.World(tmp_path_factory.mktemp("dskd") / "results")


@pytest.mark.parametrize("name", MODULES)
def test_trains_cached_and_online(world, name):
    entry = {"name": name, "module": METHODS[name].module, "chunks": METHODS[name].chunks, "weight": 1.0}
    needs = {"hidden": True, "top_k": METHODS[name].top_k}
    cached, online = world.both([entry], needs, dskd.DEFAULTS, head=True, pair=METHODS[name].pair)
    assert cached[-1][name] < cached[0][name]
    for one, other in zip(cached, online, strict=True):
        for key in one:
            assert one[key] == pytest.approx(other[key], rel=1e-4), key
