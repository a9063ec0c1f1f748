"""Divergences between a teacher p and a student q, given as log-probabilities over the same tokens.

All act on the last axis and return the divergence of each row, in nats. Where only some tokens are known, `with_rest`
appends what is left as one more token: a divergence of the coarser distributions, equal to that of the full ones when
nothing is left and else at most it (the data-processing inequality; but for akl, whose weights the rest changes).
"""

import math
from collections.abc import Callable
from typing import Any

import torch

from stages.core.errors import UserError

SMALLEST_REST = 1e-7  # below, 1 minus a float32 sum is noise
DEFAULTS: dict[str, Any] = {"skew_lambda": 0.1, "adaptive_kl_alpha": 0.5, "jsd_beta": 0.5}
Divergence = Callable[[torch.Tensor, torch.Tensor, dict[str, Any]], torch.Tensor]


def divergence(name: str, log_p: torch.Tensor, log_q: torch.Tensor, options: dict[str, Any]) -> torch.Tensor:
    """Return the divergence called `name` in DIVERGENCES of log-probabilities [..., tokens], as [...].

    A log-probability of -inf is a token of no mass. `options` may hold `skew_lambda`, `adaptive_kl_alpha`, `jsd_beta`.
    """
    return DIVERGENCES[name](log_p, log_q, DEFAULTS | options)


def check_divergence(options: dict[str, Any], name: str) -> None:
    """Raise UserError for a divergence that does not exist, or a setting of it out of its range."""
    if name not in DIVERGENCES:
        raise UserError(f"divergence is {name!r}; it must be one of {', '.join(DIVERGENCES)}.")
    for key, low, high in (("skew_lambda", 0, 1), ("adaptive_kl_alpha", 0, 1), ("jsd_beta", 0, 1)):
        value = (DEFAULTS | options)[key]
        if not low <= value <= high:
            raise UserError(f"{key} is {value}; it must lie between {low} and {high}.")


def check_temperature(options: dict[str, Any], key: str) -> None:
    """Raise UserError unless the temperature called `key` is above 0."""
    if not options[key] > 0:
        raise UserError(f"{key} is {options[key]}; it must be above 0.")


def with_rest(logprob: torch.Tensor) -> torch.Tensor:
    """Return log-probabilities [..., m + 1]: those of m tokens, and that of all others together."""
    rest = torch.log1p(-logprob.exp().sum(-1, keepdim=True).clamp(max=1 - SMALLEST_REST))
    return torch.cat([logprob, rest], -1)


def forward_kl(log_p: torch.Tensor, log_q: torch.Tensor, options: dict[str, Any]) -> torch.Tensor:
    """Return KL(p || q)."""
    return _expected(log_p, log_p - log_q).sum(-1)


def reverse_kl(log_p: torch.Tensor, log_q: torch.Tensor, options: dict[str, Any]) -> torch.Tensor:
    """Return KL(q || p)."""
    return _expected(log_q, log_q - log_p).sum(-1)


def skewed_forward_kl(log_p: torch.Tensor, log_q: torch.Tensor, options: dict[str, Any]) -> torch.Tensor:
    """Return KL(p || l p + (1 - l) q), l = `skew_lambda` (DistiLLM, arXiv 2402.03898)."""
    return forward_kl(log_p, _mixed(log_p, log_q, options["skew_lambda"]), options)


def skewed_reverse_kl(log_p: torch.Tensor, log_q: torch.Tensor, options: dict[str, Any]) -> torch.Tensor:
    """Return KL(q || l q + (1 - l) p), l = `skew_lambda`."""
    return forward_kl(log_q, _mixed(log_q, log_p, options["skew_lambda"]), options)


def jensen_shannon(log_p: torch.Tensor, log_q: torch.Tensor, options: dict[str, Any]) -> torch.Tensor:
    """Return the mean of KL(p || m) and KL(q || m), m = (p + q) / 2."""
    middle = _mixed(log_p, log_q, 0.5)
    return (forward_kl(log_p, middle, options) + forward_kl(log_q, middle, options)) / 2


