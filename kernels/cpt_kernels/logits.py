"""What cross-entropy needs of some tokens' logits: two numbers a token, and their gradient in the place of the logits.

The logits may be of all the vocabulary or of a slice of it, such as a tensor rank has; what is in no slice of it here
is for the caller to put together. A loss is logsumexp - chosen + z_loss logsumexp^2 (z-loss: Chowdhery et al. 2022,
arXiv:2204.02311); its gradient (1 + 2 z_loss logsumexp) softmax - [target].

T tokens, t of them at once, D width, R rows of the vocabulary that are here (0 in an empty slice).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional

from cpt_kernels.language import Variant, jit, tl

# Of a program, 16 a thread.
_ENTRIES_AT_ONCE = 4096
_NUM_WARPS = 8


@dataclass(frozen=True)
class OfLogits:
    """One way to do it. `places` [t] int64: row of each token's target here, -1 where it is elsewhere or none.

    statistics(logits [t, R], places) -> (logsumexps, chosen), each [t] in fp32 at least; chosen is 0 at place -1.
    gradient(logits, places, logsumexps [t], upstream [t], z_loss) -> the gradient of logits [t, R] in their type where
    the losses have the gradient `upstream`; the logits may be gone afterwards.
    add_product(total [R, D], left [t, R], right [t, D]): total += left^T right.
    """

    name: str
    statistics: Callable[[Tensor, Tensor], tuple[Tensor, Tensor]]
    gradient: Callable[[Tensor, Tensor, Tensor, Tensor, float], Tensor]
    add_product: Callable[[Tensor, Tensor, Tensor], None]


def wide(dtype: torch.dtype) -> torch.dtype:
    """fp32 at least."""
    return torch.promote_types(dtype, torch.float32)


def parts(num_tokens: int, tokens_at_once: int) -> Iterator[slice]:
    """Neighbouring tokens, so many at once."""
    return (slice(start, start + tokens_at_once) for start in range(0, num_tokens, tokens_at_once))


def losses_of(logsumexps: Tensor, chosen: Tensor, is_ignored: Tensor, z_loss: float) -> Tensor:
    """The losses [T] from both statistics over the whole vocabulary, 0 for tokens that are ignored."""
    losses = logsumexps - chosen
    if z_loss:
        losses = losses + z_loss * logsumexps.square()
    return losses.masked_fill(is_ignored, 0.0)


def statistics_of(
    by: OfLogits, hidden: Tensor, weight: Tensor, places: Tensor, tokens_at_once: int
) -> tuple[Tensor, Tensor]:
    """Log-sum-exp over the rows that are here, -inf if there are none, and the target's logit, 0 if it is elsewhere.

    hidden [T, D], weight [R, D], places [T] -> two of [T], fp32 at least.
    """
    logsumexps = torch.full(places.shape, -torch.inf, dtype=wide(hidden.dtype), device=hidden.device)
    chosen = torch.zeros_like(logsumexps)
    for part in parts(len(places) if len(weight) else 0, tokens_at_once):
        logsumexps[part], chosen[part] = by.statistics(functional.linear(hidden[part], weight), places[part])
    return logsumexps, chosen


def gradients_of(
    by: OfLogits,
    hidden: Tensor,
    weight: Tensor,
    places: Tensor,
    logsumexps: Tensor,
    upstream: Tensor,
    z_loss: float,
    tokens_at_once: int,
    wants: tuple[bool, bool] = (True, True),
) -> tuple[Tensor | None, Tensor | None]:
    """Gradients of hidden [T, D] and weight [R, D], as far as wanted; the logits are made again.

    `logsumexps` [T] are of the whole vocabulary, `upstream` [T] the losses' gradient, 0 for tokens without a target.
    The gradient of hidden is what comes through the rows that are here; the weight's is summed in fp32 at least.
    """
    grad_hidden = torch.zeros_like(hidden) if wants[0] else None
    grad_weight = torch.zeros(weight.shape, dtype=wide(hidden.dtype), device=weight.device) if wants[1] else None
    for part in parts(len(places) if len(weight) else 0, tokens_at_once):
        logits = functional.linear(hidden[part], weight)
        grad_logits = by.gradient(logits, places[part], logsumexps[part], upstream[part], z_loss)
        if grad_hidden is not None:
            grad_hidden[part] = grad_logits @ weight
        if grad_weight is not None:
            by.add_product(grad_weight, grad_logits, hidden[part])
    return grad_hidden, grad_weight.to(weight.dtype) if wants[1] else None


def _statistics(logits: Tensor, places: Tensor) -> tuple[Tensor, Tensor]:
    logits = logits.to(wide(logits.dtype))
    chosen = logits.gather(1, places.clamp(min=0)[:, None])[:, 0]
    return logits.logsumexp(dim=-1), chosen.masked_fill(places < 0, 0.0)


def _gradient(logits: Tensor, places: Tensor, logsumexps: Tensor, upstream: Tensor, z_loss: float) -> Tensor:
    grad = logits.to(wide(logits.dtype)).sub_(logsumexps[:, None]).exp_()  # now probabilities
    if z_loss:
        grad.mul_(1.0 + 2.0 * z_loss * logsumexps[:, None])
    is_here = (places >= 0).to(grad.dtype)
    grad.scatter_add_(1, places.clamp(min=0)[:, None], -is_here[:, None])
    return grad.mul_(upstream[:, None]).to(logits.dtype)


def _add_product(total: Tensor, left: Tensor, right: Tensor) -> None:
    total += left.T @ right


def _triton_statistics(logits: Tensor, places: Tensor) -> tuple[Tensor, Tensor]:
    return statistics_and_unit_gradient(logits, places, 0.0, with_gradient=False)


def statistics_and_unit_gradient(
    logits: Tensor, places: Tensor, z_loss: float, with_gradient: bool = True
) -> tuple[Tensor, Tensor]:
    """As `OfLogits.statistics`; with a gradient, that of the sum of the losses is written in the place of the logits.

    For logits of the whole vocabulary: a token at place -1 has no target, and gradient 0. One kernel; what it reads a
    second time for the gradient it has just read, 256 kB a token of 128k words.
    """
    num_tokens, rows = logits.shape
    logsumexps = torch.empty(num_tokens, dtype=torch.float32, device=logits.device)
    chosen = torch.empty_like(logsumexps)
    if num_tokens:
        _over_tokens[(num_tokens,)](
            logits, places, logsumexps, chosen, rows, z_loss, with_gradient, _block(rows), num_warps=_NUM_WARPS
        )
    return logsumexps, chosen


def _triton_gradient(logits: Tensor, places: Tensor, logsumexps: Tensor, upstream: Tensor, z_loss: float) -> Tensor:
    num_tokens, rows = logits.shape
    if num_tokens:
        block = _block(rows)
        _over_entries[(num_tokens, -(-rows // block))](
            logits, places, logsumexps, upstream.contiguous(), rows, z_loss, block, num_warps=_NUM_WARPS
        )
    return logits


def _add_product_in_place(total: Tensor, left: Tensor, right: Tensor) -> None:
    """The sum stays in fp32 inside the product too, where the device has such a product: fp16 would overflow."""
    if total.is_cuda and left.dtype is not total.dtype:
        torch.addmm(total, left.T, right, out_dtype=total.dtype, out=total)
    else:
        total.addmm_(left.T.to(total.dtype), right.to(total.dtype))


PLAIN = OfLogits("plain", _statistics, _gradient, _add_product)
# No float64.
TRITON = OfLogits("triton", _triton_statistics, _triton_gradient, _add_product_in_place)


def _block(rows: int) -> int:
    return min(_ENTRIES_AT_ONCE, max(16, 1 << (rows - 1).bit_length()))


@jit
def _over_tokens(logits, places, logsumexps, chosen, rows, z_loss, WITH_GRADIENT: tl.constexpr, BLOCK: tl.constexpr):
    """One program: one token's logits, BLOCK at once; a second time for their gradient."""
    token = tl.program_id(0).to(tl.int64)
    place = tl.load(places + token)
    start = logits + token * rows
    columns = tl.arange(0, BLOCK)
    largest = tl.full([], float("-inf"), dtype=tl.float32)
    # A sum for each of BLOCK columns: threads meet once in a round, for the largest, and not twice.
    sums = tl.zeros([BLOCK], dtype=tl.float32)
    for first in range(0, rows, BLOCK):
        values = tl.load(start + first + columns, mask=first + columns < rows, other=float("-inf")).to(tl.float32)
        larger = tl.maximum(largest, tl.max(values, axis=0))
        sums = sums * tl.exp(largest - larger) + tl.exp(values - larger)
        largest = larger
    logsumexp = largest + tl.log(tl.sum(sums, axis=0))
    tl.store(logsumexps + token, logsumexp)
    tl.store(chosen + token, tl.load(start + place, mask=place >= 0, other=0.0).to(tl.float32))
    if WITH_GRADIENT:
        # The target's logit is read before its place is written: threads have to meet in between.
        tl.debug_barrier()
        has_target = tl.where(place >= 0, 1.0, 0.0)
        for first in range(0, rows, BLOCK):
            at = first + columns
            values = tl.load(start + at, mask=at < rows, other=float("-inf")).to(tl.float32)
            share = tl.exp(values - logsumexp) * has_target
            # In this order: a share near 1 keeps its digits.
            grad = (share - tl.where(at == place, 1.0, 0.0)) + share * (2.0 * z_loss * logsumexp)
            tl.store(start + at, grad.to(logits.dtype.element_ty), mask=at < rows)


