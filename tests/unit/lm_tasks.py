"""lm-eval tasks of every kind in a folder, made of few short texts, and a world of tiny models to ask."""

import json
from pathlib import Path

import yaml

from stages import evaluate
from tests.unit import tiny

FUNCTIONS = """
import numpy as np
import torch

def scalars(doc, results):
    return {"half": np.float32(0.5), "one": np.int64(1), "yes": np.bool_(True), "quarter": torch.tensor(0.25)}

def nothing_finite(doc, results):
    return {"acc": float("inf"), "acc_norm": 0.5}

def one_infinite(doc, results):
    return {"acc": float("nan") if doc["n"] == 3 else 1.0, "fine": 1.0}

def shapes(doc, results):
    return {"acc": 1.0, "text": "N/A", "mapping": {"a": 1}, "list": [1.0, 0.0, 2.0], "nothing": None}

def fails(doc, results):
    if doc["n"] == 2:
        raise KeyError("gone")
    return {"acc": 1.0}

def no_mapping(doc, results):
    return [1.0]

def no_metric(doc, results):
    return {}

def huge(doc, results):
    return {"huge": 1e200, "acc": 1.0}

def answer_length(predictions, references, **_):
    return float(len(predictions[0]))

def two_lengths(predictions, references, **_):
    return {"characters": float(len(predictions[0])), "words": float(len(predictions[0].split()))}

def middle(items):
    return sorted(items)[len(items) // 2]

def mapping(items):
    return {"mean": 1.0}

def needs_two(items):
    assert len(items) > 1
    return 7.0

def breaks(items):
    raise RuntimeError("no luck")

def cannot_ask(doc):
    if doc["n"] == 1:
        raise ValueError("no question")
    return doc["context"]

def none_left(documents):
    return documents.filter(lambda document: False)
"""
ACC = [{"metric": "acc", "aggregation": "mean", "higher_is_better": True}]
EXACT = [{"metric": "exact_match", "aggregation": "mean", "higher_is_better": True}]
CHOICE = {"output_type": "multiple_choice", "doc_to_text": "context", "doc_to_choice": "choices"}
CHOICE |= {"doc_to_target": "label", "metric_list": ACC}
ANSWER = {"output_type": "generate_until", "doc_to_text": "{{context}}", "doc_to_target": "{{word}}"}
ANSWER |= {"generation_kwargs": {"until": ["\n\n"], "do_sample": False, "max_gen_toks": 8}, "metric_list": EXACT}
ROLLING = {"output_type": "loglikelihood_rolling", "doc_to_text": "", "doc_to_target": "{{context}}"}
NEXT = {"output_type": "loglikelihood", "doc_to_text": "{{context}}", "doc_to_target": " {{word}}"}


def items(count: int) -> list[dict]:
    """Questions of which every second one's first choice is right."""
    return [
        {
            "n": n,
            "context": tiny.text(n, 6 + n),
            "word": tiny.WORDS[n],
            "choices": [tiny.text(n + 50, 3), tiny.text(n + 90, 4)],
            "label": n % 2,
        }
        for n in range(count)
    ]


class Functions(str):
    """The name of one of FUNCTIONS in a task file."""


class Dumper(yaml.SafeDumper):
    pass


Dumper.add_representer(Functions, lambda dumper, name: dumper.represent_scalar("!function", f"functions.{name}"))


class World:
    """A folder of tasks, a tokenizer, and models to ask them."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.root, self.tasks = folder, folder / "results", folder / "tasks"
        self.tasks.mkdir(parents=True)
        (self.tasks / "functions.py").write_text(FUNCTIONS)

    def tokenizer(self, source: Path, name: str = "t") -> None:
        files = {path.name: path for path in source.iterdir() if path.is_file()}
        tiny.publish(self.root / f"tokenizers/{name}/manifest.json", "tokenizer", files)

    def task(self, name: str, settings: dict, documents: list[dict] | None = None) -> str:
        """Write a task over `documents` (default: 10 items)."""
        file = self.tasks / f"{name}.jsonl"
        lines = [json.dumps(document) for document in (items(10) if documents is None else documents)]
        file.write_text("\n".join(lines) + "\n")
        data = {"dataset_path": "json", "dataset_kwargs": {"data_files": {"test": str(file), "train": str(file)}}}
        return self.file(name, {"task": name} | data | {"test_split": "test"} | settings)

    def file(self, name: str, content: dict) -> str:
        (self.tasks / f"{name}.yaml").write_text(yaml.dump(content, Dumper=Dumper))
        return name

    def cases(self, folder: Path) -> None:
        """Copy the tasks of a folder of cases; the path that they name becomes this one's."""
        for file in folder.iterdir():
            text = file.read_text(encoding="utf-8").replace("FOLDER", str(self.tasks))
            text = text.replace("test: join.jsonl", f"test: {self.tasks}/join.jsonl")
            (self.tasks / file.name).write_text(text, encoding="utf-8")

    def evaluate(self, model: str, tasks: list[str], suite: str = "suite", tokenizer: str = "t", **settings) -> Path:
        """Run a suite of tasks; the folder of its results."""
        spec = {
            "model": {"name": model, "path": str(self.folder / model), "dtype": "auto"},
            "suite": {"kind": "lm_eval", "tasks": tasks, "include_path": str(self.tasks), "batch_size": 4} | settings,
            "seed": 0,
            "inputs": {"tokenizer": tiny.entry(f"tokenizers/{tokenizer}/manifest.json")},
        }
        evaluate.main(tiny.argv(self.root, f"evaluations/{model}/{suite}/manifest.json", spec))
        return self.root / f"evaluations/{model}/{suite}"

    def results(self, *arguments, **settings) -> dict:
        return json.loads((self.evaluate(*arguments, **settings) / "results.json").read_text())
