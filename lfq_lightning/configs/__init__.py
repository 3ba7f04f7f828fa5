"""YAML presets, shipped as package data."""
