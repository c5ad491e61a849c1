"""Processes and threads: which rank is which, on which device, failing together."""
