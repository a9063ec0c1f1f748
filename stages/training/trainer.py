"""The training loop: exact under accumulation, data parallelism and interruption.

A loss is a sum with a count. The counts of all micro-batches and processes are added up before the first backward
pass of a step, so a gradient does not depend on how its batch was split.
"""

import contextlib
import json
import math
import signal
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import torch

from stages.core.errors import UserError
from stages.losses import Prepared
from stages.training import checkpoints
from stages.training.data import Examples, MicroBatch, Step, generator
from stages.training.modes import autocasts, parameter_groups
from stages.training.student import Student

LOOKAHEAD = 2


@dataclass(frozen=True)
class Loss:
    """A loss of the run: the module of stages/losses, its settings and its weight."""

    name: str
    module: ModuleType
    options: dict[str, Any]
    weight: float


@dataclass
class Run:
    """What a run is made of: `collate` makes a step's micro-batches, `ask_teacher` adds an online teacher's signals."""

    student: Student
    losses: list[Loss]
    collate: Callable[[int], Step]
    settings: dict[str, Any]
    seed: int
    folder: Path
    ask_teacher: Callable[[Examples], None] | None = None


class Clock:
    """Seconds of training, over restarts."""

    def __init__(self, before: float) -> None:
        self.before, self.started = before, time.monotonic()

    def seconds(self) -> float:
        """Return the seconds so far."""
        return self.before + time.monotonic() - self.started


def prepare_losses(losses: list[Loss], examples: Examples) -> list[Prepared]:
    """Return what each loss prepares of a micro-batch."""
    return [loss.module.prepare(examples, loss.options) for loss in losses]


def learning_rate(step: int, settings: dict[str, Any]) -> float:
    """Return the learning rate of optimizer step `step`, counted from 0: linear warm-up, then the schedule to 0."""
    peak, warmup, steps = settings["learning_rate"], settings["warmup_steps"], settings["steps"]
    if step < warmup:
        return peak * (step + 1) / warmup
    if settings["lr_schedule"] == "constant":
        return peak
    share = (step - warmup) / max(1, steps - warmup)
    return peak * (1 - share) if settings["lr_schedule"] == "linear" else peak * 0.5 * (1 + math.cos(math.pi * share))


def train(run: Run) -> dict[str, Any]:
    """Train `run.student` to the end; return {"metrics": lines, "timing": [[step, seconds]], "figures": totals}.

    Continues from the newest checkpoint in `run.folder`. On SIGTERM the step in hand is finished and saved, and
    UserError says so.
    """
    from accelerate import Accelerator

    accelerator = Accelerator(cpu=not torch.cuda.is_available())
    trainer = _Trainer(run, accelerator)
    run.folder.mkdir(parents=True, exist_ok=True)
    first = trainer.resume()
    with _terminations() as stop, ThreadPoolExecutor(1) as pool:
        trainer.loop(first, pool, stop)
    return {"metrics": trainer.lines, "timing": trainer.timing, "figures": trainer.figures()}


