"""Evaluation: bits per byte of held-out text, and tasks of the LM Evaluation Harness."""
