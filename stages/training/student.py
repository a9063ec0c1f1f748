"""The module that is trained: a model's body and the statistics of its head, in one forward pass."""

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import nn
from transformers import PreTrainedModel

from stages.models.body import body_of, hidden_states, layer_states
from stages.vocabulary.head import Sides
from stages.vocabulary.statistics import STATISTICS


class Student(nn.Module):
    """A causal language model whose forward pass returns token statistics instead of logits.

    `asked`: what the losses read (`losses.Needs.student`). `boundary` bool [vocab] and `eos_id` as in
    `head_statistics`. `projectors`: the weights that losses have of their own, by the loss's name; trained, never
    exported. `sides`: the student's and the teacher's matrices, which losses read; not parts of this module.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        sides: Sides,
        asked: frozenset[str],
        boundary: np.ndarray | None,
        eos_id: int | None,
        projectors: dict[str, nn.Module] | None = None,
    ) -> None:
        super().__init__()
        self.sides = sides
        self.projectors = nn.ModuleDict(projectors or {})
        self.model = model
        self.head = sides.student.head
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
        queries: Sequence[tuple[torch.Tensor, torch.Tensor, int, float]] = (),
    ) -> dict[str, Any]:
        """Return "hidden" [N, d] over the flat tokens, each asked statistic [N], 0 outside `rows`, and "chosen".

        `index` int64 [N]: places of the tokens in input_ids [rows, length]; `rows` int64: flat tokens whose
        statistics are read; `targets` int64, as long as `rows`: the token that follows each. `queries`: (rows,
        candidates, top_k, temperature) as in `losses.Query`; "chosen" has a `Chosen` for each.
        """
        body, result = body_of(self.model), {}
        if "hidden_states" in self.asked:
            result["hidden_states"] = layer_states(body, input_ids, positions, index)
            hidden = result["hidden_states"][:, -1]
        else:
            hidden = hidden_states(body, input_ids, positions, index)
        if self.asked & set(STATISTICS):
            used = hidden if len(rows) == len(index) else hidden.index_select(0, rows)
            found = self.head.statistics(used, targets, self.boundary, self.eos_id)
            for name in self.asked & set(STATISTICS):
                values = found[name]
                full = values.new_zeros(len(index))
                result[name] = values if len(rows) == len(index) else full.index_copy(0, rows, values)
        chosen = [self.head.distribution(hidden.index_select(0, places), *asked) for places, *asked in queries]
        return result | {"hidden": hidden, "chosen": chosen}
