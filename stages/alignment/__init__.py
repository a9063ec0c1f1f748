"""Chunk ids from byte coordinates: which tokens of two tokenizers cover the same bytes."""

from stages.alignment.chunks import KINDS, BiasTable, align, drop_unscored

__all__ = ["KINDS", "BiasTable", "align", "drop_unscored"]
