"""Byte-level view of any tokenizer: token id -> exact bytes, and chats as slots of template and text."""

from stages.tokenization.encoding import EncodedBatch, Tokens
from stages.tokenization.view import ByteView

__all__ = ["ByteView", "EncodedBatch", "Tokens"]
