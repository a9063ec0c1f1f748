"""The module that is trained: a model's body and the statistics of its head, in one forward pass."""

from typing import Any

import numpy as np
import torch
from torch import nn
from transformers import PreTrainedModel

from stages.training.models import Head, body_of, hidden_states


class Student(nn.Module):
    """A causal language model whose forward pass returns token statistics instead of logits.

    `asked`: the statistics that the losses read. `boundary` bool [vocab] and `eos_id` as in `head_statistics`. Losses
    do not touch the model, so that data-parallel wrappers around this module see the whole forward pass.
    """

    def __init__(
        self, model: PreTrainedModel, head: Head, asked: frozenset[str], boundary: np.ndarray | None, eos_id: int | None
    ) -> None:
        super().__init__()
        self.model = model
        self.head = head
        self.asked = asked
        self.eos_id = eos_id if "eos_logprob" in asked else None
        self._no_split_modules = getattr(model, "_no_split_modules", None)
        mask = torch.from_numpy(boundary) if "boundary_logprob" in asked and boundary is not None else None
        self.register_buffer("boundary", mask, persistent=False)

    def forward(
        self,
        input_ids: torch.Tensor,
        positions: torch.Tensor | None,
        index: torch.Tensor,
        rows: torch.Tensor,
        targets: torch.Tensor,
    ) -> dict[str, torch.Tensor]:
        """Return each asked statistic, [N] over the flat tokens, 0 outside `rows`.

        `index` int64 [N]: places of the tokens in input_ids [rows, length]; `rows` int64: flat tokens whose
        statistics are read; `targets` int64, as long as `rows`: the token that follows each.
        """
        hidden = hidden_states(body_of(self.model), input_ids, positions, index)
        used = hidden if len(rows) == len(index) else hidden.index_select(0, rows)
        found = self.head.statistics(used, targets, self.boundary, self.eos_id)
        result: dict[str, Any] = {}
        for name in self.asked - {"hidden"}:
            values = found[name]
            full = values.new_zeros(len(index))
            result[name] = values if len(rows) == len(index) else full.index_copy(0, rows, values)
        if "hidden" in self.asked:
            result["hidden"] = hidden
        return result
