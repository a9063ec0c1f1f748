"""Small tokenizers of every family, made in a folder as Hugging Face saves them."""

import json
from functools import cache
from pathlib import Path
from tempfile import mkdtemp

from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers

from stages.tokenization import ByteView
from stages.tokenization.sources import prepare
from stages.tokenization.spec import TokenizerSpec
from stages.tokenization.training import train_tokenizer

TEXT = [
    "The old lighthouse keeper climbed the spiral stairs every evening, counting each of the hundred steps.",
    "def fibonacci(n):\n    if n < 2:\n        return n\n\treturn fibonacci(n - 1) + fibonacci(n - 2)\n\n",
    "user asked the assistant about the system  and   the answer was naïve: 北京, 日本 and café 🎉.",
    "Hello world, hello user! The user's system is the other's system; the rest of the text is the rest.\n",
] * 4
BYTES = [f"<0x{byte:02X}>" for byte in range(256)]
CHATML = (
    "{% for message in messages %}"
    "{{'<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>' + '\n'}}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)


def save(tokenizer, folder: Path | None = None, template: str | None = None, **config) -> Path:
    folder = folder or Path(mkdtemp())
    tokenizer.save(str(folder / "tokenizer.json"))
    (folder / "tokenizer_config.json").write_text(json.dumps(config))
    if template:
        (folder / "chat_template.jinja").write_text(template)
    return folder


def byte_level(specials=("<|endoftext|>", "<|im_start|>", "<|im_end|>"), prefix=False, size=400):
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=prefix)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    trainer = trainers.BpeTrainer(
        vocab_size=size, special_tokens=list(specials), initial_alphabet=alphabet, show_progress=False
    )
    tokenizer.train_from_iterator(TEXT, trainer)
    return tokenizer


def legacy_llama():
    tokenizer = Tokenizer(models.BPE(unk_token="<unk>", fuse_unk=True, byte_fallback=True))
    tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    words = Tokenizer(models.BPE(unk_token="<unk>", byte_fallback=True))
    words.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="never")
    trainer = trainers.BpeTrainer(vocab_size=520, special_tokens=["<unk>", "<s>", "</s>", *BYTES], show_progress=False)
    words.train_from_iterator(TEXT, trainer)
    trained = json.loads(words.to_str())
    definition = json.loads(tokenizer.to_str()) | {
        "model": trained["model"],
        "added_tokens": trained["added_tokens"][:3],
    }
    return Tokenizer.from_str(json.dumps(definition))


def gemma_like():
    """No dummy space, and whitespace runs as regular added tokens, some of them pieces of the model too."""
    definition = json.loads(legacy_llama().to_str())
    definition["normalizer"] = {"type": "Replace", "pattern": {"String": " "}, "content": "▁"}
    model = definition["model"]
    model["vocab"].setdefault("▁▁", len(model["vocab"]))
    model["merges"] = [["▁", "▁"], *(merge for merge in model["merges"] if merge != ["▁", "▁"])]
    tokenizer = Tokenizer.from_str(json.dumps(definition))
    tokenizer.add_tokens(["\n\n", "   ", "<think>", AddedToken("▁▁", normalized=False)])
    return tokenizer


def unigram():
    """Pieces and characters of TEXT; specials and bytes spelled out in a text are the dearest way to say it."""
    pieces = [(piece, -50.0) for piece in ("<unk>", "<s>", "</s>", *BYTES)]
    words = sorted({"▁" + word for text in TEXT for word in text.split(" ")} | {"▁", *"".join(TEXT)} - {" "})
    pieces += [(word, -3.0 - 0.1 * number / len(words) - 0.01 * len(word)) for number, word in enumerate(words)]
    tokenizer = Tokenizer(models.Unigram(pieces, unk_id=0, byte_fallback=True))
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first")
    tokenizer.add_special_tokens(["<unk>", "<s>", "</s>"])
    return tokenizer


def word_piece(pre_tokenizer):
    tokenizer = Tokenizer(models.WordPiece(unk_token="[UNK]"))
    tokenizer.pre_tokenizer = pre_tokenizer
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    special = ["[UNK]", "[CLS]", "[SEP]", "[PAD]"]
    trainer = trainers.WordPieceTrainer(
        vocab_size=900, special_tokens=special, initial_alphabet=alphabet, show_progress=False
    )
    tokenizer.train_from_iterator(TEXT, trainer)
    return tokenizer


def bert_uncased():
    tokenizer = word_piece(pre_tokenizers.BertPreTokenizer())
    tokenizer.normalizer = normalizers.BertNormalizer(lowercase=True)
    return tokenizer


def trained(kind: str, size: int = 600):
    prepared = train_tokenizer({"kind": kind, "vocab_size": size}, lambda: iter(TEXT), kind)
    return ByteView.of(prepared, Path(kind))


@cache
def views():
    """Return a ByteView of every family, by name."""
    plain = {"bos_token": "<s>", "eos_token": "</s>"}
    chatml = {"eos_token": "<|endoftext|>", "extra_special_tokens": ["<|im_start|>", "<|im_end|>"]}
    qwen = save(byte_level(), template=CHATML, **chatml)
    qwen3 = save(byte_level(size=500), template=CHATML, bos_token="<|im_start|>", **chatml)
    return {
        "qwen": ByteView.load(qwen),
        "qwen3": ByteView.load(qwen3),
        "gpt2": ByteView.load(save(byte_level(("<|endoftext|>",), size=300), eos_token="<|endoftext|>")),
        "prefixed": ByteView.load(save(byte_level(("<|endoftext|>",), prefix=True), eos_token="<|endoftext|>")),
        "llama3": ByteView.of(prepare(qwen, TokenizerSpec("llama3", "Qwen2", "Llama3")), qwen),
        "bytes": ByteView.of(prepare(qwen, TokenizerSpec("bytes", "Qwen2", None, "byte")), qwen),
        "spaced": ByteView.of(prepare(qwen, TokenizerSpec("spaced", None, None, "manual_add_prefix_space")), qwen),
        "legacy": ByteView.load(save(legacy_llama(), **plain)),
        "gemma": ByteView.load(save(gemma_like(), **plain)),
        "bpe": trained("byte_bpe", 320),
        "sentencepiece": trained("sentencepiece_bpe"),
        "unigram": ByteView.load(save(unigram(), **plain)),
        "wordpiece": ByteView.load(
            save(word_piece(pre_tokenizers.ByteLevel(add_prefix_space=False)), unk_token="[UNK]", eos_token="[SEP]")
        ),
    }


def chat(*turns):
    """Return slots of a chat given as (role, text), answers trained."""
    return [{"role": role, "text": text, "loss": role == "assistant"} for role, text in turns]


def plain(text):
    return [{"role": "text", "text": text, "loss": True}]
