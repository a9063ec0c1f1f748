"""Low-rank adapters on every weight matrix of a model's body, by peft.

A matrix is the weight of a linear layer, a stack of matrices in one parameter (fused experts, block-diagonal gates), or
the weight of a layer of another class that multiplies by it (routers). Embeddings, the output layer, convolutions,
norms, biases and other vectors get none; nor do layers that peft knows to be read past their adapter (those of Mamba's
kernels). So all families are treated alike, whether their experts are linear layers or one tensor.
"""

import logging

import torch
from torch import nn
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from stages.core.errors import UserError
from stages.models.body import body_of

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
    refused = [layer for layer in layers if _refuses(model, layer)]
    layers = [layer for layer in layers if layer not in refused]
    sizes = {id(p): p.numel() for p in model.parameters()}
    reached = sum(model.get_parameter(f"{layer}.weight").numel() for layer in layers)
    reached += sum(model.get_parameter(parameter).numel() for parameter in parameters)
    share = reached / max(1, sum(sizes[key] for key in body))
    LOG.info(
        "Model %r: adapters on %d matrices, %.1f %% of the weights of its body%s.", name, len(layers) + len(parameters),
        100 * share, f"; {len(refused)} layers cannot take one ({refused[0]})" if refused else "",
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


def _refuses(model: PreTrainedModel, layer: str) -> bool:
    """Return whether peft refuses an adapter for this layer of this model."""
    from peft import LoraConfig
    from peft.tuners.tuners_utils import _check_lora_target_modules_mamba

    try:
        _check_lora_target_modules_mamba(LoraConfig(), model, layer.rpartition(".")[2])
    except ValueError:
        return True
    return False
