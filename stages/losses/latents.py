"""Hidden states of student and teacher brought together at chunk ends (tokenkit's `alm_latents`).

At the last token of a chunk both models have read the same bytes. The distance of their states there is an L2 or L1
one, relative to the teacher's own size: the mean square (or absolute value) of its states over all compared chunks,
of each channel or of all together. That mean is over the optimizer step (`Prepared.totals`), as in a reference that
sees the whole batch at once, so splitting a batch changes nothing.

With `latents_to_align` all_hidden_states the student may have n layers more than the teacher: as with tokenkit's prefix
layers, state i of the teacher is compared with state i + n of the student, the teacher's embedding (state 0) with the
output of the student's layer n, and the last with the last. States 0 to n - 1 of the student are free.

tokenkit differs in this: it ignores loss masks, here chunks outside what is trained do not count; and it has a third
choice of `latents_to_align`, qkv, which its own models refuse to give and which is not supported here.
"""

from typing import TYPE_CHECKING, Any, NoReturn

import numpy as np
import torch
from torch import nn

from stages.core.errors import UserError
from stages.losses import Needs, Prepared
from stages.losses.chunks import merge_chunks
from stages.losses.projectors import linear
from stages.signals.schema import to_float32

if TYPE_CHECKING:
    from stages.losses.examples import Examples
    from stages.vocabulary.head import Sides

EPSILON = 1e-8
DEFAULTS: dict[str, Any] = {
    "latents_to_align": "last_hidden_state",
    "latents_normalization": "l2_channelwise",
    "latents_chunks": "naive",
    "latents_do_project": False,
}
COLUMNS = {"last_hidden_state": "hidden", "all_hidden_states": "hidden_states"}
EXPONENTS = {"l2": 2, "l1": 1, "l2_channelwise": 2, "l1_channelwise": 1}
CHUNKS = {"naive": "unconstrained", "space": "space"}


def check(options: dict[str, Any]) -> None:
    """Raise UserError for a setting that this loss does not know, or a projector for more than the last layer."""
    options = DEFAULTS | options
    for key, known in (
        ("latents_to_align", COLUMNS),
        ("latents_normalization", EXPONENTS),
        ("latents_chunks", CHUNKS),
    ):
        if options[key] not in known:
            raise UserError(f"{key} is {options[key]!r}; it must be one of {', '.join(known)}.")
    if options["latents_do_project"] and options["latents_to_align"] == "all_hidden_states":
        raise UserError(
            "latents_do_project goes with latents_to_align last_hidden_state, not all_hidden_states: change one."
        )


def needs(options: dict[str, Any]) -> Needs:
    """Return the states of the last layer or of all; the teacher's matrices where its sizes must be known."""
    options = DEFAULTS | options
    column = frozenset({COLUMNS[options["latents_to_align"]]})
    sizes = options["latents_do_project"] or options["latents_to_align"] == "all_hidden_states"
    return Needs(column, column, teacher_head=sizes)


def projectors(options: dict[str, Any], sides: "Sides", generator: torch.Generator, pair: Any) -> nn.Module:
    """Return the layer from the student's size to the teacher's; without `latents_do_project`, nothing to train."""
    sizes = [side.head.weight.shape[1] for side in sides if side is not None]
    if (DEFAULTS | options)["latents_do_project"]:
        return linear(*sizes, generator)
    if len(set(sizes)) > 1:
        refuse_sizes(options, *sizes)
    return nn.Identity()


def prepare(examples: "Examples", options: dict[str, Any]) -> Prepared:
    """Return the teacher's states at chunk ends and their summed size; the count is the number of chunks."""
    options = DEFAULTS | options
    chunks = merge_chunks(*examples.chunks(CHUNKS[options["latents_chunks"]]))
    states = to_float32(examples.signals[COLUMNS[options["latents_to_align"]]][chunks.teacher_end])
    power = (np.abs(states, dtype=np.float64) ** EXPONENTS[options["latents_normalization"]]).sum(0)
    count = float(len(states))
    arrays = {"teacher": states, "rows": chunks.student_end, "power": power, "chunks": np.array(count)}
    return Prepared(count, np.zeros(0, np.int64), arrays, totals=("power", "chunks"))


def loss(
    student: dict[str, Any], arrays: dict[str, torch.Tensor], options: dict[str, Any]
) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    """Return the distances summed over chunks, in units of the teacher's size."""
    options = DEFAULTS | options
    states = student[COLUMNS[options["latents_to_align"]]].index_select(0, arrays["rows"]).float()
    states = student["projectors"](states)
    if states.dim() == 2:
        states = states[:, None]
    states = last_layers(states, arrays["teacher"].shape[1], student["sides"], options)
    teacher = arrays["teacher"].view(states.shape)
    power = arrays["power"].view(states.shape[1:])
    return latent_distance(states, teacher, power, arrays["chunks"], options["latents_normalization"]).sum(), {}


def latent_distance(
    student: torch.Tensor, teacher: torch.Tensor, power: torch.Tensor, chunks: torch.Tensor, normalization: str
) -> torch.Tensor:
    """Return [C]: the distance of each chunk's states [C, layers, d], averaged over channels and layers.

    `power` [layers, d]: the teacher's states to the exponent of `normalization`, summed over `chunks` chunks.
    """
    exponent = EXPONENTS[normalization]
    size = power / chunks.clamp(min=1)
    if not normalization.endswith("_channelwise"):
        size = size.mean(-1, keepdim=True)
    distance = (student - teacher).abs() ** exponent / (size + EPSILON).to(student.dtype)
    return distance.mean((-2, -1))


def last_layers(states: torch.Tensor, width: int, sides: "Sides", options: dict[str, Any]) -> torch.Tensor:
    """Return of the student's states [C, layers, d] the last ones, as many as the teacher has.

    `width`: how many numbers the teacher's states have per token. UserError unless both are of one size and the student
    has no fewer layers.
    """
    size = states.shape[2]
    teacher_size = sides.teacher.head.weight.shape[1] if sides.teacher else width
    if size != teacher_size:
        refuse_sizes(options, size, teacher_size)
    number = width // teacher_size
    if number > states.shape[1]:
        raise UserError(
            "alm_latents with latents_to_align all_hidden_states needs a student with at least the teacher's layers, "
            f"but the teacher has {number - 1}, the student {states.shape[1] - 1}: align last_hidden_state."
        )
    return states[:, -number:]


def refuse_sizes(options: dict[str, Any], size: int, teacher_size: int) -> NoReturn:
    """Raise UserError about states that have different sizes and no layer between them."""
    every = (DEFAULTS | options)["latents_to_align"] == "all_hidden_states"
    remedy = "align last_hidden_state with latents_do_project: true" if every else "set latents_do_project: true"
    raise UserError(
        f"alm_latents compares hidden states of {teacher_size} numbers (teacher) and {size} (student): {remedy}."
    )
