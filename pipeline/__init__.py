"""What the field knows: data, cache, scoring, training. Imports run training -> scoring -> cache -> data."""
