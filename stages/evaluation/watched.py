"""lm-eval while it runs: what it raises becomes one sentence, what it logs is heard, and one failing metric is one."""

import functools
import logging
import math
import sys
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from stages.core.errors import UserError

if TYPE_CHECKING:
    from lm_eval.api.task import Task

LONGEST = 300  # characters of another library's words
LARGEST = 1e150  # number that can be squared


def words(error: Exception) -> str:
    """Return an exception as words: type, message, and the line of code that raised it."""
    where = traceback.extract_tb(error.__traceback__)[-1]
    text = f": {shortened(str(error))}" if str(error) else ""
    return f"{type(error).__name__}{text} ({Path(where.filename).name}, line {where.lineno})"


def shortened(text: str) -> str:
    """Return a text on one line of at most LONGEST characters."""
    line = " ".join(text.split())
    return line if len(line) <= LONGEST else f"{line[:LONGEST]}…"


@contextmanager
def sentence(failed: str, heard: "Warnings | None" = None) -> Iterator[None]:
    """Raise what is raised inside as a UserError that begins with `failed`, and with what was `heard` meanwhile."""
    before = heard.last if heard else None
    try:
        yield
    except UserError:
        raise
    except Exception as error:
        said = f"; before that: {shortened(heard.last)}" if heard and heard.last is not before else ""
        raise UserError(f"{failed}: {words(error)}{said}; correct the task or the suite.") from error


class Warnings(logging.Handler):
    """What a library logs as a warning or worse; the first of each place in its code goes to the log at once."""

    def __init__(self) -> None:
        super().__init__(logging.WARNING)
        self.places: dict[tuple[str, int], list[Any]] = {}
        self.last: str | None = None

    def emit(self, record: logging.LogRecord) -> None:
        """Keep a record."""
        self.last = record.getMessage()
        place = self.places.setdefault((record.pathname, record.lineno), [record.funcName, self.last, 0])
        place[2] += 1
        if place[2] == 1:
            print(f"{record.name}: {place[1]}", file=sys.stderr, flush=True)

    def clear(self) -> None:
        """Forget what was heard so far."""
        self.places.clear()

    def lines(self, without: tuple[str, ...]) -> list[str]:
        """Return each place's first message and how often it spoke, but for functions in `without`."""
        found = [(shortened(text), count) for function, text, count in self.places.values() if function not in without]
        return [text if count == 1 else f"{text} ({count} times)" for text, count in found]


@contextmanager
def heard() -> Iterator[Warnings]:
    """Yield what lm-eval logs meanwhile."""
    handler, logger = Warnings(), logging.getLogger("lm_eval")
    logger.addHandler(handler)
    try:
        yield handler
    finally:
        logger.removeHandler(handler)


def watch(name: str, task: "Task") -> list[tuple[str, str]]:
    """Make a task name itself and its document when it fails, and one failing aggregation leave the others alone.

    Returned is a list that fills with (task, sentence) of the aggregations that fail or that the task lacks.
    """
    notes: list[tuple[str, str]] = []
    for method, given in (("fewshot_context", object), ("construct_requests", object), ("process_results", dict)):
        setattr(task, method, _of_document(name, task, getattr(task, method), given))
    task.apply_filters = _of_task(name, task.apply_filters)
    functions = task.aggregation
    task.aggregation = lambda: _Aggregations(name, functions(), notes)
    return notes


def _of_task(name: str, method: Callable[..., Any]) -> Callable[..., Any]:
    def call(*arguments: Any, **named: Any) -> Any:
        with sentence(f"Task {name} failed in its filters"):
            return method(*arguments, **named)

    return call


def _of_document(name: str, task: "Task", method: Callable[..., Any], given: type) -> Callable[..., Any]:
    def call(*arguments: Any, **named: Any) -> Any:
        try:
            found = method(*arguments, **named)
            if not isinstance(found, given):
                raise TypeError(f"found {type(found).__name__}, expected {given.__name__}")
            return found
        except Exception as error:
            document = named["doc"] if "doc" in named else arguments[0]
            number = next((str(i) for i, other in enumerate(task.eval_docs) if other == document), "?")
            raise UserError(
                f"Task {name}, document {number}: {method.__name__} failed with {words(error)}; correct the task."
            ) from error

    return call


class _Aggregations:
    """The aggregation functions of a task, as lm-eval asks for them: by name, the mean where a metric has none."""

    def __init__(self, task: str, functions: dict[str, Callable], notes: list[tuple[str, str]]) -> None:
        self.task, self.functions, self.notes = task, functions, notes

    def __getitem__(self, metric: str) -> "_Aggregation":
        from lm_eval.api.metrics import mean

        if metric not in self.functions:
            self.notes.append((self.task, f"{metric} has no aggregation in the task: its mean is taken"))
        return _Aggregation(self.task, metric, self.functions.get(metric, mean), self.notes)


class _Aggregation:
    """An aggregation function that gives nan, and a note of its first call, where it fails or gives no number.

    It equals the function that it stands for, by which lm-eval looks the standard error up, unless that would fail.
    """

    def __init__(self, task: str, metric: str, function: Callable, notes: list[tuple[str, str]]) -> None:
        functools.update_wrapper(self, function)
        self.task, self.metric, self.function, self.notes = task, metric, function, notes
        self.works: bool | None = None

    def __call__(self, items: list[Any]) -> float:
        try:
            value = self.function(items)
            if isinstance(value, str | bytes):
                raise TypeError(f"{value!r} is no number")
            value = float(value)
        except Exception as error:
            if self.works is None:
                self.notes.append((self.task, f"{self.metric} cannot be aggregated ({words(error)})"))
            self.works = bool(self.works)
            return math.nan
        if self.works is None:
            # lm-eval squares what it takes the mean of for the standard error.
            self.works = not any(isinstance(item, float) and LARGEST < abs(item) < math.inf for item in items)
        return value

    def __eq__(self, other: object) -> bool:
        return bool(self.works) and other == self.function

    def __hash__(self) -> int:
        return hash(self.function)
