"""The harness of the tests: what would make other tests wait or lie."""

from __future__ import annotations

import torch
from cpt_harness.ranks import in_processes


def test_a_forked_process_computes_though_its_parent_had_threads():
    def work() -> float:
        return float(torch.ones(1000, 1000).add(1).sum())

    torch.set_num_threads(2)
    assert float(torch.ones(1000, 1000).add(1).sum()) == 2e6  # starts the second thread
    assert in_processes([work], seconds=20.0) == [2e6]
