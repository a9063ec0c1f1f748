"""Side path: what it compares, and its relation to forward KL."""

import numpy as np
import pytest
import torch

from stages import mined_mapping, tokenizer_bias, tokenizer_stats
from stages.alignment.chunks import BiasTable
from stages.core.errors import UserError
from stages.losses import side_path
from stages.losses.mapped import Likeliest

from .mapped_toys import GROUPS, SPLIT, TEXTS, forward_kl, junk_in_padding, masked, step, toys, trained
from .programs import World
from .toy_pair import Toy, close

OPTIONS = {"name": "alm_side_path", "kind": "unconstrained"}
DISTANCES = sorted(side_path.DISTANCES)


@pytest.fixture(scope="module")
def two(tmp_path_factory):
    return toys(tmp_path_factory.mktemp("tokenizers"))


@pytest.mark.parametrize("k", [1, 7, None])
@pytest.mark.parametrize("mode", ["exact_match", "mined"])
def test_one_tokenizer_is_forward_kl(two, k, mode):
    same, _ = two
    close(step(side_path, same, OPTIONS | {"side_path_mapping_mode": mode}, k=k), forward_kl(same, k=k))


def test_one_tokenizer_is_forward_kl_behind_a_prompt(tmp_path):
    same = masked(toys(tmp_path)[0], 5)
    close(step(side_path, same, OPTIONS, k=9), forward_kl(same, k=9))


@pytest.mark.parametrize("distance", DISTANCES)
@pytest.mark.parametrize("mode", ["exact_match", "mined"])
def test_a_split_batch_is_the_same_batch(two, distance, mode):
    options = OPTIONS | {"side_path_distance_fn": distance, "side_path_mapping_mode": mode}
    found = step(side_path, two[1], options, GROUPS, k=9)
    close(found, step(side_path, two[1], options, SPLIT, k=9))
    assert found[0] > 1e-3 and 0 < found[1]["teacher_matched_mass"] <= 1 + 1e-6


def test_padding_columns_do_not_exist(tmp_path):
    _, toy = toys(tmp_path)
    before = step(side_path, toy, OPTIONS, k=9)[0]
    junk_in_padding(toy)
    assert step(side_path, toy, OPTIONS, k=9)[0] == pytest.approx(before, rel=1e-6)


def rows_of(logits, k):
    logprob, ids = torch.log_softmax(logits, -1).topk(k, -1)
    rest = torch.log1p(-logprob.exp().sum(-1).clamp(max=1 - 1e-7))
    return Likeliest(ids.numpy(), logprob.numpy(), rest.numpy())


def value(distance, top, mapping, vocab, log_q):
    prepared = side_path.prepare_rows(top, np.arange(len(log_q)), mapping, vocab)
    arrays = {name: torch.as_tensor(array) for name, array in prepared.arrays.items()}
    student = {"candidate_logprob": log_q.gather(1, torch.as_tensor(prepared.query.candidates))}
    return side_path.loss(student, arrays, {"side_path_distance_fn": distance})


@pytest.mark.parametrize("distance", DISTANCES)
def test_zero_only_where_the_matched_tokens_agree(distance):
    """Student 4, 5, 6 are teacher 2, 0, 1; teacher 3 is nobody's, its mass is on student 0 to 3."""
    mapping = np.array([-1, -1, -1, -1, 2, 0, 1])
    logits = torch.randn(5, 4, generator=torch.Generator().manual_seed(3))
    p = torch.softmax(logits, -1)
    q = torch.cat([p[:, 3:].expand(-1, 4) / 4, p[:, [2, 0, 1]]], -1)
    for k in (2, 4):
        total, masses = value(distance, rows_of(logits, k), mapping, 4, q.log())
        assert abs(total.item()) < 1e-5
        torch.testing.assert_close(masses["teacher_matched_mass"], masses["student_matched_mass"])
    assert value(distance, rows_of(logits, 4), mapping, 4, torch.softmax(torch.randn(5, 7), -1).log())[0] > 1e-3


def test_tokens_that_share_a_match_are_one_event():
    """Two student tokens are mined to teacher token 0, with half its probability each: nothing is left to learn.

    tokenkit counts the teacher's token twice: with p = (.6, .3, .1) and q = (.3, .3, .3, .1) it takes the "masses"
    (.6, .6, .3, .1) of 1.6, and the loss of that student is .6 ln 2 + .6 ln 2 = .83.
    """
    mapping, p = np.array([0, 0, 1, 2]), torch.tensor([[0.6, 0.3, 0.1]])
    q = torch.tensor([[0.3, 0.3, 0.3, 0.1]])
    total, masses = value("kl", rows_of(p.log(), 3), mapping, 3, q.log())
    assert abs(total.item()) < 1e-5 and masses["student_matched_mass"].item() == pytest.approx(1)
    theirs = (p[0, mapping] * (p[0, mapping] / q[0]).log()).sum()
    assert theirs.item() == pytest.approx(1.2 * np.log(2))


