"""The tests, in folders as the package is."""
