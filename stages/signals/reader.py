"""Read teacher signals by example, without copies where one example is asked for."""

import os
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from stages.artifacts.tables import open_table
from stages.core.errors import UserError
from stages.signals.schema import BLOCKS, first_not_finite, schema_of

MEMORY_LIMIT = 4 * 2**30


class _Part(NamedTuple):
    """One row group: where each example starts, and each column's flat values."""

    first: int
    offsets: np.ndarray
    exact: np.ndarray
    values: dict[str, np.ndarray]


class Signals:
    """The signals of all shards, by example index in corpus order.

    `count`: examples; `example_ids`: their ids. `rows(index)` gives one example as views, `gather(indices)` several as
    flat arrays. Made by `open_signals`; `home` is the folder of the shards.
    """

    def __init__(self, tables: Sequence[pa.Table], columns: Sequence[str], home: Path) -> None:
        self.columns, self.home = list(columns), home
        self._parts: list[_Part] = []
        self.example_ids: list[str] = []
        first = 0
        for table in tables:
            for batch in table.to_batches():
                if batch.num_rows:
                    self._parts.append(_part(batch, first, self.columns))
                    self.example_ids += batch.column("example_id").to_pylist()
                    first += batch.num_rows
        self.count = first
        self._starts = np.array([part.first for part in self._parts], np.int64)

    def rows(self, index: int) -> dict[str, np.ndarray]:
        """Return one example as views: input_ids uint32 [n], exact, and each column, [n] or [n, k]."""
        part = self._parts[int(np.searchsorted(self._starts, index, side="right")) - 1]
        row = index - part.first
        span = slice(part.offsets[row], part.offsets[row + 1])
        return {"exact": part.exact[row]} | {name: values[span] for name, values in part.values.items()}

    def gather(self, indices: Sequence[int]) -> dict[str, np.ndarray]:
        """Return several examples, concatenated in the order given; `exact` has one entry per example.

        UserError for a value that is not finite.
        """
        examples = [self.rows(int(index)) for index in indices]
        names = ["input_ids", *self.columns]
        filled = [example for example in examples if len(example["input_ids"])] or examples[:1]
        joined = {name: np.concatenate([example[name] for example in filled]) for name in names}
        wrong = first_not_finite({name: joined[name] for name in self.columns})
        if wrong is not None:
            name, row, value = wrong
            ends = np.cumsum([len(example["input_ids"]) for example in examples])
            example = self.example_ids[int(indices[int(np.searchsorted(ends, row, side="right"))])]
            raise UserError(
                f"The teacher signals {self.home} hold {name} {value} in example {example}, which is not finite: "
                "remove that folder and run again, and the teacher is asked anew."
            )
        return joined | {"exact": np.array([example["exact"] for example in examples])}


def open_signals(paths: Sequence[Path], columns: Sequence[str], cache: Path | None = None) -> Signals:
    """Open the shards of one teacher and corpus, in order, for random access to `columns`.

    Small signals are held in memory. Larger ones are decoded once into files in `cache` and mapped from there.
    UserError when a file is damaged or lacks a column.
    """
    schema = schema_of(list(columns))
    files = [open_table(path, schema) for path in paths]
    names = schema.names
    size = sum(_decoded_size(file, names) for file in files)
    try:
        if size <= MEMORY_LIMIT or cache is None:
            # By row group: reading a whole file at once takes five times as long.
            groups = [(file, group) for file in files for group in range(file.metadata.num_row_groups)]
            tables = [file.read_row_group(group, columns=names) for file, group in groups]
        else:
            cache.mkdir(parents=True, exist_ok=True)
            tables = [
                _mapped(file, names, cache / f"{path.stem}.arrow") for file, path in zip(files, paths, strict=True)
            ]
    except (pa.ArrowException, OSError) as error:
        raise UserError(
            f"The teacher signals {paths[0].parent} cannot be read ({str(error).splitlines()[0]}): "
            "remove the damaged shard and run again."
        ) from None
    finally:
        for file in files:
            file.close()
    return Signals(tables, columns, paths[0].parent)


def _decoded_size(file: pq.ParquetFile, names: Sequence[str]) -> int:
    metadata = file.metadata
    total = 0
    for group in range(metadata.num_row_groups):
        row_group = metadata.row_group(group)
        for index in range(row_group.num_columns):
            column = row_group.column(index)
            if column.path_in_schema.split(".")[0] in names:
                total += column.total_uncompressed_size
    return total


def _mapped(file: pq.ParquetFile, names: list[str], path: Path) -> pa.Table:
    """Return a shard as a table mapped from an uncompressed copy at `path`, made if it is not there."""
    if not path.exists():
        partial = path.with_name(f".{path.name}.{os.getpid()}")
        schema = pa.schema([file.schema_arrow.field(name) for name in names])
        with pa.OSFile(str(partial), "wb") as sink, pa.ipc.new_file(sink, schema) as writer:
            for group in range(file.metadata.num_row_groups):
                writer.write_table(file.read_row_group(group, columns=names).cast(schema))
        os.replace(partial, path)
    return pa.ipc.open_file(pa.memory_map(str(path))).read_all()


def _part(batch: pa.RecordBatch, first: int, columns: Sequence[str]) -> _Part:
    ids = batch.column("input_ids")
    offsets = ids.offsets.to_numpy().astype(np.int64)
    start = offsets[0]
    values = {"input_ids": ids.values.to_numpy()[start : offsets[-1]]}
    offsets = offsets - start
    for name in columns:
        column = batch.column(name)
        if name in BLOCKS:
            values[name] = _block(column, name, int(offsets[-1]))
        else:
            bounds = column.offsets
            values[name] = column.values.to_numpy()[bounds[0].as_py() : bounds[-1].as_py()]
        if len(values[name]) != offsets[-1]:
            raise UserError(
                f"Teacher signals hold {len(values[name])} rows of {name} for {offsets[-1]} tokens: rebuild them."
            )
    exact = batch.column("exact").to_numpy(zero_copy_only=False)
    return _Part(first, offsets, exact, values)


def _block(column: pa.LargeBinaryArray, name: str, tokens: int) -> np.ndarray:
    """Return the values of a block column as [tokens, width]."""
    _, ends, data = column.buffers()
    bounds = np.frombuffer(ends, np.int64)[column.offset : column.offset + len(column) + 1]
    values = np.frombuffer(data, np.uint8)[bounds[0] : bounds[-1]].view(BLOCKS[name])
    if not tokens or len(values) % tokens:
        if tokens or len(values):
            raise UserError(f"Teacher signals hold {len(values)} values of {name} for {tokens} tokens: rebuild them.")
        return values.reshape(0, 0)
    return values.reshape(tokens, -1)
