"""Attention by what others offer for GPUs: cuDNN and FlexAttention through torch, and flash-attn where it is installed.

All have the inputs and outputs of `plain` in cpt_kernels.attention.
B windows, S positions, H query heads, G key and value heads, K head width.
"""

from __future__ import annotations

import importlib
import importlib.util
from collections.abc import Callable
from functools import cache
from types import ModuleType
from typing import TYPE_CHECKING
from weakref import WeakKeyDictionary

import torch
from torch import Tensor
from torch.nn import functional
from torch.nn.attention import SDPBackend, sdpa_kernel

from cpt_kernels.documents import Documents

if TYPE_CHECKING:
    from torch.nn.attention.flex_attention import BlockMask

# FlexAttention's own size of a block of its mask.
_ROWS_OF_A_BLOCK = 128
_masks: WeakKeyDictionary[Documents, BlockMask] = WeakKeyDictionary()


def cudnn(queries: Tensor, keys: Tensor, values: Tensor, documents: Documents | None = None) -> Tensor:
    """Through torch by cuDNN where it can serve, else by FlashAttention, else by what there is; documents as a mask.

    The fastest on Hopper without documents by published figures. Its gradients differ in the last bits from one time to
    the next: torch has no way to ask cuDNN for the same order of sums.
    """
    is_whole = documents is None or documents.are_windows
    order = [SDPBackend.CUDNN_ATTENTION, SDPBackend.FLASH_ATTENTION, SDPBackend.EFFICIENT_ATTENTION, SDPBackend.MATH]
    with sdpa_kernel(order, set_priority=True):
        mixed = functional.scaled_dot_product_attention(
            *(tensor.transpose(1, 2) for tensor in (queries, keys, values)),
            attn_mask=None if is_whole else documents.is_visible,
            is_causal=is_whole,
            enable_gqa=queries.shape[2] != keys.shape[2],
        )
    return mixed.transpose(1, 2)


def flash(queries: Tensor, keys: Tensor, values: Tensor, documents: Documents | None = None) -> Tensor:
    """By flash-attn 3 or 2, in time that follows the squares of the documents' lengths; the same bits every time.

    For queries that `flash_serves`.
    Source: Dao 2023, arXiv:2307.08691; Shah et al. 2024, arXiv:2407.08608.
    """
    library = _flash_attn(queries.device)
    if documents is None or documents.are_windows:
        mixed = library.flash_attn_func(queries, keys, values, causal=True, deterministic=True)
    else:
        mixed = library.flash_attn_varlen_func(
            *(tensor.flatten(0, 1) for tensor in (queries, keys, values)),
            cu_seqlens_q=documents.cu_seqlens,
            cu_seqlens_k=documents.cu_seqlens,
            max_seqlen_q=documents.longest,
            max_seqlen_k=documents.longest,
            causal=True,
            deterministic=True,
        )
    # Some releases of version 3 give (mixed, logsums).
    return (mixed[0] if isinstance(mixed, tuple) else mixed).view(queries.shape)


def flash_serves(queries: Tensor) -> bool:
    """Whether flash-attn is made for such queries: heads of 8, 16, ... 256 entries in fp16 or bf16."""
    width = queries.shape[-1]
    return queries.dtype in (torch.float16, torch.bfloat16) and width <= 256 and width % 8 == 0


def flex(queries: Tensor, keys: Tensor, values: Tensor, documents: Documents | None = None) -> Tensor:
    """By FlexAttention, which torch compiles for these shapes, about a minute at the first step."""
    if documents is None:
        documents = _whole_windows(*queries.shape[:2], queries.device)
    if documents not in _masks:
        _masks[documents] = block_mask(documents)
    mixed = _compiled_flex()(
        *(tensor.transpose(1, 2) for tensor in (queries, keys, values)),
        block_mask=_masks[documents],
        enable_gqa=queries.shape[2] != keys.shape[2],
    )
    return mixed.transpose(1, 2)


def block_mask(documents: Documents) -> BlockMask:
    """Which blocks of keys a block of queries meets, and which of them whole; from where documents begin alone.

    `create_block_mask` would try all S^2 pairs of positions. In blocks of 128 of each window.
    """
    # Here and not above: it takes as long to import as the rest of this package.
    from torch.nn.attention.flex_attention import BlockMask

    begins = documents.begins.long()  # [B, S]
    positions = begins.shape[1]
    starts = torch.arange(0, positions, _ROWS_OF_A_BLOCK, device=begins.device)  # of N blocks
    places = torch.arange(len(starts), device=begins.device)
    lasts = (starts + _ROWS_OF_A_BLOCK - 1).clamp(max=positions - 1)
    first_met = begins[:, starts] // _ROWS_OF_A_BLOCK  # [B, N]
    # A block of keys is whole where it lies before the queries and no document of theirs begins in it or later.
    first_whole = -(-begins[:, lasts] // _ROWS_OF_A_BLOCK)  # [B, N]
    is_met = (places >= first_met[:, :, None]) & (places <= places[:, None])  # [B, N queries, N keys]
    is_whole = (places >= first_whole[:, :, None]) & (places < places[:, None])

    def listed(is_in: Tensor) -> tuple[Tensor, Tensor]:
        """How many blocks there are, [B, 1, N], and their numbers first in each row, [B, 1, N, N]."""
        numbers = is_in.to(torch.int8).argsort(dim=-1, descending=True, stable=True)
        return is_in.sum(-1).to(torch.int32)[:, None], numbers.to(torch.int32)[:, None]

    def is_visible(window: Tensor, head: Tensor, query: Tensor, key: Tensor) -> Tensor:
        return (key <= query) & (key >= begins[window, query])

    return BlockMask.from_kv_blocks(
        *listed(is_met & ~is_whole), *listed(is_whole), BLOCK_SIZE=_ROWS_OF_A_BLOCK, mask_mod=is_visible,
        seq_lengths=(positions, positions),
    )  # fmt: skip


@cache
def _whole_windows(windows: int, positions: int, device: torch.device) -> Documents:
    return Documents.from_starts(torch.zeros(windows, positions, dtype=torch.bool)).to(device)


@cache
def _compiled_flex() -> Callable[..., Tensor]:
    from torch.nn.attention.flex_attention import flex_attention

    return torch.compile(flex_attention, dynamic=False)


@cache
def _flash_attn(device: torch.device) -> ModuleType:
    return importlib.import_module(_name_of_flash_attn(device))


def _name_of_flash_attn(device: torch.device) -> str | None:
    """Version 3 on Hopper, if it is installed; else version 2, if that is."""
    is_hopper = torch.cuda.get_device_capability(device)[0] == 9
    names = ("flash_attn_interface", "flash_attn") if is_hopper else ("flash_attn",)
    return next((name for name in names if importlib.util.find_spec(name)), None)


def _without_cuda(device: torch.device) -> str | None:
    if device.type != "cuda" or not torch.cuda.is_available():
        return "it needs a CUDA device"
    return None


def _without_flash_attn(device: torch.device) -> str | None:
    reason = _without_cuda(device)
    if reason is None and _name_of_flash_attn(device) is None:
        return "flash-attn is not installed"
    return reason


# What keeps a twin from serving on a device.
WHY_NOT: dict[str, Callable[[torch.device], str | None]] = {
    "cudnn": _without_cuda,
    "flash": _without_flash_attn,
    "flex": _without_cuda,
}
