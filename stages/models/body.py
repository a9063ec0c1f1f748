"""The body of a causal language model: hidden states of token ids."""

import torch
from torch import nn
from transformers import PreTrainedModel

from stages.core.errors import UserError


def body_of(model: PreTrainedModel) -> nn.Module:
    """Return the part of `model` that makes hidden states of token ids: the part that holds the input embeddings."""
    embedding = model.get_input_embeddings()
    head = model.get_output_embeddings()
    for part in (model.base_model, *model.children()):
        if part is not model and part is not head and any(module is embedding for module in part.modules()):
            return part
    raise UserError(f"{type(model).__name__} does not separate its body from its output layer: it is not supported.")


def hidden_states(
    body: nn.Module, input_ids: torch.Tensor, position_ids: torch.Tensor | None, index: torch.Tensor
) -> torch.Tensor:
    """Return hidden states [n, d] after the last norm, for the flat positions `index` of input_ids [rows, length].

    Rows are padded at the right end, which a causal model never sees; where `position_ids` restart within a row, the
    examples packed in it do not see each other (transformers builds that mask when it gets no attention mask; whether
    a model follows it, `description.Description.packs` says).
    """
    output = body(input_ids=input_ids, use_cache=False, **_positions(position_ids))
    return output.last_hidden_state.flatten(0, 1).index_select(0, index)


def layer_states(
    body: nn.Module, input_ids: torch.Tensor, position_ids: torch.Tensor | None, index: torch.Tensor
) -> torch.Tensor:
    """Return the states of every layer [n, L + 1, d], the embedding first and the last after the last norm.

    Arguments as of `hidden_states`.
    """
    output = body(input_ids=input_ids, use_cache=False, output_hidden_states=True, **_positions(position_ids))
    states = [*output.hidden_states[:-1], output.last_hidden_state]
    return torch.stack([state.flatten(0, 1).index_select(0, index) for state in states], 1)


def _positions(position_ids: torch.Tensor | None) -> dict[str, torch.Tensor]:
    """Return the argument that says where examples begin, none where a row holds one: some bodies do not take it."""
    return {} if position_ids is None else {"position_ids": position_ids}
