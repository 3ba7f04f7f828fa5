"""Calibration data: token sequences and where they come from."""

from lfq_lightning.data.calibration_data import CalibrationData
from lfq_lightning.data.token_set import TokenSet

__all__ = ["CalibrationData", "TokenSet"]
