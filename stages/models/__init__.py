"""Hugging Face model folders: opened with checks, written so that transformers opens them to the same model."""
