"""GOLD: the chain rule, what a top-k cache keeps, its relation to forward KL, and the programs."""

import numpy as np
import pytest
import torch

from stages import mined_mapping
from stages.core.errors import UserError
from stages.losses import gold, same_tokenizer
from stages.losses.chunks import merge_chunks
from stages.signals.schema import NO_NEEDS

from . import tiny
from .dense import evaluate, step, teacher_logits, toy_examples
from .programs import World
from .toy_pair import Toy, close, view

TEXTS = [tiny.text(i, 9 + i) for i in range(4)]
TRAIN = {"batch_size": 12, "steps": 8}  # every step sees the whole corpus
OPTIONS = {"kind": "unconstrained"}


@pytest.fixture(scope="module")
def views(tmp_path_factory):
    root = tmp_path_factory.mktemp("views")
    return view(root / "teacher", 400), view(root / "student", 300)


@pytest.fixture(scope="module")
def toy(views):
    return Toy(*views, TEXTS)


@pytest.fixture(scope="module")
def same(views):
    return Toy(views[0], views[0], TEXTS, masked=(2,))


def test_rows_add_up_to_the_beginning_and_chunks_to_the_text(views):
    toy = Toy(*reversed(views), TEXTS)  # the teacher has more tokens
    examples = toy_examples(toy, range(4), 300)
    prepared = gold.prepare(examples, OPTIONS)
    arrays = prepared.arrays
    chunks = merge_chunks(*examples.chunks("unconstrained"))
    rows = np.exp(arrays["logprob"].astype(np.float64) + arrays["before"][:, None])
    np.testing.assert_allclose(rows.sum(1), np.exp(arrays["before"]), rtol=1e-5)
    assert (chunks.count > 1).any() and (arrays["before"][chunks.count == 1] == 0).all()
    last = examples.signals["topk_ids"][chunks.teacher_end - 1] == examples.teacher.ids[chunks.teacher_end, None]
    whole = np.log(rows[last]).sum()
    tokens = np.flatnonzero(chunks.teacher >= 0)
    np.testing.assert_allclose(whole, examples.signals["observed_logprob"][tokens - 1].sum(), rtol=1e-5)


def plain(toy, examples, logits, options):
    """The sum over chunks, from all logits of both sides, in float64 and in loops."""
    temperature, beta = options.get("temperature", 1.0), options.get("jsd_beta", 0.5)
    teacher = torch.softmax(teacher_logits(toy, examples).double() / temperature, -1)
    student = torch.softmax(logits.double() / temperature, -1)
    exact = toy.pair.to_teacher.exact
    known, first = np.unique(exact[exact >= 0], return_index=True)
    own = np.flatnonzero(exact >= 0)[first]
    chunks, total = merge_chunks(*examples.chunks("unconstrained")), 0.0
    for number in range(len(chunks.count)):
        rows = []
        for probability, chunk, batch in (
            (teacher, chunks.teacher, examples.teacher),
            (student, chunks.student, examples.student),
        ):
            tokens = np.flatnonzero(chunk == number)
            row = probability[tokens[-1] - 1]
            for token in tokens[:-1]:
                row = row * probability[token - 1, batch.ids[token]]
            rows.append(row)
        p, q = rows
        apart = [torch.ones(len(side), dtype=torch.bool) for side in rows]
        if options.get("gold_hybrid", True):
            a, b = p[known], q[own]
            mixed = beta * a + (1 - beta) * b
            divergence = beta * (a * (a / mixed).log()).sum() + (1 - beta) * (b * (b / mixed).log()).sum()
            apart[0][known], apart[1][own] = False, False
            share = len(known) / len(p)
        else:
            divergence, share = 0.0, 0.0
        others = [side[mask].sort(descending=True).values for side, mask in zip(rows, apart, strict=True)]
        width = max(map(len, others))
        others = [torch.nn.functional.pad(side, (0, width - len(side))) for side in others]
        total = total + share * divergence + (1 - share) * (others[0] - others[1]).abs().sum()
    return total


@pytest.mark.parametrize("options", [{}, {"jsd_beta": 0.2, "temperature": 2.0}, {"gold_hybrid": False}])
@pytest.mark.parametrize("larger", ["teacher", "student"])
def test_all_tokens_are_the_plain_computation(views, options, larger):
    toy = Toy(*(views if larger == "teacher" else views[::-1]), TEXTS[:2])
    vocab = toy.pair.student.vocab_size
    logits = torch.randn(len(toy.student.ids), vocab, generator=torch.Generator().manual_seed(3)).requires_grad_()
    examples = toy_examples(toy, [0, 1], toy.pair.teacher.vocab_size, [2.0])
    found, _, _ = evaluate(gold, examples, logits, OPTIONS | options)
    right = plain(toy, examples, logits, options)
    torch.testing.assert_close(found, right.float(), rtol=1e-4, atol=1e-5)
    (ours,), (expected,) = (torch.autograd.grad(value, logits) for value in (found, right))
    torch.testing.assert_close(ours, expected, rtol=1e-3, atol=2e-6)


