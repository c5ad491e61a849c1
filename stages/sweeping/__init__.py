"""Many runs from one cache."""
