"""Stages that weigh clients."""
