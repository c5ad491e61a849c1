"""What a report takes from caches and sweeps."""
