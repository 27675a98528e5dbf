"""Studies: programs for measurements beyond `bench`. Run each with `python -m`."""
