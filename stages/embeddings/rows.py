"""Embedding rows from a plan: copies bit for bit, means in fp32, draws from a named generator."""

import torch

from stages.core.seeds import seed_of
from stages.embeddings.fvt import Plan

BLOCK = 4096  # rows averaged at once


def assemble(embedding: torch.Tensor, plan: Plan, source_rows: int, seed: int, name: str) -> torch.Tensor:
    """Return the target embedding [target rows, ...] in the dtype of `embedding` [>= source_rows, ...].

    Rows of rule special and copy are the source's bits. Rows of rule mean are averaged in fp32. Rows of rule
    random and padding are drawn from N(mean, std) of each dimension over the first `source_rows` rows, by a
    generator that depends on `seed` and `name` only. Rows beyond `source_rows` are padding and unused.
    """
    embedding = embedding.detach()[:source_rows]
    target = torch.empty((len(plan.rules), *embedding.shape[1:]), dtype=embedding.dtype)
    by_rule: dict[str, list[int]] = {"copy": [], "mean": [], "random": []}
    for index, rule in enumerate(plan.rules):
        by_rule[{"special": "copy", "padding": "random"}.get(rule, rule)].append(index)
    if by_rule["copy"]:
        target[by_rule["copy"]] = embedding[[plan.sources[index][0] for index in by_rule["copy"]]]
    for start in range(0, len(by_rule["mean"]), BLOCK):
        block = by_rule["mean"][start : start + BLOCK]
        target[block] = _means(embedding, [plan.sources[index] for index in block]).to(embedding.dtype)
    if by_rule["random"]:
        shape = (len(by_rule["random"]), *embedding.shape[1:])
        target[by_rule["random"]] = _draws(embedding, shape, generator(seed, name)).to(embedding.dtype)
    return target


def generator(seed: int, name: str) -> torch.Generator:
    """Return a CPU generator whose stream depends on `seed` and `name` only."""
    return torch.Generator().manual_seed(seed_of(seed, name) >> 1)


def _means(embedding: torch.Tensor, sources: list[list[int]]) -> torch.Tensor:
    """Return the fp32 means [len(sources), ...]; lists that are the same object are averaged once."""
    unique = {id(ids): ids for ids in sources}
    means = {}
    if len(unique) < len(sources):
        means = {key: embedding[ids].float().mean(0) for key, ids in unique.items()}
        return torch.stack([means[id(ids)] for ids in sources])
    counts = torch.tensor([len(ids) for ids in sources])
    rows = torch.repeat_interleave(torch.arange(len(sources)), counts)
    flat = torch.tensor([identifier for ids in sources for identifier in ids])
    sums = torch.zeros((len(sources), *embedding.shape[1:])).index_add_(0, rows, embedding[flat].float())
    return sums / counts.view(-1, *[1] * (embedding.dim() - 1))


def _draws(embedding: torch.Tensor, shape: tuple[int, ...], source: torch.Generator) -> torch.Tensor:
    values = embedding.float()
    mean, deviation = values.mean(0), values.std(0, correction=0)
    return mean + deviation * torch.randn(shape, generator=source)
