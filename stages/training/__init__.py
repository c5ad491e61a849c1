"""Stage two: one run, its recipe, its loop and what it saves."""
