"""Upcycling of dense models, the check at step 0, calibration of experts, and diagnosis of models."""
