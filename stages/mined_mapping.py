"""Find for every token of the student's tokenizer the nearest token of the teacher's (MinED)."""

from collections import Counter

from stages.core import stage


def main(argv: list[str] | None = None) -> None:
    """Write mapping.parquet (schema MAPPING), one row per student id."""
    job = stage.parse("stages.mined_mapping", __doc__, argv)
    import pyarrow as pa
    from tqdm import tqdm

    from stages.alignment.mapping import mine
    from stages.artifacts.schemas import MAPPING
    from stages.artifacts.tables import write_table
    from stages.tokenization import ByteView

    teacher, student = (ByteView.load(job.inputs[name]["path"].parent) for name in ("teacher_tokenizer", "tokenizer"))
    with job.publish() as draft:
        matches = list(tqdm(mine(teacher, student), desc="tokens", total=student.vocab_size))
        columns = [
            range(student.vocab_size),
            student.token_bytes,
            [match.teacher_id for match in matches],
            [teacher.token_bytes[match.teacher_id] if match.teacher_id >= 0 else None for match in matches],
            [match.distance for match in matches],
            [match.kind for match in matches],
        ]
        arrays = [pa.array(values, field.type) for values, field in zip(columns, MAPPING, strict=True)]
        write_table(draft.folder / "mapping.parquet", pa.Table.from_arrays(arrays, schema=MAPPING), job.identity)
        kinds = Counter(match.kind for match in matches)
        draft.describe["mapping.parquet"] = {"rows": len(matches)}
        draft.metrics |= {kind: kinds[kind] for kind in ("exact", "mined", "special", "none")}
        mined = [match.distance for match in matches if match.kind == "mined"]
        draft.metrics["mean_mined_distance"] = round(sum(mined) / len(mined), 6) if mined else None


if __name__ == "__main__":
    stage.run(main)
