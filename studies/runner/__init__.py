"""Runs of a study: their configs, logs, measurements and page."""
