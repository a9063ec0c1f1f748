"""Read documents from local files, the Hub and Python's own documentation."""

import heapq
from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from stages.core.errors import UserError
from stages.corpora.cutting import Turn, cut_text
from stages.corpora.files import Row, rows_of, text_of
from stages.corpora.messages import NotText, turns_of


@dataclass(frozen=True)
class Document:
    """A document: its turns, one of role "text" for plain text; whether it `starts` and `ends` its source."""

    slots: tuple[Turn, ...]
    starts: bool = True
    ends: bool = True


def read_documents(spec: dict[str, Any], counts: Counter[str]) -> Iterator[Document]:
    """Yield the documents that a corpus spec names, in a fixed order.

    `counts` gets "rows", "empty_rows", which have no text (null, "" or no such column), and "refused_rows", which hold
    more than text. UserError names the file and the line, byte or
    column at fault.
    """
    kind, column, messages = spec["kind"], spec.get("column"), spec.get("messages")
    columns = {name: name == messages for name in (messages, column) if name} or {"messages": True, "text": False}
    if kind == "python_docs":
        from stages.corpora.python_docs import python_documents

        return (Document((Turn("text", text),)) for text in python_documents())
    if kind == "hub":
        from stages.corpora.hub import hub_rows

        return _documents(hub_rows(spec, list(columns)), columns, f"data set {spec['path']}", counts)
    files = sorted(Path(path).expanduser() for path in spec["files"])
    if kind == "txt":
        return (document for path in files for document in _text_documents(path, spec["max_bytes"]))
    if kind in ("jsonl", "parquet"):
        tables = ((str(path), _file_rows(path, kind, list(columns))) for path in files)
        return (document for name, rows in tables for document in _documents(rows, columns, name, counts))
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
    with open(path, "rb") as stream:
        pieces = cut_text(text_of(stream, str(path)), max_bytes)
    for number, piece in enumerate(pieces):
        yield Document((Turn("text", piece),), number == 0, number == len(pieces) - 1)


def _file_rows(path: Path, kind: str, columns: list[str]) -> Iterator[Row]:
    with open(path, "rb") as stream:
        yield from rows_of(kind, stream, str(path), columns)


def _documents(rows: Iterable[Row], columns: dict[str, bool], where: str, counts: Counter[str]) -> Iterator[Document]:
    """Yield the documents of one file or data set; `columns` says of each column whether it holds chats."""
    found, names = False, ()
    for number, row in enumerate(rows, 1):
        names = names or tuple(row)
        found = found or any(column in row for column in columns)
        counts["rows"] += 1
        try:
            slots = _slots(row, columns, f"{where}, row {number}")
        except NotText:
            counts["refused_rows"] += 1
            continue
        if slots:
            yield Document(slots)
        else:
            counts["empty_rows"] += 1
    if names and not found:
        raise UserError(
            f"{where}: no column {list(columns)[-1]}; it has {', '.join(names)}: set `column` or `messages`."
        )


def _slots(row: Row, columns: dict[str, bool], where: str) -> tuple[Turn, ...]:
    """Return the turns of the first column with text in it, () when none has any."""
    for column, is_chat in columns.items():
        value = row.get(column)
        # What writers of tables call nothing: null, NaN, no turns.
        if value is None or value != value or value == []:
            continue
        found = turns_of(value, where) if is_chat else [Turn("text", value)]
        turns = tuple(turn._replace(text=_text(turn.text, f"{where}, column {column}")) for turn in found)
        if any(turn.text or turn.extra for turn in turns):
            return turns
    return ()


def _text(value: Any, where: str) -> str:
    """Return the text of a cell; some writers of Parquet call it bytes. UserError when it is none."""
    try:
        text = value.decode() if isinstance(value, bytes) else value
        if not isinstance(text, str):
            raise UserError(f"{where}: found {type(value).__name__}, expected text; choose another column.")
        if not text.isascii():
            text.encode()
    except UnicodeDecodeError as error:
        raise UserError(f"{where}: byte {error.start} is not UTF-8; repair the row.") from None
    except UnicodeEncodeError as error:
        found = f"character {error.start} is half of a surrogate pair"
        raise UserError(f"{where}: {found}, which UTF-8 cannot say; repair the row.") from None
    return text
