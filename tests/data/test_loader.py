"""However many ranks read a step, together they read the same windows in the same order."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from cpt_harness.orders import LENGTH, drawn, entry_of, make_corpora, order_of

from cpt.data.loader import Loader, read_windows
from cpt.data.order import StageOrder
from cpt.lineage.ledger import Ledger


@pytest.fixture(scope="module")
def order(tmp_path_factory) -> StageOrder:
    corpora: Path = make_corpora(tmp_path_factory.mktemp("corpora"))
    return order_of(corpora, {"old": "1/3", "new": "2/3"}, Ledger((entry_of(corpora, "other", 60),)), "1/4")


def test_a_window_is_the_tokens_from_its_place_on(order):
    batch = Loader(order, 0, 1).batch(0, 300)
    assert batch.tokens.dtype == torch.int64
    assert batch.tokens.shape == (300, LENGTH + 1)
    starts = {"old": 0, "new": 10_000, "replay/other": 20_000}
    for tokens, (name, first) in zip(batch.tokens.tolist(), drawn(order, 300), strict=True):
        assert tokens == list(range(starts[name] + first, starts[name] + first + LENGTH + 1))


def test_sources_tell_where_each_window_is_from(order):
    batch = Loader(order, 0, 1).batch(30, 40)
    assert batch.sources.dtype == torch.int64
    assert [order.source_names[i] for i in batch.sources.tolist()] == [name for name, _ in drawn(order, 40, 30)]


@pytest.mark.parametrize("num_ranks", [1, 2, 3, 4, 6, 12])
@pytest.mark.parametrize("first_slot", [0, 12, 492])
def test_any_number_of_ranks_reads_the_same_step(order, num_ranks, first_slot):
    alone = Loader(order, 0, 1).batch(first_slot, 12)
    parts = [Loader(order, rank, num_ranks).batch(first_slot, 12) for rank in range(num_ranks)]
    assert torch.equal(torch.cat([part.tokens for part in parts]), alone.tokens)
    assert torch.equal(torch.cat([part.sources for part in parts]), alone.sources)


@pytest.mark.parametrize("num_ranks", [2, 4])
def test_every_rank_knows_the_windows_of_the_whole_step(order, num_ranks):
    alone = Loader(order, 0, 1).batch(8, 8).windows
    for rank in range(num_ranks):
        windows = Loader(order, rank, num_ranks).batch(8, 8).windows
        assert np.array_equal(windows.stream, alone.stream)
        assert np.array_equal(windows.first_token, alone.first_token)


def test_steps_of_any_size_make_the_same_stream(order):
    large = [Loader(order, 0, 1).batch(first, 24).tokens for first in range(0, 96, 24)]
    small = [Loader(order, rank, 2).batch(first, 4).tokens for first in range(0, 96, 4) for rank in range(2)]
    assert torch.equal(torch.cat(large), torch.cat(small))


def test_a_loader_keeps_nothing_between_steps(order):
    loader = Loader(order, 0, 2)
    later = loader.batch(40, 8).tokens
    loader.batch(0, 8)
    assert torch.equal(loader.batch(40, 8).tokens, later)


def test_no_windows_are_no_tokens(order):
    none = np.array([], dtype=np.int64)
    assert read_windows(order, none, none).shape == (0, LENGTH + 1)
