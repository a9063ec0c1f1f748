"""Alignment and the collate path on real text with real tokenizers, on one core."""

import json
import os

from tests.benchmarks.measure import missing, row, seconds

EXAMPLES = 2000
BATCH = 64
NEEDED = ("gsm8k_train.jsonl",)
TOKENIZERS = ("qwen1.5", "gpt2")


def measure(arguments) -> list[dict]:
    """Alignment in tokens/s, and the collate path as a share of the two bare tokenizations."""
    if missing("alignment", arguments, TOKENIZERS, NEEDED):
        return []
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    from tokenizers import Tokenizer

    from stages.alignment import align
    from stages.alignment.pair import Pair
    from stages.tokenization import ByteView
    from stages.training.data import Collator

    table = corpus(arguments.data / "gsm8k_train.jsonl", EXAMPLES)
    slots, ends = table["slots"].to_pylist(), table["ends_document"].to_pylist()
    texts = [example[0]["text"] for example in slots]
    folders = [arguments.tokenizers / name for name in TOKENIZERS]
    teacher, student = (ByteView.load(folder) for folder in folders)
    bare = [Tokenizer.from_file(str(folder / "tokenizer.json")) for folder in folders]
    encoded = [view.encode_examples(slots, ends) for view in (teacher, student)]
    tokens = sum(len(batch.ids) for batch in encoded)
    batches = EXAMPLES // BATCH
    options = {"batch_size": BATCH, "max_tokens": 8192, "seed": 0}
    prepare = lambda examples: [examples.chunks("unconstrained")]  # noqa: E731
    collator = Collator(table, student, Pair(teacher, student), None, prepare, **options)

    def encode_and_align():
        align(teacher.encode_examples(slots, ends), student.encode_examples(slots, ends))

    def collate():
        for step in range(batches):
            collator(step)

    def tokenize():
        for start in range(0, batches * BATCH, BATCH):
            for tokenizer in bare:
                part = texts[start : start + BATCH]
                [item.ids for item in tokenizer.encode_batch_fast(part, add_special_tokens=False)]

    results = []
    for kind in ("unconstrained", "space", "greedy"):
        (aligned,) = seconds(lambda kind=kind: align(*encoded, kind))
        baseline = f"{tokens} tokens of {' and '.join(TOKENIZERS)} on one core"
        results.append(row(f"alignment, {kind}", tokens / aligned / 1e6, "M tokens/s", 3.0, baseline))
    both, packed, raw = seconds(encode_and_align, collate, tokenize)
    baseline = f"two bare tokenizations, {tokens / raw / 1e6:.2f} M tokens/s"
    results.append(row("encode twice and align", raw / both, "x speed", 0.70, baseline))
    results.append(row("collate: encode twice, align and pack", raw / packed, "x speed", 0.70, baseline))
    return results


def corpus(path, examples):
    """A table of plain-text examples, two questions with their answers in each."""
    import pyarrow as pa

    from stages.artifacts.schemas import EXAMPLES as SCHEMA

    lines = [json.loads(line) for line in path.read_text().splitlines()[: 2 * examples]]
    rows = []
    for number, pair in enumerate(zip(lines[::2], lines[1::2], strict=True)):
        text = "\n".join(part for item in pair for part in (item["question"], item["answer"]))
        slots = [{"role": "text", "text": text, "loss": True}]
        facts = {"starts_document": True, "ends_document": True, "bytes": len(text.encode())}
        rows.append({"example_id": f"{number}:0", "document_id": str(number), "slots": slots} | facts)
    return pa.Table.from_pylist(rows, schema=SCHEMA)
