"""Two models on the same text: their losses, the largest difference of their logits, how often they prefer the same.

N windows, S positions, V vocabulary.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from cpt.huggingface.forward import Forward

LARGEST_LOSS_DIFFERENCE = 1e-3
# Of the largest logit. Measured: two correct fp32 forwards differ by 1e-6 of it; with a rotary base 10 % off, by
# 0.3, and still by 2e-4 in a small model that has learned nothing.
LARGEST_LOGIT_DIFFERENCE = 1e-4
# A larger model is never in memory as a whole, and computes on a part of the probe, all windows of it at once.
IN_LAYERS_FROM_PARAMETERS = 100_000_000
_WINDOWS_IN_LAYERS, _TOKENS_IN_LAYERS = 2, 32


@dataclass(frozen=True)
class Probe:
    """What two models made of `num_tokens` tokens in `num_windows` windows."""

    num_windows: int
    num_tokens: int
    losses: tuple[float, ...]
    largest_logit: float
    largest_logit_difference: float
    top_1_agreement: float

    @property
    def loss_difference(self) -> float:
        """Between the two."""
        return abs(self.losses[1] - self.losses[0])

    def faults(self) -> list[str]:
        """One line for each limit that they break; NaN breaks it too."""
        limit, lines = LARGEST_LOGIT_DIFFERENCE * self.largest_logit, []
        if not self.largest_logit_difference <= limit:
            lines.append(f"the logits differ by up to {self.largest_logit_difference:.3g}, allowed {limit:.3g}")
        if not self.loss_difference <= LARGEST_LOSS_DIFFERENCE:
            lines.append(
                f"the losses are {self.losses[0]:.6f} and {self.losses[1]:.6f}; allowed difference"
                f" {LARGEST_LOSS_DIFFERENCE}"
            )
        return lines


def is_in_layers(num_parameters: int) -> bool:
    """Whether a model of that size is computed layer by layer."""
    return num_parameters >= IN_LAYERS_FROM_PARAMETERS


def random_probe(vocabulary: int, longest_sequence: int, num_windows: int = 4) -> Tensor:
    """Windows of random tokens, always the same ones: [num_windows, up to 129]."""
    generator = torch.Generator().manual_seed(0)
    return torch.randint(vocabulary, (num_windows, min(128, longest_sequence) + 1), generator=generator)


def fitted(tokens: Tensor, num_parameters: int) -> Tensor:
    """As much of a probe [N, S + 1] as a model of that size computes in minutes."""
    return tokens[:_WINDOWS_IN_LAYERS, : _TOKENS_IN_LAYERS + 1] if is_in_layers(num_parameters) else tokens


def loss_of(model: Forward, tokens: Tensor, in_layers: bool) -> float:
    """The mean loss of one model on tokens [N, S + 1], nats a token; `in_layers` as in `compare`."""
    total = 0.0
    with torch.random.fork_rng(devices=[]), torch.no_grad():
        for window in [tokens] if in_layers else list(tokens[:, None]):
            running = _Running(window[:, 1:])
            for first, logits in model.logits(model.hidden(window[:, :-1])):
                running.add(first, logits)
            total += running.loss()
    return total / tokens[:, 1:].numel()


def compare(models: Sequence[Forward], tokens: Tensor, in_layers: bool) -> Probe:
    """The first two models against each other on tokens [N, S + 1], and the losses of all.

    `in_layers`: all windows at once, because each pass reads all weights; otherwise one after the other.
    """
    windows = [tokens] if in_layers else list(tokens[:, None])
    # fork_rng: a run that goes on afterwards draws as if this had not been.
    with torch.random.fork_rng(devices=[]), torch.no_grad():
        parts = [_compare_on(models, window) for window in windows]
    num_tokens = tokens[:, 1:].numel()
    return Probe(
        len(tokens),
        num_tokens,
        tuple(sum(part["losses"][index] for part in parts) / num_tokens for index in range(len(models))),
        _largest(part["largest"] for part in parts),
        _largest(part["difference"] for part in parts),
        sum(part["agreeing"] for part in parts) / num_tokens,
    )


def _compare_on(models: Sequence[Forward], tokens: Tensor) -> dict:
    """Sums over tokens [N, S + 1]."""
    targets = tokens[:, 1:]
    hidden = [model.hidden(tokens[:, :-1]) for model in models]
    running = [_Running(targets) for _ in models]
    difference, largest = 0.0, 0.0
    for parts in zip(*(model.logits(states) for model, states in zip(models, hidden, strict=True)), strict=True):
        for one, (first, logits) in zip(running, parts, strict=True):
            one.add(first, logits)
        difference = _largest([difference, (parts[0][1] - parts[1][1]).abs().max().item()])
        largest = _largest([largest, parts[0][1].abs().max().item()])
    return {
        "losses": [one.loss() for one in running],
        "largest": largest,
        "difference": difference,
        "agreeing": int((running[0].best == running[1].best).sum()),
    }


class _Running:
    """Loss and preferred token of logits that come in parts of the vocabulary; targets [N, S]."""

    def __init__(self, targets: Tensor) -> None:
        self._targets = targets
        self._log_sum = torch.full(targets.shape, -math.inf)
        self._of_target = torch.zeros(targets.shape)
        self._highest = torch.full(targets.shape, -math.inf)
        self.best = torch.zeros_like(targets)

    def add(self, first: int, logits: Tensor) -> None:
        """logits [N, S, part of V], that of token `first` in front."""
        self._log_sum = torch.logaddexp(self._log_sum, logits.logsumexp(-1))
        place = self._targets - first
        is_here = (place >= 0) & (place < logits.shape[-1])
        of_target = logits.gather(-1, place.clamp(0, logits.shape[-1] - 1)[..., None])[..., 0]
        self._of_target = torch.where(is_here, of_target, self._of_target)
        highest, best = logits.max(-1)
        is_higher = highest > self._highest
        self.best = torch.where(is_higher, best + first, self.best)
        self._highest = torch.where(is_higher, highest, self._highest)

    def loss(self) -> float:
        """Sum over all tokens."""
        return (self._log_sum - self._of_target).sum(dtype=torch.float64).item()


def _largest(values: object) -> float:
    """The largest; NaN if any is, which `max` would lose."""
    values = list(values)
    return math.nan if any(map(math.isnan, values)) else max(values)
