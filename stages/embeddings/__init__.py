"""Embeddings for another vocabulary: which source rows a target row is made of, and the rows themselves."""
