"""The likeliest tokens of each row of logits."""

import numpy as np
import torch

GROUP = 8  # columns per group in the search


def top_k(logits: torch.Tensor, k: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Return (values, ids) [n, k] of the largest logits [n, vocab], largest first."""
    ids = _largest(logits, k)
    values, order = logits.gather(1, ids).sort(1, descending=True)
    return values, ids.gather(1, order)


def _largest(values: torch.Tensor, k: int) -> torch.Tensor:
    """Return int64 [n, k]: the columns of the k largest of each row of `values` [n, columns], in no order.

    The k largest lie in the k groups of columns with the largest maxima, so one pass for the maxima leaves
    k * GROUP candidates; the maxima are searched the same way.
    """
    columns = values.shape[1]
    groups = columns // GROUP
    if columns <= GROUP * k or groups < 2 * k:
        return _select(values, k)
    # Group j holds the columns j, j + groups, ...: maxima over the outer axis are as fast as reading.
    whole = groups * GROUP
    best = _largest(values[:, :whole].unflatten(1, (GROUP, groups)).amax(1), k)
    first = torch.arange(0, whole, groups, device=values.device)
    places = (best[:, None, :] + first[None, :, None]).flatten(1)
    if columns > whole:
        rest = torch.arange(whole, columns, device=values.device)
        places = torch.cat([places, rest.expand(len(values), -1)], 1)
    return places.gather(1, _select(values.gather(1, places), k))


def _select(values: torch.Tensor, k: int) -> torch.Tensor:
    if values.device.type != "cpu" or values.dtype == torch.bfloat16:
        return torch.topk(values, k, dim=1, sorted=False).indices
    # NumPy's vectorised selection is several times as fast as torch's on a CPU.
    columns = values.shape[1]
    return torch.from_numpy(np.argpartition(values.numpy(), columns - k, axis=1)[:, columns - k :])
