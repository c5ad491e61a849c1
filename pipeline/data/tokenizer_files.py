"""Which files of a repository belong to a tokenizer. Needs no transformers."""

from __future__ import annotations

TOKENIZER_FILES = ("*.json", "*.jinja", "*.model", "*.txt", "*.py")
"""Patterns of the files of a tokenizer, and of a model's config, in a repository on the Hub."""
