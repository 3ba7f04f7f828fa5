"""The commands of `lfq`."""
