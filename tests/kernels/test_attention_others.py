"""Attention by cuDNN, flash-attn and FlexAttention: what they are given, as far as that can be seen without a GPU."""

from __future__ import annotations

import sys
from types import ModuleType

import pytest
import torch
from cpt_harness.twins import random
from torch import Tensor

from cpt_kernels import Documents, attention, attention_others

CPU, CUDA = torch.device("cpu"), torch.device("cuda")


def documents_of(lengths: list[int], num_windows: int = 1) -> Documents:
    starts = torch.zeros(sum(lengths), dtype=torch.bool)
    starts[torch.tensor([0, *lengths[:-1]]).cumsum(0)] = True
    return Documents.from_starts(starts.view(num_windows, -1))


def inputs_of(windows: int, positions: int) -> list[Tensor]:
    return [random(windows, positions, heads, 8, seed=heads, dtype=torch.float32) for heads in (4, 2, 2)]


@pytest.fixture
def flash_attn(monkeypatch):
    """A library with the two functions of flash-attn that are used, by their published names of arguments."""
    library, library.calls = ModuleType("flash_attn"), []

    def flash_attn_func(q, k, v, causal=False, deterministic=False):
        library.calls.append((causal, deterministic))
        return attention.plain(q, k, v)

    def flash_attn_varlen_func(
        q, k, v, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k, causal=False, deterministic=False
    ):
        library.calls.append((causal, deterministic, max_seqlen_q, max_seqlen_k))
        assert torch.equal(cu_seqlens_q, cu_seqlens_k) and cu_seqlens_q.dtype is torch.int32
        lengths = cu_seqlens_q.diff().tolist()
        parts = zip(*(x.split(lengths) for x in (q, k, v)), strict=True)
        return torch.cat([attention.plain(*(x[None] for x in part))[0] for part in parts]), "logsums"

    library.flash_attn_func, library.flash_attn_varlen_func = flash_attn_func, flash_attn_varlen_func
    monkeypatch.setitem(sys.modules, "flash_attn", library)
    monkeypatch.setattr(attention_others, "_name_of_flash_attn", lambda device: "flash_attn")
    attention_others._flash_attn.cache_clear()
    yield library
    attention_others._flash_attn.cache_clear()


def test_flash_attn_is_given_documents_as_lengths_and_asked_for_the_same_bits(flash_attn):
    inputs, documents = inputs_of(2, 20), documents_of([15, 5, 1, 19], 2)
    got = attention_others.flash(*inputs, documents)
    torch.testing.assert_close(got, attention.plain(*inputs, documents))
    assert flash_attn.calls == [(True, True, 19, 19)]


@pytest.mark.parametrize("documents", [None, documents_of([20, 20], 2)])
def test_flash_attn_is_given_whole_windows_as_they_are(flash_attn, documents):
    inputs = inputs_of(2, 20)
    torch.testing.assert_close(attention_others.flash(*inputs, documents), attention.plain(*inputs))
    assert flash_attn.calls == [(True, True)]


@pytest.mark.parametrize("documents", [None, documents_of([15, 5, 1, 19], 2), documents_of([20, 20], 2)])
def test_an_order_of_preference_changes_no_result(documents):
    inputs = inputs_of(2, 20)
    torch.testing.assert_close(
        attention_others.cudnn(*inputs, documents), attention.plain(*inputs, documents), rtol=0, atol=2e-6
    )


@pytest.mark.parametrize(
    ("lengths", "num_windows"),
    [
        ([1000], 1),
        ([128, 128, 256, 1, 3, 200], 1),
        ([512], 2),
        ([300, 84, 384], 2),
        ([1] * 400, 1),
        ([127, 1, 1, 254, 2], 1),
        ([20], 1),
    ],
)
def test_blocks_of_a_mask_are_those_that_a_walk_over_all_pairs_finds(lengths, num_windows):
    documents = documents_of(lengths if num_windows == 1 or len(lengths) > 1 else lengths * 2, num_windows)
    mask = attention_others.block_mask(documents)
    windows, positions = documents.positions.shape
    blocks = -(-positions // 128)
    is_visible = torch.zeros(windows, blocks * 128, blocks * 128, dtype=torch.bool)
    is_visible[:, :positions, :positions] = documents.is_visible[:, 0]
    tiles = is_visible.clone().view(windows, blocks, 128, blocks, 128).transpose(2, 3).flatten(3)
    is_visible[:, positions:, :positions] = True  # there is no such query for which a block could be in part
    tiles_filled = is_visible.view(windows, blocks, 128, blocks, 128).transpose(2, 3).flatten(3)
    in_part, whole = tiles.any(-1), tiles_filled.all(-1)
    for number, listed, expected in [
        (mask.kv_num_blocks, mask.kv_indices, in_part & ~whole),
        (mask.full_kv_num_blocks, mask.full_kv_indices, whole),
    ]:
        for window in range(windows):
            for row in range(blocks):
                found = listed[window, 0, row, : number[window, 0, row]].tolist()
                assert found == expected[window, row].nonzero()[:, 0].tolist()


@pytest.mark.filterwarnings("ignore:flex_attention called without torch.compile")
def test_flex_attention_hides_what_is_in_another_document(monkeypatch):
    from torch.nn.attention.flex_attention import flex_attention

    monkeypatch.setattr(attention_others, "_compiled_flex", lambda: flex_attention)
    inputs, documents = inputs_of(2, 20), documents_of([15, 5, 1, 19], 2)
    for given in (documents, None):
        with torch.no_grad():
            got = attention_others.flex(*inputs, given)
        torch.testing.assert_close(got, attention.plain(*inputs, given), rtol=0, atol=2e-6)


@pytest.mark.parametrize("twin", ["cudnn", "flash", "flex"])
def test_what_is_made_for_gpus_says_so(twin):
    assert attention.WHY_NOT[twin](CPU) == "it needs a CUDA device"


def test_flash_attn_that_is_not_installed_is_told(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device=None: (9, 0))
    assert attention.WHY_NOT["flash"](CUDA) == "flash-attn is not installed"


@pytest.mark.parametrize(("capability", "serving"), [((9, 0), "flash_attn_interface"), ((8, 0), "flash_attn")])
def test_version_3_of_flash_attn_serves_on_hopper_alone(capability, serving, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device=None: capability)
    monkeypatch.setattr(attention_others.importlib.util, "find_spec", lambda name: name)
    assert attention_others._name_of_flash_attn(CUDA) == serving
    assert attention.WHY_NOT["flash"](CUDA) is None
    assert attention.face(CUDA)[0] is attention.flash_in_documents


def test_flash_attn_serves_within_documents_unasked_where_it_is(flash_attn):
    inputs, documents = [x.bfloat16() for x in inputs_of(2, 20)], documents_of([15, 5, 1, 19], 2)
    attention.flash_in_documents(*inputs)
    assert flash_attn.calls == []
    attention.flash_in_documents(*inputs, documents)
    assert len(flash_attn.calls) == 1


@pytest.mark.parametrize(("dtype", "width"), [(torch.float32, 8), (torch.bfloat16, 12), (torch.bfloat16, 264)])
def test_what_flash_attn_is_not_made_for_is_left_to_torch(flash_attn, dtype, width):
    inputs = [random(2, 20, 2, width, seed=seed, dtype=dtype) for seed in (1, 2, 3)]
    documents = documents_of([15, 5, 1, 19], 2)
    for serving in (attention.flash, attention.flash_in_documents):
        assert torch.equal(serving(*inputs, documents), attention.fused(*inputs, documents))
    assert flash_attn.calls == []
