"""Data order, head kernels, trainer, adapters, checkpoints."""
