"""A hash chain over the windows that a run trained on, in order: equal chains, equal tokens in equal order.

One link a window, so that it does not matter how windows were grouped into steps or spread over ranks.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable

START = "0" * 32


def lengthen(chain: str, windows: Iterable[tuple[str, int, int]]) -> str:
    """The chain after these windows, each told as (corpus fingerprint, first token in the corpus, number of tokens)."""
    digest = bytes.fromhex(chain)
    for fingerprint, first_token, num_tokens in windows:
        link = f"{fingerprint}:{first_token}:{num_tokens}".encode()
        digest = hashlib.blake2b(digest + link, digest_size=16).digest()
    return digest.hex()
