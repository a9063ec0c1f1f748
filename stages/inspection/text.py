"""Text for a terminal: tables, shortened values, readable bytes and sizes."""

from collections.abc import Iterable, Sequence
from typing import Any

WIDTH = 60


def table(header: Sequence[str], rows: Iterable[Sequence[Any]], indent: str = "  ") -> str:
    """Return aligned columns; numbers to the right, cells at most WIDTH characters."""
    values = [list(row) for row in rows]
    cells = [[cell(value) for value in row] for row in values]
    columns = range(len(header))
    numeric = [all(isinstance(row[i], int | float | None) for row in values) for i in columns]
    widths = [max([len(name), *(len(row[i]) for row in cells)]) for i, name in enumerate(header)]
    lines = []
    for row in [list(header), *cells]:
        parts = [
            value.rjust(width) if right else value.ljust(width)
            for value, width, right in zip(row, widths, numeric, strict=True)
        ]
        lines.append((indent + "  ".join(parts)).rstrip())
    return "\n".join(lines)


def cell(value: Any) -> str:
    """Return one value as a short single line."""
    if value is None:
        return "-"
    if isinstance(value, float):
        return f"{value:.4g}"
    if isinstance(value, bytes):
        return shorten(readable(value))
    return shorten(str(value).replace("\n", "⏎"))


def shorten(text: str, width: int = WIDTH) -> str:
    """Return `text` cut to `width` characters with an ellipsis."""
    return text if len(text) <= width else text[: width - 1] + "…"


def readable(content: bytes) -> str:
    """Return bytes as quoted text; whitespace and what is no UTF-8 as escapes."""
    text = content.decode("utf-8", "backslashreplace")
    return '"' + "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in text) + '"'


def size(count: int) -> str:
    """Return a number of bytes with a unit."""
    value = float(count)
    for unit in ("B", "KiB", "MiB", "GiB"):
        if value < 1024 or unit == "GiB":
            return f"{value:.0f} {unit}" if unit == "B" else f"{value:.1f} {unit}"
        value /= 1024
    raise AssertionError
