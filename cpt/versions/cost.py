"""What N releases cost in tokens of training: a path with branches, each version from scratch, one run plainly on.

    versions        T1       T2       T3
    from scratch    T1  +  T1+T2  +  T1+T2+T3
    plainly on      T1  +    T2   +     T3                   (one release that is ready at a time, rate up and down)
    path, branches  T1  +    T2   +  (1-a)T3  +  a(T1+T2+T3)

The path need not go further than where its last branch leaves. For equal versions T and a share a of the branch that is
N T + (N-1) a T of N (N+1) / 2 T. Source: Wang et al. 2024, arXiv:2410.04103: 58 % at N = 4, a = 0.6.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate


@dataclass(frozen=True)
class Cost:
    """Tokens of training for all releases. `versions`: tokens of each one's data; `branches`: those of its branch."""

    versions: Sequence[int]
    branches: Sequence[int]

    @property
    def path(self) -> int:
        """The main path, to where the last branch leaves it."""
        return sum(self.versions) - self.branches[-1]

    @property
    def path_and_branches(self) -> int:
        """This plan."""
        return self.path + sum(self.branches)

    @property
    def from_scratch(self) -> int:
        """Each version anew, on the data of all versions so far."""
        return sum(accumulate(self.versions))

    @property
    def plainly_on(self) -> int:
        """One run after another, each on the new data only."""
        return sum(self.versions)
