"""What is known before a run: checks, memory, work, and which layers need which width."""
