"""Teacher signals on one core: what keeping them adds to a forward pass, and how fast they are read back."""

import os
import tempfile
import warnings
from pathlib import Path
from types import SimpleNamespace

from tests.benchmarks.measure import row, seconds

TOP_K = 64
NEEDS = {"boundary": True, "eos": True, "top_k": TOP_K}
# Llama architectures, float32: (hidden size, layers, vocabulary, tokens per round, rounds).
TEACHERS = ((512, 8, 50257, 4096, 3), (256, 4, 32000, 8192, 3), (160, 4, 2048, 16384, 5))
BATCH_TOKENS = 2048
LENGTH = 256  # of every example, so that neither side computes padding
WINDOWS = 2
READ_TOKENS = 2**18


def measure(arguments) -> list[dict]:
    """The stage's pass with its writer as a share of the bare model's speed; tokens/s of reading."""
    import pyarrow as pa
    import torch

    torch.set_num_threads(1)
    pa.set_cpu_count(1)
    pa.set_io_thread_count(1)
    with tempfile.TemporaryDirectory() as folder:
        rows = [teacher_pass(Path(folder), *shape) for shape in TEACHERS]
        return rows + reading(Path(folder))


def teacher_pass(folder: Path, width: int, layers: int, vocab: int, tokens: int, rounds: int) -> dict:
    """Signals of all columns, computed and written as the stage does, against the logits of the same batches."""
    import numpy as np
    import torch

    from stages.models.description import describe
    from stages.signals.compute import check_finite, wanted_signals
    from stages.signals.schema import columns_for
    from stages.signals.writer import writing
    from stages.teacher_signals import Shard
    from stages.tokenization.batches import length_batches

    model = llama(width, layers, vocab)
    source = np.random.default_rng(0)
    teacher = describe(model, "teacher", vocab, "random ids")
    wanted = wanted_signals(NEEDS, source.random(vocab) < 0.6, 0, torch.device("cpu"))
    shard = Shard(teacher.body, teacher.head, wanted, BATCH_TOKENS, "teacher")
    windows = [token_window(source, tokens // WINDOWS, vocab) for _ in range(WINDOWS)]
    names = [[str(example) for example in range(len(window.exact))] for window in windows]

    def stage():
        progress = SimpleNamespace(update=lambda count: None)
        with writing(folder / "part.parquet", columns_for(NEEDS), {}) as writer:
            for window, ids in zip(windows, names, strict=True):
                signals = shard.signals(window, progress)
                check_finite(signals, window.offsets, ids, "teacher")
                writer.add(ids, window.exact, window.ids, window.offsets, signals)

    batches = [
        padded(window, examples)
        for window in windows
        for examples in length_batches(np.diff(window.offsets), BATCH_TOKENS)
    ]

    @torch.no_grad()
    def bare():
        for batch in batches:
            model(input_ids=batch, use_cache=False).logits  # noqa: B018

    kept, alone = seconds(stage, bare, rounds=rounds)
    total = sum(len(window.ids) for window in windows)
    baseline = f"model(ids).logits of the same batches, {total / alone:,.0f} tokens/s"
    return row(f"teacher_signals, d={width} L={layers} V={vocab} k={TOP_K}", alone / kept, "x speed", 0.85, baseline)


def reading(folder: Path) -> list[dict]:
    """Tokens/s from a Parquet file to torch tensors of each example, and of random examples once it is open."""
    import numpy as np
    import torch

    from stages.signals.reader import open_signals
    from stages.signals.schema import columns_for

    warnings.filterwarnings("ignore", message="The given NumPy array is not writable")
    columns = columns_for(NEEDS)
    path = folder / "read.parquet"
    write_random(path, columns)
    signals = open_signals([path], columns)
    order = np.random.default_rng(0).permutation(signals.count)

    def tensors(arrays):
        return {name: torch.from_numpy(values) for name, values in arrays.items() if name != "exact"}

    def decode():
        opened = open_signals([path], columns)
        for example in range(opened.count):
            tensors(opened.rows(example))

    def gather():
        for start in range(0, len(order), 16):
            tensors(signals.gather(order[start : start + 16]))

    def copy():
        path.read_bytes()

    decoded, gathered, copied = seconds(decode, gather, copy)
    baseline = f"one core; reading the file's {os.path.getsize(path) / 2**20:.0f} MiB as bytes: "
    baseline += f"{READ_TOKENS / copied / 1e6:.1f} M tokens/s"
    return [
        row(f"signals from Parquet to tensors, k={TOP_K}", READ_TOKENS / decoded / 1e6, "M tokens/s", 1.0, baseline),
        row(f"signals of 16 random examples, k={TOP_K}", READ_TOKENS / gathered / 1e6, "M tokens/s", 1.0, baseline),
    ]


def write_random(path: Path, columns: list[str]) -> None:
    """Signals with the layout of the stage's and random values, in two row groups."""
    import numpy as np

    from stages.signals.schema import BLOCKS
    from stages.signals.writer import writing

    source = np.random.default_rng(0)
    with writing(path, columns, {}) as writer:
        for group in range(2):
            window = token_window(source, READ_TOKENS // 2, 50257)
            number = len(window.ids)
            signals = {name: -source.exponential(3, number).astype(np.float32) for name in columns}
            signals["topk_ids"] = source.integers(0, 50257, (number, TOP_K), np.uint32)
            signals["topk_logprobs"] = -source.random((number, TOP_K), np.float32).astype(BLOCKS["topk_logprobs"])
            names = [f"{group}:{example}" for example in range(len(window.exact))]
            writer.add(names, window.exact, window.ids, window.offsets, signals)


def token_window(source, tokens: int, vocab: int) -> SimpleNamespace:
    """Random ids of examples of LENGTH tokens, with what the stage reads of an encoded batch."""
    import numpy as np

    offsets = np.arange(0, tokens + 1, LENGTH)
    ids = source.integers(0, vocab, tokens).astype(np.int32)
    return SimpleNamespace(ids=ids, offsets=offsets, exact=np.ones(len(offsets) - 1, bool))


def padded(window: SimpleNamespace, examples):
    """The ids of some examples as the model takes them, int64 [examples, longest]."""
    import torch

    rows = [torch.as_tensor(window.ids[window.offsets[e] : window.offsets[e + 1]]).long() for e in examples]
    return torch.nn.utils.rnn.pad_sequence(rows, batch_first=True)


def llama(width: int, layers: int, vocab: int):
    """A random model in evaluation mode."""
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    heads = {"num_attention_heads": width // 32, "num_key_value_heads": width // 32}
    sizes = {"hidden_size": width, "intermediate_size": width * 11 // 4, "num_hidden_layers": layers}
    config = AutoConfig.for_model("llama", vocab_size=vocab, tie_word_embeddings=True, **heads, **sizes)
    torch.manual_seed(0)
    return AutoModelForCausalLM.from_config(config, dtype=torch.float32).eval().requires_grad_(False)
