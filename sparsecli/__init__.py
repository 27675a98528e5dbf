"""Sparse Transformers for plain CPUs."""

__version__ = "0.1.0"
