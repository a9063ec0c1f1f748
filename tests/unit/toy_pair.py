"""Two tokenizers, a few texts and random models of them: what a loss sees, without a model's body.

Hidden states are free parameters, one row per token of all texts, so that gradients by them can be compared however
the texts are split into micro-batches.
"""

from pathlib import Path

import numpy as np
import torch
from torch import nn

from stages.alignment.pair import Matches, Pair
from stages.losses.examples import Examples
from stages.signals.schema import to_float32
from stages.tokenization import ByteView
from stages.tokenization.batches import select, token_places
from stages.vocabulary.blocks import Shape
from stages.vocabulary.head import Head, Side, Sides

from . import tiny


def view(folder: Path, vocab: int) -> ByteView:
    tiny.bpe(folder, vocab)
    return ByteView.load(folder)


def side(vocab: int, size: int, seed: int, padding: int = 0) -> Side:
    """A random output layer and embedding of `vocab` ids and some padding rows."""
    source = torch.Generator().manual_seed(seed)
    layer, embed = nn.Linear(size, vocab + padding, bias=False), nn.Embedding(vocab + padding, size)
    with torch.no_grad():
        layer.weight.normal_(generator=source)
        embed.weight.normal_(generator=source)
    return Side(Head(layer, Shape(vocab)), embed)


def exact_matches(source: ByteView, target: ByteView) -> Matches:
    """For each id of `source`, the one of `target` with its bytes or its role."""
    ids = {content: i for i, content in enumerate(target.token_bytes) if content is not None}
    roles = {role: i for i, role in target.role_of.items()}
    found = [
        roles.get(source.role_of.get(i), -1) if content is None else ids.get(content, -1)
        for i, content in enumerate(source.token_bytes)
    ]
    exact = np.array(found, np.int64)
    return Matches(exact, exact, exact, exact >= 0)


def pair_of(teacher: ByteView, student: ByteView) -> Pair:
    return Pair(teacher, student, exact_matches(student, teacher), exact_matches(teacher, student))


class Toy:
    """Texts under two tokenizers, with random states and matrices on both sides."""

    def __init__(self, teacher: ByteView, student: ByteView, texts, sizes=(6, 5), layers=1, padding=(0, 0), masked=()):
        rows = [[{"role": "text", "text": text, "loss": i not in masked}] for i, text in enumerate(texts)]
        self.pair = pair_of(teacher, student)
        self.teacher, self.student = (v.encode_examples(rows, [True] * len(rows)) for v in (teacher, student))
        source = torch.Generator().manual_seed(len(texts))
        states = torch.randn(len(self.teacher.ids), layers * sizes[0], generator=source)
        self.bits = states.to(torch.bfloat16).view(torch.uint16).numpy()
        self.hidden = torch.randn(len(self.student.ids), layers, sizes[1], generator=source, requires_grad=True)
        self.sides = Sides(
            side(student.vocab_size, sizes[1], 1, padding[1]), side(teacher.vocab_size, sizes[0], 2, padding[0])
        )
        for parameter in [*self.sides.teacher.head.layer.parameters(), *self.sides.teacher.embed.parameters()]:
            parameter.requires_grad_(False)

    def examples(self, chosen) -> Examples:
        chosen = np.array(chosen)
        bits = self.bits[token_places(self.teacher.offsets, chosen)]
        size = self.sides.teacher.head.weight.shape[1]
        logits = self.sides.teacher.head.logits(torch.tensor(to_float32(bits[:, -size:])))
        signals = {"hidden": bits, "hidden_states": bits, "topk_ids": logits.argmax(-1)[:, None].numpy().astype("u4")}
        return Examples(select(self.student, chosen), select(self.teacher, chosen), signals, self.pair)

    def states(self, chosen, projectors):
        states = self.hidden[torch.tensor(token_places(self.student.offsets, np.array(chosen)))]
        return {"hidden": states[:, -1], "hidden_states": states, "sides": self.sides, "projectors": projectors}

    def projectors(self, module, options, seed=0):
        return module.projectors(options, self.sides, torch.Generator().manual_seed(seed), self.pair)

    def evaluate(self, module, options, groups, projectors=None):
        """(the loss divided by its count, its parts, gradients by name) with one micro-batch for each of `groups`."""
        projectors = projectors or self.projectors(module, options)
        leaves = {"hidden": self.hidden, "head": self.sides.student.head.weight} | dict(projectors.named_parameters())
        for leaf in leaves.values():
            leaf.grad = None
        prepared = [module.prepare(self.examples(group), options) for group in groups]
        share_totals(prepared)
        count = max(sum(part.count for part in prepared), 1.0)
        value, parts = 0.0, {}
        for group, part in zip(groups, prepared, strict=True):
            arrays = {name: torch.as_tensor(array) for name, array in part.arrays.items()}
            total, extra = module.loss(self.states(group, projectors), arrays, options)
            (total / count).backward()
            value += total.item() / count
            parts = {name: parts.get(name, 0.0) + float(part) / count for name, part in extra.items()}
        gradients = {name: leaf.grad for name, leaf in leaves.items() if leaf.grad is not None}
        return value, parts, gradients


def share_totals(prepared) -> None:
    """What the trainer does with `Prepared.totals`: their sums over the step take the place of each micro-batch's."""
    for name in prepared[0].totals:
        total = sum(part.arrays[name] for part in prepared)
        for part in prepared:
            part.arrays[name] = np.asarray(total)


def close(one, other, rtol=1e-4, atol=1e-6):
    """Whether two results of `evaluate` are the same."""
    np.testing.assert_allclose(one[0], other[0], rtol=rtol, atol=atol)
    assert one[2].keys() == other[2].keys()
    for name in one[2]:
        np.testing.assert_allclose(one[2][name], other[2][name], rtol=1e-3, atol=atol, err_msg=name)
