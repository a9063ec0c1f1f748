"""MinED between real vocabularies in core-seconds, against the reference algorithm on a sample of the same tokens."""

import json
import random
import re
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from tempfile import TemporaryDirectory

from tests.benchmarks.counting import LARGE, enlarged
from tests.benchmarks.measure import missing, row

TOKENIZERS = ("gpt2", "qwen1.5")
ROUNDS, SAMPLED = 2, 200


def measure(arguments) -> list[dict]:
    """Both directions, and those with a vocabulary of 262k in place of the larger one; a process for each."""
    if missing("mapping", arguments, TOKENIZERS):
        return []
    results = []
    small, large = (arguments.tokenizers / name for name in TOKENIZERS)
    with TemporaryDirectory() as folder:
        larger = enlarged(large, Path(folder))
        for source, target, huge in ((small, large, (small, larger)), (large, small, (larger, small))):
            name = f"{source.name} → {target.name}"
            ours, theirs = run(source, target), run(*huge)
            reference = f"the reference scan with {ours['kernel']}, {1000 * ours['reference']:.1f} ms a token"
            tokens, more = (f"{facts['tokens']} tokens x {facts['choices']}" for facts in (ours, theirs))
            results += [
                row(f"MinED, {name}", ours["seconds"], "core-seconds", 15, tokens, at_most=True),
                row(f"MinED search, {name}", ours["reference"] / ours["search"], "x speed", 200, reference),
                row(f"MinED memory, {name}", ours["memory"], "MiB", 1024, "both tokenizers loaded", at_most=True),
                row(f"MinED, {name}, of {LARGE // 1000}k", theirs["seconds"], "core-seconds", 45, more, at_most=True),
            ]
    return results


def run(source: Path, target: Path) -> dict:
    """Map one tokenizer to another in a process of its own, whose peak memory is then known."""
    command = [sys.executable, "-m", "tests.benchmarks.mapping", str(source), str(target)]
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        raise SystemExit(f"the benchmark process of {source} and {target} failed:\n{done.stderr}")
    return json.loads(done.stdout.splitlines()[-1])


def main(source: str, target: str) -> None:
    """Print core-seconds of the whole mapping and, for each token, of the search and of the reference; peak memory."""
    from stages.alignment.mapping import mine
    from stages.alignment.nearest import nearest
    from stages.tokenization import ByteView

    views = [ByteView.load(Path(folder)) for folder in (target, source)]
    choices, own = (list(view.id_of_bytes) for view in views)
    missing_tokens = [token for token in own if token not in views[0].id_of_bytes]
    seconds = min(core_seconds(lambda: list(mine(*views, 0.3))) for _ in range(ROUNDS))
    search = min(core_seconds(lambda: nearest(missing_tokens, choices)) for _ in range(ROUNDS)) / len(missing_tokens)
    memory = int(re.search(r"VmHWM:\s+(\d+) kB", Path("/proc/self/status").read_text())[1]) / 1024
    sampled = random.Random(0).sample(missing_tokens, SAMPLED)
    reference, kernel = reference_seconds(sampled, choices)
    facts = {"seconds": seconds, "search": search, "memory": memory, "reference": reference, "kernel": kernel}
    print(json.dumps(facts | {"tokens": len(missing_tokens), "choices": len(choices)}))


def core_seconds(function: Callable[[], object]) -> float:
    """Return the processor time of a call, over all its threads."""
    start = time.process_time()
    function()
    return time.process_time() - start


def reference_seconds(tokens: list[bytes], choices: list[bytes]) -> tuple[float, str]:
    """Core-seconds a token of tokenkit's scan, and the kernel in it: editdistance as there, or rapidfuzz without it.

    Choices are scanned in the order of their length, from the end that is nearer to the token's; those whose length
    alone makes them no better are skipped, and the scan ends where all further ones would be.
    """
    try:
        from editdistance import eval as distance

        kernel = "editdistance"
    except ImportError:
        from rapidfuzz.distance.Levenshtein import distance

        kernel = "rapidfuzz pair by pair"
    ascending = sorted((token.decode("latin-1") for token in choices), key=len)
    median = len(ascending[len(ascending) // 2])

    def scan(text: str) -> int:
        forward = len(text) < median
        best = distance(text, ascending[0 if forward else -1])
        for choice in ascending if forward else reversed(ascending):
            gap = len(choice) - len(text)
            if (gap if forward else -gap) >= best:
                break
            if abs(gap) < best:
                best = min(best, distance(text, choice))
        return best

    texts = [token.decode("latin-1") for token in tokens]
    return core_seconds(lambda: [scan(text) for text in texts]) / len(tokens), kernel


if __name__ == "__main__":
    main(*sys.argv[1:])
