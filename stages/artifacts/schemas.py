"""The columns of every Parquet file of the pipeline."""

import pyarrow as pa

SLOT = pa.struct([("role", pa.string()), ("text", pa.string()), ("loss", pa.bool_()), ("extra", pa.string())])

# One row per example, in corpus order. A plain text is one slot of role "text"; a chat has one slot per message,
# with the roles system, user, assistant. `loss` says whether the slot's tokens are trained on; `extra` holds the other
# fields of a message (tool calls, say) as JSON, null for none. Reasoning in a field of its own, "reasoning_content", is
# the head of `text` too, in this form.
REASONING = "<think>\n{}\n</think>\n\n"
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

# What a teacher wrote, one row per prompt.
GENERATIONS = pa.schema(
    [
        ("document_id", pa.string()),  # of the new corpus: "<source_id>:<slot that the answer stands for>"
        ("source_id", pa.string()),  # example of the prompts' corpus
        ("answer", pa.string()),
        ("finish_reason", pa.string()),  # stop, length, invalid: see stages.generation.prompts
        ("kept", pa.bool_()),  # whether it is trained on
        ("prompt_tokens", pa.int32()),
        ("output_ids", pa.list_(pa.uint32())),  # as drawn, with the token that ended the answer
    ]
)

# One row per token id of a tokenizer. `bytes` is null for an id without bytes of its own (a special).
TOKENS = pa.schema([("id", pa.uint32()), ("bytes", pa.binary()), ("text", pa.string()), ("role", pa.string())])


def _mapping(side: str, other: str) -> pa.Schema:
    """One row per token id of a side: the other side's tokens that stand for it. An id of -1 is no token."""
    return pa.schema(
        [
            (f"{side}_id", pa.uint32()),
            (f"{side}_bytes", pa.binary()),
            (f"{other}_id", pa.int64()),
            (f"{other}_bytes", pa.binary()),
            ("kind", pa.string()),  # exact, mined, special, none
            ("distance", pa.int32()),  # Levenshtein distance in bytes, -1 for none
            ("normalised_distance", pa.float32()),  # distance / (length of one + length of the other), null for none
            ("confidence", pa.float32()),  # 0 to 1, see stages.alignment.mapping
            ("reliable", pa.bool_()),  # exact, special, or nearer than the config's mapping.max_distance
            ("runner_up_id", pa.int64()),  # of a mined token: the second nearest
            ("runner_up_distance", pa.int32()),
            ("prefix_id", pa.int64()),  # the longest token that this one begins with; of a special, its special
        ]
    )


MAPPING = _mapping("student", "teacher")
REVERSE_MAPPING = _mapping("teacher", "student")

# The sparse projection W of X-Token: where a student token's probability goes. The weights of a student id add up to 1.
PROJECTION = pa.schema([("student_id", pa.uint32()), ("teacher_id", pa.uint32()), ("weight", pa.float32())])

# One row per token id and side that occurs in the vocabulary.
COUNTS = pa.schema([("side", pa.string()), ("id", pa.uint32()), ("bytes", pa.binary()), ("count", pa.int64())])

# Fertility: one row per class of characters in the text ("all" first) and side. Tokens and words that several classes
# share count in each by bytes; intervals are at 95 % over documents, null from fewer than two.
FERTILITY = pa.schema(
    [
        ("class", pa.string()),
        ("side", pa.string()),
        ("documents", pa.int64()),  # that have the class
        ("bytes", pa.int64()),
        ("words", pa.float64()),
        ("tokens", pa.float64()),
        *((f"bytes_per_token{end}", pa.float64()) for end in ("", "_low", "_high")),
        *((f"tokens_per_word{end}", pa.float64()) for end in ("", "_low", "_high")),  # null where there are no words
    ]
)

# Coverage audit: one row per side and group of tokens in its vocabulary. Matched: the other side has the same bytes.
COVERAGE = pa.schema(
    [
        ("side", pa.string()),
        ("group", pa.string()),
        ("types", pa.int64()),  # distinct byte strings
        ("matched_types", pa.int64()),
        ("uses", pa.int64()),  # in the corpus
        ("matched_uses", pa.int64()),
        ("unmatched", pa.list_(pa.binary())),  # the most used tokens without a match
    ]
)

# Tokenization bias: one row per pair of tokens of which one is a suffix of the other, sorted by both ids.
BIAS = pa.schema(
    [
        ("teacher_id", pa.uint32()),
        ("teacher_bytes", pa.binary()),
        ("student_id", pa.uint32()),
        ("student_bytes", pa.binary()),
        ("bias1", pa.float64()),  # probability of what goes on only with the teacher's tokens
        ("bias2", pa.float64()),  # and only with the student's
        ("teacher_count", pa.int64()),  # uses in the corpus
        ("student_count", pa.int64()),
    ]
)

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

# Scores of an lm-eval suite, one row per document, metric and filter of each task, and of each group that has one.
TASK_SAMPLES = pa.schema(
    [
        ("task", pa.string()),  # task or group
        ("subtask", pa.string()),  # the task that the document is of: of a group, one of its tasks
        ("doc_id", pa.int64()),
        ("filter", pa.string()),
        ("metric", pa.string()),
        ("value", pa.float64()),  # as the task gave it; null where it is no finite number
        ("weight", pa.float64()),  # see stages.evaluation.aggregation
    ]
)
