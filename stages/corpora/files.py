"""Rows of data files as people publish them: compressed or not, in any Unicode encoding, as lines or as one array."""

import bz2
import gzip
import io
import json
import lzma
import re
import zlib
from collections.abc import Iterator, Sequence
from typing import Any, BinaryIO

import pyarrow as pa
import pyarrow.parquet as pq

from stages.core.errors import UserError, reason_of

Row = dict[str, Any]

_HEAD = 512
_COMPRESSED = {
    rb"\x1f\x8b\x08": lambda stream: gzip.GzipFile(fileobj=stream),
    rb"BZh[1-9]1AY&SY": bz2.BZ2File,
    rb"\xfd7zXZ\0": lzma.LZMAFile,
    rb"\x28\xb5\x2f\xfd": lambda stream: pa.CompressedInputStream(pa.PythonFile(stream, "r"), "zstd"),
    rb"\x04\x22\x4d\x18": lambda stream: pa.CompressedInputStream(pa.PythonFile(stream, "r"), "lz4"),
}
_NO_TEXT = {
    rb"PAR1": "a Parquet file: set `kind: parquet`",
    rb"PK\x03\x04": "a zip archive (.zip, .xlsx, .npz): unpack or export it",
    rb".{257}ustar": "a tar archive: unpack it",
    rb"ARROW1|\xff\xff\xff\xff": "an Arrow file: save it as Parquet",
    rb"SQLite format 3": "an SQLite database: export the table",
    rb"\x89HDF": "an HDF5 file: export the text",
    rb"\x80[\x02-\x05]": "a Python pickle: save the text as JSON lines",
}
_NO_JSON = {
    rb"version https://git-lfs": "a Git LFS pointer, not the data: run `git lfs pull`",
    rb"\s*<": "HTML or XML, perhaps an error page: download the data again",
    rb"[^\n{\[]*(\n|\Z)": "text or a table such as CSV, not JSON: save it as JSON lines or Parquet, or set `kind: txt`",
}
# An array of objects, or an object that goes on in the next line.
_OBJECTS = re.compile(r"\s*(\[\s*\{|\{\s*\n)")
_BETWEEN = re.compile(r"[\s,]*")
# What reading a file raises, above all one that was compressed and then cut off.
_DAMAGED = (OSError, EOFError, zlib.error, lzma.LZMAError, pa.ArrowException)


def rows_of(kind: str, stream: BinaryIO, name: str, columns: Sequence[str]) -> Iterator[Row]:
    """Yield the rows of an open file of a kind, jsonl or parquet; of other columns than `columns` nothing is needed."""
    return parquet_rows(stream, name, columns) if kind == "parquet" else json_rows(stream, name)


def text_of(stream: BinaryIO, name: str) -> str:
    """Return the text of a file, compressed or not. UserError says what it is when it is no text."""
    plain = _plain(stream, name)
    try:
        data = plain.read()
    except _DAMAGED as error:
        raise _unreadable(name, error) from None
    encoding = json.detect_encoding(data)
    try:
        return data.decode(encoding)
    except UnicodeDecodeError as error:
        raise _misread(name, error, error.start, data.count(b"\n", 0, error.start) + 1) from None


def json_rows(stream: BinaryIO, name: str) -> Iterator[Row]:
    """Yield the objects of a file of JSON lines, or of one array of objects; a `null` among them is an empty row.

    UserError says what the file is when it is neither, or which line or object is at fault.
    """
    plain = _plain(stream, name)
    head = plain.peek(_HEAD)[:_HEAD]
    encoding = json.detect_encoding(head)
    objects = _OBJECTS.match(head.decode(encoding, "ignore"))
    for place, value in _values(plain, encoding, name) if objects else _lines(plain, encoding, name, head):
        if not isinstance(value, dict | None):
            kind = type(value).__name__
            raise UserError(f"{name}: {place} is a JSON {kind}, expected an object with a text column.")
        yield value or {}


def parquet_rows(stream: BinaryIO, name: str, columns: Sequence[str]) -> Iterator[Row]:
    """Yield the rows of a Parquet file with those of `columns` that it has; no other column is read.

    Of a file that has none of them, all columns with None. UserError when the file is damaged or something else.
    """
    try:
        file = pq.ParquetFile(stream)
        names = file.schema_arrow.names
        present = [column for column in columns if column in names]
        if not present:
            yield from (dict.fromkeys(names) for _ in range(file.metadata.num_rows))
            return
        for batch in file.iter_batches(batch_size=1024, columns=present):
            yield from batch.to_pylist()
    except UnicodeDecodeError as error:
        raise UserError(f"{name} holds text that is not UTF-8 ({error.reason}): write the file again.") from None
    except (pa.ArrowException, OSError, ValueError) as error:
        stream.seek(0)
        is_parquet = stream.read(4) == b"PAR1"
        advice = "it is damaged or cut off; restore it" if is_parquet else "it is no Parquet file; set another `kind`"
        raise UserError(f"{name} cannot be read as Parquet ({reason_of(error)}): {advice}.") from None


