"""Windows that spoil a step wherever they come up: what is bad lies in the data and not in a count of calls."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import torch

from cpt.checkpoint import Place
from cpt.data.loader import read_windows
from cpt.lineage.ledger import Ledger
from cpt.models import llama
from cpt.progress import Progress
from cpt.run import read_run
from cpt.run.stages import order_of

NOTHING = Ledger()


def all_windows(config: Path, stage: int = 0, ledger: Ledger = NOTHING) -> np.ndarray:
    """The tokens [slots, S + 1] of a run's stage. `ledger`: of what was consumed before it."""
    run = read_run([str(config)])
    order = order_of(run, Place(Progress(stage=stage), ledger.as_inherited()))
    num_slots = run.num_slots(run.stages[stage])
    windows = order.windows(0, num_slots)
    tokens = np.zeros((num_slots, order.sequence_length + 1), dtype=np.int32)
    read_windows(order, windows.stream, windows.first_token, tokens)
    return tokens


def bad_windows(config: Path, *steps: int, stage: int = 0, ledger: Ledger = NOTHING) -> torch.Tensor:
    """The tokens [steps, S] of one window of each of these steps of a run's stage, which come up only there."""
    tokens, size = all_windows(config, stage, ledger), read_run([str(config)]).batch.windows
    _, index, count = np.unique(tokens[:, :-1], axis=0, return_inverse=True, return_counts=True)
    of_steps = [range((step - 1) * size, step * size) for step in steps]
    slots = [next(slot for slot in reversed(slots) if count[index[slot]] == 1) for slots in of_steps]
    return torch.from_numpy(tokens[slots, :-1])


def poison(windows: torch.Tensor, factor: float = float("nan"), *also: Callable[[], None]) -> Callable[[], None]:
    """For `before` of a run: losses of these windows [n, S] are so many times as large in training. Calls `also`."""

    def patch() -> None:
        forward = llama.Model.forward

        def changed(model: llama.Model, tokens: torch.Tensor, *rest, **named):
            made = forward(model, tokens, *rest, **named)
            is_bad = (tokens[:, None].cpu() == windows[None]).all(dim=-1).any(dim=1)
            # Not in an evaluation, nor where hidden states are made for the next part.
            if not torch.is_grad_enabled() or not is_bad.any() or model.head is None:
                return made
            losses, *beside = made if isinstance(made, tuple) else (made,)
            losses = losses * torch.where(is_bad, factor, 1.0)[:, None]
            return (losses, *beside) if beside else losses

        llama.Model.forward = changed
        call_all(also)

    return patch


def call_all(patches: Sequence[Callable[[], None]]) -> None:
    """One after another."""
    for patch in patches:
        patch()
