"""How the gradients of several losses become one: `multitask_aggregation_fn`, with tokenkit's names.

Every way adds the gradients g_i of the losses up with a factor each, and the factors follow from the dot products of
these gradients alone (their Gram matrix), taken over a whole optimizer step, all micro-batches and processes. c_i is
`loss_weights`, times the loss's schedule at this step.

    none       sum of c_i g_i. tokenkit takes the mean, which only changes the gradient's size.
    gradmag    each c_i g_i is made c_i long: weights are ratios of gradient norms. (In tokenkit they cancel.)
    gradclip:M each c_i g_i is made at most M long.
    pcgrad     where two point against each other, each loses what the other opposes (arXiv 2001.06782).

These three take all trained parameters, hold one gradient of them for each loss, and can be joined: "pcgrad+gradmag"
applies one after the other. The following compare gradients in the last transformer block alone (in it, the adapters
of lora), which costs little more than none:

    approx_gradmag               as gradmag.
    approx_gradmag_preserve_mag  the same, with factors that sum to 1. What tokenkit recommends.
    gradnorm                     c_i times a factor that is learned (GradNorm, arXiv 1711.02257).

A loss without gradient there has the factor 0. (tokenkit gives it 1e8, which is harmless only where the gradient is
zero everywhere.)
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial

import numpy as np
import torch
from torch import nn
from transformers import PreTrainedModel

from stages.core.errors import UserError
from stages.models.description import last_block_of

EPSILON = 1e-8
NEGLIGIBLE = 1e-6  # of a gradient, what a projection may leave over by rounding
BLOCK = 2**20  # parameters whose dot products are taken at once, in float64

Orders = Sequence[Sequence[int]]
Function = Callable[[np.ndarray, np.ndarray, Orders], np.ndarray]

# Of the share of the training that is done, 0 at the first step.
SCHEDULES: dict[str, Callable[[float], float]] = {
    "constant": lambda share: 1.0,
    "linear": lambda share: share,
    "cosine": lambda share: 0.5 * (1 + math.cos(math.pi * share)),
    "reverse_cosine": lambda share: 0.5 * (1 - math.cos(math.pi * share)),
}


def check_schedule(loss: str, schedule: str) -> str:
    """Return `schedule`; UserError when there is none of that name."""
    if schedule not in SCHEDULES:
        raise UserError(f"The schedule of loss {loss!r} is {schedule!r}; it must be one of {', '.join(SCHEDULES)}.")
    return schedule


@dataclass(frozen=True)
class Aggregation:
    """A `multitask_aggregation_fn`.

    `scope`: the parameters whose gradients are compared, "nothing", "last_block" or "all". `functions`: what is done
    to the gradients, in order. `normalise`: whether factors sum to 1. `learned`: whether they are (`GradNorm`).
    """

    scope: str = "nothing"
    functions: tuple[Function, ...] = ()
    normalise: bool = False
    learned: bool = False


def parse(text: str) -> Aggregation:
    """Return the aggregation that `text` names; UserError for one that does not exist."""
    if text in ALONE:
        return ALONE[text]
    functions: list[Function] = []
    for part in text.split("+"):
        name, _, value = part.partition(":")
        if part in ALONE:
            raise UserError(f"multitask_aggregation_fn is {text!r}, but {part} stands alone; take one of the two.")
        if name not in JOINED or (value and name != "gradclip"):
            known = ", ".join([*ALONE, *JOINED])
            raise UserError(f"multitask_aggregation_fn is {text!r}: {part!r} is unknown; known: {known}.")
        functions.append(partial(gradclip, limit=_limit(text, value)) if name == "gradclip" else JOINED[name])
    return Aggregation("all", tuple(functions))


def _limit(text: str, value: str) -> float:
    try:
        limit = float(value)
    except ValueError:
        limit = 0.0
    if not 0 < limit < math.inf:
        raise UserError(
            f"multitask_aggregation_fn is {text!r}: gradclip needs the longest gradient, a number above 0 as in "
            "gradclip:1.0."
        )
    return limit


def gradmag(gram: np.ndarray, own: np.ndarray, orders: Orders) -> np.ndarray:
    """Return [n, n], row i the new gradient i by factors of the old ones: each as long as its loss weight `own` [n]."""
    norms = np.sqrt(np.diag(gram))
    return np.diag(np.where(norms > 0, own / (norms + EPSILON), 0.0))


def gradclip(gram: np.ndarray, own: np.ndarray, orders: Orders, *, limit: float) -> np.ndarray:
    """Return [n, n] as `gradmag` does: gradients longer than `limit` are shortened to it."""
    return np.diag(limit / np.maximum(np.sqrt(np.diag(gram)), limit))


def pcgrad(gram: np.ndarray, own: np.ndarray, orders: Orders) -> np.ndarray:
    """Return [n, n] as `gradmag` does: gradient i without the part that points against the others (PCGrad).

    `orders[i]` says in which order they are taken; each is compared with what the ones before have left of i, over all
    parameters at once, as in Algorithm 1 of arXiv 2001.06782.
    """
    matrix = np.eye(len(gram))
    for i, row in enumerate(matrix):
        for j in orders[i]:
            along = row @ gram[:, j]
            if j != i and along < 0:
                row[j] -= along / gram[j, j]
    return matrix


JOINED: dict[str, Function] = {"gradmag": gradmag, "gradclip": gradclip, "pcgrad": pcgrad}
ALONE = {
    "none": Aggregation(),
    "approx_gradmag": Aggregation("last_block", (gradmag,)),
    "approx_gradmag_preserve_mag": Aggregation("last_block", (gradmag,), normalise=True),
    "gradnorm": Aggregation("last_block", learned=True),
}


def combination(gram: np.ndarray, own: np.ndarray, functions: Sequence[Function], orders: Orders) -> np.ndarray:
    """Return float64 [n, n]: row i is what becomes of loss i's gradient, by factors of the losses' gradients.

    `gram` float64 [n, n] holds their dot products, `own` [n] the loss weights; `orders` as in `pcgrad`.
    """
    matrix, norms = np.diag(own), np.sqrt(np.diag(gram))
    for function in functions:
        current = matrix @ gram @ matrix.T
        nothing = np.sqrt(np.abs(np.diag(current))) <= NEGLIGIBLE * (np.abs(matrix) @ norms)
        current[nothing] = current[:, nothing] = 0.0
        matrix = function(current, own, orders) @ matrix
    return matrix


def factors(aggregation: Aggregation, gram: np.ndarray, own: np.ndarray, orders: Orders) -> np.ndarray:
    """Return float64 [n]: the factor of each loss's gradient in the one that the optimizer gets."""
    found = combination(gram, own, aggregation.functions, orders).sum(0)
    return found / found.sum() if aggregation.normalise and found.sum() > 0 else found


