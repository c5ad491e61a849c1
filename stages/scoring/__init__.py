"""Stage one, the scoring processes, and what they share with the leading one."""
