"""An OpenAI-compatible server over the native engine. It needs the extra `serve`."""
