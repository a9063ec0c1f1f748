"""A step of every method from cached signals, relative to a step of sft: same student of 151,936 columns, same text."""

import argparse
import json
import os
import resource
import tempfile
import time
from pathlib import Path

from tests.benchmarks.alignment import NEEDED, corpus
from tests.benchmarks.measure import in_process, missing, row

STUDENT, TEACHER = "qwen1.5", "gpt2"
VOCAB = 151936
EXAMPLES, STEPS, WIDTH = 16, 3, 128
TRAIN = {"steps": STEPS, "batch_size": 2, "max_tokens": 4096, "train_model_mode": "full", "log_interval": 1}
OPTIONS = {"alm_latents": {"latents_do_project": True}}
BASELINE = ("sft", "clm")
# Two terms run only where the projected teacher predicts the token: measured with none, and, the dearest case, all.
PREDICTING = ("baseline_dskd", "dskd_eta")


def measure(arguments) -> list[dict]:
    """CPU time of the steps after the first, and peak memory, each method in a process of its own."""
    from stages.planning.methods import METHODS

    if missing("methods", arguments, (STUDENT, TEACHER), NEEDED):
        return []
    names = [name for name in METHODS if name not in BASELINE]
    names += [f"{name}, every token predicted" for name in PREDICTING]
    with tempfile.TemporaryDirectory() as folder:
        write_mapping(arguments, Path(folder))
        runs = {name: in_process("methods", arguments, name, folder) for name in ["sft", *names]}
        again = in_process("methods", arguments, "sft", folder)
    seconds, memory = (min(runs["sft"][key], again[key]) for key in ("seconds", "memory"))
    per_step = f"sft, {seconds / (STEPS - 1):.2f} CPU seconds a step"
    peak = f"sft, {memory / 2**20:.0f} MiB"
    rows = []
    for name in names:
        rows.append(row(f"{name} step, time", runs[name]["seconds"] / seconds, "x sft", 2.0, per_step, True))
        rows.append(row(f"{name} step, peak memory", runs[name]["memory"] / memory, "x sft", 2.0, peak, True))
    return rows


def write_mapping(arguments, folder: Path) -> None:
    """The real mapping of the two tokenizers, as the stage writes it."""
    import pyarrow.parquet as pq

    from stages.mined_mapping import mapping_tables
    from stages.tokenization import ByteView

    teacher, student = (ByteView.load(arguments.tokenizers / name) for name in (TEACHER, STUDENT))
    for name, table in mapping_tables(teacher, student, 0.3)[0].items():
        pq.write_table(table, folder / name)


def train_once() -> None:
    """One process: the trainer over STEPS steps of one method; prints its figures."""
    parser = argparse.ArgumentParser()
    parser.add_argument("method")
    parser.add_argument("folder", type=Path)
    parser.add_argument("--tokenizers", type=Path)
    parser.add_argument("--data", type=Path)
    arguments = parser.parse_args()
    from stages.distill import import_losses, joint_needs, make_projectors
    from stages.models.description import describe
    from stages.planning.methods import METHODS
    from stages.tokenization import ByteView
    from stages.training.data import Collator
    from stages.training.modes import prepare_mode, settings_of
    from stages.training.student import Student
    from stages.training.trainer import Run, prepare_losses, train
    from stages.vocabulary.head import Sides
    from tests.benchmarks.signals import llama

    name, _, predicted = arguments.method.partition(", ")
    method = METHODS[name]
    settings = settings_of(TRAIN)
    entry = {"name": name, "module": method.module, "chunks": method.chunks} | OPTIONS.get(name, {})
    losses = import_losses({"losses": [entry]})
    needs = joint_needs(losses)
    if predicted:
        read = losses[0].module.read_projected
        losses[0].module.read_projected = lambda *given: read(*given)._replace(likeliest=given[2])
    table = corpus(arguments.data / NEEDED[0], EXAMPLES)
    view = ByteView.load(arguments.tokenizers / STUDENT)
    teacher = view if method.same_tokenizer else ByteView.load(arguments.tokenizers / TEACHER)
    pair = open_pair(arguments.folder, teacher, view, needs) if needs.teacher else None
    model = llama(WIDTH, 2, VOCAB)
    student = describe(model, "student", view.vocab_size, STUDENT)
    prepare_mode(student, settings, 0)
    sides = Sides(student.side, teacher_side(teacher.vocab_size) if needs.teacher_head else None)
    mask = view.boundary_mask("space+tab+newline+special")
    module = Student(model, sides, needs.student, mask, view.eos_id, make_projectors(losses, sides, pair, 0))
    signals = made_signals(arguments.folder, table, teacher, needs, method) if needs.teacher else None
    prepare = lambda examples: prepare_losses(losses, examples)  # noqa: E731
    options = {"batch_size": settings["batch_size"], "max_tokens": settings["max_tokens"], "seed": 0}
    collate = Collator(table, view, pair, signals, prepare, **options)
    clock: list[float] = []
    step = type(module).forward
    type(module).forward = lambda *given: clock.append(time.process_time()) or step(*given)
    train(Run(module, losses, collate, settings, 0, arguments.folder / f"{name}-{os.getpid()}"))
    clock.append(time.process_time())
    memory = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    print(json.dumps({"seconds": clock[-1] - clock[-STEPS], "memory": memory}))


