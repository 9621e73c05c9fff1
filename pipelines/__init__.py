"""The stages of the pipeline: thin doors onto the library."""
