"""A teacher's embedding and output layer in a file of their own, for losses that read more than signals."""

from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import nn

from stages.vocabulary.blocks import Shape
from stages.vocabulary.head import Head, Side

FILE = "head.safetensors"


@torch.no_grad()
def save_side(side: Side, path: Path) -> dict[str, Any]:
    """Write the real rows of both matrices, as stored; return how the output layer makes logits, as JSON values."""
    shape = side.head.shape
    ids = torch.arange(shape.vocab, device=side.head.weight.device)
    tensors = {"weight": side.head.weight[: shape.vocab], "embedding": side.embed(ids)}
    if side.head.bias is not None:
        tensors["bias"] = side.head.bias[: shape.vocab]
    save_file({name: tensor.detach().cpu().clone().contiguous() for name, tensor in tensors.items()}, path)
    return {"vocab": shape.vocab, "scale": shape.scale, "softcap": shape.softcap}


def load_side(path: Path, facts: dict[str, Any], device: torch.device) -> Side:
    """Return what `save_side` wrote, float32 and frozen."""
    tensors = {name: tensor.to(device, torch.float32) for name, tensor in load_file(path).items()}
    rows, size = tensors["weight"].shape
    layer = nn.Linear(size, rows, bias="bias" in tensors, device=device)
    layer.load_state_dict({name: tensors[name] for name in ("weight", "bias") if name in tensors})
    head = Head(layer.requires_grad_(False), Shape(facts["vocab"], facts["scale"], facts["softcap"]))
    return Side(head, nn.Embedding.from_pretrained(tensors["embedding"], freeze=True))
