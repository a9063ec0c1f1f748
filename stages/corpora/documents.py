"""Read documents from local files, the Hub and Python's own documentation."""

import heapq
import json
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from stages.core.errors import UserError
from stages.corpora.cutting import cut_text

# ShareGPT names its keys and roles otherwise.
_ROLE_NAMES = {"human": "user", "gpt": "assistant", "bot": "assistant"}


@dataclass(frozen=True)
class Document:
    """A document: (role, text) pairs, role "text" for plain text; whether it `starts` and `ends` its source."""

    slots: tuple[tuple[str, str], ...]
    starts: bool = True
    ends: bool = True


def read_documents(spec: dict[str, Any]) -> Iterator[Document]:
    """Yield the documents that a corpus spec names, in a fixed order.

    UserError names the file and the line, byte or column at fault.
    """
    kind, column, messages = spec["kind"], spec.get("column"), spec.get("messages")
    if kind == "python_docs":
        from stages.corpora.python_docs import python_documents

        return (Document((("text", text),)) for text in python_documents())
    if kind == "hub":
        return _documents(_hub_rows(spec), column, messages, f"data set {spec['path']}")
    files = sorted(Path(path).expanduser() for path in spec["files"])
    if kind == "txt":
        return (document for path in files for document in _text_documents(path, spec["max_bytes"]))
    if kind == "jsonl":
        return (document for path in files for document in _documents(_json_rows(path), column, messages, str(path)))
    if kind == "parquet":
        wanted = [name for name in (column, messages) if name]
        return (d for path in files for d in _documents(_parquet_rows(path, wanted), column, messages, str(path)))
    raise UserError(f"Corpus kind {kind!r} is unknown; use hub, jsonl, parquet, txt, python_docs or subset.")


def sampled(documents: Iterable[Document], count: int | None, rank: Any) -> Iterable[Document]:
    """Return at most `count` documents, those of the lowest `rank`(document), in their order; all when None."""
    if count is None:
        return documents
    numbered = ((rank(document), number, document) for number, document in enumerate(documents))
    chosen = heapq.nsmallest(count, numbered, key=lambda item: item[:2])
    return [document for _, _, document in sorted(chosen, key=lambda item: item[1])]


def _text_documents(path: Path, max_bytes: int) -> Iterator[Document]:
    """Yield the pieces of a text file, each a document of its own: one file can be both trained and held out."""
    pieces = cut_text(_decoded(path, path.read_bytes()), max_bytes)
    for number, piece in enumerate(pieces):
        yield Document((("text", piece),), number == 0, number == len(pieces) - 1)


def _decoded(path: Path, data: bytes) -> str:
    try:
        return data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = data.count(b"\n", 0, error.start) + 1
        raise UserError(
            f"{path}: byte {error.start} (line {line}) is not UTF-8; convert the file, for instance with iconv."
        ) from None


def _json_rows(path: Path) -> Iterator[dict[str, Any]]:
    offset = 0
    with open(path, "rb") as stream:
        for number, line in enumerate(stream, 1):
            if line.strip():
                yield _json_row(path, number, offset, line)
            offset += len(line)


def _json_row(path: Path, number: int, offset: int, line: bytes) -> dict[str, Any]:
    try:
        row = json.loads(line.decode("utf-8-sig"))
    except UnicodeDecodeError as error:
        place = f"byte {offset + error.start} (line {number})"
        raise UserError(f"{path}: {place} is not UTF-8; convert the file, for instance with iconv.") from None
    except (ValueError, RecursionError) as error:
        raise UserError(f"{path}: line {number} is not JSON ({error}); correct or remove the line.") from None
    if not isinstance(row, dict):
        raise UserError(f"{path}: line {number} is a JSON {type(row).__name__}, expected an object with a text column.")
    return row


