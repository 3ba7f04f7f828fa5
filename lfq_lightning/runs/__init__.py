"""A run on disk: its folder, what it may resume from or reuse, and how it is saved when it is stopped."""
