"""Measurements. Each file is one command; results are CSV in benchmarks/results."""
