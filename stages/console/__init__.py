"""Words and bars on the terminal."""
