"""What make targets call that is no stage of the pipeline."""
