"""Distillation between models with one tokenizer: divergences, and the programs from signals to a trained student."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from stages import teacher_head, teacher_index, teacher_signals
from stages.core.errors import UserError
from stages.losses import same_tokenizer
from stages.losses.divergences import DIVERGENCES, divergence, with_rest
from stages.losses.sft import target_rows
from stages.signals.schema import NO_NEEDS, to_float32

from . import dense, tiny
from .test_distill import LOSS, MODEL, World
from .toy_pair import Toy, view

DIVERGENT = sorted(set(DIVERGENCES) - {"kl"})


def logprobs(seed, rows=5, vocab=17, spread=3.0):
    generator = torch.Generator().manual_seed(seed)
    made = spread * torch.randn(2, rows, vocab, generator=generator, dtype=torch.float64)
    return torch.log_softmax(made, -1)


@pytest.mark.parametrize("name", DIVERGENT)
@given(seed=st.integers(0, 2**16))
@settings(max_examples=20, deadline=None)
def test_zero_only_where_equal(name, seed):
    p, q = logprobs(seed)
    q.requires_grad_()
    value = divergence(name, p, q, {})
    assert (value > 0).all() and torch.isfinite(torch.autograd.grad(value.sum(), q)[0]).all()
    same = p.clone().requires_grad_()
    value = divergence(name, p, same, {})
    assert torch.allclose(value, torch.zeros_like(value), atol=1e-12)
    assert torch.isfinite(torch.autograd.grad(value.sum(), same)[0]).all()


@given(seed=st.integers(0, 2**16))
@settings(max_examples=20, deadline=None)
def test_generalised_jsd_tends_to_both_kls(seed):
    p, q = logprobs(seed, spread=1.0)
    beta = 1e-7
    forward = divergence("gjsd", p, q, {"jsd_beta": beta}) / beta
    reverse = divergence("gjsd", p, q, {"jsd_beta": 1 - beta}) / beta
    torch.testing.assert_close(forward, divergence("fkl", p, q, {}), rtol=1e-3, atol=1e-3)
    torch.testing.assert_close(reverse, divergence("rkl", p, q, {}), rtol=1e-3, atol=1e-3)
    halves = divergence("gjsd", p, q, {"jsd_beta": 0.5})
    torch.testing.assert_close(halves, divergence("js", p, q, {}))


@pytest.mark.parametrize("name", sorted(set(DIVERGENT) - {"akl"}))
@given(seed=st.integers(0, 2**16), k=st.integers(1, 16))
@settings(max_examples=25, deadline=None)
def test_less_is_known_less_is_seen(name, seed, k):
    """A divergence of the k likeliest tokens and the rest is at most the whole one (data-processing inequality)."""
    p, q = logprobs(seed)
    ids = p.topk(k, -1).indices
    coarse = divergence(name, with_rest(p.gather(-1, ids)), with_rest(q.gather(-1, ids)), {})
    assert (coarse <= divergence(name, p, q, {}) + 1e-6).all()


@pytest.mark.parametrize("name", DIVERGENT)
def test_tokens_of_no_mass_are_not_there(name):
    p, q = logprobs(1)
    none = torch.full((5, 3), -torch.inf, dtype=torch.float64)
    wide = torch.cat([q, none], -1).requires_grad_()
    value = divergence(name, torch.cat([p, none], -1), wide, {})
    torch.testing.assert_close(value, divergence(name, p, q, {}))
    assert torch.isfinite(torch.autograd.grad(value.sum(), wide)[0]).all()


def test_adaptive_kl_by_hand():
    """The tail is filled from the teacher's least likely tokens; filling the head from the likeliest gives another.

    p = .4 .3 .2 .1, alpha .5: from below .1, .3, (.6), so the tail is {.2, .1} and the head {.4, .3}. |p - q| is .3 .2
    0 .1, so the tail's share is 1/6. From above .4, (.7): the head would be {.4} alone, the share 1/2, AKL .29368.
    """
    p, q = torch.tensor([[0.4, 0.3, 0.2, 0.1], [0.1, 0.5, 0.2, 0.2]], dtype=torch.float64)
    forward = 0.4 * np.log(4) + 0.3 * np.log(0.6) + 0.1 * np.log(0.5)
    reverse = 0.1 * np.log(0.25) + 0.5 * np.log(5 / 3) + 0.2 * np.log(2)
    value = divergence("akl", p.log(), q.log(), {"adaptive_kl_alpha": 0.5}).item()
    assert value == pytest.approx(5 / 6 * forward + 1 / 6 * reverse, rel=1e-12) == pytest.approx(0.31919825, rel=1e-7)
    assert abs(value - (forward + reverse) / 2) > 0.02
    order = torch.tensor([2, 0, 3, 1])
    assert divergence("akl", p[order].log(), q[order].log(), {}).item() == pytest.approx(value, rel=1e-12)


@pytest.fixture(scope="module")
def toy(tmp_path_factory):
    one = view(tmp_path_factory.mktemp("toy"), 300)
    return Toy(one, one, [tiny.text(3, 12), tiny.text(5, 4)])


@pytest.mark.parametrize("distribution", ["top_k", "exact"])
@pytest.mark.parametrize("temperature", [2.0, 4.0])
def test_t_squared_multiplies_by_the_square(toy, temperature, distribution):
    """Exactly: these squares are powers of 2. The loss without is the tempered KL of all logits in float64."""
    options = {"name": "fkl", "temperature": temperature, "teacher_distribution": distribution}
    groups, runs = [range(2)], []
    for squared in (False, True):
        value, _, slopes = dense.step(same_tokenizer, toy, options | {"t_squared": squared}, groups)
        runs.append((value, {name: slope.clone() for name, slope in slopes.items()}))
    (plain, slopes), (scaled, scaled_slopes) = runs
    assert scaled == temperature**2 * plain
    for name, slope in slopes.items():
        assert torch.equal(scaled_slopes[name], temperature**2 * slope) and slope.any(), name
    rows = target_rows(toy.student.loss, toy.student.offsets)
    teacher, own = (side.head.weight.detach().double() for side in (toy.sides.teacher, toy.sides.student))
    z_p = torch.tensor(to_float32(toy.bits)).double()[rows] @ teacher.T
    z_q = toy.hidden.detach().double()[rows, -1] @ own.T
    log_p, log_q = (torch.log_softmax(z / temperature, -1) for z in (z_p, z_q))
    assert plain == pytest.approx((log_p.exp() * (log_p - log_q)).sum(-1).mean().item(), rel=1e-4)


NEEDS = NO_NEEDS | {"top_k": 300, "temperatures": [2.0], "samples": 400, "hidden": True}


class OneTokenizer(World):
    """A teacher and a student with the small tokenizer, and the teacher's signals of every kind."""

    def __init__(self, root):
        super().__init__(root)
        self.other = self.model("other", 300, 9)
        self.kept = self.make("kept", self.other)

    def make(self, name, teacher, needs=NEEDS):
        spec = {"model": MODEL, "needs": needs, "space_mask_mode": LOSS["space_mask_mode"], "shards": 1}
        spec |= {"dtype": "auto", "batch_tokens": 200, "shard": 0}
        part = f"teachers/{name}/part-0000.manifest.json"
        inputs = {"tokenizer": self.tokenizer, "model": teacher}
        self.run(teacher_signals.main, part, spec, corpus=self.corpus, **inputs)
        self.run(teacher_index.main, f"teachers/{name}/manifest.json", {}, shards=[part])
        self.run(teacher_head.main, f"teachers/{name}/head.manifest.json", {"model": MODEL, "dtype": "auto"}, **inputs)
        return {"signals": f"teachers/{name}/manifest.json", "teacher_head": f"teachers/{name}/head.manifest.json"}

    def learn(self, name, loss, options=None, kept=None, **changes):
        entry = {"name": loss, "module": "stages.losses.same_tokenizer", "chunks": "unconstrained", "weight": 1.0}
        inputs = {"teacher_tokenizer": self.tokenizer} | (self.kept if kept is None else kept)
        self.distill(name, [entry], loss=options, **inputs | changes)
        return [line[loss] for line in self.metrics(name)]


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    return OneTokenizer(tmp_path_factory.mktemp("same") / "results")


