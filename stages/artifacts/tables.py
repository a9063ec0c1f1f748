"""Write and read Parquet files that carry their identity and are refused when they do not match."""

import json
from collections.abc import Iterator
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq

from stages.core.errors import UserError

IDENTITY_KEY = b"tokenstill"


def schema_with(schema: pa.Schema, identity: dict[str, str]) -> pa.Schema:
    """Return `schema` with the identity of its job (`Job.identity`) in the key-value metadata."""
    return schema.with_metadata({IDENTITY_KEY: json.dumps(identity, sort_keys=True).encode()})


def write_table(path: Path, table: pa.Table, identity: dict[str, str]) -> None:
    """Write `table` as zstd Parquet with its identity. For a file inside a Draft's staging folder."""
    table = table.replace_schema_metadata(schema_with(table.schema, identity).metadata)
    pq.write_table(table, path, compression="zstd", write_page_checksum=True)


def read_table(path: Path, schema: pa.Schema, columns: list[str] | None = None) -> pa.Table:
    """Read a Parquet file that must have the fields of `schema`; more columns in the file are allowed.

    UserError names the file and the field when it is missing, damaged or of another type.
    """
    with open_table(path, schema) as file:
        try:
            return file.read(columns=columns if columns is not None else schema.names)
        except (pa.ArrowException, OSError) as error:
            raise UserError(_damaged(path, error)) from None


def read_batches(path: Path, schema: pa.Schema, rows: int) -> Iterator[pa.RecordBatch]:
    """Yield record batches of at most `rows` rows of the fields of `schema`; errors as in `read_table`."""
    with open_table(path, schema) as file:
        try:
            yield from file.iter_batches(batch_size=rows, columns=schema.names)
        except (pa.ArrowException, OSError) as error:
            raise UserError(_damaged(path, error)) from None


def open_table(path: Path, schema: pa.Schema) -> pq.ParquetFile:
    """Open a Parquet file and check that it has the fields of `schema`."""
    try:
        file = pq.ParquetFile(path, memory_map=True, page_checksum_verification=True)
    except FileNotFoundError:
        raise UserError(f"{path} does not exist.") from None
    except (pa.ArrowException, OSError) as error:
        raise UserError(_damaged(path, error)) from None
    found = file.schema_arrow
    for field in schema:
        if field.name not in found.names:
            raise UserError(f"{path} has no column {field.name}; it has {', '.join(found.names)}.")
        if not found.field(field.name).type.equals(field.type):
            actual = found.field(field.name).type
            raise UserError(f"{path}: column {field.name} is {actual}, expected {field.type}.")
    return file


def identity_of(path: Path) -> dict[str, str]:
    """Return the identity in a Parquet file's metadata, empty when it carries none."""
    metadata = open_table(path, pa.schema([])).schema_arrow.metadata or {}
    return json.loads(metadata.get(IDENTITY_KEY, b"{}"))


def _damaged(path: Path, error: Exception) -> str:
    return (
        f"{path} cannot be read as Parquet ({str(error).splitlines()[0]}): it is damaged or cut off; remove it "
        "and build it again."
    )
