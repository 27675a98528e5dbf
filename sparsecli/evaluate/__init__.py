"""Loss of a model on text: by window and by token, in the engine and in PyTorch; and the `evaluate` command."""
