"""Federations: where the clients' records come from and how they are spread."""
