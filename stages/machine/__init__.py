"""What ``dpo-cache doctor`` looks at."""
