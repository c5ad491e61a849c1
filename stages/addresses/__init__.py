"""Caches that stand elsewhere."""
