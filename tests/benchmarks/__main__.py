"""`make bench`: measure what the pipeline must reach, print one table and write results/bench.json.

Machines are shared and noisy: every figure is a ratio to a baseline measured in the same run, or a rate whose baseline
stands beside it. Each benchmark alternates with its baseline and takes the best of several rounds.
"""

import argparse
import importlib
import json
import sys
from pathlib import Path

GROUPS = ("alignment", "counting", "mapping", "signals", "bias", "distill", "methods")


def main() -> None:
    """Run all benchmarks, or those named on the command line."""
    parser = argparse.ArgumentParser(prog="python -m tests.benchmarks", description=__doc__)
    parser.add_argument("groups", nargs="*", default=GROUPS, help=f"of {', '.join(GROUPS)}; default: all")
    parser.add_argument("--output", type=Path, default=Path("results/bench.json"))
    parser.add_argument("--tokenizers", type=Path, default=Path("../shared/tokenizers"), help="real tokenizers")
    parser.add_argument("--data", type=Path, default=Path("../shared/data"), help="folder with gsm8k_train.jsonl")
    arguments = parser.parse_args()
    unknown = [group for group in arguments.groups if group not in GROUPS]
    if unknown:
        parser.error(f"no benchmark group {unknown[0]}; known: {', '.join(GROUPS)}")
    rows = []
    for group in arguments.groups:
        for row in importlib.import_module(f"tests.benchmarks.{group}").measure(arguments):
            rows.append(row | {"command": f"python -m tests.benchmarks {group}"})
            print_row(rows[-1])
    arguments.output.parent.mkdir(parents=True, exist_ok=True)
    arguments.output.write_text(json.dumps(rows, indent=2) + "\n")
    print(f"written to {arguments.output}")
    sys.exit(0)


def print_row(row: dict) -> None:
    """Print one line: what was measured, against what, and whether the target holds."""
    verdict = "holds" if row["holds"] else "FALLS SHORT"
    sign = "<=" if row["at_most"] else ">="
    value = f"{row['value']:.3g} {row['unit']}"
    target = f"{sign} {row['target']:<8g} {verdict:<12}"
    print(f"{row['name']:<46} {value:>22}   {target} against {row['baseline']}", flush=True)


if __name__ == "__main__":
    main()
