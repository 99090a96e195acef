"""Linear cross-entropy: from hidden states and the head's weight to one loss a token, without keeping all logits.

T tokens, D width, V vocabulary. Logits are the largest tensor of a step: 8192 tokens of a 128k vocabulary are 4 GiB in
fp32, and their gradient as much again.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn import functional

# A token with this target has loss 0 and gradient 0 (torch's own custom).
IGNORED = -100
# Logits that exist at once in the chunked twin. On a CPU 8 MiB in fp32, which its cache half holds: there, with 2048
# tokens and 8192 words in bf16, chunks took 227 ms forward and backward where the plain twin took 303 ms (one thread,
# AVX-512), in spite of the extra product. Elsewhere 256 MiB, so that products stay large; not measured yet.
_LOGITS_AT_ONCE_ON_CPU = 2**21
_LOGITS_AT_ONCE = 2**26


def plain(hidden: Tensor, weight: Tensor, targets: Tensor) -> Tensor:
    """-log softmax(hidden weight^T)[target] of each token, over all logits at once in fp32 at least.

    hidden [..., D], weight [V, D], targets [...] int64 (IGNORED costs nothing) -> losses [...], fp32 at least.
    """
    logits = functional.linear(hidden, weight)  # [..., V]
    logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
    losses = functional.cross_entropy(logits.flatten(0, -2), targets.flatten(), reduction="none", ignore_index=IGNORED)
    return losses.view(targets.shape)


def chunked(hidden: Tensor, weight: Tensor, targets: Tensor, tokens_at_once: int | None = None) -> Tensor:
    """The same, some tokens at a time, in both directions: the backward pass makes the logits again.

    Costs one more product with the weight (8 instead of 6 times T V D) and keeps no more than `tokens_at_once` x V
    logits. The weight's gradient is summed over chunks in fp32 at least.
    """
    tokens_at_once = tokens_at_once or max(1, _logits_at_once(weight.device) // weight.shape[0])
    losses = _Chunked.apply(hidden.flatten(0, -2), weight, targets.flatten(), tokens_at_once)
    return losses.view(targets.shape)


def by_size(hidden: Tensor, weight: Tensor, targets: Tensor) -> Tensor:
    """`plain` where all logits are no more than one chunk, `chunked` beyond."""
    serving = plain if targets.numel() * weight.shape[0] <= _logits_at_once(weight.device) else chunked
    return serving(hidden, weight, targets)


def _logits_at_once(device: torch.device) -> int:
    return _LOGITS_AT_ONCE_ON_CPU if device.type == "cpu" else _LOGITS_AT_ONCE


class _Chunked(torch.autograd.Function):
    @staticmethod
    def forward(ctx, hidden: Tensor, weight: Tensor, targets: Tensor, tokens_at_once: int) -> Tensor:
        wide = torch.promote_types(hidden.dtype, torch.float32)
        losses = torch.empty(targets.shape, dtype=wide, device=hidden.device)  # [T]
        logsumexps = torch.empty_like(losses)  # [T]
        for start in range(0, len(targets), tokens_at_once):
            part = slice(start, start + tokens_at_once)
            logits = functional.linear(hidden[part], weight).to(wide)  # [tokens_at_once, V]
            is_ignored = targets[part] == IGNORED
            chosen = logits.gather(1, targets[part].masked_fill(is_ignored, 0)[:, None])[:, 0]
            logsumexps[part] = logits.logsumexp(dim=-1)
            losses[part] = (logsumexps[part] - chosen).masked_fill(is_ignored, 0.0)
        ctx.save_for_backward(hidden, weight, targets, logsumexps)
        ctx.tokens_at_once = tokens_at_once
        return losses

    @staticmethod
    @once_differentiable
    def backward(ctx, grad_losses: Tensor) -> tuple[Tensor | None, Tensor | None, None, None]:
        hidden, weight, targets, logsumexps = ctx.saved_tensors
        wants_hidden, wants_weight = ctx.needs_input_grad[:2]
        grad_hidden = torch.empty_like(hidden) if wants_hidden else None
        grad_weight = torch.zeros(weight.shape, dtype=grad_losses.dtype, device=weight.device) if wants_weight else None
        for start in range(0, len(targets), ctx.tokens_at_once):
            part = slice(start, start + ctx.tokens_at_once)
            logits = functional.linear(hidden[part], weight).to(grad_losses.dtype)
            grad_logits = logits.sub_(logsumexps[part, None]).exp_()  # now probabilities
            is_ignored = targets[part] == IGNORED
            columns = targets[part].masked_fill(is_ignored, 0)[:, None]
            grad_logits.scatter_add_(1, columns, grad_logits.new_full(columns.shape, -1.0))
            grad_logits.mul_(grad_losses[part].masked_fill(is_ignored, 0.0)[:, None])
            grad_logits = grad_logits.to(hidden.dtype)
            if grad_hidden is not None:
                grad_hidden[part] = grad_logits @ weight
            if grad_weight is not None:
                grad_weight += grad_logits.T @ hidden[part]
        return grad_hidden, grad_weight.to(weight.dtype) if wants_weight else None, None, None


TWINS: dict[str, Callable[..., Tensor]] = {"plain": plain, "chunked": chunked}


def face(device: torch.device) -> tuple[Callable[..., Tensor], str]:
    """What serves on this device when nothing is asked for, and why."""
    return by_size, f"plain to {_logits_at_once(device) / 2**20:.0f} Mi logits, chunked beyond (memory)"
