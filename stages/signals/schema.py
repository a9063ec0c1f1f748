"""The columns of teacher signals. Row i of an example is the teacher's prediction of its token i + 1.

One Parquet row per example, in corpus order. Numbers per token are lists of float32, the rest blocks, row by row:

- observed_logprob: log-probability of the token that follows; 0 in the last row, which nothing follows.
- boundary_logprob: log of the probability mass on tokens that start a word; eos_logprob: that of the end.
- topk_ids uint32, topk_logprobs float16 [n, k]: the likeliest tokens, likeliest first; tail_logmass: log of the
  probability of all others.
- normaliser_<T>: log of the sum over the vocabulary of p ** (1 / T), which takes log-probabilities to temperature T.
- sample_ids uint32 [n, N]: tokens drawn from the distribution, with replacement (RS-KD, arXiv 2503.16870).
- hidden bfloat16 [n, d]: the state after the last norm, which the output layer reads; hidden_states [n, (L + 1) d]:
  that of every layer, the embedding first.
"""

from typing import Any

import numpy as np
import pyarrow as pa

BFLOAT16 = np.dtype(np.uint16)  # NumPy has no such type: its bits
FLOAT16_INFINITY, BFLOAT16_INFINITY = np.uint16(0x7C00), np.uint16(0x7F80)  # the exponents of infinity and NaN
BLOCKS = {
    "topk_ids": np.dtype(np.uint32),
    "topk_logprobs": np.dtype(np.float16),
    "sample_ids": np.dtype(np.uint32),
    "hidden": BFLOAT16,
    "hidden_states": BFLOAT16,
}
NO_NEEDS: dict[str, Any] = {
    "boundary": False, "eos": False, "top_k": 0, "temperatures": [], "samples": 0, "hidden": False,
    "hidden_states": False,
}  # fmt: skip


def columns_for(needs: dict[str, Any]) -> list[str]:
    """Return the signal columns of the settings `needs`, whose keys and defaults are those of NO_NEEDS."""
    columns = ["observed_logprob"]
    columns += ["boundary_logprob"] if needs.get("boundary") else []
    columns += ["eos_logprob"] if needs.get("eos") else []
    columns += ["tail_logmass", "topk_ids", "topk_logprobs"] if needs.get("top_k") else []
    columns += [normaliser_column(temperature) for temperature in needs.get("temperatures", [])]
    columns += ["sample_ids"] if needs.get("samples") else []
    columns += [name for name in ("hidden", "hidden_states") if needs.get(name)]
    return columns


def normaliser_column(temperature: float) -> str:
    """Return the name of the column that takes log-probabilities to this temperature: normaliser_2, normaliser_0_5."""
    return f"normaliser_{temperature:g}".replace(".", "_")


def schema_of(columns: list[str]) -> pa.Schema:
    """Return the Parquet schema of a file with these signal columns."""
    fields = [("example_id", pa.string()), ("exact", pa.bool_()), ("input_ids", pa.list_(pa.uint32()))]
    fields += [(name, pa.large_binary() if name in BLOCKS else pa.list_(pa.float32())) for name in columns]
    return pa.schema(fields)


def to_float32(bits: np.ndarray) -> np.ndarray:
    """Return bfloat16 values, given as their uint16 bits, as float32."""
    return (bits.astype(np.uint32) << 16).view(np.float32)


def first_not_finite(signals: dict[str, np.ndarray]) -> tuple[str, int, float] | None:
    """Return (column, row, value) of the first signal that is infinite or not a number; None where there is none."""
    for name, values in signals.items():
        bits = FLOAT16_INFINITY if values.dtype == np.float16 else BFLOAT16_INFINITY
        if values.dtype.itemsize == 2:  # NumPy has no fast test for either type
            wrong = (values.view(np.uint16) & bits) == bits
        elif values.dtype.kind == "f":
            wrong = ~np.isfinite(values)
        else:
            continue
        if wrong.any():
            row, place = divmod(int(np.argmax(wrong)), int(np.prod(values.shape[1:])))
            one = values.reshape(len(values), -1)[row, place : place + 1]
            return name, row, float((to_float32(one) if values.dtype == BFLOAT16 else one)[0])
    return None
