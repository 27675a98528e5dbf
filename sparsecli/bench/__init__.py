"""Benchmark of decoding: every `Variant` makes cases, a `Case` is timed, and a `Row` is its result."""
