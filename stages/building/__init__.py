"""Stage one, the leading process: what a mixture is to hold, and what of it is to be scored."""
