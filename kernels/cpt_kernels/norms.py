"""Triton kernels of both normalisations, each alone or on top of a residual sum: `rms_norm` and `layer_norm` call them.

    forward    a program has a few rows at once, all of their width; statistics are kept, one or two numbers a row
    backward   programs that stay: each takes every n-th group of rows and keeps the weight's gradient to itself until
               its end; their sums are then added by torch. No atomics: the same input gives the same bits.

Bytes a row of D entries of 2 bytes: 4 D forward and 6 D backward, 8 D each with the residual sum.
R rows, D width, P programs.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from cpt_kernels.language import Variant, jit, tl

# Entries that a program has at once: 16 a thread, which leaves room in the registers for five such tiles.
_ENTRIES_OF_A_TILE = 2048
_ENTRIES_OF_A_WARP = 512
# Backward, a multiprocessor has tiles of so many entries together: enough loads in flight, and few sums to add up.
_ENTRIES_OF_A_PROCESSOR = 8192


def norm(
    hidden: Tensor, residual: Tensor | None, weight: Tensor, bias: Tensor | None, epsilon: float
) -> Tensor | tuple[Tensor, Tensor]:
    """hidden [..., D], residual alike, weight and bias [D] -> normal [..., D]; with a residual (normal, their sum).

    With a bias it is LayerNorm, without RMSNorm. All in fp32, rounded once; the sum is rounded before it is normalised.
    No float64. Made for widths to 16384.
    """
    return _Norm.apply(hidden, residual, weight, bias, epsilon)


class _Norm(torch.autograd.Function):
    @staticmethod
    def forward(ctx, hidden, residual, weight, bias, epsilon):
        ctx.set_materialize_grads(False)
        width = weight.shape[0]
        rows = hidden.reshape(-1, width).contiguous()
        tile = _Tile(len(rows), width)
        normal = torch.empty_like(rows)
        scales = torch.empty(len(rows), dtype=torch.float32, device=rows.device)
        means = torch.empty_like(scales) if bias is not None else scales
        beside = rows if residual is None else residual.reshape(-1, width).contiguous()
        total = rows if residual is None else torch.empty_like(rows)
        weight = weight.contiguous()
        if len(rows):
            _forward[(tile.num_groups,)](
                rows, beside, weight, weight if bias is None else bias.contiguous(), normal, total, means, scales,
                len(rows), width, epsilon, bias is not None, residual is not None, tile.rows, tile.block,
                num_warps=tile.num_warps,
            )  # fmt: skip
        ctx.save_for_backward(total, weight, means, scales)
        ctx.is_centred, ctx.is_added = bias is not None, residual is not None
        normal = normal.view(hidden.shape)
        return normal if residual is None else (normal, total.view(hidden.shape))

    @staticmethod
    @once_differentiable
    def backward(ctx, grad_normal, grad_total=None):
        total, weight, means, scales = ctx.saved_tensors
        if grad_normal is None:
            return grad_total, grad_total, None, None, None
        tile = _Tile(*total.shape)
        shape, grad_normal = grad_normal.shape, grad_normal.contiguous()
        grad_hidden = torch.empty_like(total)
        num_programs = min(tile.num_groups, tile.programs_of_a_processor * _num_processors(total.device))
        sums = torch.empty(1 + ctx.is_centred, num_programs, len(weight), dtype=torch.float32, device=total.device)
        if len(total):
            _backward[(num_programs,)](
                grad_normal, grad_normal if grad_total is None else grad_total.contiguous(), total, weight, means,
                scales, grad_hidden, sums[0], sums[-1], *total.shape, ctx.is_centred, grad_total is not None,
                tile.rows, tile.block, num_warps=tile.num_warps,
            )  # fmt: skip
        grads = sums.sum(dim=1).to(weight.dtype)
        grad_hidden = grad_hidden.view(shape)
        grad_residual = grad_hidden if ctx.is_added else None
        return grad_hidden, grad_residual, grads[0], grads[1] if ctx.is_centred else None, None


class _Tile:
    """How rows are shared out: `rows` at once to a program, `block` entries wide, a power of two."""

    def __init__(self, num_rows: int, width: int) -> None:
        self.block = max(16, 1 << (width - 1).bit_length())
        self.rows = max(1, _ENTRIES_OF_A_TILE // self.block)
        self.num_warps = min(32, max(4, self.rows * self.block // _ENTRIES_OF_A_WARP))
        self.num_groups = -(-num_rows // self.rows)
        self.programs_of_a_processor = max(2, _ENTRIES_OF_A_PROCESSOR // (self.rows * self.block))


def _num_processors(device: torch.device) -> int:
    return torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 1


@jit
def _forward(
    hidden, residual, weight, bias, normal, total, means, scales, num_rows, width, epsilon,
    IS_CENTRED: tl.constexpr, HAS_RESIDUAL: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """One program: ROWS rows. `means` is written with IS_CENTRED only, `total` with HAS_RESIDUAL only."""
    rows = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    columns = tl.arange(0, BLOCK)
    is_row, is_column = rows < num_rows, columns < width
    is_inside = is_row[:, None] & is_column[None, :]
    # In 64 bits: a million rows of 4096 entries do not fit into 32.
    places = rows.to(tl.int64)[:, None] * width + columns[None, :]
    values = tl.load(hidden + places, mask=is_inside, other=0.0).to(tl.float32)  # [ROWS, BLOCK]
    if HAS_RESIDUAL:
        values += tl.load(residual + places, mask=is_inside, other=0.0).to(tl.float32)
        rounded = values.to(total.dtype.element_ty)
        tl.store(total + places, rounded, mask=is_inside)
        values = rounded.to(tl.float32)
    if IS_CENTRED:
        mean = tl.sum(values, axis=1) / width
        tl.store(means + rows, mean, mask=is_row)
        values = tl.where(is_inside, values - mean[:, None], 0.0)
    scale = 1.0 / tl.sqrt(tl.sum(values * values, axis=1) / width + epsilon)  # [ROWS]
    tl.store(scales + rows, scale, mask=is_row)
    values *= scale[:, None] * tl.load(weight + columns, mask=is_column, other=0.0).to(tl.float32)[None, :]
    if IS_CENTRED:
        values += tl.load(bias + columns, mask=is_column, other=0.0).to(tl.float32)[None, :]
    tl.store(normal + places, values.to(normal.dtype.element_ty), mask=is_inside)


@jit
def _backward(
    grad_normal, grad_total, total, weight, means, scales, grad_hidden, sums_of_weight, sums_of_bias, num_rows, width,
    IS_CENTRED: tl.constexpr, HAS_GRAD_TOTAL: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """One program: every n-th group of ROWS rows, of n programs; its sums [D] into row program of [P, D]."""
    columns = tl.arange(0, BLOCK)
    is_column = columns < width
    gain = tl.load(weight + columns, mask=is_column, other=0.0).to(tl.float32)
    # Summed over rows after the loop only, so that threads do not meet for it in each round.
    of_weight = tl.zeros([ROWS, BLOCK], dtype=tl.float32)
    of_bias = tl.zeros([ROWS, BLOCK], dtype=tl.float32)
    for first in range(tl.program_id(0) * ROWS, num_rows, tl.num_programs(0) * ROWS):
        rows = first + tl.arange(0, ROWS)
        is_row = rows < num_rows
        is_inside = is_row[:, None] & is_column[None, :]
        places = rows.to(tl.int64)[:, None] * width + columns[None, :]
        unit = tl.load(total + places, mask=is_inside, other=0.0).to(tl.float32)
        grad = tl.load(grad_normal + places, mask=is_inside, other=0.0).to(tl.float32)
        scale = tl.load(scales + rows, mask=is_row, other=0.0)
        if IS_CENTRED:
            mean = tl.load(means + rows, mask=is_row, other=0.0)
            unit = tl.where(is_inside, unit - mean[:, None], 0.0)
        unit *= scale[:, None]  # the normal without its weight, [ROWS, BLOCK]
        of_weight += grad * unit
        if IS_CENTRED:
            of_bias += grad
        grad *= gain[None, :]
        along = tl.sum(grad * unit, axis=1) / width
        out = grad - unit * along[:, None]
        if IS_CENTRED:
            out -= (tl.sum(grad, axis=1) / width)[:, None]
        out *= scale[:, None]
        if HAS_GRAD_TOTAL:
            out += tl.load(grad_total + places, mask=is_inside, other=0.0).to(tl.float32)
        tl.store(grad_hidden + places, out.to(grad_hidden.dtype.element_ty), mask=is_inside)
    place = tl.program_id(0).to(tl.int64) * width + columns
    tl.store(sums_of_weight + place, tl.sum(of_weight, axis=0), mask=is_column)
    if IS_CENTRED:
        tl.store(sums_of_bias + place, tl.sum(of_bias, axis=0), mask=is_column)


def _variants() -> list[Variant]:
    """Both kernels at the widths of Pythia-410M, Llama-1B and Llama-8B, with and without a residual."""
    narrow, wide, number = "*bf16:16", "*fp32:16", "i32:16"
    sizes = {"num_rows": number, "width": number}
    forward = dict.fromkeys(("hidden", "residual", "weight", "bias", "normal", "total"), narrow)
    forward |= {"means": wide, "scales": wide, **sizes, "epsilon": "fp32"}
    backward = dict.fromkeys(("grad_normal", "grad_total", "total", "weight", "grad_hidden"), narrow)
    backward |= {**dict.fromkeys(("means", "scales", "sums_of_weight", "sums_of_bias"), wide), **sizes}
    variants = []
    for width, is_centred in ((1024, True), (2048, False), (4096, False)):
        tile = _Tile(1, width)
        shape = {"IS_CENTRED": is_centred, "ROWS": tile.rows, "BLOCK": tile.block}
        for is_added in (False, True):
            variants += [
                Variant(_forward, forward, {**shape, "HAS_RESIDUAL": is_added}, num_warps=tile.num_warps),
                Variant(_backward, backward, {**shape, "HAS_GRAD_TOTAL": is_added}, num_warps=tile.num_warps),
            ]
    return variants


COMPILED = _variants()
