"""Causal attention within documents through Triton: the kernels as one operation with a gradient, and their blocks.

    queries, keys, values, documents --forward--> mixed, logsums
    gradient of mixed, and all of these --grad_queries, then grad_keys_values--> gradients

To torch they are operations of its own kind: torch.compile takes them as they are, and recomputation can keep them.
B windows, S positions, H query heads, G key and value heads, K head width.
"""

from __future__ import annotations

import inspect
import math
from dataclasses import dataclass

import torch
from torch import Tensor

from cpt_kernels import attention_kernels
from cpt_kernels.documents import Documents
from cpt_kernels.language import IS_INTERPRETED, Variant, with_near_columns

WIDEST = 256
_TYPES = {torch.float32: "fp32", torch.bfloat16: "bf16", torch.float16: "fp16"}


@dataclass(frozen=True)
class Blocks:
    """Queries and keys of a block, and how a GPU works on it."""

    queries: int
    keys: int
    num_warps: int
    num_stages: int


# For `forward`, `grad_queries` and `grad_keys_values`, by columns of a head. Chosen by what the compiler tells, not by
# time, which is not measured yet: products by the tensor cores, few spilled registers (none at 64 entries), and where
# registers allow products of 64 columns or more, for on Hopper narrower ones wait for shared memory. The first table
# fits into the 99 KiB of shared memory that the smaller GPUs have.
_BLOCKS = {
    64: (Blocks(128, 64, 8, 3), Blocks(128, 64, 8, 2), Blocks(64, 128, 8, 2)),
    128: (Blocks(128, 64, 8, 2), Blocks(128, 32, 8, 2), Blocks(32, 128, 8, 2)),
    256: (Blocks(64, 32, 8, 2), Blocks(32, 32, 4, 2), Blocks(16, 32, 8, 2)),
}
_BLOCKS_ON_HOPPER = {
    64: (Blocks(128, 128, 8, 3), Blocks(128, 64, 8, 3), Blocks(64, 128, 8, 2)),
    128: (Blocks(128, 128, 8, 2), Blocks(128, 64, 8, 2), Blocks(64, 128, 8, 2)),
    256: (Blocks(128, 64, 8, 2), Blocks(128, 32, 8, 2), Blocks(32, 64, 8, 2)),
}
# fp32 keeps its precision (no TF32), so its products are not for the tensor cores.
_BLOCKS_IN_FP32 = {
    64: (Blocks(32, 32, 4, 2), Blocks(32, 32, 4, 2), Blocks(32, 32, 8, 2)),
    128: (Blocks(32, 32, 8, 2), Blocks(32, 32, 8, 2), Blocks(16, 32, 8, 2)),
    256: (Blocks(16, 16, 4, 1), Blocks(16, 16, 8, 1), Blocks(16, 16, 8, 1)),
}
# What a thread keeps in memory for want of registers, read in each round of a walk: 60 numbers beside some 400
# instructions were taken into the bargain for products of 64 columns.
_MOST_SPILLED_BYTES = {64: 0, 128: 256, 256: 272}
_MOST_SPILLED_BYTES_IN_FP32 = 352
# In the interpreter a block takes the same time whatever its size; these give several to a small window.
_BLOCKS_INTERPRETED = (Blocks(32, 16, 1, 1), Blocks(32, 16, 1, 1), Blocks(16, 32, 1, 1))


def within_documents(queries: Tensor, keys: Tensor, values: Tensor, documents: Documents | None) -> Tensor:
    """queries [B, S, H, K], keys and values [B, S, G, K] -> [B, S, H, K], where `serves` says so.

    In time that follows the squares of the documents' lengths, with memory for S numbers a head. Widths between 16, 32,
    64, 128 and 256 take the time of the next of these.
    """
    begins = ends = None
    if documents is not None and not documents.are_windows:
        begins, ends = documents.begins, documents.ends
    return attend(queries, keys, values, begins, ends)[0]


def serves(queries: Tensor) -> bool:
    """Whether the kernels are made for such queries: heads of up to 256 entries in fp32, fp16 or bf16."""
    return queries.dtype in _TYPES and queries.shape[-1] <= WIDEST


