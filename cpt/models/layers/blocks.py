"""How the blocks of a model are called: what they keep for the backward pass, and whether they are compiled.

compiled        whole blocks. All share what was compiled for the first.
compiled apart  each operation for itself, where a block cannot be followed as a whole: under ZeRO-3, whose hooks
                gather each layer's weights in the midst of it; and where the lengths of documents decide what is
                done in a block of which some results are kept.
"""

from __future__ import annotations

from typing import Literal

from torch import nn

from cpt.models.layers import compiled, recompute

Way = Literal["not compiled", "whole blocks", "each operation of a block"]


def prepare_blocks(
    model: nn.Module,
    recomputing: recompute.Settings,
    compiling: compiled.Settings,
    has_gathered_weights: bool = False,
    is_within_documents: bool = False,
) -> Way:
    """Exchange the forward functions of `model.blocks`, in place, for what the settings say; tells what is compiled.

    `has_gathered_weights`: the model will be under ZeRO-3. `is_within_documents`: it will be called with documents.
    Blocks are children of `model.blocks` that are named by their number in the whole model.
    """
    is_parted = is_within_documents and recomputing.mode == "selective"
    way: Way = "not compiled"
    if compiling.blocks:
        way = "each operation of a block" if has_gathered_weights or is_parted else "whole blocks"
    for name, block in model.blocks.named_children():
        mode = recomputing.mode if recomputing.blocks is None or int(name) < recomputing.blocks else "none"
        if way == "each operation of a block":
            compiled.compile_operations(block, compiling)
        if way != "whole blocks":
            block.forward = recompute.recomputed(block.forward, mode)
            continue
        if is_within_documents:
            compiled.leave_documents_apart(block)
        if mode == "selective":  # the compiler is to know what is kept
            block.forward = compiled.compiled(recompute.recomputed(block.forward, mode, is_traced=True), compiling)
        else:  # from outside, because what is not compiled in a block may not be inside what is computed again
            block.forward = recompute.recomputed(compiled.compiled(block.forward, compiling), mode)
    return way
