"""Give a causal language model the embeddings of another vocabulary."""

import torch

from stages.core.errors import UserError
from stages.embeddings.fvt import Plan
from stages.embeddings.rows import assemble
from stages.models.configuration import set_vocabulary
from stages.models.description import Description
from stages.models.probes import looked_up


def replace_embeddings(described: Description, plan: Plan, rows: int, seed: int, untie: bool) -> torch.Tensor:
    """Give a model the embeddings of `plan` in place; return the new input embedding [target, hidden].

    Its input and output embeddings, tied or not, and a bias of the head become exactly as long as the plan.
    `rows` is the number of source rows that belong to tokens. `untie` gives tied models a head of their own.
    UserError for a model that could not be opened again with another vocabulary.
    """
    if len(looked_up(described.model, described.vocab)) != 1:
        raise UserError(
            f"Model {described.name!r} ({described.kind}) keeps more embeddings of its tokens than those of its input, "
            "which cannot be made for another tokenizer: choose another model."
        )
    inputs, head, tied = described.embed, described.head.layer, described.tied
    fresh = assemble(inputs.weight, plan, rows, seed, "input embeddings")
    output = fresh.clone() if untie else fresh
    if not tied:
        output = assemble(head.weight, plan, rows, seed, "output embeddings")
    if not (torch.isfinite(fresh).all() and torch.isfinite(output).all()):
        raise UserError("The source embeddings hold values that are not finite: the weights of this model are damaged.")
    if described.head.bias is not None:
        head.bias = torch.nn.Parameter(assemble(head.bias, plan, rows, seed, "output bias"))
    inputs.weight, inputs.padding_idx = torch.nn.Parameter(fresh), None
    inputs.num_embeddings = head.out_features = len(fresh)
    head.weight = inputs.weight if tied and not untie else torch.nn.Parameter(output)
    set_vocabulary(described.model, described.name, len(fresh), tied and not untie)
    return fresh
