"""What each method needs, in one table, so that the plan follows from the losses an experiment names.

To add a method: one module in stages/losses (see its docstring) and one row here. Stages do not import this
table: the plan hands each distillation job its own rows, so a new row invalidates nothing.
"""

from typing import NamedTuple


class Method(NamedTuple):
    """One row: the module of the loss, the chunks it compares, and what it needs of the teacher per token."""

    module: str
    chunks: str | None = None  # kind of alignment; None: no alignment
    boundary: bool = False  # log boundary mass and log p(eos) beside the observed log-probability
    top_k: int = 0  # likeliest tokens with their log-probabilities, and the tail's log mass

    @property
    def teacher(self) -> bool:
        """Whether the method reads teacher signals at all."""
        return self.chunks is not None or self.boundary or self.top_k > 0


METHODS = {
    "sft": Method("stages.losses.sft"),
    "clm": Method("stages.losses.sft"),
    "alm_unconstrained": Method("stages.losses.alm", chunks="unconstrained", boundary=True),
    "alm_space": Method("stages.losses.alm", chunks="space", boundary=True),
    "alm_greedy": Method("stages.losses.alm", chunks="greedy", boundary=True),
}
