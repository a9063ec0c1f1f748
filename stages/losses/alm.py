"""Approximate likelihood matching (arXiv 2503.20083): chunk likelihoods of two tokenizations, compared as events.

Teacher and student give each chunk of bytes a log-likelihood, the sum of its tokens' log-probabilities; the loss
compares the two as Bernoulli distributions {this chunk, anything else}. Notation as in tokenkit: a teacher,
b student, tau `binarization_temp`.
"""

import math
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from stages.core.errors import UserError
from stages.losses import Needs, Prepared
from stages.losses.chunks import Chunks, merge_chunks, segment_sums

if TYPE_CHECKING:
    from stages.losses.examples import Examples

EPSILON = 1e-6
K3_LIMIT = 40.0  # joschu_k3 grows linearly beyond this log-ratio: exp() of more overflows float32 in the gradient norm
DEFAULTS = {
    "alm_mode": "merge_by_space_prob+append_space",
    "alm_diff_fn": "binary_ce",
    "binarization_temp": 5.0,
    "merge_threshold": 0.1,
    "renyi_alpha": 0.5,
    "distill_main_path_numerator": "chunk_count",
    "distill_main_path_denominator": "chunk_count",
}
MODES = ("append_space", "merge_by_space_prob", "eos_as_space")
NUMERATORS: dict[str, Callable[[np.ndarray], np.ndarray]] = {
    "chunk_count": np.ones_like,
    "token_count": lambda count: count,
    "log1p_token_count": np.log1p,
}
DENOMINATORS: dict[str, Callable[[np.ndarray], float]] = {
    "chunk_count": lambda count: float(len(count)),
    "token_count": lambda count: float(count.sum()),
}


def check(options: dict[str, Any]) -> None:
    """Raise UserError naming the setting that this loss does not know."""
    options = DEFAULTS | options
    _flags(options)
    for key, known in (
        ("alm_diff_fn", DIFFERENCES),
        ("distill_main_path_numerator", NUMERATORS),
        ("distill_main_path_denominator", DENOMINATORS),
    ):
        if options[key] not in known:
            raise UserError(f"{key} is {options[key]!r}; it must be one of {', '.join(known)}.")
    if not options["binarization_temp"] > 0:
        raise UserError(f"binarization_temp is {options['binarization_temp']}; it must be above 0.")
    if options["alm_diff_fn"] == "renyi" and options["renyi_alpha"] in (0, 1):
        raise UserError(
            f"renyi_alpha is {options['renyi_alpha']}; it must not be 0 or 1 (use reverse_binary_kl for the limit)."
        )


def needs(options: dict[str, Any]) -> Needs:
    """Return the signals: log-probability of the observed token, and of the boundary where the mode uses it."""
    flags = _flags(DEFAULTS | options)
    boundary = {"eos_logprob" if "eos_as_space" in flags else "boundary_logprob"}
    teacher = {"observed_logprob"} | (boundary if flags & {"append_space", "merge_by_space_prob"} else set())
    student = {"observed_logprob"} | (boundary if "append_space" in flags else set())
    pair = {"bias"} if options.get("kind") == "unbiased" else set()
    return Needs(frozenset(teacher), frozenset(student), frozenset(pair))


def prepare(examples: "Examples", options: dict[str, Any]) -> Prepared:
    """Return the merged chunks of a micro-batch with the teacher's side already summed."""
    options = DEFAULTS | options
    flags = _flags(options)
    teacher, student, example = examples.chunks(options["kind"])
    boundary = examples.signals.get("eos_logprob" if "eos_as_space" in flags else "boundary_logprob")
    merging = options["merge_threshold"] if "merge_by_space_prob" in flags else None
    chunks = merge_chunks(teacher, student, example, boundary, merging)
    return prepare_chunks(chunks, examples.signals["observed_logprob"], boundary, options)


def prepare_chunks(
    chunks: Chunks, observed: np.ndarray, boundary: np.ndarray | None, options: dict[str, Any]
) -> Prepared:
    """Return teacher chunk log-likelihoods, weights and counts; `observed`, `boundary`: the teacher's, float[tokens].

    `boundary` is what closes a chunk: the boundary mass, or log p(eos) with `eos_as_space`.
    """
    options = DEFAULTS | options
    number = len(chunks.count)
    likelihood = segment_sums(chunks.teacher, observed, number)
    append = "append_space" in _flags(options)
    if append:
        likelihood = likelihood + boundary[chunks.teacher_end]
    tokens = np.flatnonzero(chunks.student >= 0)
    rows = np.union1d(tokens - 1, chunks.student_end) if append else tokens - 1
    arrays = {
        "teacher": np.minimum(likelihood, 0).astype(np.float32),
        "weight": NUMERATORS[options["distill_main_path_numerator"]](chunks.count).astype(np.float32),
        "chunk": chunks.student[tokens],
        "row": tokens - 1,
        "end": chunks.student_end,
    }
    return Prepared(DENOMINATORS[options["distill_main_path_denominator"]](chunks.count), rows, arrays)


