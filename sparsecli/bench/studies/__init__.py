"""Studies: programs that measure what `bench` does not, each run by `python -m`."""
