"""What a run reports of itself: averages over each log interval, totals and speed."""

import json
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from stages.training.student import Student


class Clock:
    """Seconds of training, over restarts."""

    def __init__(self, before: float) -> None:
        self.before, self.started = before, time.monotonic()

    def seconds(self) -> float:
        """Return the seconds so far."""
        return self.before + time.monotonic() - self.started


class Metrics:
    """Lines of metrics, one for each log interval, and the totals of the run."""

    def __init__(self, per_token: float) -> None:
        self.per_token = per_token
        self.lines: list[dict[str, Any]] = []
        self.timing: list[list[float]] = []
        self.window: dict[str, float] = {}
        self.totals = {"tokens": 0, "skipped_examples": 0, "flops": 0.0}
        self.clock = Clock(0.0)

    def add(self, values: dict[str, float], counts: dict[str, float], rate: float) -> None:
        """Add a step to the averages of the current log interval; `values` are averaged as they are."""
        window = self.window
        for name, value in values.items():
            window[name] = window.get(name, 0.0) + value
        window["lr"] = rate
        window["steps"] = window.get("steps", 0) + 1
        window["tokens"] = window.get("tokens", 0) + counts["tokens"]
        self.totals["tokens"] += int(counts["tokens"])
        self.totals["skipped_examples"] += int(counts["skipped"])
        self.totals["flops"] += self.per_token * counts["tokens"]

    def close(self, done: int) -> None:
        """Turn the averages since the last line into the line of step `done`."""
        window, steps = self.window, self.window.pop("steps")
        line = {"step": done, "lr": window.pop("lr"), "tokens": int(window.pop("tokens"))}
        line |= {name: value / steps for name, value in window.items()}
        line |= {"tokens_seen": self.totals["tokens"], "flops": self.totals["flops"]}
        line["skipped_examples"] = self.totals["skipped_examples"]
        self.lines.append(line)
        self.timing.append([done, round(self.clock.seconds(), 3)])
        self.window = {}

    def tokens_per_second(self) -> int:
        """Return the speed since the line of metrics before the last, over all processes."""
        before = self.timing[-2][1] if len(self.timing) > 1 else 0.0
        return round(self.lines[-1]["tokens"] / max(self.timing[-1][1] - before, 1e-3))

    def figures(self) -> dict[str, Any]:
        """Return totals for the manifest."""
        seconds = self.clock.seconds()
        rate = round(self.totals["tokens"] / max(seconds, 1e-9), 1)
        return self.totals | {"seconds": round(seconds, 3), "tokens_per_second": rate}

    def state(self) -> dict[str, Any]:
        """Return everything that `restore` needs, as JSON values."""
        kept = {"lines": self.lines, "timing": self.timing, "window": self.window, "totals": self.totals}
        return kept | {"seconds": self.clock.seconds()}

    def restore(self, state: dict[str, Any]) -> None:
        """Go on from what `state` returned."""
        self.lines, self.timing, self.window = state["lines"], state["timing"], state["window"]
        self.totals, self.clock = state["totals"], Clock(state["seconds"])


def write_metrics(path: Path, lines: Sequence[dict[str, Any]]) -> None:
    """Write metrics as one JSON object per line."""
    path.write_text("".join(json.dumps(line, allow_nan=False) + "\n" for line in lines), encoding="utf-8")


def flops_per_token(student: Student) -> float:
    """Return the floating-point operations of one token, forward and backward: 6 per parameter (arXiv 2001.08361).

    The input embedding is a lookup and not counted; the head is, and once more for its recomputed forward pass.
    Attention scores are left out.
    """
    side = student.sides.student
    embeddings = {id(p) for layer in (side.embed, side.head.layer) for p in layer.parameters()}
    body = sum(p.numel() for p in student.model.parameters() if id(p) not in embeddings)
    return 6.0 * body + 8.0 * student.head.shape.vocab * student.head.weight.shape[1]
