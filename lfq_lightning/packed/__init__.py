"""Packed models: read, run, described, and exported to other engines."""
