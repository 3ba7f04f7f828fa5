"""QuantScheme: how a weight matrix is cut into integers."""

from dataclasses import dataclass

from lfq_lightning.errors import UserError


@dataclass(frozen=True)
class QuantScheme:
    """Integer grid of one weight (O, I).

    Args:
        num_bits: width of a code, 2 … 8.
        group_size: inputs that share one scale; -1 is all of them (per output channel).
        symmetric: the zero point is fixed to 2^(num_bits-1), so that code 0 is the most negative value.
    """

    num_bits: int = 4
    group_size: int = -1
    symmetric: bool = True

    def __post_init__(self) -> None:
        if not 2 <= self.num_bits <= 8:
            raise UserError(f"bits: {self.num_bits} is outside 2 … 8.")
        if self.group_size != -1 and self.group_size < 1:
            raise UserError(f"group_size: {self.group_size} must be a positive number, or -1 for per output channel.")

    @property
    def max_code(self) -> int:
        return 2**self.num_bits - 1

    @property
    def middle_code(self) -> int:
        """The zero point of a symmetric scheme."""
        return 2 ** (self.num_bits - 1)

    def divides(self, in_features: int) -> bool:
        """Tell whether groups divide the inputs of a weight."""
        return self.group_size == -1 or in_features % self.group_size == 0

    def group_of(self, in_features: int) -> int:
        """Return the number of inputs K per group of a weight with `in_features`. Raises ValueError if none fits."""
        if not self.divides(in_features):
            raise ValueError(f"group_size {self.group_size} does not divide {in_features} inputs")
        return in_features if self.group_size == -1 else self.group_size

    def bits_per_weight(self, in_features: int, scale_bits: int = 16) -> float:
        """Return code bits plus the share of scale (and zero point, if asymmetric) per weight."""
        extra = scale_bits + (0 if self.symmetric else self.num_bits)
        return self.num_bits + extra / self.group_of(in_features)
