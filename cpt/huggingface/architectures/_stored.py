"""One tensor of a Hugging Face file and the parameters of ours that it holds; and all of a model by tables of names."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Stored:
    """A tensor of theirs: one of ours under another name, or several of equal shape whose rows lie in turn.

    Several, with `rows` = 2:  a a b b c c a a b b c c    first 2 rows of each of `ours`, then the next 2 of each, ...
    That is how GPT-NeoX keeps query, key and value: head by head, `rows` being the width of a head. It is a layout of
    whole rows, so bytes can be moved without looking at values. A tensor with one of ours has `rows` = 0: all.
    """

    ours: tuple[str, ...]
    rows: int = 0

    @property
    def is_only_renamed(self) -> bool:
        """Whether it is one of ours as it stands."""
        return len(self.ours) == 1

    def shape(self, shapes: Mapping[str, tuple[int, ...]]) -> tuple[int, ...]:
        """Shape of theirs from the shapes of ours by name (`settings.shapes`)."""
        first = shapes[self.ours[0]]
        return (len(self.ours) * first[0], *first[1:])

    def join(self, parts: Sequence[Tensor]) -> Tensor:
        """Theirs from ours in the order of `ours`; the very tensor if it is only renamed, else a new one."""
        if self.is_only_renamed:
            return parts[0]
        return torch.stack([part.unflatten(0, (-1, self.rows)) for part in parts], dim=1).flatten(0, 2)

    def split(self, tensor: Tensor) -> tuple[Tensor, ...]:
        """Ours from theirs in the order of `ours`; the very tensor if it is only renamed, else new ones."""
        if self.is_only_renamed:
            return (tensor,)
        turns = tensor.unflatten(0, (-1, len(self.ours), self.rows))  # [turns, parts, rows, ...]
        return tuple(part.flatten(0, 1) for part in turns.unbind(dim=1))


def stored_by_tables(
    names: Iterable[str],
    outside_blocks: Mapping[str, str],
    in_a_block: Mapping[str, str],
    their_blocks: str,
    rows_in_turn: int = 0,
) -> dict[str, Stored]:
    """Their name of each tensor -> what it holds, for our names in their order.

    The tables say our layers -> theirs, without `.weight` or `.bias`. `in_a_block` goes on from `blocks.N.` on our side
    and from `{their_blocks}.N.` on theirs; layers of ours that it calls alike are stored as one, `rows_in_turn`.
    """
    ours_of: dict[str, list[str]] = {}
    for ours in names:
        layer, kind = ours.rsplit(".", 1)
        if layer.startswith("blocks."):
            _, index, rest = layer.split(".", 2)
            theirs = f"{their_blocks}.{index}.{in_a_block[rest]}.{kind}"
        else:
            theirs = f"{outside_blocks[layer]}.{kind}"
        ours_of.setdefault(theirs, []).append(ours)
    return {theirs: Stored(tuple(ours), rows_in_turn if len(ours) > 1 else 0) for theirs, ours in ours_of.items()}
