"""How causal language models make logits of hidden states."""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import nn
from transformers import PreTrainedModel

from stages.core.errors import UserError
from stages.models.loading import check_rows
from stages.training.dense import RowLoss, dense_loss
from stages.training.distribution import Chosen, head_distribution
from stages.training.head import (
    Shape,
    block_buffer,
    block_logits,
    block_size,
    compute_dtype,
    head_statistics,
    pieces,
)

CHECK_TOKENS = 12


@dataclass(frozen=True)
class Head:
    """The output layer of a model: a linear layer, cut to `shape.vocab` columns, scaled and softly capped."""

    layer: nn.Module
    shape: Shape

    @property
    def weight(self) -> torch.Tensor:
        """The output matrix [rows, hidden size]; rows from `shape.vocab` on are padding."""
        return self.layer.weight

    @property
    def bias(self) -> torch.Tensor | None:
        """The output bias [rows] or None."""
        return getattr(self.layer, "bias", None)

    def statistics(
        self, hidden: torch.Tensor, targets: torch.Tensor, mask: torch.Tensor | None, eos_id: int | None
    ) -> dict[str, torch.Tensor]:
        """Return `head_statistics` of hidden states [N, d] and target ids [N]."""
        shape = self.shape
        settings = (shape.vocab, self.bias, shape.softcap, shape.scale)
        return head_statistics(hidden, self.weight, targets, mask, eos_id, *settings)

    def logits(self, hidden: torch.Tensor) -> torch.Tensor:
        """Return float32 logits [n, vocab] of hidden states [n, d]; for a few rows at a time."""
        bias = None if self.bias is None else self.bias[: self.shape.vocab]
        weight = self.weight[: self.shape.vocab]
        return block_logits(hidden.to(weight.dtype), weight, bias, self.shape)[0]

    @torch.no_grad()
    def logit_pieces(self, hidden: torch.Tensor) -> Iterator[tuple[slice, torch.Tensor]]:
        """Yield (rows, their float32 logits [n, vocab]) of hidden states [N, d], a few rows that fit a CPU's cache.

        They may be written on. Use them at once: their place is used again.
        """
        vocab, compute = self.shape.vocab, compute_dtype(hidden)
        weight = self.weight[:vocab].to(compute)
        bias = None if self.bias is None else self.bias[:vocab].to(compute)
        size = max(1, min(block_size(vocab, hidden.device), len(hidden)))
        buffer = block_buffer(size, vocab, hidden)
        for start in range(0, len(hidden), size):
            inputs = hidden[start : start + size].to(compute)
            logits, _ = block_logits(inputs, weight, bias, self.shape, buffer)
            for piece in pieces(logits):
                yield slice(start + piece.start, start + piece.stop), logits[piece]

    def distribution(
        self, hidden: torch.Tensor, candidates: torch.Tensor, likeliest: int, temperature: float
    ) -> Chosen:
        """Return `head_distribution` of hidden states [N, d]."""
        return head_distribution(hidden, self.weight, candidates, likeliest, self.shape, self.bias, temperature)

    def dense(
        self,
        function: RowLoss,
        hidden: torch.Tensor,
        constants: dict[str, torch.Tensor],
        fixed: "dict[str, tuple[Head, torch.Tensor]] | None" = None,
    ) -> torch.Tensor:
        """Return `dense_loss` of hidden states [N, d]: a sum over rows of a function of their logits."""
        return dense_loss(function, hidden, self.weight, self.shape, constants, self.bias, fixed=fixed)


class Side(NamedTuple):
    """A model as losses see it: its output layer, and `embed`, which makes vectors [n, d] of token ids [n]."""

    head: Head
    embed: nn.Module


class Sides(NamedTuple):
    """The two models of a distillation; `teacher` is None where no loss reads its matrices."""

    student: Side
    teacher: Side | None = None


def find_head(model: PreTrainedModel, vocab: int, model_name: str, tokenizer_name: str) -> Head:
    """Return the output layer of `model` for a tokenizer of `vocab` ids; its padding columns are cut.

    Compared once with the logits the model itself returns. UserError when the model has fewer rows than the tokenizer
    ids, or makes its logits in another way than a linear layer, a factor and a soft cap.
    """
    layer = model.get_output_embeddings()
    kind = type(model).__name__
    if layer is None or getattr(layer, "weight", None) is None or layer.weight.dim() != 2:
        raise UserError(f"Model {model_name!r} ({kind}) has no linear output layer: choose a causal language model.")
    check_rows(model, model_name, vocab, tokenizer_name)
    config = model.config.get_text_config()
    factor = float(getattr(model, "logit_scale", None) or getattr(config, "lm_head_multiplier", None) or 1.0)
    factor /= float(getattr(config, "logits_scaling", None) or 1.0)
    softcap = getattr(config, "final_logit_softcapping", None)
    head = Head(layer, Shape(vocab, factor, float(softcap) if softcap else None))
    _check_head(model, head, model_name)
    return head


def body_of(model: PreTrainedModel) -> nn.Module:
    """Return the part of `model` that makes hidden states of token ids."""
    body = model.base_model
    if body is model:
        raise UserError(
            f"{type(model).__name__} does not separate its body from its output layer: it is not supported."
        )
    return body


def hidden_states(
    body: nn.Module, input_ids: torch.Tensor, position_ids: torch.Tensor | None, index: torch.Tensor
) -> torch.Tensor:
    """Return hidden states [n, d] after the last norm, for the flat positions `index` of input_ids [rows, length].

    Rows are padded at the right end, which a causal model never sees; where `position_ids` restart within a row, the
    examples packed in it do not see each other (transformers builds that mask when it gets no attention mask).
    """
    output = body(input_ids=input_ids, position_ids=position_ids, use_cache=False)
    return output.last_hidden_state.flatten(0, 1).index_select(0, index)


def layer_states(
    body: nn.Module, input_ids: torch.Tensor, position_ids: torch.Tensor | None, index: torch.Tensor
) -> torch.Tensor:
    """Return the states of every layer [n, L + 1, d], the embedding first and the last after the last norm.

    Arguments as of `hidden_states`.
    """
    output = body(input_ids=input_ids, position_ids=position_ids, use_cache=False, output_hidden_states=True)
    states = [*output.hidden_states[:-1], output.last_hidden_state]
    return torch.stack([state.flatten(0, 1).index_select(0, index) for state in states], 1)


@torch.no_grad()
def _check_head(model: PreTrainedModel, head: Head, name: str) -> None:
    ids = (torch.arange(CHECK_TOKENS, device=head.weight.device) * 7 % head.shape.vocab)[None]
    training = model.training
    model.eval()
    expected = model(input_ids=ids, use_cache=False).logits[0, :, : head.shape.vocab].float()
    hidden = body_of(model)(input_ids=ids, use_cache=False).last_hidden_state[0]
    actual = head.logits(hidden)
    model.train(training)
    if not torch.isfinite(expected).all():
        raise UserError(
            f"Model {name!r} gives logits that are not finite: its weights are damaged, or it overflows in "
            f"{head.weight.dtype}; check the weights or choose another dtype."
        )
    tolerance = 1e-3 if head.weight.dtype in (torch.float32, torch.float64) else 5e-2
    if not torch.allclose(actual, expected, rtol=tolerance, atol=tolerance * float(expected.abs().amax().clamp(min=1))):
        raise UserError(
            f"Model {name!r} ({type(model).__name__}) makes its logits in a way that this code does not know: "
            "they are not a linear layer of the last hidden states with a factor and a soft cap."
        )
