"""Distillation between models that share a tokenizer: a divergence of their next-token distributions.

The loss is called by its divergence: fkl, rkl, skl, srkl, js, gjsd, akl, tvd (`losses.divergences`). `last_token_kd`
is forward KL at the last trained token of each example alone, the classic teaching example. `rskd` is forward KL from
tokens that were drawn of the teacher (RS-KD, arXiv 2503.16870): the mean of -log q over them is an unbiased estimate
of the cross entropy, which differs from forward KL by the teacher's entropy, a constant.

The teacher is known by its k likeliest tokens, and everything else is one more token (`with_rest`); or, with
`teacher_distribution: exact`, by its hidden states and output layer. Both models are cut to the tokenizer's ids, so
padding columns (Qwen2.5-7B has 152,064, 1.5B 151,936) do not exist.
"""

from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from stages.core.errors import UserError
from stages.losses import Needs, Prepared, Query
from stages.losses.divergences import DIVERGENCES, check_divergence, check_temperature, divergence, with_rest
from stages.losses.mapped import likeliest, signals_read
from stages.losses.sft import example_of, target_rows
from stages.signals.schema import to_float32

if TYPE_CHECKING:
    from stages.losses.examples import Examples

DEFAULTS: dict[str, Any] = {"temperature": 1.0, "t_squared": False, "teacher_distribution": "top_k"}


def check(options: dict[str, Any]) -> None:
    """Raise UserError for a temperature that is not above 0, or a setting of a divergence out of its range."""
    options = DEFAULTS | options
    check_temperature(options, "temperature")
    if options["name"] == "rskd" and options["temperature"] != 1.0:
        raise UserError(
            f"temperature is {options['temperature']}; rskd draws at temperature 1 and can only be read there."
        )
    check_divergence(options, _divergence(options))


def needs(options: dict[str, Any]) -> Needs:
    """Return the teacher's likeliest tokens, drawn tokens, or hidden states and output layer."""
    options = DEFAULTS | options
    if options["name"] == "rskd":
        return Needs(frozenset({"sample_ids"}))
    if options["teacher_distribution"] == "exact":
        return Needs(frozenset({"hidden"}), teacher_head=True)
    return Needs(signals_read(options["temperature"]))


def prepare(examples: "Examples", options: dict[str, Any]) -> Prepared:
    """Return the rows that predict a trained token, with what the teacher predicts there; the count is their number."""
    options = DEFAULTS | options
    batch, signals, temperature = examples.student, examples.signals, options["temperature"]
    rows = target_rows(batch.loss, batch.offsets)
    if options["name"] == "last_token_kd":
        example = example_of(rows, batch.offsets)
        rows = rows[np.append(example[1:] != example[:-1], True)] if len(rows) else rows
    none = np.zeros(0, np.int64)
    if options["name"] == "rskd":
        query = Query(rows, signals["sample_ids"][rows].astype(np.int64), 0, temperature)
        return Prepared(float(len(rows)), none, {}, query)
    if options["teacher_distribution"] == "exact":
        return Prepared(float(len(rows)), none, {"rows": rows, "teacher": to_float32(signals["hidden"][rows])})
    top = likeliest(signals, rows, temperature)
    query = Query(rows, top.ids, 0, temperature)
    return Prepared(float(len(rows)), none, {"logprob": top.logprob, "rest": top.rest}, query)


def loss(
    student: dict[str, Any], arrays: dict[str, torch.Tensor], options: dict[str, Any]
) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    """Return the summed divergence in nats; times temperature squared with `t_squared`."""
    options = DEFAULTS | options
    temperature, name = options["temperature"], _divergence(options)
    factor = temperature**2 if options["t_squared"] else 1.0
    if options["name"] == "rskd":
        return -student["candidate_logprob"].mean(-1).sum() * factor, {}
    if options["teacher_distribution"] == "exact":
        teacher, own = student["sides"].teacher.head, student["sides"].student.head

        def of_rows(logits: torch.Tensor, here: dict[str, torch.Tensor]) -> torch.Tensor:
            log_p = torch.log_softmax(here["teacher"] / temperature, -1)
            return divergence(name, log_p, torch.log_softmax(logits / temperature, -1), options).sum()

        hidden = student["hidden"].index_select(0, arrays["rows"])
        return own.dense(of_rows, hidden, {}, {"teacher": (teacher, arrays["teacher"])}) * factor, {}
    log_p, log_q = arrays["logprob"], student["candidate_logprob"]
    if log_p.shape[1] < student["sides"].student.head.shape.vocab:
        log_p, log_q = torch.cat([log_p, arrays["rest"][:, None]], -1), with_rest(log_q)
    return divergence(name, log_p, log_q, options).sum() * factor, {}


def _divergence(options: dict[str, Any]) -> str:
    return options["name"] if options["name"] in DIVERGENCES else "fkl"
