"""What a model has lost, against full precision and against another model: `lfq eval`."""
