"""`python -m lfq_lightning …` is `lfq …` (what torchrun needs)."""

from lfq_lightning.cli import main

if __name__ == "__main__":
    main()
