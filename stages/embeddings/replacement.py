"""Give a causal language model the embeddings of another vocabulary."""

import torch
from transformers import PreTrainedModel

from stages.core.errors import UserError
from stages.embeddings.fvt import Plan
from stages.embeddings.rows import assemble


def replace_embeddings(model: PreTrainedModel, plan: Plan, rows: int, seed: int, untie: bool) -> torch.Tensor:
    """Give `model` the embeddings of `plan` in place; return the new input embedding [target, hidden].

    Its input and output embeddings, tied or not, and a bias of the head become exactly as long as the plan.
    `rows` is the number of source rows that belong to tokens. `untie` gives tied models a head of their own.
    """
    config = model.config.get_text_config()
    tied = bool(config.tie_word_embeddings)
    inputs, head = model.get_input_embeddings(), model.get_output_embeddings()
    if not hasattr(inputs, "num_embeddings") or head is None or getattr(config, "vocab_size_per_layer_input", None):
        raise UserError(f"Models of type {config.model_type} keep embeddings in a form that cannot be replaced.")
    fresh = assemble(inputs.weight, plan, rows, seed, "input embeddings")
    if tied:
        output = fresh.clone() if untie else fresh
    else:
        output = assemble(head.weight, plan, rows, seed, "output embeddings")
    if not (torch.isfinite(fresh).all() and torch.isfinite(output).all()):
        raise UserError("The source embeddings hold values that are not finite: the weights of this model are damaged.")
    if getattr(head, "bias", None) is not None:
        head.bias = torch.nn.Parameter(assemble(head.bias, plan, rows, seed, "output bias"))
    inputs.weight, inputs.num_embeddings, inputs.padding_idx = torch.nn.Parameter(fresh), len(fresh), None
    head.weight, head.out_features = torch.nn.Parameter(output), len(output)
    for part in {id(item): item for item in (model.config, config)}.values():
        part.vocab_size = len(fresh)
        part.tie_word_embeddings = tied and not untie
    if tied and not untie:
        model.tie_weights()
    return fresh


def set_special_ids(model: PreTrainedModel, start: int | None, eos: int | None, pad: int | None) -> None:
    """Write the special token ids of the target tokenizer into the model's configurations."""
    for config in (model.config, model.config.get_text_config(), model.generation_config):
        config.bos_token_id, config.eos_token_id, config.pad_token_id = start, eos, pad