def dot_products(rows: torch.Tensor) -> np.ndarray:
    """Return the Gram matrix, float64 [n, n], of gradients [n, parameters]."""
    total = torch.zeros(len(rows), len(rows), dtype=torch.float64, device=rows.device)
    for block in rows.split(BLOCK, dim=1):
        wide = block.double()
        total += wide @ wide.T
    return total.cpu().numpy()


def flat_gradients(values: Sequence[torch.Tensor], parameters: Sequence[nn.Parameter]) -> torch.Tensor:
    """Return float32 [losses, parameters]: the gradient of each value, its tensors laid end to end.

    The graph is kept. A value without gradient has zeros.
    """
    rows = torch.zeros(len(values), sum(p.numel() for p in parameters), device=parameters[0].device)
    for row, value in zip(rows, values, strict=True):
        if value.requires_grad:
            found = torch.autograd.grad(value, parameters, retain_graph=True, allow_unused=True, materialize_grads=True)
            torch.cat([gradient.flatten() for gradient in found], out=row)
    return rows


def last_block(model: PreTrainedModel) -> list[nn.Parameter]:
    """Return the trained parameters of the last transformer block; UserError when there are none."""
    block = last_block_of(model)
    found = [p for p in block.parameters() if p.requires_grad] if block is not None else []
    if not found:
        raise UserError(
            f"In the last transformer block of {type(model).__name__} nothing is trained, so gradients cannot be "
            "compared there: take multitask_aggregation_fn gradmag, or another train_model_mode."
        )
    return found


class GradNorm:
    """Learns factors [n] with which no loss trains faster than the others (GradNorm, arXiv 1711.02257).

    Each factor w_i moves against the gradient of mean_i |w_i n_i - mean(w n) r_i^alpha|, the target held constant: n_i
    is the norm of loss i's gradient, r_i its value relative to the first one, divided by the mean of these. Factors
    are never below 0 and sum to n. Loss weights come on top. AdamW with the settings that optax, and so tokenkit, has.
    """

    def __init__(self, losses: int, alpha: float, rate: float) -> None:
        self.alpha = alpha
        self.weights = nn.Parameter(torch.ones(losses, dtype=torch.float64))
        self.first = torch.zeros(losses, dtype=torch.float64)
        self.optimizer = torch.optim.AdamW([self.weights], lr=rate, weight_decay=1e-4)

    @property
    def factors(self) -> np.ndarray:
        """The factors, float64 [n]."""
        return self.weights.detach().numpy().copy()

    def update(self, norms: np.ndarray, values: np.ndarray) -> None:
        """Learn from the losses' gradient norms and values [n], all unweighted, of a step that used `factors`."""
        if not self.optimizer.state:
            self.first = torch.from_numpy(values).clone()
        loss, size = torch.from_numpy(values), torch.from_numpy(norms)
        ratio = torch.where(self.first > 0, loss / self.first, 1.0).clamp(min=0)
        relative = ratio / ratio.mean() if ratio.any() else torch.ones_like(ratio)
        target = (self.weights.detach() * size).mean() * relative**self.alpha
        self.optimizer.zero_grad()
        (self.weights * size - target).abs().mean().backward()
        self.optimizer.step()
        with torch.no_grad():
            self.weights.clamp_(min=0)
            self.weights.mul_(len(self.weights) / self.weights.sum())

    def tensors(self) -> dict[str, torch.Tensor]:
        """Return everything that `restore` needs, by name."""
        state = self.optimizer.state.get(self.weights, {})
        learned = {"weights": self.weights.detach(), "first": self.first} | state
        return {f"gradnorm/{name}": value for name, value in learned.items()}

    def restore(self, tensors: dict[str, torch.Tensor]) -> None:
        """Go on from what `tensors` returned; other names are not looked at."""
        found = {name.removeprefix("gradnorm/"): v for name, v in tensors.items() if name.startswith("gradnorm/")}
        self.weights.data, self.first = found.pop("weights"), found.pop("first")
        self.optimizer.state[self.weights].update(found)
