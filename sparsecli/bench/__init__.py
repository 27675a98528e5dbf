"""Benchmark of decoding. Each `Variant` gives cases; each `Case` is timed and gives a `Row` of the result."""
