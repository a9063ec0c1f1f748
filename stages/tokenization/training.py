"""Train small tokenizers that lose no byte: byte-level BPE, and BPE with SentencePiece's conventions."""

import json
from collections import Counter
from collections.abc import Callable, Iterator
from itertools import chain
from typing import Any

from stages.core.errors import UserError
from stages.tokenization.definition import Definition, make_exact
from stages.tokenization.sources import Prepared, settle
from stages.tokenization.spec import TokenizerSpec

Texts = Callable[[], Iterator[str]]
TRAINED_KINDS = ("byte_bpe", "sentencepiece_bpe")
END_OF_TEXT = "<|endoftext|>"
_SENTENCEPIECE_SPECIALS = ("<unk>", "<s>", "</s>")
_BYTES = tuple(f"<0x{byte:02X}>" for byte in range(256))


def train_tokenizer(spec: dict[str, Any], texts: Texts, name: str) -> Prepared:
    """Train on `texts()`; `spec` holds kind (one of TRAINED_KINDS), vocab_size and optionally special (more of them).

    The result is deterministic. UserError for an unknown kind, or a vocabulary smaller than its bytes and specials.
    """
    kind, size, special = spec["kind"], spec["vocab_size"], list(spec.get("special") or [])
    if kind not in TRAINED_KINDS:
        raise UserError(f"Tokenizer {name}: unknown kind {kind!r} to train; known are {', '.join(TRAINED_KINDS)}.")
    own = [END_OF_TEXT] if kind == "byte_bpe" else list(_SENTENCEPIECE_SPECIALS)
    special = own + [content for content in special if content not in own]
    if size < 256 + len(special):
        raise UserError(
            f"Tokenizer {name}: vocab_size {size} does not hold 256 bytes and {len(special)} special tokens; "
            f"make it {256 + len(special)} or more."
        )
    tokenizer = (_byte_bpe if kind == "byte_bpe" else _sentencepiece_bpe)(texts, size, special)
    make_exact(tokenizer)
    if kind == "byte_bpe":
        named = {"bos": END_OF_TEXT, "eos": END_OF_TEXT, "pad": END_OF_TEXT}
    else:
        named = {"bos": "<s>", "eos": "</s>", "pad": "</s>", "unk": "<unk>"}
    return settle(Definition(name, tokenizer, named), TokenizerSpec(name), None)


def _byte_bpe(texts: Texts, size: int, special: list[str]) -> dict[str, Any]:
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    trainer = trainers.BpeTrainer(
        vocab_size=size, special_tokens=special, initial_alphabet=alphabet, show_progress=False
    )
    tokenizer.train_from_iterator(texts(), trainer)
    return json.loads(tokenizer.to_str())


def _sentencepiece_bpe(texts: Texts, size: int, special: list[str]) -> dict[str, Any]:
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

    tokenizer = Tokenizer(models.BPE(unk_token="<unk>", fuse_unk=True, byte_fallback=True))
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first", split=True)
    tokenizer.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    # Rare characters stay bytes: an alphabet of every character seen would eat a small vocabulary. It is chosen here
    # because the trainer breaks ties between equally rare characters at random.
    counts = Counter(chain.from_iterable(texts()))
    room = max(1, (size - 256 - len(special)) // 4)
    alphabet = sorted({"▁", *sorted(counts.keys() - {" "}, key=lambda c: (-counts[c], c))[: room - 1]})
    trainer = trainers.BpeTrainer(
        vocab_size=size,
        special_tokens=[*special, *_BYTES],
        initial_alphabet=alphabet,
        limit_alphabet=len(alphabet),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts(), trainer)
    trained = json.loads(tokenizer.to_str())
    # The trainer takes the byte pieces only as special tokens; they are ordinary vocabulary.
    trained["added_tokens"] = [token for token in trained["added_tokens"] if token["content"] not in _BYTES]
    return trained
