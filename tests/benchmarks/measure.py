"""How benchmarks are timed and reported."""

import json
import os
import subprocess
import sys
import time
from collections.abc import Callable


def seconds(*functions: Callable[[], object], rounds: int = 5) -> list[float]:
    """Return the best time of each function; they take turns, so that noise meets all of them alike."""
    best = [float("inf")] * len(functions)
    for _ in range(rounds):
        for index, function in enumerate(functions):
            start = time.perf_counter()
            function()
            best[index] = min(best[index], time.perf_counter() - start)
    return best


def row(name: str, value: float, unit: str, target: float, baseline: str, at_most: bool = False) -> dict:
    """Return one line of results/bench.json."""
    holds = value <= target if at_most else value >= target
    keys = {"name": name, "value": value, "unit": unit, "target": target, "holds": bool(holds), "baseline": baseline}
    return keys | {"at_most": at_most}


def missing(group: str, arguments, tokenizers: tuple[str, ...] = (), files: tuple[str, ...] = ()) -> bool:
    """Say which real tokenizers or files a group of benchmarks lacks; return whether it has to be left out."""
    paths = [arguments.tokenizers / name for name in tokenizers] + [arguments.data / name for name in files]
    absent = [str(path) for path in paths if not path.exists()]
    if absent:
        print(f"{group}: left out, {', '.join(absent)} not found; name their folders with --tokenizers and --data")
    return bool(absent)


def in_process(group: str, arguments, *words: str) -> dict:
    """Return the JSON that a group of benchmarks prints when run with `words`: in a process of its own, one thread."""
    command = [sys.executable, "-W", "ignore", "-m", f"tests.benchmarks.{group}", *words]
    command += ["--tokenizers", str(arguments.tokenizers), "--data", str(arguments.data)]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "OMP_WAIT_POLICY": "PASSIVE", "TOKENIZERS_PARALLELISM": "false"}
    done = subprocess.run(command, capture_output=True, text=True, env=environment)
    if done.returncode:
        raise SystemExit(f"the benchmark process {group} {words[0]} failed:\n{done.stderr}")
    return json.loads(done.stdout.splitlines()[-1])
