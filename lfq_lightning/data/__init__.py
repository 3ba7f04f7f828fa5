"""Calibration data: token sequences and where they come from."""

from lfq_lightning.data.calibration_data import CalibrationData

__all__ = ["CalibrationData"]