@pytest.mark.parametrize("temperature", [1.0, 2.0])
@pytest.mark.parametrize("loss", [*DIVERGENT, "last_token_kd"])
def test_all_tokens_are_the_whole_distribution(world, loss, temperature):
    """Top-k with k = V, the exact distribution and an online teacher: one loss. fp16 log-probabilities set how near."""
    options = {"temperature": temperature, "t_squared": True}
    cached = world.learn(f"{loss}-top", loss, options)
    exact = world.learn(f"{loss}-exact", loss, options | {"teacher_distribution": "exact"})
    np.testing.assert_allclose(cached, exact, rtol=5e-3)
    assert cached[0] > cached[-1] > 0


def test_online_equals_cached(world):
    online = {"signals": None, "teacher_head": None}
    for loss, options in (("fkl", {}), ("srkl", {"teacher_distribution": "exact"})):
        cached = world.learn("cached", loss, options)
        asked = world.learn(
            "asked", loss, options, online, teacher="online", teacher_artifact=world.other, spec={"needs": NEEDS}
        )
        np.testing.assert_allclose(cached, asked, rtol=5e-3)


def test_samples_estimate_the_cross_entropy(world):
    """rskd tends to forward KL and the teacher's entropy: known here of a student that is the teacher."""
    same = world.make("self", world.student)
    (drawn,) = world.learn("drawn", "rskd", {}, same, train={"steps": 1, "batch_size": 12})
    (zero,) = world.learn("zero", "fkl", {}, same, train={"steps": 1, "batch_size": 12})
    (warm,) = world.learn("low", "fkl", {"temperature": 2.0}, same, train={"steps": 1, "batch_size": 12})
    assert abs(zero) < 1e-4 and abs(warm) < 1e-4
    assert drawn == pytest.approx(np.log(300), rel=0.02)  # random weights are nearly uniform over 300 ids


