"""All ranks are served by the same kernels, or the run does not begin."""

from __future__ import annotations

import pytest
import torch
from cpt_harness.ranks import on_ranks

from cpt.config import Fault
from cpt.parallel.together import OtherRankError
from cpt.run.kernels import kernels_for
from cpt_kernels import attention, rotary, switch

PASSED, FAILED = "triton (passed)", "torch (Triton's twin failed its check here: output is off by {}e-01)"


def told_by(work) -> str:
    """What a rank tells when its run cannot begin, and whether it is the one to tell."""
    with pytest.raises((Fault, OtherRankError)) as raised:
        work()
    return f"{raised.type.__name__}: {raised.value}"


@pytest.mark.parametrize("failing", [[], [1], [0, 1]])
def test_a_check_that_fails_on_some_ranks_only_ends_the_run(failing):
    def work(mesh):
        told = FAILED.format(mesh.rank + 3) if mesh.rank in failing else PASSED
        for file in (attention, rotary):  # in this process, which is the rank's own
            file.face = lambda device, serving=file.plain: (serving, told)
        if len(failing) != 1:
            return kernels_for(switch.Settings(), mesh).told["attention"]
        return told_by(lambda: kernels_for(switch.Settings(), mesh))

    first, second = on_ranks(2, work)
    if len(failing) != 1:
        assert (first, second) == (FAILED.format(3), FAILED.format(4)) if failing else (PASSED, PASSED)
        return
    name = "kernels.{0}: rank 0 would be served by {1}, rank 1 by {2}; name one for all, such as kernels.{0} = plain"
    lines = [name.format(operation, PASSED, FAILED.format(4)) for operation in ("attention", "rotary")]
    assert first == f"Fault: {chr(10).join(lines)}"
    assert second.startswith("OtherRankError: rank 0 failed")


def test_a_twin_that_cannot_serve_is_told_by_one_rank():
    def work(mesh):
        return told_by(lambda: kernels_for(switch.Settings(attention="flex"), mesh))

    first, second = on_ranks(2, work)
    assert first.startswith("Fault: kernels.attention = flex cannot serve on cpu: it needs a CUDA device; use auto, ")
    assert second.startswith("OtherRankError: rank 0 failed")


def test_one_rank_has_what_the_switch_chooses():
    def work(mesh):
        kernels = kernels_for(switch.Settings(attention="torch"), mesh)
        assert kernels.attention is switch.choose(switch.Settings(attention="torch"), torch.device("cpu")).attention
        return kernels.told["attention"]

    assert on_ranks(1, work) == ["torch (asked for)"]
