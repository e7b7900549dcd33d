"""The batched engine: several clients in one pass, on every core."""