def test_a_split_batch_gives_the_same_step(world):
    for options in ({}, {"teacher_distribution": "exact"}):
        train = {"steps": 1, "batch_size": 8}
        world.learn("whole", "fkl", options, train=train | {"max_tokens": 10**6})
        world.learn("split", "fkl", options, train=train | {"max_tokens": 16})
        for key, value in world.metrics("whole")[0].items():
            assert world.metrics("split")[0][key] == pytest.approx(value, rel=1e-5), key


def test_padding_columns_change_nothing(world):
    """A teacher with 20 more columns of junk (Qwen2.5-7B against 1.5B) is the same teacher."""
    from safetensors.torch import load_file, save_file

    world.model("wide", 320, 9)
    folder = world.root.parent / "weights-wide"
    narrow = load_file(world.root.parent / "weights-other" / "model.safetensors")
    wide = load_file(folder / "model.safetensors")
    for name, value in narrow.items():
        if wide[name].shape != value.shape:
            value = torch.cat([value, torch.full((20, value.shape[1]), 50.0)])
        wide[name] = value
    save_file(wide, folder / "model.safetensors", {"format": "pt"})
    manifest = "models/wide/manifest.json"
    tiny.publish(world.root / manifest, "pretrain", {path.name: path for path in folder.iterdir()})
    kept = world.make("wide", world.named(manifest))
    for options in ({}, {"teacher_distribution": "exact"}):
        padded = world.learn("padded", "fkl", options, kept)
        assert padded == pytest.approx(world.learn("plain", "fkl", options), rel=1e-6)


def test_rows_are_not_shifted(world):
    """The log-probability of the next token stands among the likeliest of the same row."""
    from stages.signals.reader import open_signals

    signals = open_signals([world.root / "teachers/kept/part-0000.parquet"], ["topk_ids", "topk_logprobs"])
    signals_of = signals.rows(0)
    ids = signals_of["input_ids"].astype(np.int64)
    at = (signals_of["topk_ids"][:-1] == ids[1:, None]).argmax(1)
    observed = open_signals([world.root / "teachers/kept/part-0000.parquet"], ["observed_logprob"]).rows(0)
    found = np.take_along_axis(signals_of["topk_logprobs"][:-1].astype(np.float32), at[:, None], 1)[:, 0]
    np.testing.assert_allclose(found, observed["observed_logprob"][:-1], atol=5e-3)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"name": "fkl", "temperature": 0.0}, "temperature is 0.0"),
        ({"name": "gjsd", "jsd_beta": 1.5}, "jsd_beta is 1.5"),
        ({"name": "rskd", "temperature": 2.0}, "rskd draws at temperature 1"),
    ],
)
def test_settings_out_of_range(options, message):
    with pytest.raises(UserError, match=message):
        same_tokenizer.check(options)


def test_signals_without_the_column(world):
    poor = world.make("poor", world.other, NO_NEEDS | {"top_k": 4})
    with pytest.raises(UserError, match="lack normaliser_2"):
        world.learn("poor", "fkl", {"temperature": 2.0}, poor)


def test_more_likeliest_tokens_than_there_are(world):
    with pytest.raises(UserError, match="top_k is 301 but the teacher's tokenizer has 300 ids"):
        world.make("many", world.other, NO_NEEDS | {"top_k": 301})