@pytest.mark.parametrize("distance", DISTANCES)
def test_a_row_without_a_match_teaches_nothing(distance):
    log_q = torch.log_softmax(torch.randn(2, 7), -1).requires_grad_()
    total, _ = value(distance, rows_of(torch.randn(2, 4), 2), np.full(7, -1), 4, log_q)
    assert abs(total.item()) < 1e-6 and (torch.autograd.grad(total, log_q)[0] == 0).all()


def test_pairs_over_the_bias_threshold_are_left_out(tmp_path):
    _, toy = toys(tmp_path)
    exact = toy.pair.to_teacher.exact
    biased = np.flatnonzero(exact >= 0)[[3, 8]]
    table = BiasTable.over(exact[biased], biased, np.array([0.2, 0.0]), np.array([0.0, 0.2]), 0.1)
    object.__setattr__(toy.pair, "side_path_bias", table)
    found = side_path.matching(toy.pair, "bias_threshold")
    assert np.array_equal(np.flatnonzero(found != exact), biased) and (found[biased] == -1).all()
    assert side_path.needs({"side_path_mapping_mode": "bias_threshold"}).pair == {"mapping", "side_path_bias"}
    assert side_path.needs({}).pair == {"mapping"}
    options = OPTIONS | {"side_path_mapping_mode": "bias_threshold"}
    assert (
        step(side_path, toy, options, k=300)[1]["teacher_matched_mass"]
        < step(side_path, toy, OPTIONS, k=300)[1]["teacher_matched_mass"]
    )


@pytest.mark.parametrize("texts", [TEXTS[:1], ["x"], [""]])
def test_nothing_to_learn_is_zero(two, texts):
    toy = Toy(two[1].pair.teacher, two[1].pair.student, texts)
    for batch in (toy.teacher, toy.student):
        batch.loss[:] = False
    value, _, gradients = step(side_path, toy, OPTIONS, [[0]], k=5)
    assert value == 0 and all((gradient == 0).all() for gradient in gradients.values())


def test_settings_are_checked():
    side_path.check({})
    for change, sentence in (
        ({"side_path_mapping_mode": "biased"}, "side_path_mapping_mode is 'biased'; it must be one of exact_match, "),
        ({"side_path_distance_fn": "jsd"}, "side_path_distance_fn is 'jsd'; it must be one of kl, reverse_kl, "),
    ):
        with pytest.raises(UserError, match=sentence):
            side_path.check(change)


@pytest.mark.parametrize("mode", side_path.MODES)
def test_trains_cached_and_online(tmp_path, monkeypatch, mode):
    options = OPTIONS | {"side_path_mapping_mode": mode, "tokenizer_pair_bias_threshold_side_path": 1e-4}
    cached, online = trained(tmp_path, monkeypatch, side_path, options)
    assert cached == pytest.approx(online, rel=1e-4) and cached[-1] < cached[0]


def test_biases_of_chunk_ends_alone_are_refused(tmp_path):
    """They say nothing of other pairs, which would all be accepted."""
    world = World(tmp_path / "results")
    pair = {"teacher_tokenizer": world.teacher_tokenizer, "tokenizer": world.tokenizer}
    entry = {"name": "alm_side_path", "module": side_path.__name__, "chunks": "unconstrained", "weight": 1.0}
    options = {"side_path_mapping_mode": "bias_threshold", "tokenizer_pair_bias_threshold_side_path": 0.1}
    made = {name: f"made/{name}/manifest.json" for name in ("statistics", "mapping", "chunk_ends", "all")}
    world.run(tokenizer_stats.main, made["statistics"], {}, **pair, corpus=world.corpus)
    world.run(mined_mapping.main, made["mapping"], {"max_distance": 0.3}, **pair)
    inputs = pair | {"corpus": world.corpus, "statistics": made["statistics"]}
    given = {"signals": world.signals(top_k=64), "mapping": made["mapping"]}
    for pairs in ("chunk_ends", "all"):
        world.run(tokenizer_bias.main, made[pairs], {"pairs": pairs}, **inputs)
    with pytest.raises(UserError, match=r"biases of pairs at chunk ends only.*set tokenizer_bias.pairs to all"):
        world.distill("refused", [entry], None, options, bias=made["chunk_ends"], **given)
    world.distill("kept", [entry], None, options, bias=made["all"], **given)
    assert world.metrics("kept")[0]["alm_side_path"] > 0
