"""Tiny tokenizers, models, corpora and artifacts for unit tests; no network."""

import json
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq

from stages.artifacts.schemas import EXAMPLES
from stages.core import artifact, specs

WORDS = """the model reads text and gives every token a probability . naïve café 日本語 tokens are bytes , the teacher
and the student see the same bytes even where their vocabularies differ . a list holds items , a dict maps keys to
values . strings are immutable sequences of code points and methods return new strings . loops repeat a block of
statements"""
WORDS = WORDS.split()


def text(start: int, words: int) -> str:
    """A text of so many words, different for each start."""
    return " ".join(WORDS[(start * 7 + i * (1 + start % 5)) % len(WORDS)] for i in range(words))


def publish(manifest: Path, stage: str, files: dict[str, bytes | Path], spec: dict | None = None) -> dict:
    """An artifact with the given files, as a stage would publish it; its opened manifest."""
    full = {"inputs": {}} | (spec or {})
    lineage = specs.lineage(specs.canonical(full), "0")
    with artifact.publish(manifest, stage=stage, spec=full, code="0", lineage=lineage, inputs={}) as draft:
        for name, content in files.items():
            (draft.folder / name).write_bytes(content if isinstance(content, bytes) else content.read_bytes())
    return artifact.read_manifest(manifest)


def argv(root: Path, manifest: str, spec: dict) -> list[str]:
    """The command line of a stage."""
    return ["--root", str(root), "--manifest", manifest, "--spec", json.dumps(spec)]


def entry(manifest: str) -> dict:
    return {"manifest": manifest}


def bpe(folder: Path, vocab_size: int, specials: tuple[str, ...] = ("<s>", "</s>", "<pad>")):
    """Train a byte-level BPE tokenizer on WORDS; write the two files transformers reads."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=list(specials),
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator([text(i, 120) for i in range(20)], trainer)
    folder.mkdir(parents=True, exist_ok=True)
    tokenizer.save(str(folder / "tokenizer.json"))
    config = {"tokenizer_class": "PreTrainedTokenizerFast", "bos_token": specials[0], "eos_token": specials[1]}
    if len(specials) > 2:
        config["pad_token"] = specials[2]
    (folder / "tokenizer_config.json").write_text(json.dumps(config))
    return tokenizer


def tokenizer_artifact(root: Path, name: str, vocab_size: int, **options) -> str:
    """A tokenizer artifact like that of stages.tokenizer; its manifest's path."""
    from stages.artifacts.schemas import TOKENS
    from stages.tokenization import ByteView

    source = root.parent / f"source-{name}"
    bpe(source, vocab_size, **options)
    view = ByteView.load(source)
    rows = [
        {
            "id": i,
            "bytes": content,
            "text": "" if content is None else content.decode(errors="replace"),
            "role": view.role_of.get(i),
        }
        for i, content in enumerate(view.token_bytes)
    ]
    sink = pa.BufferOutputStream()
    pq.write_table(pa.Table.from_pylist(rows, schema=TOKENS), sink)
    files = {path.name: path for path in source.iterdir()} | {"tokens.parquet": sink.getvalue().to_pybytes()}
    manifest = f"tokenizers/{name}/manifest.json"
    publish(root / manifest, "tokenizer", files)
    return manifest


def llama(
    folder: Path,
    vocab_size: int,
    seed: int = 0,
    tied: bool = False,
    kind: str = "llama",
    dtype: str = "float32",
    positions: int = 512,
    layers: int = 2,
):
    """Write a tiny random causal language model; return it."""
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    torch.manual_seed(seed)
    config = AutoConfig.for_model(
        kind,
        vocab_size=vocab_size,
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=layers,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=8,
        max_position_embeddings=positions,
        tie_word_embeddings=tied,
        bos_token_id=0,
        eos_token_id=1,
        pad_token_id=2,
    )
    model = AutoModelForCausalLM.from_config(config, dtype=getattr(torch, dtype))
    model.save_pretrained(folder)
    return model


def corpus_artifact(root: Path, name: str, documents: int = 6, examples: int = 2, words: int = 60) -> str:
    """A corpus artifact whose splits hold plain-text examples; its manifest's path."""
    files = {}
    for split, shift in (("train", 0), ("heldout", 1000)):
        rows = []
        for document in range(documents):
            for index in range(examples):
                content = text(shift + document * 13 + index, words) + ("" if index == examples - 1 else " ")
                slot = {"role": "text", "text": content, "loss": True}
                rows.append(
                    {
                        "example_id": f"{split}{document}:{index}",
                        "document_id": f"{split}{document}",
                        "slots": [slot],
                        "starts_document": index == 0,
                        "ends_document": index == examples - 1,
                        "bytes": len(content.encode()),
                    }
                )
        sink = pa.BufferOutputStream()
        pq.write_table(pa.Table.from_pylist(rows, schema=EXAMPLES), sink)
        files[f"{split}.parquet"] = sink.getvalue().to_pybytes()
    manifest = f"corpora/{name}/manifest.json"
    publish(root / manifest, "corpus", files)
    return manifest
