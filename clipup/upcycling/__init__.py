"""Upcycling a dense model into a sparse one, checking it at step 0, calibrating its experts, and diagnosing models."""
