"""The output layer of a model: from hidden states to whatever is asked of their distributions."""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import nn

from stages.vocabulary.blocks import Shape, block_buffer, block_logits, block_size, compute_dtype, pieces
from stages.vocabulary.dense import Fixed, RowLoss, dense_loss
from stages.vocabulary.distribution import Chosen, head_distribution
from stages.vocabulary.statistics import head_statistics


@dataclass(frozen=True)
class Head:
    """The output layer of a model: a linear layer, cut to `shape.vocab` columns, scaled and softly capped."""

    layer: nn.Module
    shape: Shape

    @property
    def weight(self) -> torch.Tensor:
        """The output matrix [rows, hidden size]; rows from `shape.vocab` on are padding."""
        return self.layer.weight

    @property
    def bias(self) -> torch.Tensor | None:
        """The output bias [rows] or None."""
        return getattr(self.layer, "bias", None)

    def statistics(
        self, hidden: torch.Tensor, targets: torch.Tensor, mask: torch.Tensor | None, eos_id: int | None
    ) -> dict[str, torch.Tensor]:
        """Return `head_statistics` of hidden states [N, d] and target ids [N]."""
        shape = self.shape
        settings = (shape.vocab, self.bias, shape.softcap, shape.scale)
        return head_statistics(hidden, self.weight, targets, mask, eos_id, *settings)

    def logits(self, hidden: torch.Tensor) -> torch.Tensor:
        """Return float32 logits [n, vocab] of hidden states [n, d]; for a few rows at a time."""
        bias = None if self.bias is None else self.bias[: self.shape.vocab]
        weight = self.weight[: self.shape.vocab]
        return block_logits(hidden.to(weight.dtype), weight, bias, self.shape)[0]

    @torch.no_grad()
    def logit_pieces(self, hidden: torch.Tensor) -> Iterator[tuple[slice, torch.Tensor]]:
        """Yield (rows, their float32 logits [n, vocab]) of hidden states [N, d], a few rows that fit a CPU's cache.

        They may be written on. Use them at once: their place is used again.
        """
        vocab, compute = self.shape.vocab, compute_dtype(hidden)
        weight = self.weight[:vocab].to(compute)
        bias = None if self.bias is None else self.bias[:vocab].to(compute)
        size = max(1, min(block_size(vocab, hidden.device), len(hidden)))
        buffer = block_buffer(size, vocab, hidden)
        for start in range(0, len(hidden), size):
            inputs = hidden[start : start + size].to(compute)
            logits, _ = block_logits(inputs, weight, bias, self.shape, buffer)
            for piece in pieces(logits):
                yield slice(start + piece.start, start + piece.stop), logits[piece]

    def distribution(
        self, hidden: torch.Tensor, candidates: torch.Tensor, likeliest: int, temperature: float
    ) -> Chosen:
        """Return `head_distribution` of hidden states [N, d]."""
        return head_distribution(hidden, self.weight, candidates, likeliest, self.shape, self.bias, temperature)

    def dense(
        self,
        function: RowLoss,
        hidden: torch.Tensor,
        constants: dict[str, torch.Tensor],
        fixed: "dict[str, tuple[Head, torch.Tensor]] | None" = None,
    ) -> torch.Tensor:
        """Return `dense_loss` of hidden states [N, d]: a sum over rows of a function of their logits."""
        layers = {name: Fixed(h.weight, h.bias, h.shape, states) for name, (h, states) in (fixed or {}).items()}
        return dense_loss(function, hidden, self.weight, self.shape, constants, self.bias, fixed=layers)


class Side(NamedTuple):
    """A model as losses see it: its output layer, and `embed`, which makes vectors [n, d] of token ids [n]."""

    head: Head
    embed: nn.Module


class Sides(NamedTuple):
    """The two models of a distillation; `teacher` is None where no loss reads its matrices."""

    student: Side
    teacher: Side | None = None
