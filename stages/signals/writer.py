"""Write teacher signals while the next ones are computed."""

import queue
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from stages.artifacts.tables import schema_with
from stages.signals.schema import BLOCKS, schema_of


class SignalWriter:
    """Row groups go into a bounded queue that one thread writes to disk; made by `writing`."""

    def __init__(self, path: Path, columns: list[str], identity: dict[str, str]) -> None:
        self._schema = schema_with(schema_of(columns), identity)
        plain = [name for name in columns if name in BLOCKS]
        packed = {name: "NONE" if name in plain else "ZSTD" for name in self._schema.names}
        # Lists are stored under their element: "input_ids.list.element".
        packed |= {f"{name}.list.element": "ZSTD" for name in self._schema.names}
        self._writer = pq.ParquetWriter(
            path,
            self._schema,
            compression=packed,
            use_dictionary=["input_ids.list.element"],
            write_page_checksum=True,
        )
        self._queue: queue.Queue[Any] = queue.Queue(maxsize=2)
        self._error: BaseException | None = None
        self._thread = threading.Thread(target=self._work, daemon=True)
        self._thread.start()

    def add(
        self,
        example_ids: list[str],
        exact: np.ndarray,
        input_ids: np.ndarray,
        offsets: np.ndarray,
        signals: dict[str, np.ndarray],
    ) -> None:
        """Queue one row group of B examples: `exact` bool [B], `offsets` int64 [B + 1], the rest [N] or [N, k]."""
        if self._error:
            raise self._error
        self._queue.put((example_ids, exact, input_ids, offsets, signals))

    def _work(self) -> None:
        while (item := self._queue.get()) is not None:
            if self._error is None:
                try:
                    self._writer.write_table(table_of(self._schema, *item))
                except BaseException as error:  # handed to the computing thread
                    self._error = error

    def close(self) -> None:
        """Write what is queued and the footer; raises what the writing thread met."""
        self._queue.put(None)
        self._thread.join()
        self._writer.close()
        if self._error:
            raise self._error


@contextmanager
def writing(path: Path, columns: list[str], identity: dict[str, str]) -> Iterator[SignalWriter]:
    """Yield a SignalWriter for a new file; it is complete when the block ends."""
    writer = SignalWriter(path, columns, identity)
    try:
        yield writer
    finally:
        writer.close()


def table_of(
    schema: pa.Schema,
    example_ids: list[str],
    exact: np.ndarray,
    input_ids: np.ndarray,
    offsets: np.ndarray,
    signals: dict[str, np.ndarray],
) -> pa.Table:
    """Return flat arrays as a table with one row per example; values are not copied."""
    lists = pa.array(offsets.astype(np.int32))
    columns: list[pa.Array] = [pa.array(example_ids, pa.string()), pa.array(exact)]
    columns.append(pa.ListArray.from_arrays(lists, pa.array(np.ascontiguousarray(input_ids, np.uint32))))
    for name in schema.names[3:]:
        if name in BLOCKS:
            block = np.ascontiguousarray(signals[name], BLOCKS[name])
            ends = pa.py_buffer(offsets.astype(np.int64) * (block.shape[1] * block.itemsize))
            buffers = [None, ends, pa.py_buffer(block)]
            columns.append(pa.LargeBinaryArray.from_buffers(pa.large_binary(), len(offsets) - 1, buffers))
        else:
            columns.append(pa.ListArray.from_arrays(lists, pa.array(np.ascontiguousarray(signals[name], np.float32))))
    return pa.Table.from_arrays(columns, schema=schema)
