"""Which special token of one tokenizer stands for one of another: its role decides, then its text, then a stand-in.

A special can have several roles. What it says of turns comes first: Llama 3's `<|eot_id|>`, both eos and end of turn,
stands for ChatML's `<|im_end|>` and not for the `<|endoftext|>` of its documents. Where the template marks no turns (of
GPT-2, say) the eos closes them for want of anything else; that is no end of turn of its own.
"""

from collections.abc import Callable
from typing import TYPE_CHECKING

from stages.tokenization.turns import PLAIN_ROLES

if TYPE_CHECKING:
    from stages.tokenization.view import ByteView

# Roles in the order in which a special with several of them is matched, and what may stand in for a missing one.
STAND_INS = {
    "end_of_turn": ("eos",),
    "eos": ("end_of_turn", "bos"),
    "bos": ("eos",),
    "pad": ("eos", "bos"),
    "unk": (),
    "header": (),
    "end_header": (),
}


def own_roles(view: "ByteView") -> dict[str, int]:
    """Return role -> special id, without the end of turn of a tokenizer whose template marks no turns."""
    marked = any(turn.header for turn in view.chat_pieces(PLAIN_ROLES).turns)
    borrowed = not marked and view.roles.get("end_of_turn") == view.roles.get("eos")
    return {role: index for role, index in view.roles.items() if not (borrowed and role == "end_of_turn")}


def counterpart(
    index: int, text: str, roles: dict[str, int], others: dict[str, int], written: Callable[[str], int | None]
) -> int | None:
    """Return the special that stands for special `index`, written `text`; None where there is none.

    `roles` are the `own_roles` of its tokenizer, `others` those of the other; `written` finds a special of the other by
    its text.
    """
    own = [role for role in STAND_INS if roles.get(role) == index]
    candidates = [others.get(role) for role in own]
    candidates.append(written(text))
    candidates += [others.get(other) for role in own for other in STAND_INS[role]]
    return next((found for found in candidates if found is not None), None)