def _parquet_rows(path: Path, columns: Sequence[str]) -> Iterator[dict[str, Any]]:
    try:
        file = pq.ParquetFile(path)
        names = file.schema_arrow.names
        present = [name for name in columns or ("messages", "text") if name in names]
        if not present:
            yield dict.fromkeys(names)
        for batch in file.iter_batches(batch_size=1024, columns=present or []):
            yield from batch.to_pylist()
    except UnicodeDecodeError as error:
        raise UserError(f"{path} holds text that is not UTF-8 ({error.reason}): write the file again.") from None
    except (pa.ArrowException, OSError) as error:
        reason = str(error).splitlines()[0]
        raise UserError(f"{path} cannot be read as Parquet ({reason}): it is damaged or cut off; restore it.") from None


def _hub_rows(spec: dict[str, Any]) -> Iterator[dict[str, Any]]:
    """Yield the rows of a data set of the Hub. When streamed, `sample` takes the first ones: the rest is never seen."""
    import datasets

    datasets.disable_progress_bars()
    arguments = {"name": spec.get("name"), "split": spec.get("split") or "train", "revision": spec.get("revision")}
    streaming = bool(spec.get("streaming"))
    rows: Iterable[dict[str, Any]] = _asked(
        spec, lambda: datasets.load_dataset(spec["path"], **arguments, streaming=streaming)
    )
    left = iter(islice(rows, spec["sample"]) if streaming and spec.get("sample") else rows)
    # A stream reads files, and meets the network, as it goes.
    while (row := _asked(spec, lambda: next(left, None))) is not None:
        yield row


def _asked(spec: dict[str, Any], ask: Callable[[], Any]) -> Any:
    from datasets.exceptions import DatasetsError

    try:
        return ask()
    except (OSError, ValueError, DatasetsError) as error:
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise UserError(
            f"Data set {spec['path']} cannot be loaded ({reason}): check its name, split and network."
        ) from None


def _documents(
    rows: Iterable[dict[str, Any]], column: str | None, messages: str | None, where: str
) -> Iterator[Document]:
    for number, row in enumerate(rows, 1):
        key = messages or column or ("messages" if "messages" in row else "text")
        if key not in row:
            raise UserError(
                f"{where}, row {number}: no column {key}; it has {', '.join(row)}: set `column` or `messages`."
            )
        chat = messages is not None or (column is None and key == "messages")
        slots = _turns(row[key], f"{where}, row {number}") if chat else (("text", row[key]),)
        for _, text in slots:
            _check_text(text, f"{where}, row {number}, column {key}")
        if any(text for _, text in slots):
            yield Document(tuple(slots))


def _turns(messages: Any, where: str) -> list[tuple[str, Any]]:
    if not isinstance(messages, list):
        raise UserError(f"{where}: messages are {type(messages).__name__}, expected a list of {{role, content}}.")
    turns = []
    for message in messages:
        if not isinstance(message, dict) or not {"role", "from"} & message.keys():
            raise UserError(f"{where}: a message has no role; expected {{role, content}}.")
        role = message.get("role") or message.get("from")
        if not isinstance(role, str):
            raise UserError(f"{where}: the role of a message is {role!r}, expected a name such as user or assistant.")
        content = message.get("content", message.get("value"))
        if isinstance(content, list):
            parts = [(part.get("text") or "") if isinstance(part, dict) else part for part in content]
            content = "".join(parts) if all(isinstance(part, str) for part in parts) else parts
        # A plain text is told from a chat by its role, so no turn may have that name.
        turns.append((_ROLE_NAMES.get(role, role) if role != "text" else "user", "" if content is None else content))
    return turns


def _check_text(text: Any, where: str) -> None:
    if not isinstance(text, str):
        raise UserError(f"{where}: found {type(text).__name__}, expected text; choose another column.")
    if not text.isascii():
        try:
            text.encode()
        except UnicodeEncodeError as error:
            found = f"character {error.start} is half of a surrogate pair"
            raise UserError(f"{where}: {found}, which UTF-8 cannot say; repair the row.") from None
