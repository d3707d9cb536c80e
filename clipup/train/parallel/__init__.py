"""The processes of a run, and how they divide a model: replicas, shards, experts on different ranks."""
