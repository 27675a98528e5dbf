"""Pages and figures of results, for every command that measures: what they look like, and how they are written."""