class _Trainer:
    def __init__(self, run: Run, accelerator: Any) -> None:
        self.run, self.accelerator, self.settings = run, accelerator, run.settings
        device = accelerator.device
        self.bfloat16 = autocasts(self.settings["dtype"], device)
        groups = parameter_groups(run.student, self.settings)
        self.names = {p: name for name, p in run.student.named_parameters() if p.requires_grad}
        betas = (self.settings["b1"], self.settings["b2"])
        run.student.to(device).train()
        self.optimizer = torch.optim.AdamW(groups, lr=0.0, betas=betas, eps=self.settings["eps"])
        self.module = accelerator.prepare_model(run.student) if accelerator.num_processes > 1 else run.student
        self.lines: list[dict[str, Any]] = []
        self.timing: list[list[float]] = []
        self.window: dict[str, float] = {}
        self.diagnostics: dict[str, list[str]] = {}
        self.totals = {"tokens": 0, "skipped_examples": 0, "flops": 0.0}
        self.clock = Clock(0.0)
        self.per_token = flops_per_token(run.student)
        torch.manual_seed(int(generator(run.seed, "dropout", accelerator.process_index).integers(2**63)))

    def loop(self, first: int, pool: ThreadPoolExecutor, stop: list[bool]) -> None:
        from tqdm import tqdm

        steps = self.settings["steps"]
        waiting = [pool.submit(self.run.collate, step) for step in range(first, min(first + LOOKAHEAD, steps))]
        hidden = not self.accelerator.is_main_process
        with tqdm(total=steps, initial=first, unit=" steps", disable=hidden) as progress:
            for step in range(first, steps):
                data = waiting.pop(0).result()
                if step + LOOKAHEAD < steps:
                    waiting.append(pool.submit(self.run.collate, step + LOOKAHEAD))
                stopping = self.step(step, data, bool(stop))
                done = step + 1
                progress.update()
                if done % self.settings["log_interval"] == 0 or done == steps:
                    self.log(done)
                    loss = f"{self.lines[-1]['loss']:.4f}"
                    progress.set_postfix({"loss": loss, "tokens/s": self.tokens_per_second()}, refresh=False)
                if done < steps and (stopping or done % self.settings["save_interval"] == 0):
                    self.save(done)
                if stopping and done < steps:
                    for future in waiting:
                        future.cancel()
                    raise UserError(
                        f"Stopped by a termination signal after step {done} of {steps}: the checkpoint is saved, "
                        "run the same command again to continue."
                    )

    def step(self, step: int, data: Step, stopping: bool) -> bool:
        """Do one optimizer step; return whether any process was told to stop."""
        rate = learning_rate(step, self.settings)
        for group in self.optimizer.param_groups:
            group["lr"] = rate * group["lr_scale"]
        for batch in data.micro_batches:
            if self.run.ask_teacher is not None:
                self.run.ask_teacher(batch.examples)
            if not batch.prepared:
                batch.prepared = prepare_losses(self.run.losses, batch.examples)
        counts, passes = self.counts(data, stopping)
        sums: torch.Tensor | float = 0.0
        self.optimizer.zero_grad(set_to_none=True)
        for number in range(passes):
            last = number == passes - 1
            extra = number >= len(data.micro_batches)
            batch = data.micro_batches[0 if extra else number]
            quiet = contextlib.nullcontext() if last else self.accelerator.no_sync(self.module)
            with quiet:
                sums = sums + self.backward(batch, counts, 0.0 if extra else batch.weight)
        norm = torch.nn.utils.clip_grad_norm_(list(self.names), self.settings["max_grad_norm"])
        if not torch.isfinite(norm):
            raise UserError(
                f"The gradient of step {step + 1} is not finite: lower learning_rate, or train in dtype float32."
            )
        self.optimizer.step()
        self.remember(data, counts, self.reduced(sums), float(norm), rate)
        return counts["stop"] > 0

    def counts(self, data: Step, stopping: bool) -> tuple[dict[str, float], int]:
        """Return the step's counts over all micro-batches and processes, and the passes each process makes."""
        real = [batch for batch in data.micro_batches if batch.weight]
        own = [sum(batch.prepared[i].count for batch in real) for i in range(len(self.run.losses))]
        own += [sum(len(batch.examples.student.ids) for batch in real), data.skipped, float(stopping)]
        tensor = torch.tensor(own, dtype=torch.float64)
        passes = torch.tensor([len(data.micro_batches)], device=self.accelerator.device)
        if self.accelerator.num_processes > 1:
            tensor = self.reduced(tensor)
            passes = self.accelerator.gather(passes)
        names = [loss.name for loss in self.run.losses] + ["tokens", "skipped", "stop"]
        return dict(zip(names, tensor.tolist(), strict=True)), int(passes.max())

    def backward(self, batch: MicroBatch, counts: dict[str, float], weight: float) -> torch.Tensor:
        """Add the micro-batch's gradient; return float64 sums: each loss and its diagnostics."""
        values, sums = self.losses(batch, counts)
        total = sum(loss.weight * value for loss, value in zip(self.run.losses, values, strict=True))
        if self.accelerator.num_processes > 1:
            total = total + self.nothing()
        if weight == 0.0:
            total = total * 0.0
        # Data-parallel wrappers average gradients over processes; the counts are already global.
        (total * self.accelerator.num_processes).backward()
        return torch.stack([value.double().cpu() for value in sums]) * weight

    def nothing(self) -> torch.Tensor:
        """Return 0 with a zero gradient in every weight that a loss may leave out, for wrappers that wait for it."""
        student = self.run.student
        unsure = [student.head.weight, *student.projectors.parameters()]
        return sum((p.sum() * 0.0 for p in unsure if p.requires_grad), torch.zeros((), device=self.accelerator.device))

    def losses(self, batch: MicroBatch, counts: dict[str, float]) -> tuple[list[torch.Tensor], list[torch.Tensor]]:
        """Return each loss divided by its count over the step, and the detached sums: each loss, its diagnostics."""
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
            found = self.module(*inputs, queries)
        chosen = iter(found.pop("chosen"))
        values, sums = [], []
        for loss, prepared in zip(self.run.losses, batch.prepared, strict=True):
            seen = found | {"sides": self.run.student.sides}
            if prepared.query is not None:
                seen |= dict(zip(("candidate_logprob", "topk_logprob", "topk_ids"), next(chosen), strict=True))
            if loss.name in self.run.student.projectors:
                seen["projectors"] = self.run.student.projectors[loss.name]
            arrays = {name: place(value) for name, value in prepared.arrays.items()}
            value, extra = loss.module.loss(seen, arrays, loss.options)
            values.append(value / max(counts[loss.name], 1.0))
            sums += [value.detach(), *extra.values()]
            self.diagnostics.setdefault(loss.name, list(extra))
        return values, sums

    def reduced(self, tensor: torch.Tensor) -> torch.Tensor:
        """Return the sum over processes, float64 on the CPU."""
        if self.accelerator.num_processes == 1:
            return tensor
        return self.accelerator.reduce(tensor.to(self.accelerator.device), "sum").cpu()

    def remember(self, data: Step, counts: dict[str, float], sums: torch.Tensor, norm: float, rate: float) -> None:
        """Add the step to the averages of the current log interval."""
        window, values = self.window, iter(sums.tolist())
        total = 0.0
        for loss in self.run.losses:
            count = max(counts[loss.name], 1.0)
            value = next(values) / count
            total += loss.weight * value
            _add(window, loss.name, value)
            for name in self.diagnostics[loss.name]:
                _add(window, f"{loss.name}/{name}", next(values) / count)
        _add(window, "loss", total)
        _add(window, "grad_norm", norm)
        window["lr"] = rate
        window["steps"] = window.get("steps", 0) + 1
        window["tokens"] = window.get("tokens", 0) + counts["tokens"]
        self.totals["tokens"] += int(counts["tokens"])
        self.totals["skipped_examples"] += int(counts["skipped"])
        self.totals["flops"] += self.per_token * counts["tokens"]

    def log(self, done: int) -> None:
        """Turn the averages since the last line into a line of metrics."""
        window, steps = self.window, self.window.pop("steps")
        line = {"step": done, "lr": window.pop("lr"), "tokens": int(window.pop("tokens"))}
        line |= {name: value / steps for name, value in window.items()}
        line |= {"tokens_seen": self.totals["tokens"], "flops": self.totals["flops"]}
        line["skipped_examples"] = self.totals["skipped_examples"]
        self.lines.append(line)
        self.timing.append([done, round(self.clock.seconds(), 3)])
        self.window = {}
        if self.accelerator.is_main_process:
            write_metrics(self.run.folder / "metrics.jsonl", self.lines)

    def tokens_per_second(self) -> int:
        """Return the speed since the line of metrics before the last, over all processes."""
        before = self.timing[-2][1] if len(self.timing) > 1 else 0.0
        return round(self.lines[-1]["tokens"] / max(self.timing[-1][1] - before, 1e-3))

    def save(self, done: int) -> None:
        """Write a checkpoint after `done` steps. Random states of all processes go into it."""
        states = self.random_states()
        if self.accelerator.is_main_process:
            tensors = {f"model/{name}": parameter for parameter, name in self.names.items()}
            tensors |= checkpoints.optimizer_tensors(self.optimizer, self.names) | states
            state = {"step": done, "lines": self.lines, "timing": self.timing, "window": self.window}
            state |= {"totals": self.totals, "seconds": self.clock.seconds(), "diagnostics": self.diagnostics}
            checkpoints.save(self.run.folder, done, tensors, state)
        self.accelerator.wait_for_everyone()

    def random_states(self) -> dict[str, torch.Tensor]:
        """Return the states of the generators that dropout draws from, one for each process."""
        own = [torch.get_rng_state()]
        if self.accelerator.device.type == "cuda":
            own.append(torch.cuda.get_rng_state(self.accelerator.device))
        states = {}
        for kind, state in zip(("cpu", "cuda"), own, strict=False):
            gathered = state[None]
            if self.accelerator.num_processes > 1:
                gathered = self.accelerator.gather(state[None].to(self.accelerator.device)).cpu()
            states[f"random/{kind}"] = gathered
        return states

    def resume(self) -> int:
        """Load the newest checkpoint, if any; return the number of steps done."""
        found = checkpoints.latest(self.run.folder)
        if found is None:
            return 0
        tensors, state = checkpoints.load(found)
        with torch.no_grad():
            for parameter, name in self.names.items():
                parameter.copy_(tensors[f"model/{name}"])
        checkpoints.restore_optimizer(self.optimizer, self.names, tensors)
        rank = self.accelerator.process_index
        if rank < len(tensors["random/cpu"]):
            torch.set_rng_state(tensors["random/cpu"][rank])
            if "random/cuda" in tensors and self.accelerator.device.type == "cuda":
                torch.cuda.set_rng_state(tensors["random/cuda"][rank], self.accelerator.device)
        self.lines, self.timing, self.window = state["lines"], state["timing"], state["window"]
        self.totals, self.diagnostics = state["totals"], state["diagnostics"]
        self.clock = Clock(state["seconds"])
        return int(state["step"])

    def figures(self) -> dict[str, Any]:
        """Return totals for the manifest."""
        seconds = self.clock.seconds()
        rate = round(self.totals["tokens"] / max(seconds, 1e-9), 1)
        return self.totals | {"seconds": round(seconds, 3), "tokens_per_second": rate}


