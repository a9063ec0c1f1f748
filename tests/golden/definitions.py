"""Divergences by their definitions, in float64, for where a reference has no number or a wrong one."""

import numpy as np


def softmax(logits):
    logits = np.asarray(logits, np.float64)
    weights = np.exp(logits - logits.max(-1, keepdims=True))
    return weights / weights.sum(-1, keepdims=True)


def kl(p, q):
    """Of each row; infinite where q has no mass and p has some."""
    with np.errstate(divide="ignore", invalid="ignore"):
        terms = np.where(p > 0, p * (np.log(p) - np.log(q)), 0.0)
    return terms.sum(-1)


def akl(p, q, alpha):
    order = np.argsort(p, -1, kind="stable")
    p_up, gap = np.take_along_axis(p, order, -1), np.take_along_axis(np.abs(p - q), order, -1)
    tail = np.cumsum(p_up, -1) < alpha
    share = (gap * tail).sum(-1) / gap.sum(-1)
    return (1 - share) * kl(p, q) + share * kl(q, p)


def divergence(name, p, q, options):
    """The divergence of each row of probabilities, by the product's name of it."""
    skew = options.get("skew_lambda")
    return {
        "kl": lambda: kl(p, q),
        "fkl": lambda: kl(p, q),
        "rkl": lambda: kl(q, p),
        "skl": lambda: kl(p, skew * p + (1 - skew) * q),
        "srkl": lambda: kl(q, skew * q + (1 - skew) * p),
        "js": lambda: (kl(p, (p + q) / 2) + kl(q, (p + q) / 2)) / 2,
        "akl": lambda: akl(p, q, options.get("adaptive_kl_alpha")),
    }[name]()
