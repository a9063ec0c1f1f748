"""Teacher signals: what is computed, written and read back."""

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch

from stages.core.errors import UserError
from stages.signals import reader
from stages.signals.compute import check_finite, compute_signals, top_k, wanted_signals
from stages.signals.reader import open_signals
from stages.signals.schema import columns_for, to_float32
from stages.signals.writer import writing
from stages.vocabulary.blocks import Shape
from stages.vocabulary.head import Head

NEEDS = {"boundary": True, "eos": True, "top_k": 5}


def made(vocab=97, rows=101, tokens=50, softcap=None, spread=1.0):
    torch.manual_seed(0)
    layer = torch.nn.Linear(8, rows)
    hidden = torch.randn(tokens, 8) * spread
    return Head(layer, Shape(vocab, 1.0, softcap)), hidden, torch.randint(0, vocab, (tokens,))


@pytest.mark.parametrize("softcap", [None, 4.0])
@pytest.mark.parametrize("block", [None, 7])
def test_columns_equal_the_full_softmax(softcap, block):
    head, hidden, targets = made(softcap=softcap)
    boundary = np.zeros(97, bool)
    boundary[[3, 50, 96]] = True
    wanted = wanted_signals(NEEDS, boundary, 11, torch.device("cpu"))
    signals = compute_signals(hidden, head, targets, torch.tensor([20, 49]), wanted, block)
    assert set(signals) == set(columns_for(NEEDS))
    logits = head.layer(hidden)[:, :97]
    logprobs = torch.log_softmax(softcap * torch.tanh(logits / softcap) if softcap else logits, -1).detach()
    observed = logprobs.gather(1, targets[:, None])[:, 0]
    observed[[20, 49]] = 0
    torch.testing.assert_close(signals["observed_logprob"], observed)
    torch.testing.assert_close(signals["boundary_logprob"], logprobs[:, torch.tensor(boundary)].logsumexp(-1))
    torch.testing.assert_close(signals["eos_logprob"], logprobs[:, 11])
    values, ids = torch.topk(logprobs, 5)
    assert torch.equal(signals["topk_ids"].long(), ids)
    torch.testing.assert_close(signals["topk_logprobs"].float(), values, rtol=1e-3, atol=1e-3)
    tail = logprobs.scatter(1, ids, -torch.inf).logsumexp(-1)
    torch.testing.assert_close(signals["tail_logmass"], tail)


def test_tiny_tails_and_boundaries_are_exact():
    head, hidden, targets = made(spread=60.0)
    boundary = np.zeros(97, bool)
    boundary[3] = True
    signals = compute_signals(
        hidden, head, targets, torch.tensor([]).long(), wanted_signals(NEEDS, boundary, 11, hidden.device)
    )
    exact = torch.log_softmax(head.layer.double()(hidden.double())[:, :97], -1).detach()
    tail = exact.scatter(1, torch.topk(exact, 5)[1], -torch.inf).logsumexp(-1).clamp(min=np.log(1e-37))
    torch.testing.assert_close(signals["tail_logmass"].double(), tail, rtol=1e-4, atol=1e-3)
    torch.testing.assert_close(signals["boundary_logprob"].double(), exact[:, 3], rtol=1e-4, atol=1e-3)
    assert tail.min() < -30 and all(torch.isfinite(value).all() for value in signals.values())


def test_normalisers_take_the_columns_to_another_temperature():
    head, hidden, targets = made()
    needs = NEEDS | {"temperatures": [2.0, 0.5]}
    none = torch.tensor([]).long()
    signals = compute_signals(hidden, head, targets, none, wanted_signals(needs, np.zeros(97, bool), 11, hidden.device))
    logits = head.layer(hidden)[:, :97].detach()
    for temperature, name in ((2.0, "normaliser_2"), (0.5, "normaliser_0_5")):
        exact = torch.log_softmax(logits / temperature, -1).gather(1, signals["topk_ids"].long())
        found = signals["topk_logprobs"].float() / temperature - signals[name][:, None]
        torch.testing.assert_close(found, exact, rtol=2e-3, atol=2e-3)


def test_samples_follow_the_distribution():
    """RS-KD: counts sum to N, and the mean over many draws tends to p (kd_peers, invariant 13)."""
    head, hidden, targets = made(tokens=2, spread=0.5)
    needs, none = {"samples": 40_000}, torch.tensor([]).long()
    drawn = compute_signals(hidden, head, targets, none, wanted_signals(needs, np.zeros(97, bool), 1, hidden.device))
    again = compute_signals(hidden, head, targets, none, wanted_signals(needs, np.zeros(97, bool), 1, hidden.device))
    assert torch.equal(drawn["sample_ids"], again["sample_ids"]) and drawn["sample_ids"].shape == (2, 40_000)
    shares = torch.stack([torch.bincount(row, minlength=97) for row in drawn["sample_ids"].long()]) / 40_000
    p = torch.softmax(head.layer(hidden)[:, :97], -1).detach()
    assert ((shares - p).abs() < 5 * (p * (1 - p) / 40_000).sqrt() + 1e-4).all()


def test_bfloat16_bits():
    values = torch.tensor([0.0, 1.0, -2.5, 3.140625, 1e30, -1e-30])
    bits = values.to(torch.bfloat16).view(torch.uint16).numpy()
    assert torch.equal(torch.from_numpy(to_float32(bits)), values.to(torch.bfloat16).float())


@pytest.mark.parametrize("vocab,k", [(4096, 64), (5001, 32), (100, 7), (64, 64)])
def test_top_k(vocab, k):
    logits = torch.randn(9, vocab, generator=torch.Generator().manual_seed(1))
    values, ids = top_k(logits, k)
    expected, places = torch.topk(logits, k)
    assert torch.equal(values, expected) and torch.equal(ids, places)


