"""GOLD (TRL's universal logit distillation by chunks): distributions of whole chunks, compared token by token.

A chunk of bytes is one row on each side: the distribution that predicts its last token, times the probability of the
tokens before it (the chain rule, TRL's "bayesian" strategy, the correct one of its two). So a row adds up to the
probability of the chunk's beginning, as in TRL. With `gold_hybrid` the tokens that both vocabularies hold with the
same bytes are compared one by one, by the generalised JSD of `jsd_beta`; the others by the L1 distance of their sorted
probabilities (`losses.uld`). Without, all are compared in that way. The hybrid's weights are the share m of the
teacher's vocabulary that is matched, and 1 - m, unless `gold_matched_weight` and `gold_unmatched_weight` are given.

- `temperature` holds for both sides; TRL has one for each. Its default there is 1 as well.
- Chunks are those of the byte-exact alignment, and the loss is their mean over the optimizer step; TRL's is the mean of
  the examples' means.
- TRL takes no probability to be below 1e-8, which ends the gradient of a long chunk; here there is no floor.
- TRL matches tokens by their spelling in the vocabulary, where `Ġa` and `▁a` differ; here their bytes decide.
- The teacher is known by its k likeliest tokens. What neither side lists counts as one more matched token in the
  hybrid and as in `losses.uld` otherwise; an unmatched token that is not listed counts as 0. With k the whole
  vocabulary nothing is left out.
"""

from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from stages.core.errors import UserError
from stages.losses import Needs, Prepared, Query
from stages.losses.chunks import Chunks, merge_chunks, segment_sums
from stages.losses.divergences import SMALLEST_REST, check_divergence, check_temperature, divergence
from stages.losses.mapped import likeliest, signals_read
from stages.losses.uld import rest_of, sorted_l1
from stages.signals.schema import normaliser_column

if TYPE_CHECKING:
    from stages.losses.examples import Examples

DEFAULTS: dict[str, Any] = {
    "temperature": 1.0,
    "jsd_beta": 0.5,
    "gold_hybrid": True,
    "gold_matched_weight": None,
    "gold_unmatched_weight": None,
}


def check(options: dict[str, Any]) -> None:
    """Raise UserError for a temperature, a share or a weight out of its range."""
    options = DEFAULTS | options
    check_temperature(options, "temperature")
    check_divergence(options, "gjsd")
    for key in ("gold_matched_weight", "gold_unmatched_weight"):
        if options[key] is not None and not options[key] >= 0:
            raise UserError(f"{key} is {options[key]}; it must not be negative.")
    if options["gold_unmatched_weight"] is None and (options["gold_matched_weight"] or 0) > 1:
        raise UserError(
            f"gold_matched_weight is {options['gold_matched_weight']}, so that gold_unmatched_weight, by default 1 "
            "minus it, would be negative: give both."
        )


def needs(options: dict[str, Any]) -> Needs:
    """Return the teacher's likeliest tokens and its observed ones; which tokens have the same bytes for the hybrid."""
    options = DEFAULTS | options
    columns = signals_read(options["temperature"]) | {"observed_logprob"}
    return Needs(columns, pair=frozenset({"mapping"} if options["gold_hybrid"] else ()))


def prepare(examples: "Examples", options: dict[str, Any]) -> Prepared:
    """Return the chunks with the teacher's rows merged; the count is their number."""
    options, pair = DEFAULTS | options, examples.pair
    chunks = merge_chunks(*examples.chunks(options["kind"]))
    images = np.full(pair.teacher.vocab_size, -1)
    if options["gold_hybrid"]:
        images = matched_tokens(pair.to_teacher.exact, pair.teacher.vocab_size)
    return prepare_chunks(chunks, examples.signals, examples.student.ids, images, pair.student.vocab_size, options)


def matched_tokens(exact: np.ndarray, vocab: int) -> np.ndarray:
    """Return int64[V teacher]: the student token that each teacher token is compared with, -1 for none.

    `exact` int64[V student] has the teacher token of each student token. Of several the lowest id is taken.
    """
    images = np.full(vocab, -1)
    known = np.flatnonzero(exact >= 0)[::-1]
    images[exact[known]] = known
    return images


