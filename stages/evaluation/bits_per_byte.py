"""Bits per byte of held-out text: comparable between tokenizers, since all score the same bytes."""

from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    from stages.models.description import Description


def ratio_with_error(values: np.ndarray, sizes: np.ndarray, documents: list[str]) -> tuple[float, float, int]:
    """Return (sum of values / sum of sizes, its standard error over documents, number of documents).

    Examples of one document are not independent, so the error is that of a ratio of cluster totals
    (linearised; Cochran 1977, §6). It is 0 for a single document.
    """
    _, cluster = np.unique(np.asarray(documents), return_inverse=True)
    bits, bytes_ = np.bincount(cluster, values), np.bincount(cluster, sizes)
    ratio = float(bits.sum() / bytes_.sum())
    count = len(bits)
    if count < 2:
        return ratio, 0.0, count
    residual = bits - ratio * bytes_
    return ratio, float(np.sqrt(count / (count - 1) * np.square(residual).sum()) / bytes_.sum()), count


def forward_flops_per_token(model: "Description", mean_context: float) -> float:
    """Return the FLOPs of a forward pass per token at `mean_context` tokens of context.

    Two per non-embedding and head parameter, plus the attention scores and values: 4 * layers * width * context
    (Kaplan et al. 2020, table 1, with the head counted).
    """
    from stages.models.configuration import attention_width

    size = model.parameters
    matrices = 2.0 * (size["non_embedding_parameters"] + size["head_parameters"])
    return matrices + 4 * attention_width(model.model) * mean_context


def mean_context(lengths: np.ndarray) -> float:
    """Return the mean number of tokens that a token of sequences of these lengths attends to."""
    lengths = lengths.astype(np.float64)
    return float((lengths * (lengths + 1) / 2).sum() / max(lengths.sum(), 1))
