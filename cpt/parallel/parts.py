"""What a rank of a tensor group has of each parameter, and how its elements are counted.

A layer that was cut has `parts`: for each of its parameters, by the name it has in the layer, the `Part` of it that
lies here. Whatever is in no layer's `parts` lies whole on every rank of the group.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from torch import nn


@dataclass(frozen=True)
class Part:
    """The rows (`dimension` 0) or columns (1) `first` to before `last` of a parameter of the whole `shape`.

    The tensor here may be longer along the dimension: what is left is padding, is 0 and gets no gradient.
    `is_first_copy`: no earlier rank of the group has the same part.
    """

    shape: tuple[int, ...]
    dimension: int
    first: int
    last: int
    is_first_copy: bool = True

    @property
    def num_elements(self) -> int:
        """Elements of the parameter that lie here, without padding; as they are flattened here they come first."""
        return math.prod(self.shape) // self.shape[self.dimension] * (self.last - self.first)

    @property
    def columns(self) -> tuple[int, int] | None:
        """The columns that lie here, if not all do."""
        return (self.first, self.last) if self.dimension == 1 else None

    @property
    def offset(self) -> int:
        """What is added to the number of an element here, for its number as `Piece` counts them."""
        return self.first * math.prod(self.shape[1:]) if self.dimension == 0 else 0


def whole(shape: tuple[int, ...], is_first_copy: bool) -> Part:
    """All of a parameter."""
    return Part(shape, 0, 0, shape[0], is_first_copy)


def parts_of(model: nn.Module) -> dict[str, Part]:
    """The parts of all parameters that are cut, by whole name; a tied one once."""
    found = {
        f"{path}.{name}" if path else name: part
        for path, module in model.named_modules()
        for name, part in getattr(module, "parts", {}).items()
    }
    return {name: found[name] for name, _ in model.named_parameters() if name in found}
