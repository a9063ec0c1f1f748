"""Bits of every token of a batch of sequences under a causal language model."""

from collections.abc import Iterator
from typing import Any

import numpy as np
import torch
from tqdm import tqdm
from transformers import PreTrainedModel

from stages.core.errors import UserError
from stages.training.head import Shape, block_logits, head_statistics


def token_bits(
    model: PreTrainedModel, ids: np.ndarray, offsets: np.ndarray, scored: np.ndarray, vocab_size: int, batch_tokens: int
) -> np.ndarray:
    """Return -log2 p(token | the tokens before it in its sequence), float64 [N], 0 for tokens not scored.

    Sequence b is `ids[offsets[b]:offsets[b + 1]]`; `scored` bool [N] never includes a sequence's first token.
    Logits are cut to `vocab_size` before the softmax. Sequences run in batches of similar length, padded on the
    right to at most `batch_tokens` tokens.
    """
    check_lengths(model, int(np.diff(offsets).max(initial=0)))
    bits = np.zeros(len(ids))
    head = head_of(model)
    batches = list(length_batches(np.diff(offsets), batch_tokens))
    with torch.inference_mode(), tqdm(total=len(offsets) - 1, desc="score", mininterval=5) as progress:
        for rows in batches:
            _score_batch(model, head, ids, offsets, scored, vocab_size, rows, bits)
            progress.update(len(rows))
    return bits


def length_batches(lengths: np.ndarray, batch_tokens: int) -> Iterator[np.ndarray]:
    """Yield index arrays of sequences of similar length whose padded size is at most `batch_tokens` (or one row)."""
    order = np.argsort(-lengths, kind="stable")
    start = 0
    while start < len(order):
        count = max(1, batch_tokens // max(1, int(lengths[order[start]])))
        yield order[start : start + count]
        start += count


def check_lengths(model: PreTrainedModel, longest: int) -> None:
    """UserError when a sequence is longer than the model's positions."""
    limit = getattr(model.config.get_text_config(), "max_position_embeddings", None)
    if limit and longest > limit:
        raise UserError(
            f"An example is {longest} tokens long but the model has {limit} positions: lower the corpus's `max_bytes` "
            f"by a factor of {longest / limit:.2f} or more."
        )


def head_of(model: PreTrainedModel) -> dict[str, Any]:
    """Return {weight, bias, softcap, scale}: how `model` makes logits of its body's hidden states.

    Checked on a few tokens against the model's own logits; UserError for a model with another kind of head.
    """
    config, layer = model.config.get_text_config(), model.get_output_embeddings()
    scale = float(getattr(config, "logit_scale", None) or 1.0) / float(getattr(config, "logits_scaling", None) or 1.0)
    cap = getattr(config, "final_logit_softcapping", None)
    head = {"weight": layer.weight, "bias": getattr(layer, "bias", None), "softcap": cap, "scale": scale}
    probe = torch.arange(min(4, len(layer.weight)), device=model.device)[None]
    with torch.inference_mode():
        own = model(input_ids=probe, use_cache=False).logits[0].float()
        hidden = body_of(model)(input_ids=probe, use_cache=False).last_hidden_state[0]
        ours, _ = block_logits(hidden, head["weight"], head["bias"], Shape(len(layer.weight), scale, cap))
    if own.shape != ours.shape or not torch.allclose(own, ours, rtol=2e-2, atol=2e-2 * float(own.std())):
        raise UserError(f"Models of type {config.model_type} compute logits in a way that scoring does not know.")
    return head


def body_of(model: PreTrainedModel) -> torch.nn.Module:
    """Return the model without its head."""
    return model.get_decoder() or model.base_model


def _score_batch(
    model: PreTrainedModel,
    head: dict[str, Any],
    ids: np.ndarray,
    offsets: np.ndarray,
    scored: np.ndarray,
    vocab_size: int,
    rows: np.ndarray,
    bits: np.ndarray,
) -> None:
    """Score the sequences `rows` and write their tokens' bits into `bits`."""
    lengths = offsets[rows + 1] - offsets[rows]
    column = np.arange(lengths.max())
    inside = column < lengths[:, None]
    flat = np.where(inside, offsets[rows][:, None] + column, 0)  # place of each padded position in `ids`
    tokens = torch.from_numpy(np.where(inside, ids[flat], 0)).long().to(model.device)
    mask = torch.from_numpy(inside).long().to(model.device)
    hidden = body_of(model)(input_ids=tokens, attention_mask=mask, use_cache=False).last_hidden_state
    row, position = np.nonzero(inside & scored[flat])
    if (position == 0).any():
        raise ValueError("the first token of a sequence has no prediction and cannot be scored")
    places = flat[row, position]
    observed = torch.from_numpy(ids[places]).long().to(model.device)
    before = hidden[torch.from_numpy(row).to(model.device), torch.from_numpy(position - 1).to(model.device)]
    log_p = head_statistics(before, targets=observed, vocab=vocab_size, **head)["observed_logprob"]
    bits[places] = -log_p.double().cpu().numpy() / np.log(2)
