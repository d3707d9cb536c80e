"""The losses that training can minimize: a file each, chosen by ``selection.create_objective``."""
