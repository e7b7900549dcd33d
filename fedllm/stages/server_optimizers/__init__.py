"""Stages that turn the mean update into the step of an optimiser on the server."""
