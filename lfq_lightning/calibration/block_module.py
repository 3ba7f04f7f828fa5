"""BlockModule: one decoder block, compared by its hidden states."""

from typing import final

from lfq_lightning.calibration.calibration_block import CalibrationBlock


@final
class BlockModule(CalibrationBlock):
    """One decoder layer, calibrated on its output hidden states (B, T, D)."""

    @property
    def head(self) -> None:
        return None
