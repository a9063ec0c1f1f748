"""A model's configurations: what is read of them, and what is written into them when its vocabulary changes."""

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from transformers import GenerationConfig, PreTrainedModel

from stages.core.errors import UserError

# How configurations call the number of positions that a model has; one thing has many names.
LIMITS = (
    "max_position_embeddings", "n_positions", "max_seq_len", "max_sequence_length", "max_seq_length", "n_ctx",
    "context_length", "seq_length", "max_target_positions",
)  # fmt: skip
# Settings of a generation config that hold token ids, which mean something else to another tokenizer.
ID_SETTINGS = (
    "decoder_start_token_id", "forced_bos_token_id", "forced_eos_token_id", "suppress_tokens", "begin_suppress_tokens",
    "bad_words_ids", "force_words_ids", "sequence_bias",
)  # fmt: skip
ENDINGS = ("eos", "end_of_turn")


def positions(model: PreTrainedModel) -> int | None:
    """Return how many tokens a sequence may have, by the first of LIMITS that is named; None where none is."""
    values = (getattr(_text(model), key, None) for key in LIMITS)
    return next((value for value in values if isinstance(value, int) and value > 0), None)


def layers(model: PreTrainedModel) -> int | None:
    """Return the number of blocks, None where none is named."""
    return getattr(_text(model), "num_hidden_layers", None)


def attention_width(model: PreTrainedModel) -> int:
    """Return layers times the width of their attention, 0 for a model that names no attention heads."""
    config, heads = _text(model), getattr(_text(model), "num_attention_heads", None)
    if not isinstance(heads, int) or not isinstance(getattr(config, "hidden_size", None), int):
        return 0
    size = getattr(config, "head_dim", None)
    return (layers(model) or 0) * heads * (size if isinstance(size, int) else config.hidden_size // heads)


def endings(model: PreTrainedModel) -> list[int]:
    """Return the ids at which the model's own generation settings say that a text ends."""
    named = model.generation_config.eos_token_id if model.generation_config is not None else None
    return [named] if isinstance(named, int) else list(named or [])


def padding_id(model: PreTrainedModel) -> int:
    """Return the id that fills rows of a batch, after `set_generation`."""
    return model.generation_config.pad_token_id


def set_generation(model: PreTrainedModel, max_new_tokens: int, ends: Sequence[int], pad_id: int) -> None:
    """Make `generate` search greedily with a cache, until one of `ends`, with nothing of the model's own defaults."""
    model.generation_config = GenerationConfig(
        do_sample=False,
        use_cache=True,
        max_new_tokens=max_new_tokens,
        eos_token_id=list(ends) or None,
        pad_token_id=pad_id,
    )


def set_vocabulary(model: PreTrainedModel, name: str, rows: int, tied: bool) -> None:
    """Write down that the embeddings of the model called `name` have `rows` rows, and whether they are `tied`.

    UserError when a model of that configuration would have tensors of other shapes than this one.
    """
    for config in _both(model):
        config.vocab_size = rows
    set_tied(model, tied)
    with torch.device("meta"):
        planned = type(model)(model.config).state_dict()
    for key, tensor in model.state_dict().items():
        if key in planned and planned[key].shape != tensor.shape:
            raise UserError(
                f"Model {name!r} ({type(model).__name__}) cannot be given another tokenizer: with {rows} ids its {key} "
                f"would be {tuple(planned[key].shape)}, not {tuple(tensor.shape)}; choose another model."
            )


def set_tied(model: PreTrainedModel, tied: bool) -> None:
    """Write down whether input and output embeddings are one tensor, where the configuration says otherwise."""
    for config in _both(model):
        if bool(getattr(config, "tie_word_embeddings", tied)) != tied:
            config.tie_word_embeddings = tied


def set_special_ids(model: PreTrainedModel, roles: Mapping[str, int], start: int | None, pad: int | None) -> None:
    """Write the special ids of a tokenizer; `roles` as in ByteView, `start` and `pad` the ids used as bos and pad.

    Generation ends at the end of a text and at that of a turn.
    """
    ends = sorted({roles[role] for role in ENDINGS if role in roles})
    for config in _both(model):
        config.bos_token_id, config.eos_token_id, config.pad_token_id = start, roles.get("eos"), pad
    generation = model.generation_config
    generation.bos_token_id, generation.pad_token_id = start, pad
    generation.eos_token_id = ends if len(ends) > 1 else roles.get("eos")
    for key in ID_SETTINGS:
        if getattr(generation, key, None) is not None:
            setattr(generation, key, None)


def _text(model: PreTrainedModel) -> Any:
    return model.config.get_text_config()


def _both(model: PreTrainedModel) -> list[Any]:
    """Return the configuration and that of the text model in it, once where they are one."""
    return list({id(config): config for config in (model.config, _text(model))}.values())
