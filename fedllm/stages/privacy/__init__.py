"""Stages that bound what one client can change and add noise."""
