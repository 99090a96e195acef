"""What a block keeps for the backward pass, and what it computes again there.

    none       everything that a gradient needs is kept
    selective  results of matrix products and of attention kernels are kept; all else, cheap to compute and most of the
               memory, is computed again
    full       a block's input is kept, the whole block is computed again: a third more work

The same operations on the same numbers a second time: losses and weights do not change by a bit. Collectives inside a
block are called again too, by all ranks in the same order.
Source: Korthikanti et al. 2022, arXiv:2205.05198 (selective recomputation).
"""

from __future__ import annotations

from collections import defaultdict, deque
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any, Literal

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_iter, tree_map_only
from torch.utils.checkpoint import checkpoint, create_selective_checkpoint_contexts

from cpt_kernels import attention_triton

# `bmm` is not among them: the scores of an attention that is written out are S x S, which is what recomputing is for.
_KEPT = [
    torch.ops.aten.mm.default,
    torch.ops.aten.addmm.default,
    torch.ops.aten._scaled_dot_product_flash_attention.default,
    torch.ops.aten._scaled_dot_product_flash_attention_for_cpu.default,
    torch.ops.aten._scaled_dot_product_efficient_attention.default,
    torch.ops.aten._scaled_dot_product_cudnn_attention.default,
    attention_triton.ATTEND,
]


@dataclass(frozen=True)
class Settings:
    """What is computed again in the backward pass to save memory. `blocks`: only in the first so many; None, in all."""

    mode: Literal["none", "selective", "full"] = "none"
    blocks: int | None = None

    def faults(self) -> list[str]:
        """A count below one, or of nothing."""
        if self.blocks is not None and self.blocks < 1:
            return [f"blocks = {self.blocks}: at least 1; leave it out for all blocks"]
        if self.blocks is not None and self.mode == "none":
            return [
                f"blocks = {self.blocks}: mode is none, so nothing is computed again; set mode to selective or full"
            ]
        return []

    def faults_of(self, num_layers: int) -> list[str]:
        """More blocks than a model has."""
        if self.blocks is not None and self.blocks > num_layers:
            return [f"recompute.blocks = {self.blocks}: the model has {num_layers}; lower it, or leave it out for all"]
        return []


def recomputed(forward: Callable[..., Tensor], mode: str, is_traced: bool = False) -> Callable[..., Tensor]:
    """`forward` of a block, keeping less for its backward pass.

    `is_traced`: it is about to be compiled as a whole; the compiler knows torch's own way of keeping some results.
    """
    if mode == "none":
        return forward
    # Nothing in a block draws random numbers, so none are kept for it.
    plain = partial(checkpoint, forward, use_reentrant=False, preserve_rng_state=False)
    if mode == "full":
        return plain
    contexts = partial(create_selective_checkpoint_contexts, _KEPT) if is_traced else _keeping_and_reusing
    return partial(plain, context_fn=contexts)


def _keeping_and_reusing() -> tuple[TorchDispatchMode, TorchDispatchMode]:
    kept: dict[Any, deque] = defaultdict(deque)
    return _Keeping(kept), _Reusing(kept)


class _WithKept(TorchDispatchMode):
    """Sees every operation; `kept` holds results by operation, in the order in which they were made."""

    def __init__(self, kept: dict[Any, deque]) -> None:
        super().__init__()
        self.kept = kept

    @classmethod
    def ignore_compile_internals(cls) -> bool:
        """A compiled operation is one operation."""
        return True


class _Keeping(_WithKept):
    """Keeps results in the order in which they are made, for the forward pass.

    Torch's own contexts count every operation, which ZeRO-3 upsets: weights that it gathers in the forward pass may
    lie there still in the backward pass. They would also hand out results that were added to in place afterwards, as
    DeepSpeed's linear layer adds its bias under ZeRO-3.
    """

    def __torch_dispatch__(self, operation: Any, types: Any, arguments: tuple = (), named: dict | None = None) -> Any:
        schema = getattr(operation, "_schema", None)
        if schema is not None and schema.is_mutable:
            self._move_what_is_written(schema, arguments, named or {})
        result = operation(*arguments, **(named or {}))
        if operation in _KEPT:
            # Detached, because what is returned will hold the graph that holds what is kept.
            self.kept[operation].append(tree_map_only(Tensor, Tensor.detach, result))
        return result

    def _move_what_is_written(self, schema: Any, arguments: tuple, named: dict) -> None:
        """Copies of what is kept in memory that an operation is about to write to."""
        given = {**dict(zip((a.name for a in schema.arguments), arguments, strict=False)), **named}
        written = [given.get(a.name) for a in schema.arguments if a.alias_info is not None and a.alias_info.is_write]
        places = {_place(tensor) for tensor in tree_iter(written) if isinstance(tensor, Tensor)}

        def moved(tensor: Tensor) -> Tensor:
            return tensor.clone() if _place(tensor) in places else tensor

        for results in self.kept.values():
            for index, result in enumerate(results):
                results[index] = tree_map_only(Tensor, moved, result)


class _Reusing(_WithKept):
    """Gives back what was kept in the place of computing it, for the backward pass."""

    def __torch_dispatch__(self, operation: Any, types: Any, arguments: tuple = (), named: dict | None = None) -> Any:
        if operation in _KEPT:
            return self.kept[operation].popleft()
        return operation(*arguments, **(named or {}))


def _place(tensor: Tensor) -> int:
    return tensor.untyped_storage().data_ptr()
