"""Linear cross-entropy: from hidden states and the head's weight to one loss a token, without keeping all logits.

Losses are told token by token, so that sums of them, such as one for each source of data, need no second pass.

T tokens, D width, V vocabulary. Logits are the largest tensor of a step: 8192 tokens of a 128k vocabulary are 4 GiB in
fp32, and their gradient as much again.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn import functional

from cpt_kernels import logits
from cpt_kernels.self_check import difference

# A token with this target has loss 0 and gradient 0 (torch's own custom).
IGNORED = -100
# Logits that exist at once in the chunked twin. On a CPU 8 MiB in fp32, which its cache half holds: there, with 2048
# tokens and 8192 words in bf16, chunks took 227 ms forward and backward where the plain twin took 303 ms (one thread,
# AVX-512), in spite of the extra product. Elsewhere 256 MiB, so that products stay large; not measured yet.
_LOGITS_AT_ONCE_ON_CPU = 2**21
# In fp32 the extra product costs more than the cache gives: chunks took 1.2 times as long as the plain twin there
# (kernels/README.md), so that they are for what would not fit. 256 MiB, and as much again for the gradient.
_WIDE_LOGITS_FOR_PLAIN_ON_CPU = 2**26
_LOGITS_AT_ONCE = 2**26
# 256 MiB in bf16, 512 MiB in fp32. The weight's gradient takes as much again and more until it is narrowed.
_LOGITS_AT_ONCE_IN_TRITON = 2**27


def plain(hidden: Tensor, weight: Tensor, targets: Tensor, z_loss: float = 0.0) -> Tensor:
    """-log softmax(hidden weight^T)[target] of each token, over all logits at once in fp32 at least.

    hidden [..., D], weight [V, D], targets [...] int64 (IGNORED costs nothing) -> losses [...], fp32 at least. With
    `z_loss` that much of the squared log-sum-exp of a token's logits is added, which keeps it near 0.
    """
    scores = functional.linear(hidden, weight)  # [..., V]
    scores = scores.to(logits.wide(scores.dtype))
    losses = functional.cross_entropy(scores.flatten(0, -2), targets.flatten(), reduction="none", ignore_index=IGNORED)
    losses = losses.view(targets.shape)
    if not z_loss:
        return losses
    return losses + (z_loss * scores.logsumexp(dim=-1).square()).masked_fill(targets == IGNORED, 0.0)


def chunked(
    hidden: Tensor, weight: Tensor, targets: Tensor, z_loss: float = 0.0, tokens_at_once: int | None = None
) -> Tensor:
    """The same, some tokens at a time, in both directions: the backward pass makes the logits again.

    Costs one more product with the weight (8 instead of 6 times T V D) and keeps no more than `tokens_at_once` x V
    logits. The weight's gradient is summed over chunks in fp32 at least.
    """
    tokens_at_once = tokens_at_once or max(1, logits_at_once(weight.device) // weight.shape[0])
    places = _places(targets, weight.shape[0])
    losses = _Chunked.apply(hidden.flatten(0, -2), weight, places, z_loss, tokens_at_once)
    return losses.view(targets.shape)


def triton(
    hidden: Tensor, weight: Tensor, targets: Tensor, z_loss: float = 0.0, tokens_at_once: int | None = None
) -> Tensor:
    """The same with what is between the products in one Triton kernel, and no product made twice.

    The gradients are made in the forward pass, each chunk's logits being there, for losses that all weigh the same;
    the backward pass multiplies them by what they weigh. That is so for a mean, also over the tokens that have a
    target. It reads one number back from the device to see whether it is so: if not, logits are made again, as in
    `chunked`, and the gradients are right all the same. Kept in between: the gradients of hidden, and of weight in
    fp32. float64 is left to `chunked`.
    """
    if hidden.dtype is torch.float64:
        return chunked(hidden, weight, targets, z_loss, tokens_at_once)
    tokens_at_once = tokens_at_once or max(1, _LOGITS_AT_ONCE_IN_TRITON // weight.shape[0])
    places = _places(targets, weight.shape[0])
    # Asked for here: inside, gradients are always off, and tensors want one all the same.
    wants = tuple(torch.is_grad_enabled() and tensor.requires_grad for tensor in (hidden, weight))
    losses = _InForward.apply(hidden.flatten(0, -2).contiguous(), weight, places, z_loss, tokens_at_once, wants)
    return losses.view(targets.shape)


def by_size(hidden: Tensor, weight: Tensor, targets: Tensor, z_loss: float = 0.0) -> Tensor:
    """`plain` where all logits are no more than one chunk, or on a CPU not low and not too many; `chunked` beyond."""
    is_wide_on_cpu = weight.device.type == "cpu" and hidden.dtype not in (torch.bfloat16, torch.float16)
    most = _WIDE_LOGITS_FOR_PLAIN_ON_CPU if is_wide_on_cpu else logits_at_once(weight.device)
    serving = plain if targets.numel() * weight.shape[0] <= most else chunked
    return serving(hidden, weight, targets, z_loss)


def of_a_slice(serving: Callable[..., Tensor]) -> logits.OfLogits:
    """What tensor ranks use of a slice of the vocabulary each, where `serving` would be used of all of it."""
    return logits.TRITON if serving is triton else logits.PLAIN


def logits_at_once(device: torch.device) -> int:
    """Logits that exist at the same time on a device, in what is not a Triton kernel."""
    return _LOGITS_AT_ONCE_ON_CPU if device.type == "cpu" else _LOGITS_AT_ONCE


def _places(targets: Tensor, vocabulary: int) -> Tensor:
    """Targets [T] with -1 for those that are IGNORED. Raises RuntimeError, on a GPU later, for what is no word."""
    targets = targets.flatten()
    is_ignored = targets == IGNORED
    is_word = (targets >= 0) & (targets < vocabulary)
    torch._assert_async((is_word | is_ignored).all(), f"a target is out of bounds of {vocabulary} words")
    return targets.masked_fill(is_ignored, -1)


class _Chunked(torch.autograd.Function):
    @staticmethod
    def forward(ctx, hidden: Tensor, weight: Tensor, places: Tensor, z_loss: float, tokens_at_once: int) -> Tensor:
        logsumexps, chosen = logits.statistics_of(logits.PLAIN, hidden, weight, places, tokens_at_once)
        ctx.save_for_backward(hidden, weight, places, logsumexps)
        ctx.numbers = z_loss, tokens_at_once
        return logits.losses_of(logsumexps, chosen, places < 0, z_loss)

    @staticmethod
    @once_differentiable
    def backward(ctx, upstream: Tensor) -> tuple[Tensor | None, ...]:
        places = ctx.saved_tensors[2]
        upstream = upstream.masked_fill(places < 0, 0.0)
        wants = ctx.needs_input_grad[:2]
        gradients = logits.gradients_of(logits.PLAIN, *ctx.saved_tensors, upstream, *ctx.numbers, wants)
        return *gradients, None, None, None


class _InForward(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx,
        hidden: Tensor,
        weight: Tensor,
        places: Tensor,
        z_loss: float,
        tokens_at_once: int,
        wants: tuple[bool, bool],
    ) -> Tensor:
        logsumexps = torch.empty(places.shape, dtype=torch.float32, device=hidden.device)
        chosen = torch.empty_like(logsumexps)
        grad_hidden = torch.empty_like(hidden) if wants[0] else None
        grad_weight = torch.zeros(weight.shape, dtype=torch.float32, device=weight.device) if wants[1] else None
        for part in logits.parts(len(places), tokens_at_once):
            scores = functional.linear(hidden[part], weight)  # [t, V]; from the next line on their gradient
            logsumexps[part], chosen[part] = logits.statistics_and_unit_gradient(
                scores, places[part], z_loss, any(wants)
            )
            if wants[0]:
                torch.mm(scores, weight, out=grad_hidden[part])
            if wants[1]:
                logits.TRITON.add_product(grad_weight, scores, hidden[part])
        ctx.save_for_backward(hidden, weight, places, logsumexps, grad_hidden, grad_weight)
        ctx.numbers = z_loss, tokens_at_once
        return logits.losses_of(logsumexps, chosen, places < 0, z_loss)

    @staticmethod
    @once_differentiable
    def backward(ctx, upstream: Tensor) -> tuple[Tensor | None, ...]:
        *inputs, grad_hidden, grad_weight = ctx.saved_tensors
        places, wants = inputs[2], ctx.needs_input_grad[:2]
        scale = _one_number(upstream, places >= 0)
        if scale is None:
            upstream = upstream.masked_fill(places < 0, 0.0)
            gradients = logits.gradients_of(logits.TRITON, *inputs, upstream, *ctx.numbers, wants)
            return *gradients, None, None, None, None
        # With a dimension: a number without one is rounded to 16 bits by CUDA's product before it is used, and 1e5 is
        # infinite there in fp16. As it is, both products are made in fp32 and rounded once, on a GPU without a tensor
        # in fp32 in between.
        scale = scale[None]
        grad_hidden = torch.mul(grad_hidden, scale, out=torch.empty_like(inputs[0])) if wants[0] else None
        grad_weight = torch.mul(grad_weight, scale, out=torch.empty_like(inputs[1])) if wants[1] else None
        return grad_hidden, grad_weight, None, None, None, None


def _one_number(upstream: Tensor, is_counted: Tensor) -> Tensor | None:
    """The gradient of every loss that counts, if it is one and the same; a tensor without dimensions."""
    if not len(upstream):
        return None
    smallest = upstream.masked_fill(~is_counted, torch.inf).min()
    largest = upstream.masked_fill(~is_counted, -torch.inf).max()
    return largest if bool(smallest == largest) else None


TWINS: dict[str, Callable[..., Tensor]] = {"plain": plain, "chunked": chunked, "triton": triton}


def face(device: torch.device) -> tuple[Callable[..., Tensor], str]:
    """What serves on this device when nothing is asked for, and why."""
    most = f"{logits_at_once(device) / 2**20:.0f} Mi logits"
    if device.type == "cpu":
        most += f" in bf16 and {_WIDE_LOGITS_FOR_PLAIN_ON_CPU / 2**20:.0f} Mi in fp32"
    return by_size, f"plain to {most}, chunked beyond (memory)"


def check(device: torch.device) -> str | None:
    """What is wrong with the Triton twin on this device, against `plain` on small random inputs; None if nothing is."""
    targets = torch.arange(23, device=device) * 57 % 131
    targets[5] = IGNORED
    uneven = torch.linspace(0.5, 2.0, 23, device=device)
    for dtype in (torch.float32, torch.bfloat16):
        for weights in (1.0, uneven):  # the gradients of the forward pass, and those that are made again
            fault = difference(
                lambda h, w: triton(h, w, targets, 1e-2, 7) * weights,  # noqa: B023
                lambda h, w: plain(h, w, targets, 1e-2) * weights,  # noqa: B023
                [(23, 48), (131, 48)], dtype, device,
            )  # fmt: skip
            if fault:
                return fault
    return None
