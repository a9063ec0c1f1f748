"""What is kept of a teacher: computed in one pass, written as Parquet, read back without copies."""
