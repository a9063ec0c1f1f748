"""The training loop: exact under accumulation, data parallelism and interruption.

A loss is a sum with a count. The counts of all micro-batches and processes are added up before the first backward
pass of a step, so a gradient does not depend on how its batch was split.
"""

import contextlib
import math
import signal
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from stages.core.errors import UserError
from stages.losses import Loss, Prepared
from stages.losses.examples import Examples
from stages.training import checkpoints
from stages.training.data import Step, generator
from stages.training.gradients import Gradients
from stages.training.metrics import Metrics, flops_per_token, write_metrics
from stages.training.modes import parameter_groups
from stages.training.student import Student

LOOKAHEAD = 2


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
    metrics = trainer.metrics
    return {"metrics": metrics.lines, "timing": metrics.timing, "figures": metrics.figures()}


class _Trainer:
    def __init__(self, run: Run, accelerator: Any) -> None:
        self.run, self.accelerator, self.settings = run, accelerator, run.settings
        device = accelerator.device
        groups = parameter_groups(run.student, self.settings)
        self.names = {p: name for name, p in run.student.named_parameters() if p.requires_grad}
        betas = (self.settings["b1"], self.settings["b2"])
        run.student.to(device).train()
        self.optimizer = torch.optim.AdamW(groups, lr=0.0, betas=betas, eps=self.settings["eps"])
        self.module = accelerator.prepare_model(run.student) if accelerator.num_processes > 1 else run.student
        self.gradients = Gradients(run.student, self.module, run.losses, self.settings, run.seed, accelerator)
        self.metrics = Metrics(flops_per_token(run.student))
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
                    self.metrics.close(done)
                    if not hidden:
                        write_metrics(self.run.folder / "metrics.jsonl", self.metrics.lines)
                    loss, speed = self.metrics.lines[-1]["loss"], self.metrics.tokens_per_second()
                    progress.set_postfix({"loss": f"{loss:.4f}", "tokens/s": speed}, refresh=False)
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
        self.share_totals(data)
        counts, passes = self.counts(data, stopping)
        self.optimizer.zero_grad(set_to_none=True)
        factors, averages = self.gradients.of_step(step, data, counts, passes)
        norm = torch.nn.utils.clip_grad_norm_(list(self.names), self.settings["max_grad_norm"])
        if not torch.isfinite(norm):
            raise UserError(
                f"The gradient of step {step + 1} is not finite: lower learning_rate, or train in dtype float32."
            )
        self.optimizer.step()
        factor_of = dict(zip([loss.name for loss in self.run.losses], factors.tolist(), strict=True))
        averages["loss"] = sum(factor * averages[name] for name, factor in factor_of.items())
        averages["grad_norm"] = float(norm)
        combined = self.settings["multitask_aggregation_fn"] != "none"
        varying = [loss.name for loss in self.run.losses if combined or loss.schedule != "constant"]
        averages |= {f"{name}/weight": factor_of[name] for name in varying}
        self.metrics.add(averages, counts, rate)
        return counts["stop"] > 0

    def share_totals(self, data: Step) -> None:
        """Sum the arrays that `Prepared.totals` names over all micro-batches and processes, in place of each."""
        for place in range(len(self.run.losses)):
            parts = [(batch.prepared[place], batch.weight) for batch in data.micro_batches]
            for name in parts[0][0].totals:
                total = torch.as_tensor(sum(part.arrays[name] * weight for part, weight in parts))
                if self.accelerator.num_processes > 1:
                    total = self.accelerator.reduce(total.to(self.accelerator.device), "sum").cpu()
                for part, _ in parts:
                    part.arrays[name] = total.numpy()

    def counts(self, data: Step, stopping: bool) -> tuple[dict[str, float], int]:
        """Return the step's counts over all micro-batches and processes, and the passes each process makes."""
        real = [batch for batch in data.micro_batches if batch.weight]
        own = [sum(batch.prepared[i].count for batch in real) for i in range(len(self.run.losses))]
        own += [sum(len(batch.examples.student.ids) for batch in real), data.skipped, float(stopping)]
        tensor = torch.tensor(own, dtype=torch.float64)
        passes = torch.tensor([len(data.micro_batches)], device=self.accelerator.device)
        if self.accelerator.num_processes > 1:
            tensor = self.accelerator.reduce(tensor.to(self.accelerator.device), "sum")
            passes = self.accelerator.gather(passes)
        names = [loss.name for loss in self.run.losses] + ["tokens", "skipped", "stop"]
        return dict(zip(names, tensor.tolist(), strict=True)), int(passes.max())

    def save(self, done: int) -> None:
        """Write a checkpoint after `done` steps. Random states of all processes go into it."""
        states = self.random_states()
        if self.accelerator.is_main_process:
            tensors = {f"model/{name}": parameter for parameter, name in self.names.items()}
            tensors |= checkpoints.optimizer_tensors(self.optimizer, self.names) | states
            if self.gradients.gradnorm is not None:
                tensors |= self.gradients.gradnorm.tensors()
            checkpoints.save(self.run.folder, done, tensors, {"step": done} | self.metrics.state())
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
        if self.gradients.gradnorm is not None:
            self.gradients.gradnorm.restore(tensors)
        self.metrics.restore(state)
        return int(state["step"])


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
