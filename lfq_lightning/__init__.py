"""lfq_lightning: weight-only post-training quantisation of LLMs that keeps the token distribution."""

__version__ = "0.1.0"