@jit
def _over_entries(logits, places, logsumexps, upstream, rows, z_loss, BLOCK: tl.constexpr):
    """One program: BLOCK logits of one token, which their gradient takes the place of."""
    token = tl.program_id(0).to(tl.int64)
    at = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    logsumexp = tl.load(logsumexps + token)
    start = logits + token * rows
    values = tl.load(start + at, mask=at < rows, other=float("-inf")).to(tl.float32)
    share = tl.exp(values - logsumexp)
    target = tl.where(at == tl.load(places + token), 1.0, 0.0)
    grad = ((share - target) + share * (2.0 * z_loss * logsumexp)) * tl.load(upstream + token).to(tl.float32)
    tl.store(start + at, grad.to(logits.dtype.element_ty), mask=at < rows)


_NUMBERS = {"logits": "*bf16:16", "places": "*i64:16", "logsumexps": "*fp32:16", "rows": "i32:16", "z_loss": "fp32"}
COMPILED = [
    Variant(
        _over_tokens, {**_NUMBERS, "chosen": "*fp32:16"}, {"WITH_GRADIENT": with_gradient, "BLOCK": 4096}, _NUM_WARPS
    )
    for with_gradient in (False, True)
] + [Variant(_over_entries, {**_NUMBERS, "upstream": "*fp32:16"}, {"BLOCK": 4096}, _NUM_WARPS)]
