"""Studies: variants of a model, trained on the same tokens and compared in loss, size and speed of decoding."""
