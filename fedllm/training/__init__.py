"""Local training: what a client does between receiving and sending."""
