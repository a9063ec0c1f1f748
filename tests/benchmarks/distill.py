"""A step of alm from cached signals against a step of sft: same student of 151,936 columns, same examples."""

import argparse
import itertools
import json
import os
import resource
import tempfile
from pathlib import Path

from tests.benchmarks.alignment import NEEDED, corpus
from tests.benchmarks.measure import in_process, missing, row

STUDENT, TEACHER = "qwen1.5", "gpt2"
COLUMNS = ["observed_logprob", "boundary_logprob"]
VOCAB = 151936
EXAMPLES, STEPS, ROUNDS = 64, 4, 5
ENTRIES = {
    "sft": {"name": "sft", "module": "stages.losses.sft", "chunks": None},
    "alm": {"name": "alm_unconstrained", "module": "stages.losses.alm", "chunks": "unconstrained"},
}
TRAIN = {"steps": STEPS, "batch_size": 2, "max_tokens": 4096, "train_model_mode": "full", "log_interval": 1}


def measure(arguments) -> list[dict]:
    """Time of the steps after the first, each at its best of the rounds, and peak memory of the process."""
    if missing("distill", arguments, (STUDENT, TEACHER), NEEDED):
        return []
    with tempfile.TemporaryDirectory() as folder:
        write_signals(arguments, Path(folder) / "signals.parquet")
        runs = {method: [] for method in ENTRIES}
        for _ in range(ROUNDS):
            for method, found in runs.items():
                found.append(in_process("distill", arguments, method, folder))
    seconds = {
        method: sum(min(steps) for steps in zip(*(one["steps"] for one in found), strict=True))
        for method, found in runs.items()
    }
    memory = {method: min(one["memory"] for one in found) for method, found in runs.items()}
    ratios = {"time": seconds["alm"] / seconds["sft"], "peak memory": memory["alm"] / memory["sft"]}
    per_step = f"sft, {seconds['sft'] / (STEPS - 1):.2f} s a step of {runs['sft'][0]['tokens']:.0f} tokens"
    baselines = {"time": per_step, "peak memory": f"sft, {memory['sft'] / 2**20:.0f} MiB"}
    return [row(f"alm step, {what}, V={VOCAB}", ratios[what], "x sft", 1.15, baselines[what], True) for what in ratios]


def write_signals(arguments, path: Path) -> None:
    """Random signals for the teacher's tokens of the corpus."""
    import numpy as np

    from stages.signals.writer import writing
    from stages.tokenization import ByteView

    table = corpus(arguments.data / NEEDED[0], EXAMPLES)
    view = ByteView.load(arguments.tokenizers / TEACHER)
    batch = view.encode_examples(table["slots"].to_pylist(), table["ends_document"].to_pylist())
    source = np.random.default_rng(0)
    signals = {name: -source.exponential(2, len(batch.ids)).astype(np.float32) for name in COLUMNS}
    with writing(path, COLUMNS, {}) as writer:
        writer.add(table["example_id"].to_pylist(), batch.exact, batch.ids, batch.offsets, signals)


def train_once() -> None:
    """One process: the trainer over STEPS steps of one method; prints its figures."""
    parser = argparse.ArgumentParser()
    parser.add_argument("method", choices=ENTRIES)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--tokenizers", type=Path)
    parser.add_argument("--data", type=Path)
    arguments = parser.parse_args()
    from stages.alignment.pair import Pair
    from stages.distill import import_losses, joint_needs
    from stages.models.description import describe
    from stages.signals.reader import open_signals
    from stages.tokenization import ByteView
    from stages.training.data import Collator
    from stages.training.modes import prepare_mode, settings_of
    from stages.training.student import Student
    from stages.training.trainer import Run, prepare_losses, train
    from stages.vocabulary.head import Sides
    from tests.benchmarks.signals import llama

    settings = settings_of(TRAIN)
    losses = import_losses({"losses": [ENTRIES[arguments.method]], "loss": {"binarization_temp": 5.0}})
    needs = joint_needs(losses)
    table = corpus(arguments.data / NEEDED[0], EXAMPLES)
    view = ByteView.load(arguments.tokenizers / STUDENT)
    pair = Pair(ByteView.load(arguments.tokenizers / TEACHER), view) if needs.teacher else None
    path = arguments.folder / "signals.parquet"
    signals = open_signals([path], sorted(needs.teacher)) if needs.teacher else None
    model = llama(128, 2, VOCAB)
    student = describe(model, "student", view.vocab_size, STUDENT)
    prepare_mode(student, settings, 0)
    sides = Sides(student.side)
    student = Student(model, sides, needs.student, view.boundary_mask("space+tab+newline+special"), view.eos_id)
    prepare = lambda examples: prepare_losses(losses, examples)  # noqa: E731
    options = {"batch_size": settings["batch_size"], "max_tokens": settings["max_tokens"], "seed": 0}
    collate = Collator(table, view, pair, signals, prepare, **options)
    result = train(Run(student, losses, collate, settings, 0, arguments.folder / f"{arguments.method}-{os.getpid()}"))
    times = [seconds for _, seconds in result["timing"]]
    steps = [after - before for before, after in itertools.pairwise(times)]
    tokens = result["metrics"][-1]["tokens_seen"] / STEPS
    memory = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    print(json.dumps({"steps": steps, "memory": memory, "tokens": tokens}))


if __name__ == "__main__":
    train_once()
