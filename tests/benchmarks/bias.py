"""Tokenization bias at full vocabulary: suffix pairs, all their biases, memory, and a vocabulary of 262k."""

import json
import random
import resource
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from tempfile import TemporaryDirectory

from tests.benchmarks.measure import missing, row

TOKENIZERS = ("qwen1.5", "gpt2")
SAMPLED = 48  # pairs for the reference algorithm
LARGE = 262_144  # ids of the made vocabulary


def measure(arguments) -> list[dict]:
    """Seconds for the pairs, core-seconds and memory for the biases, and the same for the made vocabulary."""
    if missing("bias", arguments, TOKENIZERS):
        return []
    from stages.alignment.bias import suffix_pairs
    from stages.tokenization import ByteView

    folders = [arguments.tokenizers / name for name in TOKENIZERS]
    views = [ByteView.load(folder) for folder in folders]
    pairs = suffix_pairs(*views)
    found = min(core_seconds(lambda: suffix_pairs(*views)) for _ in range(3))
    per_pair = reference_seconds(views, pairs)
    usual = all_biases(*folders)
    with TemporaryDirectory() as made:
        widen(folders[0], Path(made), views[0])
        large = all_biases(Path(made), folders[1])
    what = f"all {len(pairs.teacher_id)} pairs of {' and '.join(TOKENIZERS)}"
    hours = per_pair * len(pairs.teacher_id) / 3600
    reference = f"the reference algorithm on the bare model, {per_pair * 1e3:.0f} ms a pair, {hours:.1f} core-hours"
    against = f"{what}: {usual['core_seconds']:.1f} core-seconds, {usual['gigabytes']:.2f} GB"
    made_of = f"{LARGE} ids and gpt2, {large['pairs']} pairs"
    return [
        row("suffix pairs", found, "core-seconds", 2, what, at_most=True),
        row("biases of all suffix pairs", usual["core_seconds"], "core-seconds", 120, reference, at_most=True),
        row("biases of all suffix pairs, memory", usual["gigabytes"], "GB", 3, what, at_most=True),
        row(f"biases, {made_of}", large["core_seconds"] / usual["core_seconds"], "x time", 3, against, at_most=True),
        row("the same, memory", large["gigabytes"] / usual["gigabytes"], "x memory", 3, against, at_most=True),
    ]


def core_seconds(function: Callable[[], object]) -> float:
    """Return the processor time that a call takes, that of all its threads."""
    start = time.process_time()
    function()
    return time.process_time() - start


def all_biases(teacher: Path, student: Path) -> dict:
    """Compute the biases of all pairs in a process of its own; return pairs, core-seconds and peak memory in GB."""
    command = [sys.executable, "-m", "tests.benchmarks.bias", str(teacher), str(student)]
    return json.loads(subprocess.run(command, check=True, capture_output=True, text=True).stdout)


def main() -> None:
    """Print what `all_biases` returns for the two tokenizer folders on the command line."""
    import numpy as np

    from stages.alignment.bias import biases, suffix_pairs
    from stages.tokenization import ByteView

    views = [ByteView.load(Path(folder)) for folder in sys.argv[1:]]
    pairs = suffix_pairs(*views)
    order = np.random.default_rng(0)
    counts = tuple(1_000_000 // (1 + order.permutation(view.vocab_size)) for view in views)
    spent = core_seconds(lambda: biases(*views, counts, pairs))
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / (1e9 if sys.platform == "darwin" else 1e6)
    print(json.dumps({"pairs": len(pairs.teacher_id), "core_seconds": spent, "gigabytes": peak}))


def reference_seconds(views: list, pairs) -> float:
    """Return core-seconds per pair of tokenkit's algorithm: both cover dictionaries anew, each candidate encoded."""
    chosen = random.Random(0).sample(range(len(pairs.teacher_id)), SAMPLED)
    sides = [(bare_model(view), prefix_map(view)) for view in views]

    def run() -> None:
        for place in chosen:
            for view, ids, (model, prefixes) in zip(views, pairs, sides, strict=True):
                covers(spelled(view.token_bytes[ids[place]]), model, prefixes)

    return core_seconds(run) / SAMPLED


def covers(string: str, model, prefixes: dict[str, list[str]]) -> dict[str, list[str]]:
    """Return the cover dictionary of a token, spelled in the byte alphabet."""
    found = {}
    for cut in range(len(string) - 1, -1, -1):
        head = [token.value for token in model.tokenize(string[:cut])]
        for token in prefixes.get(string[cut:], []):
            whole = string[:cut] + token
            if [t.value for t in model.tokenize(whole)] == [*head, token] and len(whole) > len(string):
                found[whole[len(string) :]] = [*head, token]
    return found


def prefix_map(view) -> dict[str, list[str]]:
    """Return every prefix of every token with the tokens that have it."""
    prefixes: dict[str, list[str]] = {}
    for token in filter(None, view.token_bytes):
        name = spelled(token)
        for end in range(1, len(name) + 1):
            prefixes.setdefault(name[:end], []).append(name)
    return prefixes


def bare_model(view):
    """Return the BPE model of a tokenizer."""
    from tokenizers import Tokenizer

    return Tokenizer.from_file(str(view.folder / "tokenizer.json")).model


def spelled(token: bytes) -> str:
    """Return bytes as a byte-level vocabulary spells them."""
    from stages.tokenization.byte_functions import byte_alphabet

    alphabet = byte_alphabet()
    return "".join(alphabet[byte] for byte in token)


def widen(folder: Path, made: Path, view) -> None:
    """Write the tokenizer of `folder` with LARGE ids: later merges join neighbours, words and what can follow them."""
    definition = json.loads((folder / "tokenizer.json").read_text(encoding="utf-8"))
    model, draw = bare_model(view), random.Random(0)
    tokens = [
        spelled(token) for token in view.token_bytes if token and token.decode(errors="replace").strip().isalpha()
    ]
    starts = [token for token in tokens if token.startswith("Ġ")]
    ends = [token for token in tokens if not token.startswith("Ġ") and len(token) < 8]
    vocabulary, merges = definition["model"]["vocab"], definition["model"]["merges"]
    as_list = isinstance(merges[0], list)
    added = definition["added_tokens"]
    while len(vocabulary) + len(added) < LARGE:
        pair = draw.choice(starts), draw.choice(ends)
        whole = "".join(pair)
        if whole not in vocabulary and [token.value for token in model.tokenize(whole)] == list(pair):
            vocabulary[whole] = len(vocabulary)
            merges.append(list(pair) if as_list else " ".join(pair))
    for place, token in enumerate(added):
        token["id"] = len(vocabulary) + place
    (made / "tokenizer.json").write_text(json.dumps(definition), encoding="utf-8")
    (made / "tokenizer_config.json").write_text((folder / "tokenizer_config.json").read_text(encoding="utf-8"))


if __name__ == "__main__":
    main()
