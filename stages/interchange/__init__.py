"""Reference values from other trainers, and for them."""
