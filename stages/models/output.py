"""The output layer of a causal language model: found, and proved to be all there is to its logits."""

from itertools import product

import torch
from torch import nn
from transformers import PreTrainedModel

from stages.core.errors import UserError
from stages.models.body import body_of
from stages.vocabulary.blocks import Shape
from stages.vocabulary.head import Head

CHECK_TOKENS = 12
# What transformers' models call a factor on the logits, what they divide them by, and their soft cap.
FACTORS, DIVISORS = ("logit_scale", "lm_head_multiplier"), ("logits_scaling",)
SOFTCAPS = ("final_logit_softcapping", "logits_soft_cap", "output_logit_soft_cap")


def check_ids(vocab: int, device: torch.device) -> torch.Tensor:
    """Return token ids [1, CHECK_TOKENS] that a model is tried with."""
    return (torch.arange(CHECK_TOKENS, device=device) * 7 % vocab)[None]


def tolerance(dtype: torch.dtype) -> float:
    """Return the relative difference that two ways to compute one number may have."""
    return 1e-3 if dtype in (torch.float32, torch.float64) else 5e-2


def close(actual: torch.Tensor, expected: torch.Tensor, dtype: torch.dtype) -> bool:
    """Return whether two tensors are the same but for the rounding of computations in `dtype`."""
    relative = tolerance(dtype)
    return torch.allclose(actual.float(), expected.float(), rtol=relative, atol=relative * float(expected.abs().amax()))


@torch.no_grad()
def find_head(model: PreTrainedModel, vocab: int, name: str) -> Head:
    """Return the output layer of `model`, cut to `vocab` columns.

    How logits come from it is asked of the configuration, else measured, and compared with the logits that the model
    itself returns. UserError when they are no linear layer of the last hidden states with a factor and a soft cap.
    """
    layer = model.get_output_embeddings()
    kind = type(model).__name__
    if layer is None or getattr(layer, "weight", None) is None or layer.weight.dim() != 2:
        raise UserError(f"Model {name!r} ({kind}) has no linear output layer: choose a causal language model.")
    ids = check_ids(vocab, layer.weight.device)
    expected = model(input_ids=ids, use_cache=False).logits[0, :, :vocab].float()
    hidden = body_of(model)(input_ids=ids, use_cache=False).last_hidden_state[0]
    if not torch.isfinite(expected).all():
        raise UserError(
            f"Model {name!r} gives logits that are not finite: its weights are damaged, or it overflows in "
            f"{layer.weight.dtype}; check the weights or choose another dtype."
        )
    if hidden.shape[-1] == layer.weight.shape[1]:
        for shape in _shapes(model, layer, hidden, expected):
            head = Head(layer, shape)
            if close(head.logits(hidden), expected, layer.weight.dtype):
                return head
    raise UserError(
        f"Model {name!r} ({kind}) makes its logits in a way that this code does not know: "
        "they are not a linear layer of the last hidden states with a factor and a soft cap."
    )


def _shapes(model: PreTrainedModel, layer: nn.Module, hidden: torch.Tensor, expected: torch.Tensor) -> list[Shape]:
    """Return how logits may be made: as the configuration says, then with the factor that is measured."""
    vocab = expected.shape[1]
    places = (model, model.config.get_text_config())
    named = [[float(v) for place in places if isinstance(v := getattr(place, key, None), (int, float)) and v]
             for key in (*FACTORS, *DIVISORS)]  # fmt: skip
    factors = [v for part in named[: len(FACTORS)] for v in part]
    factors += [1 / v for part in named[len(FACTORS) :] for v in part]
    caps = [float(v) for key in SOFTCAPS if (v := getattr(places[1], key, None))]
    plain = Head(layer, Shape(vocab)).logits(hidden)
    measured = float((expected * plain).sum() / plain.square().sum().clamp(min=1e-20))
    found = [Shape(vocab, factor, cap) for cap, factor in product([*caps, None], [*factors, 1.0])]
    return [*found, Shape(vocab, measured)]
