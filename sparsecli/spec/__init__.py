"""The architecture of a model as inert data, without torch, NumPy or transformers."""
