"""The processes of a run: groups, data in parallel, sharded parameters, experts in parallel."""
