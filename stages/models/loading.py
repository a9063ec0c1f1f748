"""Open a causal language model."""

from pathlib import Path
from typing import Any

import torch
from huggingface_hub.errors import StrictDataclassError
from safetensors import SafetensorError
from transformers import AutoModelForCausalLM, PreTrainedModel

from stages.core.errors import UserError


def load_model(
    model: dict[str, Any], artifact: dict[str, Any] | None, dtype: torch.dtype | None = None
) -> PreTrainedModel:
    """Load the model that a spec's "model" describes, or the artifact (opened manifest) that stands for it, on the CPU.

    In the type that its `dtype` in the config names; where that is auto, in `dtype`, and None keeps the stored type.
    Only safetensors are read. UserError when it is not there, is damaged, is no causal language model, or lacks
    weights.
    """
    name = model["name"]
    place = str(artifact["path"].parent) if artifact else model.get("path")
    if not place:
        raise UserError(f"Model {name!r} has neither a path nor an artifact: give it a `path` in the config.")
    if place.startswith(("/", "~", ".")) or Path(place).is_dir():
        place = str(Path(place).expanduser())
        _refuse_folder(name, Path(place))
    options: dict[str, Any] = {"trust_remote_code": bool(model.get("trust_remote_code"))}
    if not artifact:
        options["revision"] = model.get("revision")
    if model.get("attn_implementation"):
        options["attn_implementation"] = model["attn_implementation"]
    try:
        loaded, info = AutoModelForCausalLM.from_pretrained(
            place,
            dtype=_own_dtype(model) or dtype or "auto",
            output_loading_info=True,
            use_safetensors=True,
            ignore_mismatched_sizes=True,  # refused below, by name
            **options,
        )
    except SafetensorError as error:
        raise UserError(
            f"Model {name!r} cannot be loaded from {place}: its weights are damaged or cut off ({error}); "
            "fetch or build it again."
        ) from None
    except Exception as error:  # whatever the code of a model type raises
        lines = [line.strip() for line in str(error).splitlines() if line.strip()] or [type(error).__name__]
        first = (" ".join(lines) if isinstance(error, StrictDataclassError) else lines[0]).rstrip(".")
        raise UserError(
            f"Model {name!r} cannot be loaded from {place} ({first}): correct `models.{name}` in the config."
        ) from None
    if info["missing_keys"]:
        some = ", ".join(sorted(info["missing_keys"])[:3])
        raise UserError(
            f"Model {name!r}: the weights in {place} lack {some}; the folder is incomplete or no causal language model."
        )
    if info["mismatched_keys"]:
        key, stored, expected = sorted(info["mismatched_keys"])[0]
        raise UserError(
            f"Model {name!r}: in the weights of {place} {key} is {tuple(stored)} where config.json says "
            f"{tuple(expected)}; give the weights the config.json they were saved with."
        )
    return loaded


def _own_dtype(model: dict[str, Any]) -> torch.dtype | None:
    """Return the type that the config gives this model, None for auto."""
    setting = model.get("dtype") or "auto"
    return None if setting == "auto" else getattr(torch, setting)


def teacher_dtype(setting: str, device: torch.device) -> torch.dtype:
    """Return the type a teacher runs in: "auto" is bfloat16 on a GPU and float32 on a CPU."""
    if setting == "auto":
        return torch.bfloat16 if device.type == "cuda" else torch.float32
    return {"float32": torch.float32, "bfloat16": torch.bfloat16}[setting]


def _refuse_folder(name: str, folder: Path) -> None:
    """Refuse a local folder that is no model, or whose weights are pickles: to open one is to run it."""
    if not folder.is_dir():
        raise UserError(f"Model {name!r} cannot be loaded from {folder}: there is no such folder; correct its path.")
    if not (folder / "config.json").is_file():
        raise UserError(
            f"Model {name!r} cannot be loaded from {folder}: there is no config.json; give the folder of a saved model."
        )
    if any(folder.glob("*.safetensors")):
        return
    pickles = sorted(path.name for pattern in ("*.bin", "*.pt", "*.pth") for path in folder.glob(pattern))
    found = f"its weights are pickles ({pickles[0]}), which are never opened" if pickles else "it has no weights"
    raise UserError(
        f"Model {name!r} cannot be loaded from {folder}: {found}; save it with save_pretrained as safetensors."
    )
