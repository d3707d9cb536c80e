"""What a run records: metrics, evaluations, warnings and collapsed routers."""
