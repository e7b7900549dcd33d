"""Differential privacy without tensors: who takes part, what is released, what it costs, and secret noise."""
