"""One run, from its check to its results."""
