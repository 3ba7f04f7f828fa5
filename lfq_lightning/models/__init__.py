"""Models: read from disk, built without weights, taken apart into blocks and a head."""
