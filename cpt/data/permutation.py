"""A shuffle without an index: position i of a shuffled order of n things, computed, never stored.

A Feistel network over pairs (left, right) with left < a, right < b and a * b just above n; the few pairs that stand for
numbers from n on are walked past. Whoever knows (n, key) knows the order: it costs no memory, no start-up time, and
is the same on every machine.
Source: Black and Rogaway 2002, "Ciphers with Arbitrary Finite Domains" (generalised Feistel, cycle walking).
"""

from __future__ import annotations

import math

import numpy as np

_NUM_ROUNDS = 6
_MASK32 = np.uint64(0xFFFFFFFF)


class Permutation:
    """A bijection on 0 .. size - 1, chosen by `key` (any whole number below 2**64).

    Raises ValueError if the size is not between 1 and 2**62.
    """

    def __init__(self, size: int, key: int) -> None:
        if not 1 <= size <= 2**62:
            raise ValueError(f"a permutation of {size} things: 1 to 2**62 can be shuffled")
        self.size = size
        root = math.isqrt(size - 1) + 1
        self._a, self._b = np.uint64(root), np.uint64(-(-size // root))
        words = np.random.SeedSequence(key).generate_state(2 * _NUM_ROUNDS, np.uint32)
        self._keys = words.astype(np.uint64).reshape(_NUM_ROUNDS, 2)

    def __call__(self, positions: np.ndarray) -> np.ndarray:
        """The numbers [n] int64 that stand at `positions` [n] of the shuffled order; a single one for a single one."""
        shape = np.shape(positions)
        out = np.array(positions, dtype=np.uint64, ndmin=1)
        if out.size and int(out.max()) >= self.size:
            raise ValueError(f"position {int(out.max())} in an order of {self.size}")
        out = self._rounds(out)
        beyond = out >= self.size
        while beyond.any():
            out[beyond] = self._rounds(out[beyond])
            beyond = out >= self.size
        return out.astype(np.int64).reshape(shape)

    def _rounds(self, numbers: np.ndarray) -> np.ndarray:
        left, right = numbers // self._b, numbers % self._b
        for index, (key, other_key) in enumerate(self._keys):
            if index % 2:
                right = (right + _scale(_mix(left, key, other_key), self._b)) % self._b
            else:
                left = (left + _scale(_mix(right, key, other_key), self._a)) % self._a
        return left * self._b + right


def _mix(numbers: np.ndarray, key: np.uint64, other_key: np.uint64) -> np.ndarray:
    """32 well-stirred bits of each number: two multiply-xorshift turns (finaliser of MurmurHash3, public domain)."""
    x = (numbers ^ (numbers >> np.uint64(32)) ^ key) & _MASK32
    x = ((x ^ (x >> np.uint64(16))) * np.uint64(0x85EBCA6B) + other_key) & _MASK32
    x = ((x ^ (x >> np.uint64(13))) * np.uint64(0xC2B2AE35)) & _MASK32
    return x ^ (x >> np.uint64(16))


def _scale(bits: np.ndarray, below: np.uint64) -> np.ndarray:
    """Bring 32 bits evenly into 0 .. below - 1 (below < 2**32) without a division."""
    return (bits * below) >> np.uint64(32)
