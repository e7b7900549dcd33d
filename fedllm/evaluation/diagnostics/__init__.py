"""Diagnostics: what the server can tell of a round from the updates that it sees, and when that is worth a warning."""