def prepare_chunks(
    chunks: Chunks,
    signals: dict[str, np.ndarray],
    student_ids: np.ndarray,
    images: np.ndarray,
    student_vocab: int,
    options: dict[str, Any],
) -> Prepared:
    """Return what `loss` reads of the chunks.

    `signals`: the teacher's; `student_ids` int[tokens]; `images` int64[V teacher] as `matched_tokens` returns it.
    """
    temperature = (DEFAULTS | options)["temperature"]
    last = chunks.teacher_end - 1
    top, following = likeliest(signals, last, temperature), signals["observed_logprob"]
    if temperature != 1.0:
        following = following / temperature - signals[normaliser_column(temperature)]
    before = segment_sums(chunks.teacher, following, len(last)) - following[last]
    tokens = np.flatnonzero(chunks.student >= 0)
    place = np.searchsorted(tokens, chunks.student_end)
    image = images[top.ids]
    # One question for all rows: what they observed, and for a chunk's last row the teacher's likeliest tokens too.
    candidates = np.zeros((len(tokens), 1 + image.shape[1]), np.int64)
    candidates[:, 0] = student_ids[tokens]
    candidates[place, 1:] = image.clip(min=0)
    matched = np.zeros(student_vocab, bool)
    matched[images[images >= 0]] = True
    arrays = {
        "logprob": top.logprob,
        "rest": top.rest,
        "before": before.astype(np.float32),
        "listed": image >= 0,
        "matched": matched,
        "share": np.float32((images >= 0).mean()),
        "whole": np.bool_(image.shape[1] == len(images)),
        "chunk": chunks.student[tokens],
        "last": place,
    }
    query = Query(tokens - 1, candidates, min(image.shape[1], student_vocab), temperature)
    return Prepared(float(len(last)), np.zeros(0, np.int64), arrays, query)


def loss(
    student: dict[str, Any], arrays: dict[str, torch.Tensor], options: dict[str, Any]
) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    """Return the weighted sum over chunks, and of the hybrid both parts without their weights."""
    options = DEFAULTS | options
    following, last = student["candidate_logprob"][:, 0], arrays["last"]
    before = torch.zeros_like(arrays["before"]).index_add(0, arrays["chunk"], following) - following[last]
    top, top_ids = student["topk_logprob"][last], student["topk_ids"][last]
    if not options["gold_hybrid"]:
        rest_q = rest_of(top.exp(), len(arrays["matched"])) * before.exp()
        rest_p = torch.zeros_like(rest_q) if arrays["whole"] else (arrays["rest"] + arrays["before"]).exp()
        log_p, log_q = arrays["logprob"] + arrays["before"][:, None], top + before[:, None]
        return sorted_l1(log_p.exp(), log_q.exp(), rest_p, rest_q).sum(), {}
    candidates = student["candidate_logprob"][last, 1:]
    matched, unmatched = _parts(candidates, top, ~arrays["matched"][top_ids], before, arrays, options)
    of_matched, of_unmatched = options["gold_matched_weight"], options["gold_unmatched_weight"]
    of_matched = arrays["share"] if of_matched is None else of_matched
    of_unmatched = 1 - of_matched if of_unmatched is None else of_unmatched
    parts = {"matched": matched.detach(), "unmatched": unmatched.detach()}
    return of_matched * matched + of_unmatched * unmatched, parts


def _parts(
    candidates: torch.Tensor,
    top: torch.Tensor,
    own: torch.Tensor,
    before: torch.Tensor,
    arrays: dict[str, torch.Tensor],
    options: dict[str, Any],
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the summed divergence of matched tokens and the summed distance of the others, over C chunks.

    Of the student's row of each chunk: `candidates` [C, k], log-probabilities of the teacher's likeliest tokens where
    `arrays["listed"]` says that they are matched; `top` [C, m], of its own likeliest, `own` bool [C, m] where they are
    not matched; `before` [C], of the tokens before.
    """
    listed, log_p = arrays["listed"], arrays["logprob"] + arrays["before"][:, None]
    sides = [side.masked_fill(~listed, -torch.inf) for side in (log_p, candidates + before[:, None])]
    distance = sorted_l1(_sorted(log_p.exp() * ~listed), _sorted((top + before[:, None]).exp() * own))
    known = (candidates.exp() * listed).sum(-1) + (top.exp() * own).sum(-1)
    if not arrays["whole"]:
        rest = torch.log1p(-known.clamp(max=1 - SMALLEST_REST))
        rests = arrays["rest"] + arrays["before"], rest + before
        sides = [torch.cat([side, rest[:, None]], -1) for side, rest in zip(sides, rests, strict=True)]
    elif top.shape[1] < len(arrays["matched"]):  # the student has the larger vocabulary: no token meets its last ones
        distance = distance + (1 - known).clamp(min=0) * before.exp()
    return divergence("gjsd", *sides, options).sum(), distance.sum()


def _sorted(values: torch.Tensor) -> torch.Tensor:
    return values.sort(-1, descending=True).values