def write_metrics(path: Path, lines: list[dict[str, Any]]) -> None:
    """Write metrics as one JSON object per line."""
    path.write_text("".join(json.dumps(line, allow_nan=False) + "\n" for line in lines), encoding="utf-8")


def flops_per_token(student: Student) -> float:
    """Return the floating-point operations of one token, forward and backward: 6 per parameter (arXiv 2001.08361).

    The input embedding is a lookup and not counted; the head is, and once more for its recomputed forward pass.
    Attention scores are left out.
    """
    model = student.model
    embeddings = {id(p) for layer in (model.get_input_embeddings(), student.head.layer) for p in layer.parameters()}
    body = sum(p.numel() for p in model.parameters() if id(p) not in embeddings)
    return 6.0 * body + 8.0 * student.head.shape.vocab * student.head.weight.shape[1]


def _add(window: dict[str, float], name: str, value: float) -> None:
    window[name] = window.get(name, 0.0) + value


@contextlib.contextmanager
def _terminations() -> Iterator[list[bool]]:
    """Yield a list that gets an entry when the process is told to end (SIGTERM)."""
    received: list[bool] = []
    try:
        before = signal.signal(signal.SIGTERM, lambda *_: received.append(True))
    except ValueError:  # not the main thread
        yield received
        return
    try:
        yield received
    finally:
        signal.signal(signal.SIGTERM, before)
