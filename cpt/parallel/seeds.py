"""Random numbers as a function of where we are: nothing to save, the same after any stop."""

from __future__ import annotations

import hashlib

import torch


def derive_seed(*parts: int | str) -> int:
    """A seed below 2**63 from numbers and words; other parts, another seed. Same on every machine."""
    text = "\x1f".join(f"{type(part).__name__}:{part}" for part in parts)
    return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8).digest(), "little") >> 1


def seed_step(seed: int, step: int, rank: int) -> None:
    """Set torch's generators (CPU and GPU) for one step on one rank; whatever draws in the step is repeatable."""
    torch.manual_seed(derive_seed(seed, "step", step, rank))
