"""Checkpoints of a run: its directory, open_clip's format, the sharded format, and their content."""
