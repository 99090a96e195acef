"""Update parameters on this machine's CPU, beside the passes over memory that DeepSpeed makes of an update.

    DeepSpeed's BF16_Optimizer:  norm of the gradients -> clip -> AdamW -> copy of 16 bits -> gradients to 0

P parameters as one flat tensor of fp32, as a ZeRO shard is.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from cpt.benchmarks.measure import Reader, Spread, microseconds_a_sample
from cpt.benchmarks.options import option
from cpt_kernels import adamw

_CLIP = 1.0


@dataclass(frozen=True)
class Settings:
    """`parameters`: in the flat tensor; many more than fit into a cache."""

    parameters: int = option(2**24, "in the flat tensor")
    repetitions: int = option(11, "turns of each way")

    def faults(self) -> list[str]:
        """Numbers that leave nothing to measure."""
        names = ("parameters", "repetitions")
        return [f"{name} = {getattr(self, name)}: at least 1" for name in names if getattr(self, name) < 1]


@dataclass(frozen=True)
class Update:
    """One way to update: CPU time, and how many times as fast it is as DeepSpeed's passes, by repetition."""

    name: str
    nanoseconds_a_parameter: Spread
    times_as_fast: Spread


@dataclass(frozen=True)
class Result:
    """All ways; the first is the yardstick."""

    settings: Settings
    updates: list[Update]


class _Shard:
    """Master, gradient, weight of 16 bits and an optimiser, in memory of their own."""

    def __init__(self, num_parameters: int, is_fused: bool, is_alone: bool) -> None:
        generator = torch.Generator().manual_seed(1)
        self.master = torch.nn.Parameter(torch.randn(num_parameters, generator=generator))
        self.gradient = torch.randn(num_parameters, generator=generator)
        self.weight = self.master.detach().bfloat16()
        # Set to 0 in the place of the gradient, which then has numbers again for the next turn.
        self.spare = torch.empty_like(self.gradient)
        groups = [{"params": [self.master], "weight_decay": 0.1}]
        make = adamw.fused if is_fused else _foreach
        self.optimizer = make(groups, 1e-4, (0.9, 0.95), 1e-8)
        self.is_alone = is_alone

    @torch.no_grad()
    def update(self, number: int) -> int:
        """So many updates."""
        for _ in range(number):
            self.master.grad = self.gradient
            if self.is_alone:
                self.optimizer.step()
                continue
            norm = torch.linalg.vector_norm(self.gradient)
            self.gradient.mul_(torch.clamp(_CLIP / (norm + 1e-6), max=1.0))
            self.optimizer.step()
            self.weight.copy_(self.master)
            self.spare.zero_()
        return number


def _foreach(groups, learning_rate, betas, epsilon) -> torch.optim.AdamW:
    return torch.optim.AdamW(groups, lr=learning_rate, betas=betas, eps=epsilon, foreach=True)


def compare(settings: Settings) -> Result:
    """All ways in turn."""
    around = "norm, clip, {}, copy, gradients to 0"
    ways = {
        around.format("AdamW (torch, foreach)"): (False, False),
        around.format("AdamW (torch, fused)"): (True, False),
        "AdamW (torch, foreach) alone": (False, True),
        "AdamW (torch, fused) alone": (True, True),
    }
    readers = [Reader(name, _Shard(settings.parameters, *kind).update) for name, kind in ways.items()]
    taken = microseconds_a_sample(readers, settings.repetitions)
    updates = [
        Update(
            reader.name,
            Spread.of([each * 1e3 / settings.parameters for each in values]),
            Spread.of([yardstick / each for yardstick, each in zip(taken[0], values, strict=True)]),
        )
        for reader, values in zip(readers, taken, strict=True)
    ]
    return Result(settings, updates)


def as_lines(result: Result) -> list[str]:
    """A Markdown table with a head."""
    settings, updates = result.settings, result.updates
    lines = [
        f"{settings.parameters:,} parameters in fp32, {torch.get_num_threads()} thread(s); CPU time, median (smallest "
        f"to largest) of {settings.repetitions} alternating repetitions; torch {torch.__version__}",
        "",
        "| update | ns a parameter | times as fast |",
        "|---|---|---|",
    ]
    for update in updates:
        told = (
            f"{spread.median:.2f} ({spread.smallest:.2f} to {spread.largest:.2f})"
            for spread in (update.nanoseconds_a_parameter, update.times_as_fast)
        )
        lines.append(f"| {update.name} | {' | '.join(told)} |")
    return lines
