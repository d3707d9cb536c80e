"""What a run reports while it trains: records, console, trackers, routing collapse, utilization."""
