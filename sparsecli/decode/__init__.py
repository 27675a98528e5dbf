"""Decoding on plain CPUs: packed weights and the native step. Importing it needs neither torch nor transformers."""
