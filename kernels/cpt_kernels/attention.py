"""Causal self-attention with grouped queries: each position looks at itself and at all before it (in its document).

B sequences, S positions, H query heads, G key and value heads (H is a multiple of G), K head width.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn import functional

from cpt_kernels import attention_others, attention_triton
from cpt_kernels.documents import Documents
from cpt_kernels.language import why_not
from cpt_kernels.self_check import difference

# Measured with one thread of an AVX-512 CPU, forward and backward, B x H = 32, K = 32: at 128 positions in bf16 torch's
# fused attention took 10.0 ms and the plain one 3.8 ms; at 512 both took 48 ms; in fp32 the fused one always won.
_LONGEST_FOR_PLAIN_ON_CPU = 256
# The same way, a call for each document against one with a mask, medians of 7 in CPU time: documents of 100 tokens in
# windows of 1024 take 44 ms instead of 280 (176 across documents; in bf16 44, 212 and 149), documents of 30 tokens in
# windows of 256 take 9 instead of 18. In fp32 parting lost where it saves up to 10,000 scores for each further call and
# won from 24,000 on, in bf16 it won from 10,000 on.
_SCORES_IN_THE_TIME_OF_A_CALL = 2**14
# Blocks of all kinds: whole ones, on the diagonal, with the beginning of a document in them, the last not full.
_POSITIONS_OF_A_CHECK = 393
_WIDTHS_OF_A_CHECK = (64, 80, 128)


def plain(queries: Tensor, keys: Tensor, values: Tensor, documents: Documents | None = None) -> Tensor:
    """softmax(Q K^T / sqrt(K)) V with every score written down; scores and softmax in fp32 at least.

    queries [B, S, H, K], keys and values [B, S, G, K] -> [B, S, H, K] in the type of the queries. With `documents` of
    the same B and S, a position looks no further back than to the beginning of its document.
    """
    positions, heads, head_width = queries.shape[1:]
    repeats = heads // keys.shape[2]
    queries = queries.transpose(1, 2)  # [B, H, S, K]
    keys = keys.transpose(1, 2).repeat_interleave(repeats, dim=1)  # [B, H, S, K]
    values = values.transpose(1, 2).repeat_interleave(repeats, dim=1)  # [B, H, S, K]
    scores = queries @ keys.mT  # [B, H, S, S]
    scores = scores.to(torch.promote_types(scores.dtype, torch.float32)) * head_width**-0.5
    if documents is None:
        is_hidden = torch.ones(positions, positions, dtype=torch.bool, device=queries.device).triu(diagonal=1)
    else:
        is_hidden = ~documents.is_visible
    weights = scores.masked_fill(is_hidden, float("-inf")).softmax(dim=-1).to(values.dtype)
    return (weights @ values).transpose(1, 2)


def fused(queries: Tensor, keys: Tensor, values: Tensor, documents: Documents | None = None) -> Tensor:
    """The same through torch's scaled_dot_product_attention: memory grows with S, not with its square.

    With documents: on a CPU one after the other where that is worth it, so that time follows the squares of their
    lengths; elsewhere through a mask, in the time of whole windows and with S^2 bytes a window.
    """
    if documents is None or documents.are_windows:
        return _scaled_dot_product(queries, keys, values)
    if _is_worth_parting(queries, documents):
        return _part_by_part(queries, keys, values, documents)
    return _scaled_dot_product(queries, keys, values, documents.is_visible)


def by_length(queries: Tensor, keys: Tensor, values: Tensor, documents: Documents | None = None) -> Tensor:
    """On a CPU: `plain` for short sequences in low precision, `fused` for the rest and where it parts documents."""
    is_short = queries.shape[1] <= _LONGEST_FOR_PLAIN_ON_CPU
    is_parted = documents is not None and _is_worth_parting(queries, documents)
    is_low = queries.dtype in (torch.bfloat16, torch.float16)
    serving = plain if is_short and is_low and not is_parted else fused
    return serving(queries, keys, values, documents)


def _scaled_dot_product(queries: Tensor, keys: Tensor, values: Tensor, is_visible: Tensor | None = None) -> Tensor:
    mixed = functional.scaled_dot_product_attention(
        queries.transpose(1, 2),
        keys.transpose(1, 2),
        values.transpose(1, 2),
        attn_mask=is_visible,
        is_causal=is_visible is None,
        enable_gqa=queries.shape[2] != keys.shape[2],
    )
    return mixed.transpose(1, 2)


def _is_worth_parting(queries: Tensor, documents: Documents) -> bool:
    """Whether the scores that are saved take longer than the further calls."""
    if queries.device.type != "cpu":
        return False
    windows, positions, heads, _ = queries.shape
    num_saved = heads * (windows * positions**2 - documents.num_visible)
    return num_saved > len(documents.runs) * _SCORES_IN_THE_TIME_OF_A_CALL


def _part_by_part(queries: Tensor, keys: Tensor, values: Tensor, documents: Documents) -> Tensor:
    """Causal attention for each run of documents of one length, which it sees as windows; in fp32 at least."""
    lengths = [num_documents * length for num_documents, length in documents.runs]
    wide = torch.promote_types(queries.dtype, torch.float32)
    # Split and not sliced: the gradient of n slices is n tensors of the whole size.
    parts = zip(*(x.to(wide).flatten(0, 1).split(lengths) for x in (queries, keys, values)), strict=True)
    mixed = [
        _scaled_dot_product(*(tensor.unflatten(0, run) for tensor in part)).flatten(0, 1)
        for part, run in zip(parts, documents.runs, strict=True)
    ]
    return torch.cat(mixed).view(queries.shape).to(queries.dtype)


def triton(queries: Tensor, keys: Tensor, values: Tensor, documents: Documents | None = None) -> Tensor:
    """The same through Triton: time follows the squares of the documents' lengths, the same bits every time.

    float64 and heads of more than 256 entries are left to `fused`.
    """
    if not attention_triton.serves(queries):
        return fused(queries, keys, values, documents)
    return attention_triton.within_documents(queries, keys, values, documents)


def triton_in_documents(queries: Tensor, keys: Tensor, values: Tensor, documents: Documents | None = None) -> Tensor:
    """`triton` within documents, of what `check` has tried; all else through torch, whose kernels are faster there."""
    is_whole = documents is None or documents.are_windows
    is_tried = queries.dtype is torch.bfloat16 and attention_triton.columns_for(queries.shape[-1]) in (64, 128)
    return (
        triton(queries, keys, values, documents)
        if is_tried and not is_whole
        else fused(queries, keys, values, documents)
    )


def flash(queries: Tensor, keys: Tensor, values: Tensor, documents: Documents | None = None) -> Tensor:
    """The same through flash-attn (see cpt_kernels.attention_others); what it is not made for, through `fused`."""
    serving = attention_others.flash if attention_others.flash_serves(queries) else fused
    return serving(queries, keys, values, documents)


def flash_in_documents(queries: Tensor, keys: Tensor, values: Tensor, documents: Documents | None = None) -> Tensor:
    """`flash` within documents, torch without."""
    is_whole = documents is None or documents.are_windows
    return (fused if is_whole else flash)(queries, keys, values, documents)


TWINS: dict[str, Callable[..., Tensor]] = {
    "plain": plain,
    "torch": fused,
    "triton": triton,
    "cudnn": attention_others.cudnn,
    "flash": flash,
    "flex": attention_others.flex,
}
WHY_NOT: dict[str, Callable[[torch.device], str | None]] = attention_others.WHY_NOT
THROUGH_TRITON: tuple[Callable[..., Tensor], ...] = (triton_in_documents,)


def face(device: torch.device, fault_of_flash: str | None = None) -> tuple[Callable[..., Tensor], str]:
    """What serves on this device when nothing is asked for, and why; without flash-attn if that has a fault."""
    if device.type == "cpu":
        return by_length, f"plain to {_LONGEST_FOR_PLAIN_ON_CPU} positions in bf16, else torch (each the faster there)"
    whole = "torch (scaled_dot_product_attention picks the fastest it has)"
    if device.type != "cuda":
        return fused, whole
    without_flash = fault_of_flash or WHY_NOT["flash"](device)
    if without_flash is None:
        return flash_in_documents, f"flash within documents, {whole} without"
    reason = why_not(device)
    if reason is not None:
        return fused, f"{whole}; within documents through a mask, in the time of whole windows ({reason})"
    return triton_in_documents, f"triton within documents ({without_flash}), {whole} without"


def check(device: torch.device) -> str | None:
    """What is wrong with the Triton twin on this device, against `plain` on small random inputs; None if nothing is."""
    return _fault_within_documents(triton, device)


def check_flash(device: torch.device) -> str | None:
    """The same of flash-attn, which may be built for another torch or another GPU."""
    return _fault_within_documents(flash, device)


PREFERRED: dict[Callable[..., Tensor], tuple[str, Callable[[torch.device], str | None]]] = {
    flash_in_documents: ("flash-attn", check_flash)
}


def _fault_within_documents(serving: Callable[..., Tensor], device: torch.device) -> str | None:
    positions = _POSITIONS_OF_A_CHECK
    documents = Documents.from_starts(torch.arange(2 * positions).view(2, positions) % 131 == 0).to(device)
    for width in _WIDTHS_OF_A_CHECK:
        shapes = [(2, positions, 2, width), (2, positions, 1, width), (2, positions, 1, width)]
        fault = difference(
            lambda q, k, v: serving(q, k, v, documents), lambda q, k, v: plain(q, k, v, documents),
            shapes, torch.bfloat16, device,
        )  # fmt: skip
        if fault:
            return f"{fault}, in heads of {width} entries"
    return None
