"""Map two tokenizers to each other: the nearest token for every token (MinED), and the sparse projection W."""

from collections import Counter
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from stages.core import stage

if TYPE_CHECKING:
    import pyarrow as pa

    from stages.alignment.mapping import Match
    from stages.tokenization import ByteView


def main(argv: list[str] | None = None) -> None:
    """Write mapping.parquet (student to teacher), reverse.parquet (teacher to student) and projection.parquet."""
    job = stage.parse("stages.mined_mapping", __doc__, argv)
    from stages.artifacts.tables import write_table
    from stages.tokenization import ByteView

    teacher, student = (ByteView.load(job.inputs[name]["path"].parent) for name in ("teacher_tokenizer", "tokenizer"))
    with job.publish() as draft:
        tables, metrics = mapping_tables(teacher, student, job.spec["max_distance"])
        for name, table in tables.items():
            write_table(draft.folder / name, table, job.identity)
            draft.describe[name] = {"rows": table.num_rows}
        draft.metrics |= metrics


def mapping_tables(
    teacher: "ByteView", student: "ByteView", max_distance: float
) -> tuple[dict[str, "pa.Table"], dict[str, Any]]:
    """Return (file name -> table, metrics) of the mapping of two tokenizers in both directions."""
    import pyarrow as pa

    from stages.alignment.mapping import mine
    from stages.alignment.projection import projection
    from stages.artifacts.schemas import MAPPING, PROJECTION, REVERSE_MAPPING

    matches, reverse = list(mine(teacher, student, max_distance)), list(mine(student, teacher, max_distance))
    cells = projection(teacher, student, matches, reverse)
    tables = {
        "mapping.parquet": mapping_table(student, matches, MAPPING),
        "reverse.parquet": mapping_table(teacher, reverse, REVERSE_MAPPING),
        "projection.parquet": pa.table(
            dict(zip(PROJECTION.names, (pa.array(column) for column in cells), strict=True))
        ).cast(PROJECTION),
    }
    return tables, facts(matches) | {"reverse": facts(reverse)}


def mapping_table(source: "ByteView", matches: "Sequence[Match]", schema: "pa.Schema") -> "pa.Table":
    """Return a table of schema MAPPING or REVERSE_MAPPING: one row per token id of `source`."""
    import pyarrow as pa

    columns = [range(source.vocab_size), source.token_bytes, *zip(*matches, strict=True)]
    arrays = [pa.array(values, field.type) for values, field in zip(columns, schema, strict=True)]
    return pa.Table.from_arrays(arrays, schema=schema)


def facts(matches: "Sequence[Match]") -> dict[str, Any]:
    """Return how many tokens are of each kind, how many are unreliable, and the mean distance of the mined ones."""
    kinds = Counter(match.kind for match in matches)
    mined = [match.distance for match in matches if match.kind == "mined"]
    return {kind: kinds[kind] for kind in ("exact", "mined", "special", "none")} | {
        "unreliable": sum(match.kind == "mined" and not match.reliable for match in matches),
        "mean_mined_distance": round(sum(mined) / len(mined), 6) if mined else None,
    }


if __name__ == "__main__":
    stage.run(main)
