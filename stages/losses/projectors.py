"""Linear layers that losses train beside the student."""

import torch
from torch import nn


@torch.no_grad()
def linear(inputs: int, outputs: int, generator: torch.Generator) -> nn.Linear:
    """Return a layer with weights and bias uniform within 1 / sqrt(inputs), as torch draws them, from `generator`."""
    layer = nn.Linear(inputs, outputs)
    bound = inputs**-0.5
    layer.weight.uniform_(-bound, bound, generator=generator)
    layer.bias.uniform_(-bound, bound, generator=generator)
    return layer
