"""Tasks of the LM Evaluation Harness through its Python interface: the one place where it is called."""

import difflib
import json
import os
from pathlib import Path
from typing import TYPE_CHECKING, Any

from stages.core.errors import UserError
from stages.evaluation.results import Table, table
from stages.evaluation.watched import Warnings, heard, sentence, watch

if TYPE_CHECKING:
    from lm_eval.api.group import Group
    from lm_eval.api.task import Task
    from lm_eval.tasks import TaskManager
    from transformers import PreTrainedTokenizerBase

    from stages.models.description import Description

# Functions of lm-eval whose warnings are no news: what the suite asked for, and what AskedModel says by task.
TOLD = ("simple_evaluate", "_loglikelihood_tokens", "tok_batch_encode")


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
    with sentence(f"lm-eval cannot read the task files in {include_path}"):
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
    described: "Description",
    tokenizer: "PreTrainedTokenizerBase",
    tasks: list[str | dict[str, Any]],
    manager: "TaskManager",
    suite: dict[str, Any],
    seed: int,
) -> Table:
    """Return what `lm_eval.simple_evaluate` finds for a loaded model as rows; its notes say what changed the numbers.

    UserError, with task and document where they are known, for whatever fails in lm-eval, in a task or in its data.
    """
    import lm_eval

    from stages.evaluation.asked import AskedModel

    if suite.get("apply_chat_template") and not tokenizer.chat_template:
        raise UserError(
            "The suite asks for apply_chat_template but the tokenizer has no chat template: set it to false."
        )
    os.environ.setdefault("DISABLE_MULTIPROC", "1")  # else lm-eval forks this process once a core for standard errors
    with heard() as warnings:
        asked = AskedModel(described, tokenizer, suite.get("batch_size") or 16)
        named = _load(tasks, manager, warnings)
        with sentence("The suite's tasks do not go together", warnings):
            loaded = manager.load(named)
        notes = [watch(name, task) for name, task in loaded["tasks"].items()]
        warnings.clear()
        with sentence(f"lm-eval failed in {', '.join(map(_task_name, tasks))}", warnings):
            results = lm_eval.simple_evaluate(
                model=asked,
                tasks=named,
                task_manager=manager,
                num_fewshot=suite.get("num_fewshot"),
                limit=suite.get("limit"),
                apply_chat_template=bool(suite.get("apply_chat_template")),
                fewshot_as_multiturn=suite.get("fewshot_as_multiturn", True),
                log_samples=True,
                bootstrap_iters=1000,
                random_seed=seed,
                numpy_random_seed=seed,
                torch_random_seed=seed,
                fewshot_random_seed=seed,
            )
    failed = [note for part in notes for note in part]  # before the table asks for aggregations of its own
    made = table(results, loaded)
    made.notes += failed
    made.notes += [(task, f"{count} {text}") for (task, text), count in sorted(asked.notes.items())]
    made.notes += [("", text) for text in warnings.lines(without=TOLD)]
    wanted = suite.get("num_fewshot")
    for row in made.results:
        if wanted is not None and row["num_fewshot"] not in (None, wanted):
            given = f"is asked with {row['num_fewshot']} examples, as its file says, and not with {wanted}"
            made.notes.append((row["task"], given))
    made.notes = list(dict.fromkeys(made.notes))
    return made


def _load(tasks: list[str | dict[str, Any]], manager: "TaskManager", warnings: Warnings) -> "list[Task | Group]":
    """Return the task or group that each entry names, and all tasks of a tag."""
    found: dict[str, Any] = {}
    for spec in tasks:
        name = _task_name(spec)
        if name in found and isinstance(spec, dict):
            raise UserError(f"The suite names two tasks {name!r}, one of them built: rename it in evaluation.tasks.")
        with sentence(f"lm-eval cannot load task {name!r} or its data", warnings):
            part = manager.load([spec])
        inside = {child for group in part["groups"].values() for child in group.child_names}
        top = part["groups"] | part["tasks"]
        found |= {each: item for each, item in top.items() if each not in inside and each not in found}
    return list(found.values())


def _task_name(task: str | dict[str, Any]) -> str:
    return task["task"] if isinstance(task, dict) else str(task)
