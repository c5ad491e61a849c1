"""Score a preference dataset once with the reference model, then train DPO from the cache."""

__version__ = "0.1.0"