def open_pair(folder: Path, teacher, student, needs):
    """The pair of tokenizers with what the losses read of it."""
    import numpy as np
    import pyarrow.parquet as pq

    from stages.alignment.bias import suffix_pairs
    from stages.alignment.chunks import BiasTable
    from stages.alignment.pair import Pair
    from stages.training.inputs import matches, projection

    parts = {}
    if "mapping" in needs.pair:
        parts["to_teacher"] = matches(pq.read_table(folder / "mapping.parquet"), "teacher_id", teacher.vocab_size)
        parts["to_student"] = matches(pq.read_table(folder / "reverse.parquet"), "student_id", student.vocab_size)
    if "projection" in needs.pair:
        parts["projection"] = projection(pq.read_table(folder / "projection.parquet"), student.vocab_size)
    if "bias" in needs.pair:
        pairs = suffix_pairs(teacher, student)
        biases = np.random.default_rng(0).random((2, len(pairs.teacher_id)))
        parts["bias"] = BiasTable.over(*pairs, *biases, 0.5)
    return Pair(teacher, student, **parts)


def teacher_side(vocab: int):
    """A teacher's matrices of random numbers."""
    import torch

    from stages.vocabulary.blocks import Shape
    from stages.vocabulary.head import Head, Side

    torch.manual_seed(1)
    layer = torch.nn.Linear(WIDTH, vocab, bias=False).requires_grad_(False)
    return Side(Head(layer, Shape(vocab)), torch.nn.Embedding(vocab, WIDTH).requires_grad_(False))


def made_signals(folder: Path, table, view, needs, method):
    """Signals of the needed kinds with random contents: likeliest tokens of falling probability, 0.9 together."""
    import numpy as np

    from stages.signals.reader import open_signals
    from stages.signals.writer import writing
    from stages.tokenization.batches import encode_rows

    source, batch = np.random.default_rng(0), encode_rows(view, table)
    tokens, columns, signals = len(batch.ids), sorted(needs.teacher), {}
    share = 1 / np.arange(1, (method.top_k or 1) + 1)
    kept = np.log(0.9 * share / share.sum()).astype(np.float16)
    makers = {
        "topk_ids": lambda: (
            (source.integers(0, view.vocab_size, (tokens, 1)) + 7919 * np.arange(len(kept))) % view.vocab_size
        ),
        "topk_logprobs": lambda: np.tile(kept, (tokens, 1)),
        "tail_logmass": lambda: np.full(tokens, np.log(0.1), np.float32),
        "sample_ids": lambda: source.integers(0, view.vocab_size, (tokens, method.samples)),
        "hidden": lambda: source.normal(size=(tokens, WIDTH)).astype(np.float32).view(np.uint32) >> 16,
    }
    for name in columns:
        tempered = np.full(tokens, 0.5, np.float32) if name.startswith("normaliser") else None
        number = -source.exponential(2, tokens).astype(np.float32)
        signals[name] = makers[name]() if name in makers else number if tempered is None else tempered
    path = folder / "signals.parquet"
    with writing(path, columns, {}) as writer:
        writer.add(table["example_id"].to_pylist(), batch.exact, batch.ids, batch.offsets, signals)
    return open_signals([path], columns)


if __name__ == "__main__":
    train_once()
