"""tokenstill: each module here is one program of the pipeline, each folder one concept of its library."""
