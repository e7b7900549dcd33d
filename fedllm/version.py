"""The version of fedllm."""

__version__ = "0.1.0"
