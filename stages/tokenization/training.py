"""Train small tokenizers that lose no byte: byte-level BPE, and BPE or Unigram with SentencePiece's conventions."""

import json
import math
from collections import Counter
from collections.abc import Callable, Iterator
from itertools import chain, islice
from typing import Any

from stages.core.errors import UserError
from stages.tokenization.definition import Definition, make_exact
from stages.tokenization.sources import Prepared, settle
from stages.tokenization.spec import TokenizerSpec

Texts = Callable[[], Iterator[str]]
TRAINED_KINDS = ("byte_bpe", "sentencepiece_bpe", "unigram")
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
    train = {"byte_bpe": _byte_bpe, "sentencepiece_bpe": _sentencepiece_bpe, "unigram": _unigram}[kind]
    tokenizer = train(texts, size, special)
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
    from tokenizers import models, trainers

    tokenizer = _sentencepiece(models.BPE(unk_token="<unk>", fuse_unk=True, byte_fallback=True))
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


def _unigram(texts: Texts, size: int, special: list[str]) -> dict[str, Any]:
    """Train a Unigram vocabulary: pieces of a larger BPE vocabulary, scored and pruned by how often they are used.

    Hard EM over whole counts, as the library's own trainer sums floats in random order and never gives the same twice.
    """
    seed = _sentencepiece_bpe(texts, 4 * size, special)
    literal = [*special, *_BYTES]
    pieces = [piece for piece in seed["model"]["vocab"] if piece not in set(literal)]
    counts = Counter(dict.fromkeys(pieces, 1))
    goal = size - len(literal)
    scored = _unigram_json(seed, literal, counts)
    while True:
        counts = _usage(scored, texts, counts)
        if len(counts) <= goal:
            return _unigram_json(seed, literal, counts)
        keep = max(goal, int(0.7 * len(counts)))
        ranked = sorted(counts, key=lambda piece: (len(piece) > 1, -counts[piece], piece))
        counts = Counter({piece: counts[piece] for piece in ranked[:keep]})
        scored = _unigram_json(seed, literal, counts)


def _usage(tokenizer: dict[str, Any], texts: Texts, pieces: Counter[str]) -> Counter[str]:
    """Return how often each of `pieces` is used to write the texts."""
    from tokenizers import Tokenizer

    built = Tokenizer.from_str(json.dumps(tokenizer))
    used: Counter[int] = Counter()
    stream = texts()
    while batch := list(islice(stream, 1000)):
        for encoding in built.encode_batch_fast(batch, add_special_tokens=False):
            used.update(encoding.ids)
    return Counter({piece: used[built.token_to_id(piece)] for piece in pieces})


def _unigram_json(seed: dict[str, Any], literal: list[str], counts: Counter[str]) -> dict[str, Any]:
    total = sum(counts.values()) + len(counts)
    scores = {piece: round(math.log((count + 0.5) / total), 6) for piece, count in counts.items()}
    # Only text spells pieces: a special or `<0xNN>` written out in a text must be the dearest way to say it.
    dearest = min(scores.values()) - 100.0
    ranked = sorted(scores.items(), key=lambda item: (-item[1], item[0]))
    vocabulary = [[piece, dearest] for piece in literal] + [[piece, score] for piece, score in ranked]
    return seed | {"model": {"type": "Unigram", "unk_id": 0, "byte_fallback": True, "vocab": vocabulary}}


def _sentencepiece(model: Any) -> Any:
    from tokenizers import Tokenizer, decoders, pre_tokenizers

    tokenizer = Tokenizer(model)
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first", split=True)
    tokenizer.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    return tokenizer
