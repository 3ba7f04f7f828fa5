"""GPTQ's rounding of columns with the errors carried on; on a GPU a span of columns is one kernel."""

from lfq_lightning.ops.gptq_solve.round_columns import round_columns

__all__ = ["round_columns"]
