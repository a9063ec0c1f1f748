"""Losses of a few numbers per row, each made of all of the row's logits, where one term reads several rows.

`Head.dense` sums over rows, so a term of several rows (a divergence from the mean of a chunk's rows) does not fit it.
Here the numbers are made first, without a gradient; their share of the loss is then known, and a second pass brings it
to the logits. Neither pass holds the logits of more than one block.
"""

from collections.abc import Callable
from typing import TYPE_CHECKING

import torch

if TYPE_CHECKING:
    from stages.vocabulary.head import Head

Constants = dict[str, torch.Tensor]
Statistics = Callable[[torch.Tensor, Constants], torch.Tensor]


def loss_of_statistics(
    head: "Head",
    hidden: torch.Tensor,
    constants: Constants,
    statistics: Statistics,
    loss: Callable[[torch.Tensor], torch.Tensor],
) -> torch.Tensor:
    """Return `loss` of the statistics [R, m] of all rows, a scalar, differentiable in `hidden` [R, d] and the head.

    `statistics(logits [n, vocab], constants)` makes those of n rows, and gets the same rows of every constant [R, ...].
    It must not write on the logits.
    """
    if not len(hidden):
        return hidden.sum().float()
    parts = []
    for part, logits in head.logit_pieces(hidden):
        parts.append(statistics(logits, {name: value[part] for name, value in constants.items()}))
    found = torch.cat(parts).requires_grad_()
    with torch.enable_grad():
        value = loss(found)
        (slope,) = torch.autograd.grad(value, found)

    def linear(logits: torch.Tensor, here: Constants) -> torch.Tensor:
        return (statistics(logits, here) * here["slope"]).sum()

    share = head.dense(linear, hidden, constants | {"slope": slope})
    return value.detach() + (share - share.detach())
