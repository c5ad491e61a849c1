"""The cache on disk: keys, the reference's identity, shards, mixtures, and the order they are read in."""