def write(path, groups, k=4, seed=0):
    """Random signals of row groups of examples; returns the flat arrays and lengths of all."""
    source = np.random.default_rng(seed)
    columns = columns_for(NEEDS)
    everything = []
    with writing(path, columns, {"stage": "test"}) as writer:
        for group, lengths in enumerate(groups):
            offsets = np.concatenate([[0], np.cumsum(lengths)]).astype(np.int64)
            number = int(offsets[-1])
            signals = {name: source.random(number).astype(np.float32) for name in columns}
            signals["topk_ids"] = source.integers(0, 2**32, (number, k)).astype(np.uint32)
            signals["topk_logprobs"] = source.random((number, k)).astype(np.float16)
            ids = source.integers(0, 2**32, number).astype(np.uint32)
            exact = source.random(len(lengths)) < 0.5
            writer.add([f"{group}:{i}" for i in range(len(lengths))], exact, ids, offsets, signals)
            everything += [
                {"input_ids": ids[a:b], "exact": flag} | {name: value[a:b] for name, value in signals.items()}
                for a, b, flag in zip(offsets[:-1], offsets[1:], exact, strict=True)
            ]
    return everything


@pytest.mark.parametrize("mapped", [False, True])
def test_round_trip(tmp_path, monkeypatch, mapped):
    if mapped:
        monkeypatch.setattr(reader, "MEMORY_LIMIT", 0)
    expected = write(tmp_path / "part-0000.parquet", [[3, 0, 5], [1]], seed=1)
    expected += write(tmp_path / "part-0001.parquet", [[2, 7]], seed=2)
    paths = sorted(tmp_path.glob("part-*"))
    signals = open_signals(paths, columns_for(NEEDS), tmp_path / "cache")
    assert (tmp_path / "cache").exists() == mapped and signals.count == 6
    assert signals.example_ids == ["0:0", "0:1", "0:2", "1:0", "0:0", "0:1"]
    for index in (5, 0, 3, 1, 4, 2):
        rows = signals.rows(index)
        assert all(np.array_equal(rows[name], value) for name, value in expected[index].items())
    joined = signals.gather([4, 0])
    assert np.array_equal(joined["topk_ids"], np.concatenate([expected[4]["topk_ids"], expected[0]["topk_ids"]]))
    assert joined["exact"].tolist() == [expected[4]["exact"], expected[0]["exact"]]
    assert torch.from_numpy(joined["topk_logprobs"]).shape == (5, 4)
    few = open_signals(paths, ["observed_logprob"])
    assert set(few.rows(0)) == {"exact", "input_ids", "observed_logprob"}
    table = pq.read_table(paths[0])
    assert table.schema.field("topk_ids").type == pa.large_binary() and len(table["topk_ids"][0].as_py()) == 3 * 4 * 4


def test_wrong_files_are_named(tmp_path):
    write(tmp_path / "part-0000.parquet", [[3]])
    with pytest.raises(UserError, match="no column hidden"):
        open_signals([tmp_path / "part-0000.parquet"], ["hidden"])
    content = (tmp_path / "part-0000.parquet").read_bytes()
    (tmp_path / "part-0000.parquet").write_bytes(content[:-20])
    with pytest.raises(UserError, match=r"part-0000.parquet cannot be read"):
        open_signals([tmp_path / "part-0000.parquet"], ["observed_logprob"])


def test_writer_hands_on_its_errors(tmp_path):
    with pytest.raises(KeyError), writing(tmp_path / "x.parquet", ["observed_logprob"], {}) as writer:
        writer.add(["a"], np.array([True]), np.zeros(2, np.uint32), np.array([0, 2]), {})


def test_not_finite():
    values = np.zeros(6, np.float32)
    values[4] = np.nan
    with pytest.raises(UserError, match=r"'big' gives eos_logprob nan in example b"):
        check_finite({"eos_logprob": values}, np.array([0, 3, 6]), ["a", "b"], "big")


@pytest.mark.parametrize(
    ("column", "bad"),
    [
        ("observed_logprob", np.float32(np.nan)),
        ("tail_logmass", np.float32(-np.inf)),
        ("topk_logprobs", np.float16(np.nan)),
        ("hidden", np.uint16(0xFF80)),  # minus infinity in bfloat16
        ("hidden", np.uint16(0x7FC0)),  # NaN
    ],
)
def test_a_value_that_is_not_finite_is_refused_when_it_is_read(tmp_path, column, bad):
    offsets = np.array([0, 2, 2, 5])
    signals = {
        "observed_logprob": np.full(5, -1.0, np.float32),
        "tail_logmass": np.full(5, -2.0, np.float32),
        "topk_ids": np.zeros((5, 3), np.uint32),
        "topk_logprobs": np.full((5, 3), -3.0, np.float16),
        "hidden": np.full((5, 4), 0x7F7F, np.uint16),  # the largest finite number
    }
    signals[column].reshape(5, -1)[3, -1] = bad
    with writing(tmp_path / "part.parquet", list(signals), {}) as writer:
        writer.add(["a", "empty", "c"], np.ones(3, bool), np.zeros(5, np.uint32), offsets, signals)
    found = open_signals([tmp_path / "part.parquet"], list(signals))
    assert len(found.gather([1, 0])["hidden"]) == 2
    with pytest.raises(UserError, match=rf"{tmp_path} hold {column} (nan|-inf) in example c, which is not finite"):
        found.gather([1, 2, 0])
