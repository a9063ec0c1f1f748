"""The columns of every Parquet file of the pipeline."""

import pyarrow as pa

SLOT = pa.struct([("role", pa.string()), ("text", pa.string()), ("loss", pa.bool_())])

# One row per example, in corpus order. A plain text is one slot of role "text"; a chat has one slot per message,
# with the roles system, user, assistant. `loss` says whether the slot's tokens are trained on.
EXAMPLES = pa.schema(
    [
        ("example_id", pa.string()),  # "<document_id>:<index within the document>"
        ("document_id", pa.string()),
        ("slots", pa.list_(SLOT)),
        ("starts_document", pa.bool_()),
        ("ends_document", pa.bool_()),
        ("bytes", pa.int32()),  # UTF-8 bytes of all slots together
    ]
)

# One row per token id of a tokenizer. `bytes` is null for an id without bytes of its own (a special).
TOKENS = pa.schema([("id", pa.uint32()), ("bytes", pa.binary()), ("text", pa.string()), ("role", pa.string())])

# One row per student token id: the teacher token that stands for it.
MAPPING = pa.schema(
    [
        ("student_id", pa.uint32()),
        ("student_bytes", pa.binary()),
        ("teacher_id", pa.int64()),  # -1: no teacher token
        ("teacher_bytes", pa.binary()),
        ("distance", pa.int32()),  # Levenshtein distance in bytes
        ("kind", pa.string()),  # exact, mined, special, none
    ]
)

# One row per token id and side that occurs in the vocabulary.
COUNTS = pa.schema([("side", pa.string()), ("id", pa.uint32()), ("bytes", pa.binary()), ("count", pa.int64())])

# Provenance of one embedding row of an initialised student.
PROVENANCE = pa.schema(
    [
        ("id", pa.uint32()),
        ("bytes", pa.binary()),
        ("rule", pa.string()),  # copy, special, mean, random, padding
        ("source_ids", pa.list_(pa.uint32())),
        ("norm", pa.float32()),  # L2 norm of the input embedding row
    ]
)

# Held-out scores, one row per example.
SCORES = pa.schema(
    [
        ("example_id", pa.string()),
        ("document_id", pa.string()),
        ("bytes", pa.int32()),
        ("tokens", pa.int32()),
        ("bits", pa.float64()),
    ]
)

# Scores of an lm-eval suite, one row per task, document and metric.
TASK_SAMPLES = pa.schema(
    [
        ("task", pa.string()),
        ("doc_id", pa.int64()),
        ("filter", pa.string()),
        ("metric", pa.string()),
        ("value", pa.float64()),
    ]
)
