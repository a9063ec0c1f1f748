"""From a tokenizer's folder and a spec to a view of its bytes: what programs and tests call."""

from pathlib import Path

from stages.tokenization.preparation import Prepared, prepare, write
from stages.tokenization.view import ByteView

__all__ = ["Prepared", "load", "prepare", "view_of", "write"]


def load(folder: Path) -> ByteView:
    """Load a ByteView from a folder of the tokenizer stage, or from any other tokenizer folder."""
    return ByteView.load(folder)


def view_of(prepared: Prepared, folder: Path) -> ByteView:
    """Return the ByteView of a prepared tokenizer."""
    return ByteView.of(prepared, folder)
