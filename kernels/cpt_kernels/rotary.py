"""Rotary position embedding: turns pairs of query and key entries by an angle that grows with the position.

B sequences, S positions, H heads, K head width. Entry i is paired with entry i + K/2 ("half-split", as Llama and
GPT-NeoX weights expect it; not neighbours, as in the paper).
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from cpt_kernels.language import Variant, jit, tl, why_not, with_near_columns
from cpt_kernels.self_check import difference

# Entries of queries that a program has at once: 32 a thread, four loads of 16 bytes in bf16. Of several tokens, if one
# has fewer.
_ENTRIES_AT_ONCE = 4096


def frequencies(rotary_width: int, base: float, device: torch.device) -> Tensor:
    """Radians that each pair turns from one position to the next, [K/2] in fp32: from 1 down to almost 1 / base."""
    pairs = torch.arange(0, rotary_width, 2, dtype=torch.float32, device=device)
    return 1.0 / base ** (pairs / rotary_width)


def table(num_positions: int, turns_per_position: Tensor, amplitude: float = 1.0) -> Tensor:
    """Cosines and sines of all angles, [2, S, K/2], always fp32; each times `amplitude`.

    A function and not a module's buffer: whatever casts a model to bf16 would round the angles too, which moves
    position 2000 by several positions.
    """
    positions = torch.arange(num_positions, dtype=torch.float32, device=turns_per_position.device)
    angles = torch.outer(positions, turns_per_position)
    return torch.stack((angles.cos(), angles.sin())) * amplitude


def plain(queries: Tensor, keys: Tensor, angles: Tensor) -> tuple[Tensor, Tensor]:
    """Queries and keys turned by their positions; computed in fp32 at least and rounded once at the end.

    queries [B, S, H, K], keys [B, S, G, K], angles [2, S, K/2] from `table`, or [2, B, S, K/2] where each window has
    positions of its own -> two of the same shapes and types. Fewer angles than K/2 turn the first entries of a head and
    leave the rest as they are.
    Source: Su et al. 2021, arXiv:2104.09864.
    """
    return _turn(queries, angles), _turn(keys, angles)


def _turn(vectors: Tensor, angles: Tensor) -> Tensor:
    cosines, sines = angles[..., None, :]  # [S, 1, K/2] each, or [B, S, 1, K/2]
    pairs = cosines.shape[-1]
    wide = vectors[..., : 2 * pairs].to(torch.promote_types(vectors.dtype, torch.float32))
    first, second = wide.chunk(2, dim=-1)
    turned = torch.cat((first * cosines - second * sines, second * cosines + first * sines), dim=-1)
    turned = turned.to(vectors.dtype)
    return turned if vectors.shape[-1] == 2 * pairs else torch.cat((turned, vectors[..., 2 * pairs :]), dim=-1)


def triton(queries: Tensor, keys: Tensor, angles: Tensor) -> tuple[Tensor, Tensor]:
    """The same, queries and keys in one Triton kernel, which turns gradients back; float64 is left to `plain`.

    Bytes an entry of 2 bytes: 4 each way.
    """
    if queries.dtype is torch.float64:
        return plain(queries, keys, angles)
    return turn(queries, keys, angles, 1.0)


@torch.library.custom_op("cpt_kernels::turn", mutates_args=())
def turn(queries: Tensor, keys: Tensor, angles: Tensor, direction: float) -> tuple[Tensor, Tensor]:
    """As `plain`; by the negative angles where `direction` is -1."""
    windows, positions = queries.shape[:2]
    queries, keys, angles = (with_near_columns(tensor) for tensor in (queries, keys, angles))
    turned = [torch.empty(tensor.shape, dtype=tensor.dtype, device=tensor.device) for tensor in (queries, keys)]
    form = _form(queries.shape[2], keys.shape[2], queries.shape[3], angles.shape[-1])
    of_window = angles.stride(1) if angles.ndim == 4 else 0
    _turn_tokens[(-(-windows * positions // form["TOKENS"]),)](
        queries, keys, angles, *turned, *queries.stride()[:3], *keys.stride()[:3],
        angles.stride(0), of_window, angles.stride(-2), windows * positions, positions, direction, **form, num_warps=4,
    )  # fmt: skip
    return tuple(turned)


@turn.register_fake
def _(queries, keys, angles, direction):
    return queries.new_empty(queries.shape), keys.new_empty(keys.shape)


def _keep(ctx, inputs: tuple, output: tuple[Tensor, Tensor]) -> None:
    ctx.save_for_backward(inputs[2])
    ctx.direction = inputs[3]


def _turn_back(ctx, of_queries: Tensor, of_keys: Tensor) -> tuple[Tensor | None, ...]:
    return *turn(of_queries, of_keys, ctx.saved_tensors[0], -ctx.direction), None, None


turn.register_autograd(_turn_back, setup_context=_keep)


def _form(heads: int, groups: int, width: int, pairs: int) -> dict[str, int]:
    """What the kernel is compiled for."""
    rest = width - 2 * pairs
    rows, columns, columns_of_rest = _power_of_two(heads), _power_of_two(pairs), _power_of_two(max(rest, 1))
    return {
        "HEADS": heads,
        "ROWS": rows,
        "GROUPS": groups,
        "ROWS_OF_KEYS": _power_of_two(groups),
        "WIDTH": width,
        "PAIRS": pairs,
        "COLUMNS": columns,
        "REST": rest,
        "COLUMNS_OF_REST": columns_of_rest,
        "TOKENS": max(1, _ENTRIES_AT_ONCE // (rows * max(2 * columns, columns_of_rest))),
    }


def _power_of_two(number: int) -> int:
    return 1 << (number - 1).bit_length()


@jit
def _turn_tokens(
    queries, keys, angles, turned_queries, turned_keys,
    queries_window, queries_row, queries_head, keys_window, keys_row, keys_head, angles_kind, angles_window, angles_row,
    num_tokens, positions, direction,
    HEADS: tl.constexpr, GROUPS: tl.constexpr, WIDTH: tl.constexpr, PAIRS: tl.constexpr, COLUMNS: tl.constexpr,
    REST: tl.constexpr, COLUMNS_OF_REST: tl.constexpr, ROWS: tl.constexpr, ROWS_OF_KEYS: tl.constexpr,
    TOKENS: tl.constexpr,
):  # fmt: skip
    """One program: all heads of TOKENS tokens. x_window, x_row, x_head: entries between neighbours of tensor x."""
    tokens = tl.program_id(0).to(tl.int64) * TOKENS + tl.arange(0, TOKENS)
    windows, rows = tokens // positions, tokens % positions
    is_token = tokens < num_tokens
    pairs = tl.arange(0, COLUMNS)
    places = angles + (windows * angles_window + rows * angles_row)[:, None] + pairs[None, :]
    is_there = is_token[:, None] & (pairs < PAIRS)[None, :]
    cosines = tl.load(places, mask=is_there, other=0.0)[:, None, :]  # [TOKENS, 1, COLUMNS]
    sines = tl.load(places + angles_kind, mask=is_there, other=0.0)[:, None, :] * direction
    _turn_heads(
        queries + windows * queries_window + rows * queries_row, queries_head,
        turned_queries + tokens * (HEADS * WIDTH), is_token, cosines, sines,
        HEADS, ROWS, WIDTH, PAIRS, COLUMNS, REST, COLUMNS_OF_REST,
    )  # fmt: skip
    _turn_heads(
        keys + windows * keys_window + rows * keys_row, keys_head,
        turned_keys + tokens * (GROUPS * WIDTH), is_token, cosines, sines,
        GROUPS, ROWS_OF_KEYS, WIDTH, PAIRS, COLUMNS, REST, COLUMNS_OF_REST,
    )  # fmt: skip


@jit
def _turn_heads(
    sources, source_head, targets, is_token, cosines, sines, HEADS: tl.constexpr, ROWS: tl.constexpr,
    WIDTH: tl.constexpr, PAIRS: tl.constexpr, COLUMNS: tl.constexpr, REST: tl.constexpr, COLUMNS_OF_REST: tl.constexpr,
):  # fmt: skip
    """sources, targets [TOKENS]: where the first head of each token is and where it goes, heads side by side."""
    heads = tl.arange(0, ROWS)
    pairs = tl.arange(0, COLUMNS)
    is_head = (is_token[:, None] & (heads < HEADS)[None, :])[:, :, None]  # [TOKENS, ROWS, 1]
    is_there = is_head & (pairs < PAIRS)[None, None, :]
    of_heads = (sources[:, None] + heads[None, :] * source_head)[:, :, None]
    to_heads = (targets[:, None] + heads[None, :] * WIDTH)[:, :, None]
    first = tl.load(of_heads + pairs[None, None, :], mask=is_there, other=0.0).to(tl.float32)
    second = tl.load(of_heads + (PAIRS + pairs)[None, None, :], mask=is_there, other=0.0).to(tl.float32)
    kind = targets.dtype.element_ty
    tl.store(to_heads + pairs[None, None, :], (first * cosines - second * sines).to(kind), mask=is_there)
    tl.store(to_heads + (PAIRS + pairs)[None, None, :], (second * cosines + first * sines).to(kind), mask=is_there)
    if REST > 0:
        rest = tl.arange(0, COLUMNS_OF_REST)
        is_rest = is_head & (rest < REST)[None, None, :]
        kept = tl.load(of_heads + (2 * PAIRS + rest)[None, None, :], mask=is_rest)
        tl.store(to_heads + (2 * PAIRS + rest)[None, None, :], kept, mask=is_rest)


def _variants() -> list[Variant]:
    """Heads of Llama-1B and 8B, of Pythia-410M and 2.8B, which turns a quarter of 80 entries."""
    types = dict.fromkeys(("queries", "keys", "turned_queries", "turned_keys"), "*bf16:16") | {"angles": "*fp32:16"}
    strides = [f"{name}_{part}" for name in ("queries", "keys", "angles") for part in ("window", "row", "head")]
    strides = dict.fromkeys([*(name for name in strides if name != "angles_head"), "angles_kind"], "i32:16")
    types |= {**strides, "num_tokens": "i32:16", "positions": "i32:16", "direction": "fp32"}
    return [
        Variant(_turn_tokens, types, _form(*f))
        for f in ((32, 8, 64, 32), (32, 8, 128, 64), (16, 16, 64, 8), (32, 32, 80, 10))
    ]


TWINS: dict[str, Callable[..., tuple[Tensor, Tensor]]] = {"plain": plain, "triton": triton}
COMPILED = _variants()


def face(device: torch.device) -> tuple[Callable[..., tuple[Tensor, Tensor]], str]:
    """What serves on this device when nothing is asked for, and why."""
    if device.type != "cuda":
        return plain, "plain (torch has no kernel of it)"
    reason = why_not(device)
    return (plain, f"plain ({reason})") if reason else (triton, "triton (queries and keys in one kernel each way)")


def check(device: torch.device) -> str | None:
    """What is wrong with the Triton twin on this device, against `plain` on small random inputs; None if nothing is."""
    for width, pairs in ((64, 32), (80, 10)):
        angles = table(37, frequencies(2 * pairs, 500.0, device))
        for dtype in (torch.float32, torch.bfloat16):
            fault = difference(
                lambda q, k, angles=angles: torch.cat(triton(q, k, angles), dim=2),
                lambda q, k, angles=angles: torch.cat(plain(q, k, angles), dim=2),
                [(3, 37, 6, width), (3, 37, 2, width)], dtype, device,
            )  # fmt: skip
            if fault:
                return fault
    return None
