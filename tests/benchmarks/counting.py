"""Counting tokens and all statistics of a pair on real text, with the threads of the tokenizers library."""

import json
import os
from pathlib import Path
from tempfile import TemporaryDirectory

from tests.benchmarks.measure import missing, row, seconds

NEEDED = ("gsm8k_train.jsonl",)
TOKENIZERS = ("qwen1.5", "gpt2")
LARGE = 262_144
ROUNDS = 7


def measure(arguments) -> list[dict]:
    """Both as shares of the speed of two bare `encode_batch_fast`; the time that a vocabulary of 262k takes more."""
    if missing("counting", arguments, TOKENIZERS, NEEDED):
        return []
    os.environ["TOKENIZERS_PARALLELISM"] = "true"
    lines = [json.loads(line) for line in (arguments.data / NEEDED[0]).read_text().splitlines()]
    texts = [f"{line['question']}\n{line['answer']}" for line in lines]
    teacher, student = (arguments.tokenizers / name for name in TOKENIZERS)
    results, usual = pair(teacher, student, texts, " x ".join(TOKENIZERS))
    with TemporaryDirectory() as folder:
        rows, large = pair(enlarged(teacher, Path(folder)), student, texts, f"{LARGE // 1000}k x {TOKENIZERS[1]}")
    baseline = f"the statistics of {' x '.join(TOKENIZERS)}, {usual:.2f} s with the summary"
    more = row(f"statistics, a vocabulary of {LARGE // 1000}k", large / usual, "x time", 3.0, baseline, at_most=True)
    return [*results, *rows, more]


def pair(teacher: Path, student: Path, texts: list[str], name: str) -> tuple[list[dict], float]:
    """The two shares of one pair, and the seconds of its statistics."""
    from tokenizers import Tokenizer

    from stages.alignment.statistics import PairStatistics, ahead
    from stages.tokenization import ByteView
    from stages.tokenizer_stats import ROWS

    views = [ByteView.load(folder) for folder in (teacher, student)]
    bare = [Tokenizer.from_file(str(folder / "tokenizer.json")) for folder in (teacher, student)]
    slots = [[{"role": "text", "text": text, "loss": True}] for text in texts]
    batches = [slots[start : start + ROWS] for start in range(0, len(slots), ROWS)]
    raw_batches = [texts[start : start + ROWS] for start in range(0, len(texts), ROWS)]

    def counting():
        statistics = PairStatistics(*views)
        for _, encoded in ahead(statistics.encode, batches):
            statistics.count(encoded)

    def everything():
        statistics = PairStatistics(*views)
        for batch, encoded in ahead(statistics.encode, batches):
            statistics.add(batch, encoded, [True] * len(batch))
        statistics.summary()

    def raw():
        for batch in raw_batches:
            for tokenizer in bare:
                tokenizer.encode_batch_fast(batch, add_special_tokens=False)

    counted, whole, alone = seconds(counting, everything, raw, rounds=ROUNDS)
    size = sum(len(text.encode()) for text in texts)
    baseline = f"encode_batch_fast of both on the same threads, {2 * size / alone / 1e6:.1f} MB/s"
    rows = [
        row(f"counting tokens, {name}", alone / counted, "x speed", 0.80, baseline),
        row(f"all statistics, {name}", alone / whole, "x speed", 0.60, baseline),
    ]
    return rows, whole


def enlarged(source: Path, folder: Path) -> Path:
    """A copy of a byte-level BPE tokenizer with merges of its tokens two by two until it has LARGE tokens."""
    definition = json.loads((source / "tokenizer.json").read_text(encoding="utf-8"))
    places, merges = definition["model"]["vocab"], definition["model"]["merges"]
    words = [token for token in places if token.isalpha() and len(token) > 2]
    for first in words:
        for second in words[:64]:
            if len(places) + len(definition["added_tokens"]) >= LARGE:
                break
            if first + second not in places:
                places[first + second] = len(places)
                merges.append([first, second] if isinstance(merges[0], list) else f"{first} {second}")
    for number, token in enumerate(definition["added_tokens"]):
        token["id"] = len(places) + number
    (folder / "tokenizer.json").write_text(json.dumps(definition), encoding="utf-8")
    (folder / "tokenizer_config.json").write_bytes((source / "tokenizer_config.json").read_bytes())
    return folder