def _plain(stream: BinaryIO, name: str) -> io.BufferedReader:
    """Return the file without its compression; UserError when what is in it is known to be no text."""
    plain = io.BufferedReader(stream)
    try:
        while opener := _first(_COMPRESSED, plain.peek(_HEAD)):
            plain = io.BufferedReader(opener(plain))
        what = _first(_NO_TEXT, plain.peek(_HEAD))
    except _DAMAGED as error:
        raise _unreadable(name, error) from None
    if what:
        raise UserError(f"{name} is {what}.")
    return plain


def _first(patterns: dict[bytes, Any], head: bytes) -> Any:
    return next((value for pattern, value in patterns.items() if re.match(pattern, head, re.DOTALL)), None)


def _lines(plain: io.BufferedReader, encoding: str, name: str, head: bytes) -> Iterator[tuple[str, Any]]:
    """Yield (place, value) of every line that is not blank."""
    is_utf8 = encoding.startswith("utf-8")
    offset = number = 0
    try:
        for line in plain if is_utf8 else io.TextIOWrapper(plain, encoding, newline="\n"):
            number += 1
            if line.strip():
                yield f"line {number}", json.loads(line.decode("utf-8-sig") if is_utf8 else line)
            offset += len(line)
    except UnicodeDecodeError as error:
        raise _misread(name, error, offset + error.start, number + (not is_utf8)) from None
    except (ValueError, RecursionError) as error:
        what = _first(_NO_JSON, head) if number == 1 else None
        if what:
            raise UserError(f"{name} is {what}.") from None
        raise UserError(f"{name}: line {number} is not JSON ({error}); correct or remove the line.") from None
    except _DAMAGED as error:
        raise _unreadable(name, error) from None


def _values(plain: io.BufferedReader, encoding: str, name: str) -> Iterator[tuple[str, Any]]:
    """Yield (place, value) of every value of an array, or of values one after the other, without holding all of them.

    The standard library reads a whole value or nothing, so what is at hand grows until the next value is whole.
    """
    text, decoder = io.TextIOWrapper(plain, encoding), json.JSONDecoder()
    buffer, at, number, wanted = "", 0, 0, 1 << 16
    in_array = False
    while True:
        at = _BETWEEN.match(buffer, at).end()
        if number == 0 and not in_array and buffer[at : at + 1] == "[":
            in_array, at = True, at + 1
            continue
        if buffer[at : at + 1] == "]":
            return
        try:
            value, at = decoder.raw_decode(buffer, at)
        except (ValueError, RecursionError) as error:
            try:
                more = text.read(wanted) if _may_go_on(error, buffer, at) else ""
            except UnicodeDecodeError as fault:
                raise _misread(name, fault, fault.start, buffer.count("\n") + 1) from None
            except _DAMAGED as fault:
                raise _unreadable(name, fault) from None
            if more:
                buffer, at, wanted = buffer[at:] + more, 0, 2 * wanted
            elif at == len(buffer) and not in_array:
                return
            else:
                what = "is cut off" if at == len(buffer) else f"is not JSON ({error})"
                raise UserError(f"{name}: object {number + 1} {what}; correct or restore the file.") from None
            continue
        number, wanted = number + 1, 1 << 16
        yield f"object {number}", value


def _may_go_on(error: Exception, buffer: str, at: int) -> bool:
    """Return whether a value may only be cut: what is wrong is near the end of what was read, or a text has no end."""
    near_end = 16  # the longest token that could be cut, "\\ud83d\\udc4d"
    position = getattr(error, "pos", at)
    return "Unterminated string" in str(error) or position >= len(buffer) - near_end


def _unreadable(name: str, error: Exception) -> UserError:
    why = "it is cut off, damaged or out of reach; restore it and run again"
    return UserError(f"{name} cannot be read to its end ({reason_of(error)}): {why}.")


def _misread(name: str, error: UnicodeDecodeError, position: int, line: int) -> UserError:
    encoding = error.encoding.upper()
    place = f"byte {position} (line {line})"
    return UserError(f"{name}: {place} is not {encoding}; convert the file, for instance with iconv.")
