"""The shapes of models as far as the config and model folders tell them, so that what cannot work is refused at once.

What they do not tell is refused where the models are open (`stages.losses`).
"""

import json
from pathlib import Path
from typing import Any, NamedTuple

from stages.core.errors import UserError


class Shape(NamedTuple):
    """The number of layers of a model, and the size of its hidden states."""

    layers: int
    size: int


def shape_of(model: dict[str, Any]) -> Shape | None:
    """Return the shape of a model of the config: of its recipe, or of a local folder's config.json; else None."""
    if "pretrain" in model:
        described = model["pretrain"]["architecture"]
    else:
        try:
            described = json.loads((Path(model["path"]).expanduser() / "config.json").read_text(encoding="utf-8"))
        except (OSError, ValueError):
            return None
        described = described.get("text_config", described)
    layers, size = described.get("num_hidden_layers"), described.get("hidden_size")
    return Shape(layers, size) if isinstance(layers, int) and isinstance(size, int) else None


def check_latents(where: str, entry: dict[str, Any], models: dict[str, Any]) -> None:
    """Refuse an experiment with alm_latents whose student has other hidden states than its teacher, or fewer."""
    if "alm_latents" not in entry["losses"] or entry["latents_do_project"]:
        return
    student, teacher = (shape_of(models[entry[side]]) for side in ("student", "teacher"))
    if student is None or teacher is None:
        return
    every = entry["latents_to_align"] == "all_hidden_states"
    found = f"the teacher `{entry['teacher']}` has {{}}, the student `{entry['student']}` {{}}"
    if student.size != teacher.size:
        remedy = "align last_hidden_state with latents_do_project" if every else "set latents_do_project"
        raise UserError(
            f"Config: `{where}`: alm_latents compares hidden states of one size, but "
            f"{found.format(teacher.size, student.size)}; {remedy}: true."
        )
    if every and student.layers < teacher.layers:
        raise UserError(
            f"Config: `{where}.latents_to_align`: all_hidden_states needs a student with at least the teacher's "
            f"layers, but {found.format(teacher.layers, student.layers)}; align last_hidden_state."
        )