def columns_for(width: int) -> int:
    """Entries of a head, filled up to what a block of it has."""
    return max(16, 1 << (width - 1).bit_length())


def blocks_for(columns: int, dtype: torch.dtype, capability: int) -> tuple[Blocks, Blocks, Blocks]:
    """Blocks of `forward`, `grad_queries` and `grad_keys_values`; `capability` is 90 for Hopper."""
    if IS_INTERPRETED:
        return _BLOCKS_INTERPRETED
    table = _BLOCKS_IN_FP32 if dtype is torch.float32 else _BLOCKS_ON_HOPPER if capability in (90, 100) else _BLOCKS
    return table[max(64, columns)]


@torch.library.custom_op("cpt_kernels::attend", mutates_args=())
def attend(
    queries: Tensor, keys: Tensor, values: Tensor, begins: Tensor | None, ends: Tensor | None
) -> tuple[Tensor, Tensor]:
    """(mixed [B, S, H, K], logsums [B, H, S] in fp32). begins, ends: of each position's document, int32 [B, S]."""
    queries, keys, values = (with_near_columns(tensor) for tensor in (queries, keys, values))
    windows, positions, heads, width = queries.shape
    mixed = torch.empty(queries.shape, dtype=queries.dtype, device=queries.device)
    logsums = torch.empty(windows, heads, positions, dtype=torch.float32, device=queries.device)
    blocks = _blocks_of(queries)[0]
    attention_kernels.forward[(_num_programs(positions, blocks.queries, windows * heads),)](
        queries, keys, values, begins, mixed, logsums,
        *queries.stride()[:3], *keys.stride()[:3], *values.stride()[:3],
        positions, heads, heads // keys.shape[2], width**-0.5 * math.log2(math.e),
        **_form(width, queries.dtype, begins is not None, blocks), **_launch(blocks),
    )  # fmt: skip
    return mixed, logsums


