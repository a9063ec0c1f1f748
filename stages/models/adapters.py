"""Low-rank adapters on every weight matrix of a model's body, by peft.

A matrix is the weight of a linear layer, a stack of matrices in one parameter (fused experts, block-diagonal gates), or
the weight of a layer of another kind that multiplies by it (routers). Embeddings, the output layer, convolutions,
norms, biases and other vectors get none; nor do layers whose weight the model reads without calling them (in Mamba's
blocks and kernels), which would go past an adapter. So all families are treated alike, whether their experts are linear
layers or one tensor.
"""

import logging
from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import nn
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from stages.core.errors import UserError
from stages.models.body import body_of
from stages.models.probes import tried_layers

LOG = logging.getLogger(__name__)
LINEAR = (nn.Linear, Conv1D)
OTHERS = (nn.Embedding, nn.modules.conv._ConvNd)
LEAST_SHARE = 0.5  # of the body's weights that adapters must reach


def add_adapters(model: PreTrainedModel, name: str, rank: int, alpha: float, seed: int) -> tuple[nn.Module, int]:
    """Return (the PEFT model around `model`, whose layers are wrapped in place; how many of its weights they change).

    UserError when the adapters would leave the greater part of the body frozen, or when peft cannot make them.
    """
    import peft

    body = {id(parameter) for parameter in body_of(model).parameters()} - _embeddings(model)
    layers, parameters = matrices(model, body)
    passed, odd = tried_layers(model, layers)
    layers = [layer for layer in layers if layer not in passed | odd]
    parameters += [f"{layer}.weight" for layer in sorted(odd)]
    sizes = {id(p): p.numel() for p in model.parameters()}
    reached = sum(model.get_parameter(f"{layer}.weight").numel() for layer in layers)
    reached += sum(model.get_parameter(parameter).numel() for parameter in parameters)
    share = reached / max(1, sum(sizes[key] for key in body))
    LOG.info(
        "Model %r: adapters on %d matrices, %.1f %% of the weights of its body%s.", name, len(layers) + len(parameters),
        100 * share, f"; {len(passed)} layers cannot take one ({min(passed)})" if passed else "",
    )  # fmt: skip
    if share < LEAST_SHARE:
        raise UserError(
            f"Model {name!r} ({type(model).__name__}): adapters would reach {100 * share:.0f} % of the weights of its "
            "body alone and leave the rest as it is: set train_model_mode to full or embeddings."
        )
    config = peft.LoraConfig(
        r=rank, lora_alpha=alpha, target_modules=layers or None, target_parameters=parameters or None,
        task_type="CAUSAL_LM",
    )  # fmt: skip
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        try:
            with _unnamed(model):
                return peft.get_peft_model(model, config), reached
        except (ValueError, TypeError, NotImplementedError) as error:
            raise UserError(
                f"Model {name!r} ({type(model).__name__}) cannot take adapters ({str(error).splitlines()[0]}): "
                "set train_model_mode to full or embeddings."
            ) from None


def merged(outer: nn.Module) -> PreTrainedModel:
    """Return the plain model, adapters merged into its weights."""
    return outer.merge_and_unload() if hasattr(outer, "merge_and_unload") else outer


def matrices(model: PreTrainedModel, wanted: set[int]) -> tuple[list[str], list[str]]:
    """Return (names of linear layers, names of other parameters that are matrices or stacks) among those `wanted`."""
    layers, parameters = [], []
    for name, module in model.named_modules():
        if isinstance(module, OTHERS):
            continue
        for key, parameter in module.named_parameters(recurse=False):
            if id(parameter) not in wanted or not parameter.is_floating_point():
                continue
            if isinstance(module, LINEAR):
                layers += [name] if key == "weight" else []
            elif min(parameter.shape, default=0) > 1 and (
                parameter.dim() == 3 or (parameter.dim() == 2 and key == "weight")
            ):
                parameters.append(f"{name}.{key}")
    return layers, parameters


def _embeddings(model: PreTrainedModel) -> set[int]:
    parts = (model.get_input_embeddings(), model.get_output_embeddings())
    return {id(parameter) for part in parts if part is not None for parameter in part.parameters()}


@contextmanager
def _unnamed(model: PreTrainedModel) -> Iterator[None]:
    """Hide the type of a model from peft, which takes names of layers for those that older transformers gave them."""
    model.config.model_type = ""
    try:
        yield
    finally:
        del model.config.model_type
