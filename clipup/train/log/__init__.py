"""What a run records and shows: metrics, evaluations, warnings, trackers."""
