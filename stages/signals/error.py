"""What each kind of signal loses of a teacher's distribution, measured on the teacher itself."""

from typing import Any

import torch

from stages.vocabulary.head import Head

ROWS = 256
LARGEST = 4096  # the most likeliest tokens that are measured
DRAWS = (16, 50, 128)


@torch.no_grad()
def signal_errors(hidden: torch.Tensor, head: Head, source: torch.Generator) -> list[dict[str, Any]]:
    """Return {signal, size, bytes_per_token, kl, total_variation} of signals of several sizes, means over rows.

    `hidden` [N, d], of which ROWS rows are used. With p the teacher's distribution and q what the signal alone says of
    it, `kl` is KL(q || p) in nats and `total_variation` half the sum of |p - q|. q is: the k likeliest tokens in
    float16, renormalised (the tail's mass, which is kept as well, mends the scale but not what lies within the tail);
    the shares of N drawn tokens (right on average); what hidden states in bfloat16 give.
    """
    log_p = torch.log_softmax(head.logits(hidden[:ROWS]), -1)
    ordered, ids = log_p.sort(-1, descending=True)
    found = []
    for k in [2**n for n in range(13) if 2**n < log_p.shape[1] and 2**n <= LARGEST]:
        kept = torch.log_softmax(ordered[:, :k].half().float(), -1)
        found.append(_row("top_k", k, 6 * k + 4, torch.zeros_like(log_p).scatter_(1, ids[:, :k], kept.exp()), log_p))
    for number in DRAWS:
        drawn = torch.multinomial(log_p.exp(), number, True, generator=source)
        share = torch.full(drawn.shape, 1 / number, device=log_p.device)
        found.append(_row("samples", number, 4 * number, torch.zeros_like(log_p).scatter_add_(1, drawn, share), log_p))
    rounded = head.logits(hidden[:ROWS].to(torch.bfloat16).to(hidden.dtype))
    found.append(_row("hidden", hidden.shape[1], 2 * hidden.shape[1], torch.softmax(rounded, -1), log_p))
    return found


def _row(signal: str, size: int, bytes_per_token: int, q: torch.Tensor, log_p: torch.Tensor) -> dict[str, Any]:
    kl = torch.where(q > 0, q * (q.log() - log_p), 0.0).sum(-1).mean()
    distance = (q - log_p.exp()).abs().sum(-1).mean() / 2
    row = {"signal": signal, "size": size, "bytes_per_token": bytes_per_token}
    return row | {"kl": round(float(kl), 6), "total_variation": round(float(distance), 6)}
