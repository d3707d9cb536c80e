"""Checkpoints of a run: its directory, open_clip's format, sharded ones, and what they hold."""