def generalised_jsd(log_p: torch.Tensor, log_q: torch.Tensor, options: dict[str, Any]) -> torch.Tensor:
    """Return b KL(p || m) + (1 - b) KL(q || m), m = b p + (1 - b) q, b = `jsd_beta` (GKD, arXiv 2306.13649, eq. 1).

    By definition forward KL at b = 0 and reverse KL at b = 1. Near these it tends to 0 like b and 1 - b.
    """
    beta = options["jsd_beta"]
    if beta in (0, 1):
        return (reverse_kl if beta else forward_kl)(log_p, log_q, options)
    middle = _mixed(log_p, log_q, beta)
    return beta * forward_kl(log_p, middle, options) + (1 - beta) * forward_kl(log_q, middle, options)


def adaptive_kl(log_p: torch.Tensor, log_q: torch.Tensor, options: dict[str, Any]) -> torch.Tensor:
    """Return forward and reverse KL weighted by where p and q differ (AKL, arXiv 2404.02657).

    The tail holds the teacher's least likely tokens, to a mass below `adaptive_kl_alpha`, the head the others; their
    shares of sum |p - q| weigh forward KL (head) and reverse KL (tail). Half each where p = q. So tokenkit and DSKD
    (which takes "at most"); the authors' own code fills the head, from the likeliest on, up to a mass of 0.5.
    """
    p, q = log_p.exp(), log_q.detach().exp()
    ascending, order = p.sort(-1)
    tail = torch.zeros_like(p, dtype=torch.bool).scatter(-1, order, ascending.cumsum(-1) < options["adaptive_kl_alpha"])
    gap = (p - q).abs()
    in_tail, whole = (gap * tail).sum(-1), gap.sum(-1)
    share = torch.where(whole > 0, in_tail / whole.clamp(min=torch.finfo(whole.dtype).tiny), 0.5)
    return (1 - share) * forward_kl(log_p, log_q, options) + share * reverse_kl(log_p, log_q, options)


def total_variation(log_p: torch.Tensor, log_q: torch.Tensor, options: dict[str, Any]) -> torch.Tensor:
    """Return half the sum of |p - q|."""
    return (log_p.exp() - log_q.exp()).abs().sum(-1) / 2


def _expected(log_weight: torch.Tensor, values: torch.Tensor) -> torch.Tensor:
    """Return exp(log_weight) * values, 0 where the weight is 0, with finite gradients."""
    filled = torch.isfinite(log_weight)
    if filled.all():  # as in all dense losses, where each pass over the vocabulary counts
        return log_weight.exp() * values
    weight = torch.where(filled, log_weight, 0.0).exp()
    return torch.where(filled, weight * torch.where(filled, values, 0.0), 0.0)


def _mixed(log_a: torch.Tensor, log_b: torch.Tensor, share: float) -> torch.Tensor:
    """Return the log of share * a + (1 - share) * b."""
    if share in (0, 1):
        return log_a if share else log_b
    return _logaddexp(log_a + math.log(share), log_b + math.log(1 - share))


def _logaddexp(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    """Return log(e^a + e^b); -inf with no gradient where both are -inf, for which torch's gradient is NaN."""
    none = torch.isneginf(a) & torch.isneginf(b)
    if not none.any():
        return torch.logaddexp(a, b)
    return torch.logaddexp(a.masked_fill(none, 0.0), b.masked_fill(none, 0.0)).masked_fill(none, -torch.inf)


DIVERGENCES: dict[str, Divergence] = {
    "kl": forward_kl,  # as tokenkit calls it
    "fkl": forward_kl,
    "rkl": reverse_kl,
    "skl": skewed_forward_kl,
    "srkl": skewed_reverse_kl,
    "js": jensen_shannon,
    "gjsd": generalised_jsd,
    "akl": adaptive_kl,
    "tvd": total_variation,
}
