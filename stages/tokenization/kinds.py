"""Model kinds that a tokenizer spec may name: special tokens, chat pieces and byte function.

The table is that of tokenkit's `model_kinds.py`. Pieces are ordinary strings here: each may be any number of tokens.
"""

from dataclasses import dataclass, field
from difflib import get_close_matches

from stages.core.errors import UserError


@dataclass(frozen=True)
class Kind:
    """One model kind. `header` holds "{role}" where the role's name goes; "" means that turns have no header."""

    byte_function: str
    specials: tuple[str, ...]
    eos: str
    pad: str
    bos: str | None = None
    header: str = ""
    end_of_turn: str = ""
    role_names: dict[str, str] = field(default_factory=dict)

    def headers(self) -> dict[str, str]:
        """Return the literal text before the content of a turn, by role."""
        names = {"system": "system", "user": "user", "assistant": "assistant"} | self.role_names
        return {role: self.header.replace("{role}", name) for role, name in names.items()}


_CHATML = {
    "byte_function": "byte_level",
    "specials": ("<|im_start|>", "<|im_end|>", "<|endoftext|>"),
    "eos": "<|endoftext|>",
    "pad": "<|endoftext|>",
    "header": "<|im_start|>{role}\n",
    "end_of_turn": "<|im_end|>\n",
}
_GEMMA = Kind(
    byte_function="sentencepiece",
    specials=("<bos>", "<start_of_turn>", "<end_of_turn>", "<eos>", "<pad>"),
    bos="<bos>",
    eos="<eos>",
    pad="<pad>",
    header="<start_of_turn>{role}\n",
    end_of_turn="<end_of_turn>\n",
    role_names={"system": "user", "assistant": "model"},
)
KINDS: dict[str, Kind] = {
    "Qwen2": Kind(**_CHATML),
    "Qwen3": Kind(**_CHATML, bos="<|endoftext|>"),
    "Llama3": Kind(
        byte_function="byte_level",
        specials=("<|begin_of_text|>", "<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>", "<|end_of_text|>"),
        bos="<|begin_of_text|>",
        eos="<|eot_id|>",
        pad="<|end_of_text|>",
        header="<|start_header_id|>{role}<|end_header_id|>\n\n",
        end_of_turn="<|eot_id|>",
    ),
    "Gemma2": _GEMMA,
    "Gemma3": _GEMMA,
    "Phi3": Kind(
        byte_function="byte_level",
        specials=("<|user|>", "<|assistant|>", "<|end|>", "<|endoftext|>"),
        eos="<|endoftext|>",
        pad="<|endoftext|>",
        header="{role}\n",
        end_of_turn="<|end|>\n",
        role_names={"system": "<|user|>", "user": "<|user|>", "assistant": "<|assistant|>"},
    ),
    "GPT2": Kind(
        byte_function="byte_level",
        specials=("<|endoftext|>",),
        eos="<|endoftext|>",
        pad="<|endoftext|>",
        end_of_turn="<|endoftext|>",
    ),
    "TinyLlama": Kind(
        byte_function="sentencepiece",
        specials=("<s>", "</s>", "<unk>"),
        bos="<s>",
        eos="</s>",
        pad="</s>",
        end_of_turn="</s>",
    ),
    "Mistral": Kind(
        byte_function="byte_level",
        specials=("<s>", "</s>", "<unk>"),
        bos="<s>",
        eos="</s>",
        pad="</s>",
        end_of_turn="</s>",
    ),
}


def kind_named(name: str, spec: str) -> Kind:
    """Return the kind called `name`; UserError with the nearest known one, naming the tokenizer spec."""
    if name not in KINDS:
        near = get_close_matches(name, KINDS, 1, 0.5)
        hint = f", did you mean {near[0]}?" if near else "."
        raise UserError(f"Tokenizer {spec}: unknown model kind {name}; known are {', '.join(KINDS)}{hint}")
    return KINDS[name]
