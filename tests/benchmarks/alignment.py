"""Alignment and the collate path on real text with real tokenizers, on one core."""

import json
import os

from tests.benchmarks.measure import row, seconds

EXAMPLES = 2000


def measure(arguments) -> list[dict]:
    """Alignment in tokens/s, and the collate path as a share of the two bare tokenizations."""
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    from tokenizers import Tokenizer

    from stages.alignment import align
    from stages.tokenization import ByteView

    lines = (arguments.data / "gsm8k_train.jsonl").read_text().splitlines()[: 2 * EXAMPLES]
    rows = [json.loads(line) for line in lines]
    texts = [f"{a['question']}\n{a['answer']}\n{b['question']}\n{b['answer']}" for a, b in zip(rows[::2], rows[1::2], strict=True)]
    slots = [[{"role": "text", "text": text, "loss": True}] for text in texts]
    ends = [True] * len(texts)
    folders = [arguments.tokenizers / name for name in ("qwen1.5", "gpt2")]
    teacher, student = (ByteView.load(folder) for folder in folders)
    bare = [Tokenizer.from_file(str(folder / "tokenizer.json")) for folder in folders]
    encoded = [view.encode_examples(slots, ends) for view in (teacher, student)]
    tokens = sum(len(batch.ids) for batch in encoded)

    def collate():
        align(teacher.encode_examples(slots, ends), student.encode_examples(slots, ends))

    def tokenize():
        for tokenizer in bare:
            [item.ids for item in tokenizer.encode_batch_fast(texts, add_special_tokens=False)]

    results = []
    for kind in ("unconstrained", "space", "greedy"):
        (aligned,) = seconds(lambda kind=kind: align(*encoded, kind))
        baseline = f"{tokens} tokens of qwen1.5 and gpt2 on one core"
        results.append(row(f"alignment, {kind}", tokens / aligned / 1e6, "M tokens/s", 3.0, baseline))
    both, raw = seconds(collate, tokenize)
    baseline = f"two bare tokenizations, {tokens / raw / 1e6:.2f} M tokens/s"
    return [*results, row("collate: tokenize twice and align", raw / both, "x speed", 0.70, baseline)]