def loss(
    student: dict[str, torch.Tensor], arrays: dict[str, torch.Tensor], options: dict[str, Any]
) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    """Return the weighted sum of differences over chunks, and the summed chunk log-likelihoods of both sides."""
    options = DEFAULTS | options
    flags = _flags(options)
    teacher, weight = arrays["teacher"], arrays["weight"]
    observed = student["observed_logprob"][arrays["row"]]
    likelihood = torch.zeros_like(teacher).index_add(0, arrays["chunk"], observed)
    if "append_space" in flags:
        name = "eos_logprob" if "eos_as_space" in flags else "boundary_logprob"
        likelihood = likelihood + student[name][arrays["end"]]
    likelihood = likelihood.clamp(max=0)
    total = (DIFFERENCES[options["alm_diff_fn"]](teacher, likelihood, options) * weight).sum()
    with torch.no_grad():
        sides = {"teacher_logprob": (teacher * weight).sum(), "student_logprob": (likelihood * weight).sum()}
    return total, sides


def log1mexp(x: torch.Tensor) -> torch.Tensor:
    """Return log(1 - exp(x)) for x < 0 with finite gradients in both branches (Mächler 2012)."""
    far = x < -math.log(2)
    below = torch.log1p(-torch.exp(torch.where(far, x, -1.0)))
    near = torch.log(-torch.expm1(torch.where(far, -1.0, x)))
    return torch.where(far, below, near)


def _flags(options: dict[str, Any]) -> set[str]:
    flags = {flag for flag in options["alm_mode"].split("+") if flag}
    for flag in sorted(flags):
        if flag not in MODES:
            raise UserError(f"alm_mode has the flag {flag!r}; it takes {', '.join(MODES)}, joined by '+'.")
    return flags


def _scaled(a: torch.Tensor, b: torch.Tensor, options: dict[str, Any]) -> tuple[torch.Tensor, torch.Tensor]:
    return a / options["binarization_temp"] - EPSILON, b / options["binarization_temp"] - EPSILON


def _binary_ce(a: torch.Tensor, b: torch.Tensor, options: dict[str, Any]) -> torch.Tensor:
    a, b = _scaled(a, b, options)
    return -(a.exp() * b - torch.expm1(a) * log1mexp(b))


def _reverse_binary_kl(a: torch.Tensor, b: torch.Tensor, options: dict[str, Any]) -> torch.Tensor:
    a, b = _scaled(a, b, options)
    return b.exp() * (b - a) - torch.expm1(b) * (log1mexp(b) - log1mexp(a))


def _binary_kl_temp_limit(a: torch.Tensor, b: torch.Tensor, options: dict[str, Any]) -> torch.Tensor:
    a, b = a - EPSILON, b - EPSILON
    return (a - b) + a * (torch.log(-b) - torch.log(-a))


def _abs(a: torch.Tensor, b: torch.Tensor, options: dict[str, Any]) -> torch.Tensor:
    return (a - b).abs()


def _abs_exp(a: torch.Tensor, b: torch.Tensor, options: dict[str, Any]) -> torch.Tensor:
    a, b = _scaled(a, b, options)
    return (a.exp() - b.exp()).abs()


def _renyi(a: torch.Tensor, b: torch.Tensor, options: dict[str, Any]) -> torch.Tensor:
    a, b, alpha = a - EPSILON, b - EPSILON, options["renyi_alpha"]
    inside = alpha * a + (1 - alpha) * b
    outside = alpha * log1mexp(a) + (1 - alpha) * log1mexp(b)
    return torch.logaddexp(inside, outside) / (alpha - 1)


def _joschu_k2(a: torch.Tensor, b: torch.Tensor, options: dict[str, Any]) -> torch.Tensor:
    return ((a - b) / options["binarization_temp"]).square() / 2


def _joschu_k3(a: torch.Tensor, b: torch.Tensor, options: dict[str, Any]) -> torch.Tensor:
    ratio = (a - b) / options["binarization_temp"]
    near = ratio.clamp(max=K3_LIMIT)
    return torch.expm1(near) * (1 + ratio - near) - near


DIFFERENCES: dict[str, Callable[[torch.Tensor, torch.Tensor, dict[str, Any]], torch.Tensor]] = {
    "binary_ce": _binary_ce,
    "reverse_binary_kl": _reverse_binary_kl,
    "binary_kl_temp_limit": _binary_kl_temp_limit,
    "abs": _abs,
    "abs_exp": _abs_exp,
    "renyi": _renyi,
    "joschu_k2": _joschu_k2,
    "joschu_k3": _joschu_k3,
}
