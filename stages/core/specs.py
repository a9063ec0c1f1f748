"""Canonical settings and the digests built from them."""

import hashlib
import json
from typing import Any


def canonical(value: Any) -> str:
    """Return the one JSON text of `value`: keys sorted, no spaces, no NaN.

    Two settings are the same exactly when their canonical texts are. Raises TypeError for what JSON
    cannot say and ValueError for NaN or infinity.
    """
    return json.dumps(value, sort_keys=True, separators=(",", ":"), ensure_ascii=True, allow_nan=False)


def digest(text: str) -> str:
    """Return the first 32 hex digits of the SHA-256 of `text`."""
    return hashlib.sha256(text.encode()).hexdigest()[:32]


def lineage(spec: str, code: str) -> str:
    """Return the identity of an artifact: its own settings, its code, and those of everything upstream.

    `spec` is canonical JSON; its "inputs" hold the lineage of each input, so the digest covers the
    whole history like a Merkle tree.
    """
    return digest(f"{spec}\n{code}")
