"""Scenes of two coloured icons: data that do not run out, where a bag of words is not enough."""
