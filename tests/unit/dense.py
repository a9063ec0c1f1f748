"""What a loss reads of a student or a teacher, made of all of its logits."""

from types import SimpleNamespace

import numpy as np
import torch

from stages.signals.schema import normaliser_column, to_float32


def answer(query, logits):
    """What the trainer hands a loss for its query, of logits [tokens, V]."""
    logprob = torch.log_softmax(logits / query.temperature, -1)[torch.as_tensor(query.rows)]
    top = logprob.topk(query.top_k, -1)
    candidates = logprob.gather(1, torch.as_tensor(query.candidates))
    sides = SimpleNamespace(student=SimpleNamespace(head=SimpleNamespace(shape=SimpleNamespace(vocab=logits.shape[1]))))
    return {"candidate_logprob": candidates, "topk_logprob": top.values, "topk_ids": top.indices, "sides": sides}


def signals_of(logits, ids, k, temperatures=()):
    """Teacher signals of logits [tokens, V] and the token ids [tokens], log-probabilities in float32."""
    logprob = torch.log_softmax(torch.as_tensor(logits).double(), -1)
    top = logprob.topk(k, -1)
    following = torch.as_tensor(np.roll(ids, -1).astype(np.int64))
    tail = torch.log1p(-top.values.exp().sum(-1).clamp(max=1.0)).clamp(min=-85.0)
    signals = {
        "topk_ids": top.indices.to(torch.int32).numpy().astype(np.uint32),
        "topk_logprobs": top.values.float().numpy(),
        "tail_logmass": tail.float().numpy(),
        "observed_logprob": logprob.gather(1, following[:, None])[:, 0].float().numpy(),
    }
    for temperature in temperatures:
        signals[normaliser_column(temperature)] = torch.logsumexp(logprob / temperature, -1).float().numpy()
    return signals


def tensors(arrays):
    return {name: torch.as_tensor(value) for name, value in arrays.items()}


def evaluate(module, examples, logits, options):
    """(the loss, its parts, its count) of a loss that asks a query, for student logits [tokens, V]."""
    prepared = module.prepare(examples, options)
    total, parts = module.loss(answer(prepared.query, logits), tensors(prepared.arrays), options)
    return total, parts, prepared.count


def toy_examples(toy, chosen, k, temperatures=(), sharpness=1.0):
    """Some texts of a `toy_pair.Toy` with the k likeliest tokens of its teacher; `sharpness` multiplies its logits."""
    examples = toy.examples(chosen)
    logits = teacher_logits(toy, examples) * sharpness
    examples.signals |= signals_of(logits, examples.teacher.ids, k, temperatures)
    return examples


def teacher_logits(toy, examples):
    return toy.sides.teacher.head.logits(torch.tensor(to_float32(examples.signals["hidden"])))


def step(module, toy, options, groups, k=None, sharpness=1.0):
    """(the loss divided by its count, its parts, gradients) with a micro-batch for each of `groups`, as in training."""
    options = {"kind": "unconstrained"} | options
    k = k or toy.pair.teacher.vocab_size
    temperature = options.get("temperature", 1.0)
    batches = [toy_examples(toy, group, k, {temperature} - {1.0}, sharpness) for group in groups]
    prepared = [module.prepare(examples, options) for examples in batches]
    count = max(sum(part.count for part in prepared), 1.0)
    head, value, parts = toy.sides.student.head, 0.0, {}
    leaves = {"hidden": toy.hidden, "head": head.weight}
    for leaf in leaves.values():
        leaf.grad = None
    for group, part in zip(groups, prepared, strict=True):
        seen = toy.states(group, None)
        if part.query is not None:
            rows = seen["hidden"][torch.as_tensor(part.query.rows)]
            asked = torch.as_tensor(part.query.candidates), part.query.top_k, part.query.temperature
            names = ("candidate_logprob", "topk_logprob", "topk_ids")
            seen |= dict(zip(names, head.distribution(rows, *asked), strict=True))
        total, extra = module.loss(seen, tensors(part.arrays), options)
        (total / count).backward()
        value += total.item() / count
        parts = {name: parts.get(name, 0.0) + float(number) / count for name, number in extra.items()}
    return value, parts, {name: leaf.grad for name, leaf in leaves.items() if leaf.grad is not None}
