"""AdamW's update of flat tensors in one pass over memory, with what else would be passes of their own fused in.

    gradient -> unscaled, clipped -> moments -> master, decayed -> pulled to its anchor -> weight of 16 bits

Bytes a parameter with gradient and weight of 16 bits: 28 (read 2 + 4 + 4 + 4, written 4 + 4 + 4 + 2); 36 on the steps
that pull; 2 more for a gradient in fp32; 8 less for moments in bf16. The norm that the clip coefficient comes from is a
pass of its own before, because it is of all gradients.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from cpt_kernels.language import Variant, jit, tl

# Of a program, 8 a thread: with up to six tensors that is as many loads in flight as registers allow.
_ENTRIES_AT_ONCE = 1024


@torch.no_grad()
def update(
    masters: Sequence[Tensor],
    gradients: Sequence[Tensor],
    means: Sequence[Tensor],
    squares: Sequence[Tensor],
    step: Tensor,
    *,
    learning_rate: float,
    betas: tuple[float, float],
    epsilon: float,
    weight_decay: float = 0.0,
    loss_scale: float = 1.0,
    clip: Tensor | None = None,
    weights: Sequence[Tensor] | None = None,
    anchors: Sequence[Tensor] | None = None,
    kept: float = 1.0,
    seed: int = 0,
) -> None:
    """Update masters and moments in place, tensor by tensor; a kernel each, so few and long ones are best.

    masters: fp32. gradients: of any type, divided by `loss_scale` and multiplied by `clip`, a number on the device.
    means, squares: the moments, fp32, or bf16, which is rounded up or down at random: so that small changes are not
    lost, and the mean is right. What is drawn depends on `seed`, step and the element's number, counted through all
    tensors, and on nothing else. step: the number of this update, from 1, a number on the device: nothing waits.
    weights: copies of the masters in another type, which are written. anchors: fp32; the master then keeps the share
    `kept` of its way from there and the anchor goes where it is (Reptile, Lookahead; see cpt/methods/reptile.py).
    All without gaps in memory, tensors of the same place of as many elements in the same order there.
    Source: Loshchilov and Hutter 2019, arXiv:1711.05101; random rounding: Gupta et al. 2015, arXiv:1502.02551.
    """
    count = step.double()
    # In float64: 1 - 0.999 in fp32 is off by 5e-5.
    corrections = torch.stack((learning_rate / (1.0 - betas[0] ** count), (1.0 - betas[1] ** count).rsqrt())).float()
    first = 0
    for index, (master, gradient, mean, square) in enumerate(zip(masters, gradients, means, squares, strict=True)):
        number = master.numel()
        if number:
            _update[(-(-number // _ENTRIES_AT_ONCE),)](
                master, gradient, mean, square,
                master if weights is None else weights[index], master if anchors is None else anchors[index],
                corrections, corrections if clip is None else clip, step, number, first,
                1.0 - learning_rate * weight_decay, betas[0], 1.0 - betas[0], betas[1], 1.0 - betas[1], epsilon,
                1.0 / loss_scale, kept, seed << 32,
                clip is not None, weights is not None, anchors is not None, mean.dtype is torch.bfloat16,
                _ENTRIES_AT_ONCE, num_warps=4,
            )  # fmt: skip
        first += number


@jit
def _rounded_at_random(values, chances):
    """fp32 -> fp32 with the digits of bf16; up in so many of 65536 cases as it is on the way there."""
    bits = (values.to(tl.uint32, bitcast=True) + chances) & 0xFFFF0000
    # Bits of what is not a number could be counted up to what is one.
    return tl.where(values == values, bits.to(tl.float32, bitcast=True), values)


@jit
def _update(
    master, gradient, mean, square, weight, anchor, corrections, clip, step, number, first,
    decay, beta1, rest1, beta2, rest2, epsilon, unscale, kept, seed,
    HAS_CLIP: tl.constexpr, HAS_WEIGHT: tl.constexpr, HAS_ANCHOR: tl.constexpr, IS_RANDOM: tl.constexpr,
    BLOCK: tl.constexpr,
):  # fmt: skip
    """One program: BLOCK elements. rest1 is 1 - beta1, told because fp32 has too few digits to take it off here."""
    places = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    is_inside = places < number
    factor = unscale
    if HAS_CLIP:
        factor *= tl.load(clip).to(tl.float32)
    g = tl.load(gradient + places, mask=is_inside, other=0.0).to(tl.float32) * factor
    m = tl.load(mean + places, mask=is_inside, other=0.0).to(tl.float32)
    v = tl.load(square + places, mask=is_inside, other=0.0).to(tl.float32)
    w = tl.load(master + places, mask=is_inside, other=0.0)
    m = beta1 * m + rest1 * g
    v = beta2 * v + rest2 * g * g
    rate = tl.load(corrections)  # learning rate / (1 - beta1^step)
    w = w * decay - rate * m / (tl.sqrt(v) * tl.load(corrections + 1) + epsilon)
    if HAS_ANCHOR:
        a = tl.load(anchor + places, mask=is_inside, other=0.0)
        # As torch.lerp: from the end that is nearer, so that keeping all changes nothing.
        w = tl.where(kept < 0.5, a + kept * (w - a), w - (w - a) * (1.0 - kept))
        tl.store(anchor + places, w, mask=is_inside)
    tl.store(master + places, w, mask=is_inside)
    if HAS_WEIGHT:
        tl.store(weight + places, w.to(weight.dtype.element_ty), mask=is_inside)
    if IS_RANDOM:
        # 16 bits for each of the two moments; the key is seed and step, the counter the element.
        key = seed + tl.load(step).to(tl.int64)
        chances = tl.randint(key, first + places).to(tl.uint32, bitcast=True)
        m = _rounded_at_random(m, chances & 0xFFFF)
        v = _rounded_at_random(v, chances >> 16)
    tl.store(mean + places, m.to(mean.dtype.element_ty), mask=is_inside)
    tl.store(square + places, v.to(square.dtype.element_ty), mask=is_inside)


def _variant(gradient: str, moment: str, weight: str, **flags: bool) -> Variant:
    tensors = {"master": "*fp32:16", "gradient": gradient, "mean": moment, "square": moment, "weight": weight}
    tensors |= dict.fromkeys(("anchor", "corrections", "clip", "step"), "*fp32:16")
    numbers = dict.fromkeys(("decay", "beta1", "rest1", "beta2", "rest2", "epsilon", "unscale", "kept"), "fp32")
    asked = {name: flags.get(name, False) for name in ("HAS_CLIP", "HAS_WEIGHT", "HAS_ANCHOR", "IS_RANDOM")}
    numbers |= {"number": "i32:16", "first": "i32:16", "seed": "i64:16"}
    return Variant(_update, tensors | numbers, {**asked, "BLOCK": _ENTRIES_AT_ONCE})


COMPILED = [
    _variant("*fp32:16", "*fp32:16", "*fp32:16"),
    _variant("*bf16:16", "*fp32:16", "*bf16:16", HAS_CLIP=True, HAS_WEIGHT=True),
    _variant("*bf16:16", "*fp32:16", "*bf16:16", HAS_CLIP=True, HAS_WEIGHT=True, HAS_ANCHOR=True),
    _variant("*bf16:16", "*bf16:16", "*bf16:16", HAS_CLIP=True, HAS_WEIGHT=True, IS_RANDOM=True),
]
