"""Bits of every token of a batch of sequences under a causal language model."""

import numpy as np
import torch
from tqdm import tqdm

from stages.models.description import Description
from stages.tokenization.batches import length_batches


def token_bits(
    model: Description, ids: np.ndarray, offsets: np.ndarray, scored: np.ndarray, batch_tokens: int
) -> np.ndarray:
    """Return -log2 p(token | the tokens before it in its sequence), float64 [N], 0 for tokens not scored.

    Sequence b is `ids[offsets[b]:offsets[b + 1]]`; `scored` bool [N] never includes a sequence's first token.
    Padding columns take no part. Sequences run in batches of similar length, padded on the right to at most
    `batch_tokens` tokens.
    """
    bits = np.zeros(len(ids))
    batches = list(length_batches(np.diff(offsets), batch_tokens))
    with torch.inference_mode(), tqdm(total=len(offsets) - 1, desc="score") as progress:
        for rows in batches:
            _score_batch(model, ids, offsets, scored, rows, bits)
            progress.update(len(rows))
    return bits


def _score_batch(
    model: Description,
    ids: np.ndarray,
    offsets: np.ndarray,
    scored: np.ndarray,
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
    hidden = model.body(input_ids=tokens, attention_mask=mask, use_cache=False).last_hidden_state
    row, position = np.nonzero(inside & scored[flat])
    if (position == 0).any():
        raise ValueError("the first token of a sequence has no prediction and cannot be scored")
    places = flat[row, position]
    observed = torch.from_numpy(ids[places]).long().to(model.device)
    before = hidden[torch.from_numpy(row).to(model.device), torch.from_numpy(position - 1).to(model.device)]
    log_p = model.head.statistics(before, observed, None, None)["observed_logprob"]
    bits[places] = -log_p.double().cpu().numpy() / np.log(2)
