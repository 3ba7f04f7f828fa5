"""ScaleCodec: how the scales, or the minima, of groups are stored."""

from abc import ABC, abstractmethod

from torch import Tensor


class ScaleCodec(ABC):
    """Numbers (O, G, 1) fp32 that can be stored.

    Attributes:
        signed: negative ones can be.
        alone: what is stored for a group does not depend on others.
    """

    signed: bool
    alone: bool = True

    @abstractmethod
    def ship(self, value: Tensor) -> Tensor:
        """Return the nearest numbers (O, G, 1) that can be stored; of such numbers, themselves."""

    @abstractmethod
    def bits(self, group_size: int) -> float:
        """Return what is stored per weight, in bits."""

    def neighbours(self, value: Tensor) -> list[Tensor]:
        """Return numbers beside those that `ship` has returned, any of which can be stored in the place of its own."""
        return []
