"""Reptile: every few steps the weights are pulled back towards where they were, on the sharded fp32 masters.

    anchor ---- `every` updates of AdamW ----> weights        way = weights - anchor
    velocity := momentum * velocity + way
    weights  := anchor + step_size * velocity;  anchor := weights        (without momentum: a share of the way is kept)

Each rank interpolates the pieces that it owns; an outer step sends nothing but the refresh of the low-precision weights
and two sums of one number a rank, for the log. With replay in the batch this is called meta-experience replay; with
`every: 5, step_size: 0.5` it is Lookahead; with `every: 500, step_size: 0.7, momentum: 0.9, nesterov: true` it is
DiLoCo's outer step, for ranks that also meet in between.
Source: Abbes et al. 2025, arXiv:2508.01908; Nichol et al. 2018, arXiv:1803.02999; Zhang et al. 2019, arXiv:1907.08610
(Lookahead); Douillard et al. 2023, arXiv:2311.08105 (DiLoCo).
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import nn

from cpt.methods import Seams
from cpt.parallel.mesh import Mesh
from cpt.parallel.weights import Masters
from cpt.progress import Progress

_log = logging.getLogger(__name__)

_ELEMENTS_AT_ONCE = 2**22  # two or three times their 16 MiB are in memory beyond the anchor
# A toy byte model on 800 steps in windows of 40 ended at 2.58 without, 2.72 at 0.5 and 3.51 at 0.1.
_STALLS_BELOW = 0.3


@dataclass(frozen=True)
class Settings:
    """`every`: updates in a window. `step_size`: share of a window's way that is kept; 1 changes nothing.

    `warmup_windows`: over the first so many windows the share kept goes straight from 1 to `step_size`. `momentum`,
    `nesterov`: of the outer step. `reset_anchor`: whether a new stage begins with a new anchor and no velocity.
    `anchor_on`: where anchor and velocity are kept, beside the masters or in host memory.
    The paper's step size of 0.1 all but stops learning when it is really applied to the masters: begin with 0.5 and
    more.
    """

    every: int = 500
    step_size: float = 0.7
    warmup_windows: int = 0
    momentum: float = 0.0
    nesterov: bool = False
    reset_anchor: Literal["at_stage_start", "never"] = "never"
    anchor_on: Literal["device", "host"] = "device"

    def faults(self) -> list[str]:
        """Values that are no interpolation."""
        faults = [] if self.every >= 1 else [f"every = {self.every}: at least 1 update in a window"]
        if not 0 < self.step_size <= 1:
            faults.append(f"step_size = {self.step_size}: above 0 (keep nothing) and at most 1 (keep all)")
        if self.warmup_windows < 0:
            faults.append(f"warmup_windows = {self.warmup_windows}: at least 0")
        if not 0 <= self.momentum < 1:
            faults.append(f"momentum = {self.momentum}: at least 0 and below 1")
        if self.nesterov and not self.momentum:
            faults.append("nesterov: true needs a momentum above 0, such as 0.9")
        return faults


class Method(Seams):
    """The outer step; counts updates that were made, so a skipped one does not shorten a window."""

    def __init__(self, settings: Settings) -> None:
        super().__init__(settings)
        self._anchor: list[torch.Tensor] | None = None  # one for each of the masters' pieces
        self._velocity: list[torch.Tensor] | None = None  # likewise, with momentum
        self._updates_since = 0
        self._num_windows = 0
        self._lengths: tuple[float, float] | None = None  # of the last window's way, and of what was made of it

    @property
    def num_copies(self) -> int:
        """The anchor, and the velocity if there is one."""
        return 2 if self.settings.momentum else 1

    @property
    def are_copies_on_host(self) -> bool:
        """Both, if that is asked for."""
        return self.settings.anchor_on == "host"

    def meet(self, model: nn.Module, make_model: Callable[[], nn.Module], masters: Masters, mesh: Mesh) -> None:
        """Warn of a step size that would stall learning."""
        settings = self.settings
        if settings.step_size < _STALLS_BELOW and not settings.momentum:
            _log.warning(
                "reptile.step_size = %g keeps %.0f%% of what each window of %d updates has learned: learning all but "
                "stops; use 0.5 and more, or a learning rate that is %.0f times as high",
                settings.step_size, 100 * settings.step_size, settings.every, 1 / settings.step_size,
            )  # fmt: skip

    @torch.no_grad()
    def before_update(self, masters: Masters, progress: Progress) -> None:
        """The first anchor is where the first update starts."""
        self._lengths = None
        if self._anchor is None:
            self._anchor = [self._kept(piece.values) for piece in masters.pieces]
            if self.settings.momentum:
                self._velocity = [torch.zeros_like(anchor) for anchor in self._anchor]

    @torch.no_grad()
    def after_update(self, masters: Masters, progress: Progress) -> bool:
        """Interpolate once in `every` updates."""
        self._updates_since += 1
        if self._updates_since < self.settings.every:
            return False
        share = self.step_size_of_window(self._num_windows)
        self._updates_since, self._num_windows = 0, self._num_windows + 1
        moved = [self._move(index, piece.values, share) for index, piece in enumerate(masters.pieces)]
        squares = torch.stack(moved).tolist() if moved else []  # of each piece: of its way, of what was made of it
        self._lengths = tuple(masters.total([of_piece[i] for of_piece in squares]) ** 0.5 for i in (0, 1))
        return share < 1 or self._velocity is not None

    def step_size_of_window(self, number: int) -> float:
        """Share that is kept of the window's way, of which `number` are behind."""
        warmup, step_size = self.settings.warmup_windows, self.settings.step_size
        return step_size if number >= warmup else 1.0 + (step_size - 1.0) * number / warmup

    @torch.no_grad()
    def end_stage(self, masters: Masters, progress: Progress) -> bool:
        """The next stage's first update starts from a new anchor, if that is asked for."""
        if self.settings.reset_anchor == "at_stage_start":
            self._anchor = self._velocity = None
            self._updates_since = 0
        return False

    def report(self) -> dict[str, float]:
        """On the steps that end a window: the length of its way, and how much of that was kept."""
        if self._lengths is None:
            return {}
        way, kept = self._lengths
        return {"method/reptile/displacement": way, "method/reptile/kept": kept / way if way else 1.0}

    def state_dict(self) -> dict[str, Any]:
        """The anchor by piece, the velocity if there is one, and how far window and warm-up have come."""
        if self._anchor is None:
            return {"num_windows": self._num_windows} if self._num_windows else {}
        state: dict[str, Any] = {"anchor": self._anchor, "updates_since": self._updates_since}
        state["num_windows"] = self._num_windows
        return state if self._velocity is None else {**state, "velocity": self._velocity}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Take back anchor, velocity and counts."""
        self._updates_since, self._num_windows = int(state.get("updates_since", 0)), int(state.get("num_windows", 0))
        anchors = state.get("anchor")
        self._anchor = None if anchors is None else [self._kept(anchor) for anchor in anchors]
        self._velocity = None
        if self.settings.momentum and self._anchor is not None:
            velocity = state.get("velocity") or [torch.zeros_like(anchor) for anchor in self._anchor]
            self._velocity = [self._kept(part) for part in velocity]

    def _kept(self, values: torch.Tensor) -> torch.Tensor:
        """A copy where the settings say; pinned in host memory, so that it is read at the full rate."""
        if self.settings.anchor_on == "device" or values.device.type == "cpu":
            return values.clone()
        return torch.empty(values.shape, dtype=values.dtype, pin_memory=True).copy_(values)

    def _move(self, index: int, values: torch.Tensor, share: float) -> torch.Tensor:
        """Make the outer step on one piece; the squared lengths [2] of its way and of what was made of it, float64."""
        squares = torch.zeros(2, dtype=torch.float64, device=values.device)
        for part in _parts(len(values)):
            here, kept = values[part], self._anchor[index][part]
            anchor = kept.to(here.device, non_blocking=True)
            way = here - anchor
            squares[0] += way.square().sum(dtype=torch.float64)
            if self._velocity is not None:
                velocity = self._velocity[index][part]
                speed = velocity.to(here.device).mul_(self.settings.momentum).add_(way)
                velocity.copy_(speed)
                step = way.add_(speed, alpha=self.settings.momentum) if self.settings.nesterov else speed
                here.copy_(anchor.add(step, alpha=share))
            elif share < 1:  # lerp with weight 1 need not be the identity in floating point
                here.copy_(torch.lerp(anchor, here, share))
            squares[1] += (here - anchor).square_().sum(dtype=torch.float64)
            kept.copy_(here)
        return squares


def _parts(number: int) -> Iterator[slice]:
    return (slice(first, first + _ELEMENTS_AT_ONCE) for first in range(0, number, _ELEMENTS_AT_ONCE))
