"""Validation loss, generation, the run report, and the demo that ties everything together."""
