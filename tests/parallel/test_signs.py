"""Signs of life over a store that other programs may write into, too."""

from __future__ import annotations

import json

import pytest
import torch.distributed as dist
from cpt_harness import runs

from cpt.parallel.signs import Signs
from cpt.parallel.verdict import Limits, Sign

LIMITS = Limits(hang=900, slow=3600, lost=60, evidence=8, beat=0.05)


@pytest.mark.parametrize("strange", ['{"other": 1}', "[]", "7", "not JSON", '{"sign": {"other": 1}, "verdict": null}'])
@pytest.mark.parametrize("rank", [0, 1])
def test_what_is_no_sign_is_silence_and_the_talk_goes_on(rank, strange):
    store = dist.HashStore()
    store.set("sign/1" if rank == 0 else "hub", strange)
    if rank == 1:
        store.set("sign/0", strange)
    signs = Signs(store, rank, 2, LIMITS, lambda: Sign("here"), ends_with_first=True)
    try:
        runs.wait_for(lambda: signs._rounds >= 3, "three rounds")
        assert json.loads(store.get(f"sign/{rank}"))["beat"] >= 3
        assert signs.verdict(has_lost_connection=False) is None
    finally:
        signs.tell(is_last=True)
        signs._thread.join(5)
