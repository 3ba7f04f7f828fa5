"""What of a model's blocks can be packed, and what stays in full precision."""

import re
from dataclasses import dataclass

from lfq_lightning.models.model_skeleton import ModelSkeleton

_NUMBER = re.compile(r"(?<=\.)\d+(?=\.)")
_LEAST = 0.01  # of the blocks' parameters that a kept tensor must hold to be named


@dataclass(frozen=True)
class Coverage:
    """Parameters of the blocks.

    Args:
        packable: in linear layers that can be packed.
        kept: in all else, by name with * for numbers, the most first.
    """

    packable: int
    kept: dict[str, int]

    @property
    def share(self) -> float:
        """Return the part that can be packed."""
        return self.packable / (self.packable + sum(self.kept.values()))

    @property
    def large(self) -> list[str]:
        """Return the names of what holds a hundredth or more of the blocks, and is kept."""
        total = self.packable + sum(self.kept.values())
        return [name for name, size in self.kept.items() if size >= _LEAST * total]


def coverage(skeleton: ModelSkeleton) -> Coverage:
    """Count the parameters of a model's blocks; reads no weights."""
    packable, kept = 0, dict[str, int]()
    for index in range(len(skeleton)):
        layers = skeleton.linear_shapes(index)
        for name, size in skeleton.parameter_sizes(index).items():
            if name.removesuffix(".weight") in layers:
                packable += size
            else:
                pattern = _NUMBER.sub("*", name)
                kept[pattern] = kept.get(pattern, 0) + size
    return Coverage(packable, dict(sorted(kept.items(), key=lambda item: -item[1])))
