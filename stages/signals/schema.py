"""The columns of teacher signals. Row i of an example is the teacher's prediction of its token i + 1.

One Parquet row per example, in corpus order. `observed_logprob` of the last row is 0: nothing follows it. The top-k
columns are blocks [n, k] in row-major order: uint32 ids with float16 log-probabilities, likeliest first.
"""

from typing import Any

import numpy as np
import pyarrow as pa

TOKENS = ("observed_logprob", "boundary_logprob", "eos_logprob", "tail_logmass")
BLOCKS = {"topk_ids": np.dtype(np.uint32), "topk_logprobs": np.dtype(np.float16)}


def columns_for(needs: dict[str, Any]) -> list[str]:
    """Return the signal columns of settings {"boundary": bool, "eos": bool, "top_k": int}."""
    columns = ["observed_logprob"]
    columns += ["boundary_logprob"] if needs.get("boundary") else []
    columns += ["eos_logprob"] if needs.get("eos") else []
    columns += ["tail_logmass", "topk_ids", "topk_logprobs"] if needs.get("top_k") else []
    return columns


def schema_of(columns: list[str]) -> pa.Schema:
    """Return the Parquet schema of a file with these signal columns."""
    fields = [("example_id", pa.string()), ("exact", pa.bool_()), ("input_ids", pa.list_(pa.uint32()))]
    fields += [(name, pa.large_binary() if name in BLOCKS else pa.list_(pa.float32())) for name in columns]
    return pa.schema(fields)
