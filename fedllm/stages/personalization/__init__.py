"""Stages that keep parameters on the client."""
