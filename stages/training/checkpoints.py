"""Checkpoints of a running training: safetensors and JSON, whole or not at all."""

import json
import os
import shutil
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file

from stages.core.errors import UserError

PREFIX = "step-"


def latest(folder: Path) -> Path | None:
    """Return the newest complete checkpoint in `folder`, None when there is none."""
    found = [path for path in folder.glob(f"{PREFIX}*") if path.is_dir() and path.suffix != ".partial"]
    return max(found, key=lambda path: int(path.name.removeprefix(PREFIX)), default=None)


def save(folder: Path, step: int, tensors: dict[str, torch.Tensor], state: dict[str, Any]) -> None:
    """Write the checkpoint of `step` and remove older ones. `state` is JSON; `tensors` are copied to the CPU."""
    partial = folder / f"{PREFIX}{step:08d}.partial"
    partial.mkdir(parents=True, exist_ok=True)
    # Two names of one storage, as of tied weights, are written twice: safetensors refuses shared memory.
    save_file(
        {name: value.detach().cpu().clone().contiguous() for name, value in tensors.items()},
        partial / "state.safetensors",
    )
    (partial / "state.json").write_text(json.dumps(state, allow_nan=False), encoding="utf-8")
    for path in partial.iterdir():
        with open(path, "rb") as stream:
            os.fsync(stream.fileno())
    final = folder / f"{PREFIX}{step:08d}"
    shutil.rmtree(final, ignore_errors=True)
    os.replace(partial, final)
    for path in folder.glob(f"{PREFIX}*"):
        if path != final and path.is_dir():
            shutil.rmtree(path, ignore_errors=True)


def load(checkpoint: Path) -> tuple[dict[str, torch.Tensor], dict[str, Any]]:
    """Return (tensors, state) of a checkpoint; UserError when it cannot be read."""
    try:
        state = json.loads((checkpoint / "state.json").read_text(encoding="utf-8"))
        return load_file(checkpoint / "state.safetensors"), state
    except Exception as error:
        raise UserError(f"The checkpoint {checkpoint} cannot be read ({error}): remove it and run again.") from None


def optimizer_tensors(
    optimizer: torch.optim.Optimizer, names: dict[torch.nn.Parameter, str]
) -> dict[str, torch.Tensor]:
    """Return the optimizer's state as "optimizer/<parameter>/<key>" -> tensor; `names` names the parameters."""
    return {
        f"optimizer/{names[parameter]}/{key}": torch.as_tensor(value)
        for parameter, entry in optimizer.state.items()
        for key, value in entry.items()
    }


def restore_optimizer(
    optimizer: torch.optim.Optimizer, names: dict[torch.nn.Parameter, str], tensors: dict[str, torch.Tensor]
) -> None:
    """Put the tensors of `optimizer_tensors` back."""
    by_name = {name: parameter for parameter, name in names.items()}
    for full, value in tensors.items():
        kind, _, rest = full.partition("/")
        if kind == "optimizer":
            name, _, key = rest.rpartition("/")
            parameter = by_name[name]
            # The step count of AdamW stays on the CPU, as it is when first made.
            target = value if key == "step" else value.to(parameter.device)
            optimizer.state[parameter][key] = target
