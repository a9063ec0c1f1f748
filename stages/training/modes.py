"""What of a model is trained: all of it, low-rank adapters, or its embeddings."""

import logging
from typing import Any

import torch
from torch import nn

from stages.core.errors import UserError
from stages.models.adapters import add_adapters
from stages.models.description import Description
from stages.training import aggregation
from stages.training.data import generator

LOG = logging.getLogger(__name__)
DEFAULTS: dict[str, Any] = {
    "steps": 5000,
    "warmup_steps": 0,
    "batch_size": 64,
    "max_tokens": 8192,
    "learning_rate": 1e-5,
    "lr_schedule": "linear",
    "weight_decay": 0.0,
    "b1": 0.9,
    "b2": 0.95,
    "eps": 1e-8,
    "max_grad_norm": 1.0,
    "projector_lr_scale": 2.0,
    "multitask_aggregation_fn": "none",
    "gradnorm_alpha": 0.12,
    "gradnorm_lr": 0.025,
    "train_model_mode": "lora",
    "model_lora_rank": 64,
    "model_lora_alpha": 64,
    "train_embeddings": True,
    "gradient_checkpointing": False,
    "dtype": "auto",
    "save_interval": 500,
    "log_interval": 10,
}


def settings_of(train: dict[str, Any]) -> dict[str, Any]:
    """Return the "train" settings of a spec with defaults; UserError for a key or word that does not exist."""
    for key in train:
        if key not in DEFAULTS:
            raise UserError(f"train has the unknown key {key!r}; it takes {', '.join(DEFAULTS)}.")
    settings = DEFAULTS | train
    known = {
        "train_model_mode": ("full", "lora", "embeddings"),
        "lr_schedule": ("linear", "cosine", "constant"),
        "dtype": ("auto", "float32", "bfloat16"),
    }
    for key, words in known.items():
        if settings[key] not in words:
            raise UserError(f"train.{key} is {settings[key]!r}; it must be one of {', '.join(words)}.")
    aggregation.parse(settings["multitask_aggregation_fn"])
    return settings


def autocasts(setting: str, device: torch.device) -> bool:
    """Return whether forward passes run in bfloat16: "auto" is that on a GPU and float32 on a CPU."""
    return setting == "bfloat16" or (setting == "auto" and device.type == "cuda" and torch.cuda.is_bf16_supported())


def prepare_mode(described: Description, settings: dict[str, Any], seed: int) -> tuple[nn.Module, dict[str, Any]]:
    """Mark what is trained, in place; return (the model to export, plain or a PEFT model around it; what is trained).

    Trained parameters become float32; frozen ones keep their type, or become float32 too where forward passes are.
    What is trained: {"parameters", "share"}, the number of parameters that the optimizer has, and the share of the
    model's own weights that they change.
    """
    model, mode = described.model, settings["train_model_mode"]
    if not autocasts(settings["dtype"], torch.device("cuda" if torch.cuda.is_available() else "cpu")):
        model.float()
    # Torch keeps a padding row from training, and that token is often the one that starts every example.
    described.embed.padding_idx = None
    own = list(model.parameters())
    embeddings = {id(p) for layer in (described.embed, described.head.layer) for p in layer.parameters()}
    outer, changed = model, 0
    if mode == "lora":
        rank, alpha = settings["model_lora_rank"], settings["model_lora_alpha"]
        outer, changed = add_adapters(model, described.name, rank, alpha, int(generator(seed, "lora").integers(2**63)))
    for name, parameter in model.named_parameters():
        if id(parameter) in embeddings:
            trained = mode == "embeddings" or settings["train_embeddings"]
        else:
            trained = mode == "full" or (mode == "lora" and "lora_" in name)
        parameter.requires_grad_(trained)
        if trained:
            parameter.data = parameter.data.float()
    number = sum(parameter.numel() for parameter in model.parameters() if parameter.requires_grad)
    if not number:
        raise UserError(f"Nothing is trained with train_model_mode {mode!r} and train_embeddings false: change one.")
    changed += sum(parameter.numel() for parameter in own if parameter.requires_grad)
    share = changed / sum(parameter.numel() for parameter in own)
    LOG.info("Model %r: %d parameters are trained, %.1f %% of its weights change.", described.name, number, 100 * share)
    if settings["gradient_checkpointing"]:
        described.checkpoint_gradients()
    return outer, {"parameters": number, "share": round(share, 6)}


def parameter_groups(model: nn.Module, settings: dict[str, Any]) -> list[dict[str, Any]]:
    """Return optimizer groups: matrices decay; vectors and the B matrices of adapters do not (as in tokenkit).

    Projectors of losses have their own learning rate, `lr_scale` times that of the step.
    """
    groups: dict[tuple[bool, bool], list[nn.Parameter]] = {}
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            decays = parameter.dim() >= 2 and "lora_B" not in name
            groups.setdefault((decays, name.startswith("projectors.")), []).append(parameter)
    return [
        {
            "params": parameters,
            "weight_decay": settings["weight_decay"] if decays else 0.0,
            "lr_scale": settings["projector_lr_scale"] if projects else 1.0,
        }
        for (decays, projects), parameters in sorted(groups.items(), key=lambda item: (not item[0][0], item[0][1]))
    ]
