"""Stages that make updates smaller."""
