"""Preference rows to token ids: sources and mixing, formats, chat templates, masks."""
