"""The end of the pipeline: tidy results, paired comparisons, figures, and the report page."""
