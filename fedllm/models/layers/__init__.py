"""The layers of a model, for several clients in one pass."""
