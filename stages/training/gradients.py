"""The gradient of one optimizer step: of all its micro-batches and processes, and of all losses."""

import contextlib
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
from torch import nn

from stages.core.errors import UserError
from stages.losses import Loss
from stages.training import aggregation
from stages.training.data import MicroBatch, Step, generator
from stages.training.modes import autocasts
from stages.training.student import Student


class Gradients:
    """Leaves the gradient of a step in the student's parameters; `module` is the student or its data-parallel wrapper.

    Nothing depends on how the step is split: counts, and the factors with which the losses' gradients are added up
    (`training.aggregation`), are those of the whole step.
    """

    def __init__(
        self,
        student: Student,
        module: nn.Module,
        losses: Sequence[Loss],
        settings: dict[str, Any],
        seed: int,
        accelerator: Any,
    ) -> None:
        self.student, self.module, self.losses, self.seed, self.accelerator = student, module, losses, seed, accelerator
        self.steps = settings["steps"]
        self.bfloat16 = autocasts(settings["dtype"], accelerator.device)
        self.way = aggregation.parse(settings["multitask_aggregation_fn"])
        # The parameters whose gradients are compared.
        self.compared = [p for p in student.parameters() if p.requires_grad]
        if self.way.scope == "last_block":
            self.compared = aggregation.last_block(student.model)
        learning = (settings["gradnorm_alpha"], settings["gradnorm_lr"])
        self.gradnorm = aggregation.GradNorm(len(losses), *learning) if self.way.learned else None

    def of_step(
        self, step: int, data: Step, counts: dict[str, float], passes: int
    ) -> tuple[np.ndarray, dict[str, float]]:
        """Make the gradient of optimizer step `step`; return (factor of each loss, averages of losses and diagnostics).

        `counts`: each loss's denominator over the whole step; `passes`: what each process makes.
        """
        own = np.array([loss.weight * aggregation.SCHEDULES[loss.schedule](step / self.steps) for loss in self.losses])
        if self.gradnorm is not None:
            return self.learning(self.gradnorm, step, own, data, counts, passes)
        if not self.way.functions:
            return own, self.together(data, counts, passes, lambda values: own)
        if self.way.scope == "all":
            rows, averages = self.apart(data, counts)
            factors = self.factors(step, own, rows)
            self.assign(torch.from_numpy(factors).to(rows) @ rows)
            return factors, averages
        if passes == 1:
            seen: list[np.ndarray] = []

            def compare(values: list[torch.Tensor]) -> np.ndarray:
                seen.append(self.factors(step, own, self.summed(aggregation.flat_gradients(values, self.compared))))
                return seen[-1]

            averages = self.together(data, counts, passes, compare)
            return seen[0], averages
        device = self.accelerator.device
        with torch.random.fork_rng([device] if device.type == "cuda" else []):  # both rounds draw the same dropout
            rows, _ = self.apart(data, counts)
        factors = self.factors(step, own, rows)
        return factors, self.together(data, counts, passes, lambda values: factors)

    def learning(
        self,
        gradnorm: aggregation.GradNorm,
        step: int,
        own: np.ndarray,
        data: Step,
        counts: dict[str, float],
        passes: int,
    ) -> tuple[np.ndarray, dict[str, float]]:
        """Do what `of_step` does with learned factors, which are known before the first pass and learned after all."""
        factors, rows = own * gradnorm.factors, self.zeros()

        def collect(values: list[torch.Tensor]) -> np.ndarray:
            rows.add_(aggregation.flat_gradients(values, self.compared))
            return factors

        averages = self.together(data, counts, passes, collect)
        norms = np.sqrt(np.diag(self.gram(step, self.summed(rows))))
        gradnorm.update(norms, np.array([averages[loss.name] for loss in self.losses]))
        return factors, averages

    def together(
        self,
        data: Step,
        counts: dict[str, float],
        passes: int,
        factors: Callable[[list[torch.Tensor]], np.ndarray],
    ) -> dict[str, float]:
        """Add the gradient of the sum of all losses, each times its factor, over all passes; return averages.

        `factors` gets the losses of a pass before its graph is used up.
        """
        sums: dict[str, torch.Tensor] = {}
        for number in range(passes):
            last = number == passes - 1
            extra = number >= len(data.micro_batches)
            batch = data.micro_batches[0 if extra else number]
            with contextlib.nullcontext() if last else self.accelerator.no_sync(self.module):
                values = self.values(self.module, batch, counts, 0.0 if extra else batch.weight, sums)
                total = sum(float(factor) * value for factor, value in zip(factors(values), values, strict=True))
                if self.accelerator.num_processes > 1:
                    total = total + self.nothing()
                # Data-parallel wrappers average gradients over processes; the counts are already global.
                (total * self.accelerator.num_processes).backward()
        return self.averages(sums, counts)

    def apart(self, data: Step, counts: dict[str, float]) -> tuple[torch.Tensor, dict[str, float]]:
        """Return (each loss's gradient over all passes and processes [losses, compared parameters], averages)."""
        sums: dict[str, torch.Tensor] = {}
        rows = self.zeros()
        for batch in data.micro_batches:
            values = self.values(self.student, batch, counts, batch.weight, sums)
            rows.add_(aggregation.flat_gradients(values, self.compared))
        return self.summed(rows), self.averages(sums, counts)

    def zeros(self) -> torch.Tensor:
        """Return float32 zeros [losses, compared parameters]."""
        return torch.zeros(len(self.losses), sum(p.numel() for p in self.compared), device=self.accelerator.device)

    def factors(self, step: int, own: np.ndarray, rows: torch.Tensor) -> np.ndarray:
        """Return the factor of each loss, from its gradient over the whole step."""
        source = generator(self.seed, "pcgrad", step)
        orders = [source.permutation(len(own)) for _ in own]
        return aggregation.factors(self.way, self.gram(step, rows), own, orders)

    def gram(self, step: int, rows: torch.Tensor) -> np.ndarray:
        """Return the dot products of the losses' gradients; UserError for one that is not finite."""
        gram = aggregation.dot_products(rows)
        for loss, square in zip(self.losses, np.diag(gram), strict=True):
            if not np.isfinite(square):
                raise UserError(
                    f"The gradient of {loss.name} in step {step + 1} is not finite: lower learning_rate, or train in "
                    "dtype float32."
                )
        return gram

    def assign(self, gradient: torch.Tensor) -> None:
        """Give the compared parameters their parts of a flat gradient."""
        sizes = [parameter.numel() for parameter in self.compared]
        for parameter, part in zip(self.compared, gradient.split(sizes), strict=True):
            parameter.grad = part.view_as(parameter)

    def values(
        self,
        module: nn.Module,
        batch: MicroBatch,
        counts: dict[str, float],
        weight: float,
        sums: dict[str, torch.Tensor],
    ) -> list[torch.Tensor]:
        """Return each loss of a pass divided by its count over the step, times `weight`.

        Adds the undivided losses and their diagnostics to `sums`, float64.
        """
        device = self.accelerator.device
        place = lambda array: torch.as_tensor(array).to(device, non_blocking=True)  # noqa: E731
        student = batch.examples.student
        rows = np.unique(np.concatenate([prepared.rows for prepared in batch.prepared] or [np.zeros(0, np.int64)]))
        if not len(rows):
            rows = np.zeros(1, np.int64)
        targets = np.append(student.ids[1:], 0)[rows].astype(np.int64)
        positions = None if batch.positions is None else place(batch.positions)
        asked = [prepared.query for prepared in batch.prepared if prepared.query is not None]
        queries = [(place(query.rows), place(query.candidates), query.top_k, query.temperature) for query in asked]
        with torch.autocast(device.type, torch.bfloat16, enabled=self.bfloat16):
            inputs = (place(batch.input_ids), positions, place(batch.index), place(rows), place(targets))
            found = module(*inputs, queries)
        chosen = iter(found.pop("chosen"))
        values = []
        for loss, prepared in zip(self.losses, batch.prepared, strict=True):
            seen = found | {"sides": self.student.sides, "pair": batch.examples.pair}
            if prepared.query is not None:
                seen |= dict(zip(("candidate_logprob", "topk_logprob", "topk_ids"), next(chosen), strict=True))
            if loss.name in self.student.projectors:
                seen["projectors"] = self.student.projectors[loss.name]
            arrays = {name: place(value) for name, value in prepared.arrays.items()}
            value, extra = loss.module.loss(seen, arrays, loss.options)
            values.append(value * (weight / max(counts[loss.name], 1.0)))
            named = {loss.name: value} | {f"{loss.name}/{name}": part for name, part in extra.items()}
            for name, part in named.items():
                sums[name] = sums.get(name, 0.0) + part.detach().to(device, torch.float64) * weight
        return values

    def averages(self, sums: dict[str, torch.Tensor], counts: dict[str, float]) -> dict[str, float]:
        """Return sums over all processes, divided by the count of the loss that they belong to."""
        total = self.summed(torch.stack(list(sums.values()))).tolist()
        return {name: value / max(counts[name.partition("/")[0]], 1.0) for name, value in zip(sums, total, strict=True)}

    def nothing(self) -> torch.Tensor:
        """Return 0 with a zero gradient in every weight that a loss may leave out, for wrappers that wait for it."""
        unsure = [self.student.head.weight, *self.student.projectors.parameters()]
        return sum((p.sum() * 0.0 for p in unsure if p.requires_grad), torch.zeros((), device=self.accelerator.device))

    def summed(self, tensor: torch.Tensor) -> torch.Tensor:
        """Return the sum over processes."""
        return self.accelerator.reduce(tensor, "sum") if self.accelerator.num_processes > 1 else tensor
