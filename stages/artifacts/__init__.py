"""Parquet tables: their schemas, and readers that refuse what does not match."""
