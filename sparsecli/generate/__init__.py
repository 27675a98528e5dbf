"""The `generate` command: prompt, decoder, sampling, text."""
