"""Models for inference on CPUs: ``accelerate`` packs the weights of MLPs, experts and attention."""
