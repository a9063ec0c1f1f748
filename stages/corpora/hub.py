"""Rows of a data set of the Hub, or of a local folder in its layout: the one place that calls `datasets`."""

from collections.abc import Callable, Iterator, Sequence
from itertools import islice
from typing import Any

from stages.core.errors import UserError, reason_of
from stages.corpora.files import Row, rows_of


def hub_rows(spec: dict[str, Any], columns: Sequence[str]) -> Iterator[Row]:
    """Yield the rows of a split with those of `columns` that it has. When streamed, `sample` takes the first ones.

    JSON and Parquet files are found by `datasets` and read as local ones are: the library gives all files of a data
    set one schema, and fails where columns that nobody asked for differ. UserError with the library's own reason.
    """
    rows = _guarded(spec, lambda: _rows(spec, columns))
    return islice(rows, spec["sample"]) if spec.get("streaming") and spec.get("sample") else rows


def _rows(spec: dict[str, Any], columns: Sequence[str]) -> Iterator[Row]:
    import datasets
    import fsspec

    datasets.disable_progress_bars()
    path, split, streaming = spec["path"], spec.get("split") or "train", bool(spec.get("streaming"))
    where = {"name": spec.get("name"), "revision": spec.get("revision")}
    builder = datasets.load_dataset_builder(path, **where)
    files = (builder.config.data_files or {}).get(split)
    kind = {"json": "jsonl", "parquet": "parquet"}.get(builder.name)
    if files and kind:
        for url in files if streaming else datasets.DownloadManager().download(list(files)):
            with fsspec.open(url, "rb") as stream:
                yield from rows_of(kind, stream, url, columns)
        return
    table = datasets.load_dataset(path, **where, split=split, streaming=streaming)
    present = [column for column in columns if column in (table.column_names or ())]
    yield from table.select_columns(present) if present else table


def _guarded(spec: dict[str, Any], ask: Callable[[], Iterator[Row]]) -> Iterator[Row]:
    """Yield what the library gives; whatever it raises, at once or as a stream meets the network, is one sentence."""
    try:
        yield from ask()
    except UserError:
        raise
    except Exception as error:
        advice = "check its name, split and network"
        raise UserError(f"Data set {spec['path']} cannot be loaded ({reason_of(error)}): {advice}.") from None