@pytest.mark.parametrize("options", [{}, {"gold_hybrid": False}])
def test_more_tokens_come_nearer(toy, options):
    """Of a teacher that is sure, 100 of 400 tokens tell nearly all."""
    whole = step(gold, toy, options, [[0, 1, 2, 3]], sharpness=3.0)[0]
    errors = [abs(step(gold, toy, options, [[0, 1, 2, 3]], k, sharpness=3.0)[0] - whole) for k in (5, 100)]
    assert errors[1] < errors[0] and errors[1] < 0.02 * whole


@pytest.mark.parametrize("temperature", [1.0, 2.0])
@pytest.mark.parametrize("k", [8, 400])
def test_one_tokenizer_is_forward_kl(same, k, temperature):
    """Every token is matched, chunks have one token: beta 0 gives the number of `fkl`, from the same cache."""
    options = {"temperature": temperature, "jsd_beta": 0.0}
    right = step(same_tokenizer, same, options | {"name": "fkl"}, [[0, 1, 2, 3]], k)
    close(step(gold, same, options, [[0, 1, 2, 3]], k), right)


def test_a_split_batch_gives_the_same_gradient(toy):
    close(step(gold, toy, {}, [[0, 1, 2, 3]], k=20), step(gold, toy, {}, [[2], [0, 3], [1]], k=20))


def test_junk_in_padding_columns_changes_nothing(views):
    padded = Toy(*views, TEXTS, padding=(7, 3))
    before = step(gold, padded, {}, [[0, 1]], k=20)
    with torch.no_grad():
        for side, vocab in zip(padded.sides, (300, 400), strict=True):
            side.head.weight[vocab:] = 1e6
    close(before, step(gold, padded, {}, [[0, 1]], k=20))


def test_weights(toy):
    """By default the share of matched tokens in the teacher's vocabulary and 1 minus it."""
    value, parts, _ = step(gold, toy, {}, [[0, 1]])
    share = (gold.matched_tokens(toy.pair.to_teacher.exact, 400) >= 0).mean()
    assert 0.3 < share < 0.9
    assert value == pytest.approx(share * parts["matched"] + (1 - share) * parts["unmatched"], rel=1e-5)
    for given in ({"gold_matched_weight": 0.7}, {"gold_matched_weight": 2.0, "gold_unmatched_weight": 0.0}):
        value, parts, _ = step(gold, toy, given, [[0, 1]])
        weights = given["gold_matched_weight"], given.get("gold_unmatched_weight", 0.3)
        assert value == pytest.approx(weights[0] * parts["matched"] + weights[1] * parts["unmatched"], rel=1e-5)


def test_of_tokens_with_the_same_bytes_the_first_is_taken():
    assert gold.matched_tokens(np.array([2, -1, 0, 2]), 4).tolist() == [2, -1, 0, -1]


@pytest.mark.parametrize("options", [{}, {"gold_hybrid": False}])
def test_nothing_to_learn(views, options):
    empty = Toy(*views, ["", TEXTS[0]])  # one token, and all masked
    empty.teacher.loss[:], empty.student.loss[:] = False, False
    value, _, gradients = step(gold, empty, options, [[0, 1]], k=20)
    assert value == 0 and all((gradient == 0).all() for gradient in gradients.values())


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"temperature": 0.0}, "temperature is 0.0"),
        ({"jsd_beta": -0.1}, "jsd_beta is -0.1"),
        ({"gold_matched_weight": -1.0}, "gold_matched_weight is -1.0"),
        ({"gold_unmatched_weight": float("nan")}, "gold_unmatched_weight is nan"),
    ],
)
def test_settings_out_of_range(options, message):
    with pytest.raises(UserError, match=message):
        gold.check(options)


def test_needs_follow_the_settings():
    assert gold.needs({}).pair == {"mapping"} and gold.needs({"gold_hybrid": False}).pair == frozenset()
    assert "normaliser_2" in gold.needs({"temperature": 2.0}).teacher


@pytest.mark.parametrize("options", [{"temperature": 2.0}, {"gold_hybrid": False}])
def test_cached_equals_online(tmp_path, options):
    entry = {"name": "gold", "module": "stages.losses.gold", "chunks": "unconstrained", "weight": 1.0}
    needs = NO_NEEDS | {"top_k": 30, "temperatures": [2.0]}
    cached, online = World(tmp_path / "results").both([entry], needs, options, False, TRAIN, ["mapping"])
    for one, other in zip(cached, online, strict=True):
        assert one["gold"] == pytest.approx(other["gold"], rel=1e-4)
    assert cached[-1]["gold"] < cached[0]["gold"]


def test_a_mapping_of_another_pair_is_refused(tmp_path):
    world = World(tmp_path / "results")
    signals = world.signals(shards=1, top_k=30)
    turned = {"teacher_tokenizer": world.tokenizer, "tokenizer": world.teacher_tokenizer}
    world.run(mined_mapping.main, "tokenizer_pairs/turned/manifest.json", {"max_distance": 0.3}, **turned)
    entry = {"name": "gold", "module": "stages.losses.gold", "chunks": "unconstrained", "weight": 1.0}
    with pytest.raises(UserError, match=r"turned.* was made with another teacher_tokenizer .* than tokenizers/big"):
        world.distill("refused", [entry], signals=signals, mapping="tokenizer_pairs/turned/manifest.json")
    assert not (world.root / "students/refused").exists()
