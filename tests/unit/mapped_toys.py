"""Toys for losses that map the teacher's tokens to the student's, with one tokenizer for both or with two."""

from types import SimpleNamespace

import numpy as np
import torch

from stages.alignment.chunks import BiasTable
from stages.alignment.mapping import mine
from stages.alignment.pair import Matches
from stages.losses import same_tokenizer
from stages.signals.schema import NO_NEEDS
from stages.training import inputs

from . import dense, tiny, toy_pair
from .programs import World

TEXTS = [tiny.text(1, 14), tiny.text(2, 9), "naïve 日本語 tokens", tiny.text(5, 20)]
GROUPS = [[0, 1, 2, 3]]
SPLIT = [[2], [0, 3], [1]]


def matches(source, target):
    """What the mined mapping says of two tokenizers."""
    found = list(mine(target, source, 0.3))
    exact = [match.identity if match.kind in ("exact", "special") else -1 for match in found]
    columns = (exact, [m.prefix for m in found], [m.identity for m in found])
    return Matches(*(np.array(column, np.int64) for column in columns), np.array([m.reliable for m in found]))


def toys(folder):
    """(one tokenizer for both, two tokenizers), each with the mapping between them."""
    big, small = toy_pair.view(folder / "big", 330), toy_pair.view(folder / "small", 280)
    made = []
    for teacher in (small, big):
        toy = toy_pair.Toy(teacher, small, TEXTS, padding=(2, 3))
        object.__setattr__(toy.pair, "to_teacher", matches(small, teacher))
        object.__setattr__(toy.pair, "to_student", matches(teacher, small))
        made.append(toy)
    return tuple(made)


def step(module, toy, options, groups=GROUPS, k=None):
    """`dense.step` of a loss that also sees the pair of tokenizers."""
    seen = lambda student, arrays, options: module.loss(student | {"pair": toy.pair}, arrays, options)  # noqa: E731
    temperature = options.get("kd_temp", options.get("temperature", 1.0))
    options = options | {"temperature": temperature}
    return dense.step(SimpleNamespace(prepare=module.prepare, loss=seen), toy, options, groups, k)


def forward_kl(toy, groups=GROUPS, k=None, temperature=1.0):
    return dense.step(same_tokenizer, toy, {"name": "fkl", "temperature": temperature}, groups, k)


def masked(toy, tokens):
    """Make only what comes after so many student tokens of each example a target; on both sides the same text."""
    ends = toy.student.ends[np.minimum(toy.student.offsets[:-1] + tokens, toy.student.offsets[1:] - 1)]
    for batch in (toy.teacher, toy.student):
        batch.loss[:] = batch.ends > np.repeat(ends, np.diff(batch.offsets))
    return toy


def junk_in_padding(toy):
    """Change the rows of both output layers that no token has."""
    for side in toy.sides:
        with torch.no_grad():
            side.head.layer.weight[side.head.shape.vocab :] = 1e4


def trained(tmp_path, monkeypatch, module, options, temperatures=()):
    """The losses of each step of the programs, on cached signals and with the teacher at hand."""
    name = options["name"]
    monkeypatch.setattr(inputs, "open_bias", lambda *arguments: BiasTable(np.zeros(0, np.int64)))
    for check in ("refuse_other", "refuse_few"):
        monkeypatch.setattr(inputs, check, lambda *arguments: None)
    entry = {"name": name, "module": module.__name__, "chunks": "unconstrained", "weight": 1.0}
    needs = NO_NEEDS | {"top_k": 100, "temperatures": list(temperatures)}
    train = {"batch_size": 12, "steps": 8}  # every step sees the whole corpus
    runs = World(tmp_path / "results").both([entry], needs, options, False, train, ["mapping"])
    return tuple([line[name] for line in lines] for lines in runs)