@torch.library.custom_op("cpt_kernels::attend_backward", mutates_args=())
def attend_backward(
    grads: Tensor, queries: Tensor, keys: Tensor, values: Tensor, begins: Tensor | None, ends: Tensor | None,
    mixed: Tensor, logsums: Tensor,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """Gradients of queries, keys and values, from those of `mixed`."""
    grads, queries, keys, values = (with_near_columns(tensor) for tensor in (grads, queries, keys, values))
    windows, positions, heads, width = queries.shape
    groups = keys.shape[2]
    grad_queries = torch.empty(queries.shape, dtype=queries.dtype, device=queries.device)
    grad_keys = torch.empty(keys.shape, dtype=keys.dtype, device=keys.device)
    grad_values = torch.empty(values.shape, dtype=values.dtype, device=values.device)
    deltas = torch.empty_like(logsums)
    strides = [stride for tensor in (queries, keys, values, grads) for stride in tensor.stride()[:3]]
    scales = width**-0.5 * math.log2(math.e), width**-0.5
    _, blocks, blocks_of_keys = _blocks_of(queries)
    attention_kernels.grad_queries[(_num_programs(positions, blocks.queries, windows * heads),)](
        queries, keys, values, begins, mixed, logsums, grads, deltas, grad_queries,
        *strides, positions, heads, heads // groups, *scales,
        **_form(width, queries.dtype, begins is not None, blocks), **_launch(blocks),
    )  # fmt: skip
    attention_kernels.grad_keys_values[(_num_programs(positions, blocks_of_keys.keys, windows * groups),)](
        queries, keys, values, ends, logsums, grads, deltas, grad_keys, grad_values,
        *strides, positions, groups, heads // groups, *scales,
        **_form(width, queries.dtype, begins is not None, blocks_of_keys), **_launch(blocks_of_keys),
    )  # fmt: skip
    return grad_queries, grad_keys, grad_values


@attend.register_fake
def _(queries, keys, values, begins, ends):
    windows, positions, heads, _ = queries.shape
    return queries.new_empty(queries.shape), queries.new_empty(windows, heads, positions, dtype=torch.float32)


@attend_backward.register_fake
def _(grads, queries, keys, values, begins, ends, mixed, logsums):
    return tuple(tensor.new_empty(tensor.shape) for tensor in (queries, keys, values))


def _keep(ctx, inputs: tuple, output: tuple[Tensor, Tensor]) -> None:
    ctx.set_materialize_grads(False)  # nobody wants the gradient of the logsums
    ctx.save_for_backward(*inputs, *output)


def _backward(ctx, grads: Tensor, _: Tensor | None) -> tuple[Tensor | None, ...]:
    return *attend_backward(grads, *ctx.saved_tensors), None, None


attend.register_autograd(_backward, setup_context=_keep)
# As torch's dispatcher knows it, for who keeps its results.
ATTEND = torch.ops.cpt_kernels.attend.default


def _num_programs(positions: int, rows: int, num_heads: int) -> int:
    return -(-positions // rows) * num_heads


def _blocks_of(queries: Tensor) -> tuple[Blocks, Blocks, Blocks]:
    capability = 0
    if queries.device.type == "cuda":
        major, minor = torch.cuda.get_device_capability(queries.device)
        capability = 10 * major + minor
    return blocks_for(columns_for(queries.shape[-1]), queries.dtype, capability)


def _form(width: int, dtype: torch.dtype, has_documents: bool, blocks: Blocks) -> dict[str, object]:
    """What a kernel is compiled for."""
    return {
        "HAS_DOCUMENTS": has_documents,
        "WIDTH": width,
        "COLUMNS": columns_for(width),
        "QUERIES": blocks.queries,
        "KEYS": blocks.keys,
        "PRECISION": "ieee" if dtype is torch.float32 else "tf32",
        "WIDEN": IS_INTERPRETED and dtype is torch.bfloat16,
    }


def _launch(blocks: Blocks) -> dict[str, int]:
    return {"num_warps": blocks.num_warps, "num_stages": blocks.num_stages}


def _variants() -> list[Variant]:
    """The usual heads, the most usual first: many heads of 64 and grouped ones of 128 within documents."""
    bf16 = torch.bfloat16
    forms = [(64, bf16, True, False), (128, bf16, True, True), (80, bf16, True, False), (256, bf16, True, True)]
    forms += [(64, bf16, False, False), (128, bf16, False, True), (128, torch.float16, True, True)]
    forms += [(width, torch.float32, True, True) for width in (64, 128, 256)]
    return [variant for capability in (80, 90) for form in forms for variant in _variants_of(capability, *form)]


def _variants_of(
    capability: int, width: int, dtype: torch.dtype, has_documents: bool, is_grouped: bool
) -> list[Variant]:
    """The three kernels for heads of one kind."""
    kernels = attention_kernels.forward, attention_kernels.grad_queries, attention_kernels.grad_keys_values
    tensors = dict.fromkeys(
        ("queries", "keys", "values", "mixed", "grads", "grad", "grad_keys", "grad_values"), f"*{_TYPES[dtype]}:16"
    )
    tensors |= {"begins": "*i32:16", "ends": "*i32:16", "logsums": "*fp32:16", "deltas": "*fp32:16"}
    numbers = {"scale": "fp32", "grad_scale": "fp32", "heads": "i32", "groups": "i32", "repeats": "i32"}
    variants = []
    for kernel, blocks in zip(kernels, blocks_for(columns_for(width), dtype, capability), strict=True):
        constants = _form(width, dtype, has_documents, blocks)
        constants |= {} if has_documents else {"begins": None, "ends": None}
        constants |= {} if is_grouped else {"repeats": 1}
        names = inspect.signature(getattr(kernel, "fn", kernel)).parameters
        constants = {name: value for name, value in constants.items() if name in names}
        # All others are strides and the number of positions.
        types = {name: {**tensors, **numbers}.get(name, "i32:16") for name in names if name not in constants}
        is_fp32 = dtype is torch.float32
        most_spilled_bytes = _MOST_SPILLED_BYTES_IN_FP32 if is_fp32 else _MOST_SPILLED_BYTES[columns_for(width)]
        variants.append(
            Variant(
                kernel,
                types,
                constants,
                **_launch(blocks),
                capabilities=(capability,),
                uses_tensor_cores=not is_fp32,
                most_spilled_bytes=most_spilled_bytes,
            )
        )
    return variants


COMPILED = _variants()
