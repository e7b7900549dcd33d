"""Stages for work without gradients."""
