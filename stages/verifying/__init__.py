"""What ``dpo-cache verify`` finds, and scores again."""
