"""Stages that aggregate low-rank factors."""
