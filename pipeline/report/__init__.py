"""What a run's folder says, made into series, one self-contained page and figures; no cache and no model is opened."""
