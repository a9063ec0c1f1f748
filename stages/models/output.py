"""Finding the output layer of a causal language model, and making sure that it is all there is to its logits."""

import torch
from transformers import PreTrainedModel

from stages.core.errors import UserError
from stages.models.body import body_of
from stages.models.loading import check_rows
from stages.vocabulary.blocks import Shape
from stages.vocabulary.head import Head

CHECK_TOKENS = 12


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
