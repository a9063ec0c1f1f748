"""Tasks of the LM Evaluation Harness through its Python interface, and its results as plain rows."""

import difflib
import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

from stages.core.errors import UserError

if TYPE_CHECKING:
    from lm_eval.tasks import TaskManager
    from transformers import PreTrainedModel, PreTrainedTokenizerBase


def built_task(folder: Path, name: str) -> dict[str, Any]:
    """Return the task that stages.cloze_task wrote into `folder` as a config that works wherever the folder lies."""
    import yaml
    from datasets import Dataset

    config = yaml.safe_load((folder / f"{name}.yaml").read_text(encoding="utf-8"))
    file = folder / config.pop("dataset_kwargs")["data_files"]["test"]
    with open(file, encoding="utf-8") as stream:
        items = [json.loads(line) for line in stream]
    # lm-eval would look for the file in the working directory and keep a copy in the user's cache.
    return config | {"custom_dataset": lambda **_: {"test": Dataset.from_list(items)}}


def task_manager(names: list[str], include_path: str | None) -> "TaskManager":
    """Return lm-eval's TaskManager that knows `names`; UserError with the nearest names for one it does not know.

    Its own task folder is only read when a name is not found in `include_path` (reading it takes seconds).
    """
    from lm_eval.tasks import TaskManager

    if include_path and not Path(include_path).is_dir():
        raise UserError(f"The task folder {include_path} does not exist: correct `include_path` of the suite.")
    manager = TaskManager(include_path=include_path, include_defaults=False)
    if any(name not in manager.all_tasks for name in names):
        manager = TaskManager(include_path=include_path, include_defaults=True)
    for name in names:
        if name not in manager.all_tasks:
            near = difflib.get_close_matches(name, manager.all_tasks, 3, 0.5)
            hint = f"; nearest: {', '.join(near)}" if near else ""
            where = f" nor {include_path}" if include_path else ""
            raise UserError(
                f"lm-eval has no task {name!r}{where}{hint}: correct `tasks` of the suite, or set `include_path`."
            )
    return manager


def run_tasks(
    model: "PreTrainedModel",
    tokenizer: "PreTrainedTokenizerBase",
    tasks: list[str | dict[str, Any]],
    manager: "TaskManager",
    suite: dict[str, Any],
    seed: int,
) -> dict[str, Any]:
    """Return what `lm_eval.simple_evaluate` does for a loaded model; UserError when a data set is not to be had."""
    import lm_eval
    from lm_eval.models.huggingface import HFLM

    if suite.get("apply_chat_template") and not tokenizer.chat_template:
        raise UserError(
            "The suite asks for apply_chat_template but the tokenizer has no chat template: set it to false."
        )
    wrapped = HFLM(pretrained=model, tokenizer=tokenizer, batch_size=suite.get("batch_size") or 16)
    try:
        return lm_eval.simple_evaluate(
            model=wrapped,
            tasks=tasks,
            task_manager=manager,
            num_fewshot=suite.get("num_fewshot"),
            limit=suite.get("limit"),
            apply_chat_template=bool(suite.get("apply_chat_template")),
            log_samples=True,
            bootstrap_iters=1000,
            random_seed=seed,
            numpy_random_seed=seed,
            torch_random_seed=seed,
            fewshot_random_seed=seed,
        )
    except (ConnectionError, FileNotFoundError) as error:
        first = str(error).strip().splitlines()[0]
        raise UserError(f"lm-eval cannot load the data of {', '.join(map(_task_name, tasks))}: {first}") from None


def result_rows(results: dict[str, Any]) -> list[dict[str, Any]]:
    """Return the metrics as rows {task, metric, filter, value, stderr, n, num_fewshot, version, higher_is_better}."""
    rows = []
    for task, values in sorted(results["results"].items()):
        for key, value in sorted(values.items()):
            metric, _, kind = key.partition(",")
            if metric.endswith("_stderr") or not isinstance(value, int | float) or not kind:
                continue
            stderr = values.get(f"{metric}_stderr,{kind}")
            samples = results.get("n-samples", {}).get(task, {})
            rows.append(
                {
                    "task": task,
                    "metric": metric,
                    "filter": kind,
                    "value": float(value),
                    "stderr": float(stderr) if isinstance(stderr, int | float) else None,
                    "n": samples.get("effective"),
                    "num_fewshot": results.get("n-shot", {}).get(task),
                    "version": results.get("versions", {}).get(task),
                    "higher_is_better": results.get("higher_is_better", {}).get(task, {}).get(metric, True),
                }
            )
    return rows


def sample_rows(results: dict[str, Any]) -> list[dict[str, Any]]:
    """Return one row {task, doc_id, filter, metric, value} per document and numeric metric."""
    rows = []
    for task, samples in sorted(results.get("samples", {}).items()):
        for sample in samples:
            for metric in sample.get("metrics", []):
                value = sample.get(metric)
                if isinstance(value, bool | int | float):
                    place = {"task": task, "doc_id": int(sample["doc_id"]), "filter": sample.get("filter", "none")}
                    rows.append(place | {"metric": metric, "value": float(value)})
    return sorted(rows, key=lambda row: (row["task"], row["filter"], row["metric"], row["doc_id"]))


def _task_name(task: str | dict[str, Any]) -> str:
    return task["task"] if isinstance(task, dict) else str(task)
