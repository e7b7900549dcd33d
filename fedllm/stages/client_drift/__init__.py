"""Stages that keep clients from drifting apart."""
