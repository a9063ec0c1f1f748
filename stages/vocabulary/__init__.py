"""The vocabulary axis: logits in blocks, and what is read of their distributions, forward and backward."""
