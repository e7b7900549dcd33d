"""Engines whose clients live in other processes."""
