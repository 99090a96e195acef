"""An update that is left out: the norm that DeepSpeed would clip by, before it does, and gradients let go of.

    gradients summed --> judged --fine--> update
                             | not fine
                             +--> what DeepSpeed does after an overflow: gradients gone, masters and moments untouched

`optimizer` is DeepSpeed's around AdamW. Its classes differ by ZeRO stage and precision; what is called here is what
their own `step` calls.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

INVALID = -1.0  # what some of DeepSpeed's norms say instead of one that is not finite


def norm_before_update(optimizer: Any) -> float:
    """The norm of all gradients at ZeRO 1 to 3, times the loss scale; not finite if a gradient is not. Collective."""
    if hasattr(optimizer, "get_grads_for_norm"):  # bf16 at stage 1
        from deepspeed.runtime.utils import get_global_norm_of_tensors

        gradients, _ = optimizer.get_grads_for_norm()
        norms = [get_global_norm_of_tensors(gradients, mpu=optimizer.mpu, norm_type=optimizer.norm_type)]
    elif hasattr(optimizer, "_get_norm_groups"):  # stage 3
        norms = optimizer._get_norm_groups()
    else:
        optimizer._wait_for_offload_copies()
        norms = [optimizer.scaled_global_norm()]
    norms = [float(norm) for norm in norms]
    return float("inf") if INVALID in norms else sum(norm * norm for norm in norms) ** 0.5


def leave_out(optimizer: Any, update: Callable[[], Any]) -> None:
    """Do in place of `update`, DeepSpeed's own step, what that does after an overflow, whatever the gradients are."""
    if hasattr(optimizer, "clear_hp_grads"):  # bf16 at stage 1
        optimizer.zero_grad()
        optimizer.overflow = True
        return
    if not hasattr(optimizer, "averaged_gradients"):  # torch's AdamW itself: the engine empties its gradients
        optimizer.overflow = True
        return

    def find_one(*arguments: Any, **named: Any) -> bool:
        optimizer.overflow = True
        return True

    # An attribute of the object hides the method of the class until it is deleted.
    of_class = "_overflow_check_and_loss_scale_update" if hasattr(optimizer, "_get_norm_groups") else "check_overflow"
    looks = getattr(optimizer, "check_grad_overflow", None)
    setattr(optimizer, of_class, find_one)
    optimizer.check_grad_overflow = True
    try:
        update()
    finally:
        delattr(optimizer, of_class)
        optimizer.check_grad_overflow = looks
    let_go_of_gradients(optimizer)


def let_go_of_gradients(optimizer: Any) -> None:
    """Empty what gradients are summed in: DeepSpeed adds to what overflowed, at stages 1 and 2 with offloading."""
    if hasattr(optimizer, "single_partition_of_fp32_groups"):  # of stages 1 and 2
        for group in optimizer.averaged_gradients:
            optimizer.averaged_gradients[group] = None
