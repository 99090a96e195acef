"""Continual pre-training of large language models: learn the new, keep the old, and prove it."""

__version__ = "0.1.0"
