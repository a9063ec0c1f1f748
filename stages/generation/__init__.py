"""Text that a teacher writes: prompts from a corpus, sampling, and answers as examples of a new corpus."""
