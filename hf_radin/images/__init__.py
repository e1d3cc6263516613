"""A labelled split: opened, read in shards, decoded, cached as prepared pixels, told apart by digests."""
