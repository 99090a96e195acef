"""However a step is read, by any number of ranks, ahead or when asked for, the same windows come in the same order."""

from __future__ import annotations

import gc
import logging
import re
import threading
import time
import traceback
import tracemalloc
from pathlib import Path

import numpy as np
import pytest
import torch
from cpt_harness.numbered import numbered_corpus
from cpt_harness.orders import LENGTH, drawn, entry_of, make_corpora, order_of

from cpt.config import Fault
from cpt.data import loader as loader_file
from cpt.data.corpus import Corpus
from cpt.data.loader import Loader, Settings, read_windows
from cpt.data.order import StageOrder
from cpt.data.shards import Shard, ShardWriter
from cpt.data.streams import Source
from cpt.data.token_file import TokenFile
from cpt.lineage.ledger import Ledger

STAGE = 240  # slots


@pytest.fixture(scope="module")
def order(tmp_path_factory) -> StageOrder:
    corpora: Path = make_corpora(tmp_path_factory.mktemp("corpora"))
    return order_of(corpora, {"old": "1/3", "new": "2/3"}, Ledger((entry_of(corpora, "other", 60),)), "1/4")


@pytest.fixture(scope="module")
def unread(order) -> list[torch.Tensor]:
    """The tokens of the stage in steps of 12, read without any thread."""
    return [Loader(order, 0, 1).batch(first, 12).tokens for first in range(0, STAGE, 12)]


def readers() -> list[threading.Thread]:
    return [thread for thread in threading.enumerate() if thread.name.startswith(("reader ", "stall watch"))]


@pytest.fixture(autouse=True)
def no_thread_is_left():
    yield
    if readers():
        gc.collect()
    deadline = time.monotonic() + 10
    while readers() and time.monotonic() < deadline:
        time.sleep(0.01)
    assert readers() == []


def test_a_window_is_the_tokens_from_its_place_on(order):
    batch = Loader(order, 0, 1).batch(0, 300)
    assert batch.tokens.dtype == torch.int32
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


def test_places_drawn_many_at_a_time_are_the_same(order, unread, monkeypatch):
    monkeypatch.setattr(loader_file, "_SLOTS_AT_ONCE", 30)
    with Loader(order, 0, 1, Settings(prefetch=0), num_slots_in_stage=STAGE) as loader:
        assert all(torch.equal(loader.batch(12 * i, 12).tokens, unread[i]) for i in (0, 1, 2, 3, 1, 19, 18, 4))
        assert torch.equal(loader.batch(0, 48).tokens, torch.cat(unread[:4]))


@pytest.mark.parametrize("workers", [1, 3])
@pytest.mark.parametrize("prefetch", [0, 1, 2, 7, 50])
def test_the_same_batches_come_for_any_prefetch_and_any_workers(order, unread, prefetch, workers):
    with Loader(order, 0, 1, Settings(prefetch, workers), num_slots_in_stage=STAGE) as loader:
        for first in range(0, STAGE, 12):
            assert torch.equal(loader.batch(first, 12).tokens, unread[first // 12])
            assert len(readers()) == 1 + (workers if prefetch and first < STAGE - 12 or first and prefetch else 0)
    assert readers() == []


@pytest.mark.parametrize("workers", [1, 2])
def test_a_batch_that_was_not_expected_comes_all_the_same(order, unread, workers):
    every = torch.cat(unread)
    with Loader(order, 0, 1, Settings(3, workers), num_slots_in_stage=STAGE) as loader:
        for first, number in [(0, 12), (12, 12), (24, 6), (30, 6), (36, 18), (120, 18), (0, 12), (0, 12), (12, 24)]:
            assert torch.equal(loader.batch(first, number).tokens, every[first : first + number])


def asked_for(monkeypatch) -> list[tuple[int, int]]:
    """The slots that are read from now on."""
    asked = []
    read = loader_file._Reader._read

    def note(self, request):
        asked.append((request.first_slot, request.num_slots))
        return read(self, request)

    monkeypatch.setattr(loader_file._Reader, "_read", note)
    return asked


def test_each_batch_is_read_once_and_nothing_beyond_the_end_of_the_stage(order, monkeypatch):
    asked = asked_for(monkeypatch)
    drawn_to = []
    windows = StageOrder.windows
    monkeypatch.setattr(StageOrder, "windows", lambda self, a, n: drawn_to.append(a + n) or windows(self, a, n))
    with Loader(order, 0, 1, Settings(prefetch=4), num_slots_in_stage=55) as loader:
        for first in range(0, 48, 12):
            loader.batch(first, 12)
        time.sleep(0.05)
        assert sorted(asked) == [(0, 12), (12, 12), (24, 12), (36, 12)]
        loader.batch(48, 7)  # a last step that is shorter
    assert max(drawn_to) == 55


def test_without_the_end_of_the_stage_nothing_is_read_ahead(order, monkeypatch):
    asked = asked_for(monkeypatch)
    with Loader(order, 0, 1, Settings(prefetch=4)) as loader:
        loader.batch(0, 12)
        time.sleep(0.05)
    assert asked == [(0, 12)]


def test_batches_are_read_while_the_step_is_made(order, monkeypatch):
    asked = asked_for(monkeypatch)
    with Loader(order, 0, 1, Settings(prefetch=2), num_slots_in_stage=STAGE) as loader:
        loader.batch(0, 12)
        deadline = time.monotonic() + 10
        while len(asked) < 3 and time.monotonic() < deadline:
            time.sleep(0.001)
        assert sorted(asked) == [(0, 12), (12, 12), (24, 12)]


def test_slots_beyond_the_stage_are_an_error(order):
    with (
        Loader(order, 0, 1, num_slots_in_stage=20) as loader,
        pytest.raises(ValueError, match="slots up to 24 of a stage of 20"),
    ):
        loader.batch(12, 12)


def test_a_closed_loader_says_so(order):
    loader = Loader(order, 0, 1, num_slots_in_stage=STAGE)
    loader.batch(0, 12)
    loader.close()
    loader.close()
    with pytest.raises(ValueError, match="this loader is closed"):
        loader.batch(12, 12)


def test_a_loader_that_is_forgotten_takes_its_threads_along(order):
    loader = Loader(order, 0, 1, num_slots_in_stage=STAGE)
    loader.batch(0, 12)
    assert len(readers()) == 2
    assert all(thread.daemon for thread in readers())
    del loader  # the fixture sees the threads end


@pytest.mark.parametrize("prefetch", [0, 2])
def test_an_error_while_reading_reaches_the_step_with_its_traceback(order, monkeypatch, prefetch):
    gather = TokenFile.gather
    broken = threading.Event()

    def failing(self, start_tokens, length):
        if broken.is_set():
            raise OSError(5, "the disk is gone")
        return gather(self, start_tokens, length)

    with Loader(order, 0, 1, Settings(prefetch), num_slots_in_stage=STAGE) as loader:
        loader.batch(0, 12)
        monkeypatch.setattr(TokenFile, "gather", failing)
        broken.set()
        with pytest.raises(OSError, match="the disk is gone") as caught:
            for first in range(12, STAGE, 12):
                loader.batch(first, 12)
        assert "failing" in [frame.name for frame in traceback.extract_tb(caught.value.__traceback__)]
        broken.clear()
        assert loader.batch(0, 12).tokens.shape == (12, LENGTH + 1)


@pytest.mark.parametrize("prefetch", [0, 2])
def test_the_log_names_the_file_that_stalls_and_training_goes_on(order, unread, monkeypatch, caplog, prefetch):
    gather = TokenFile.gather
    stalls = threading.Event()
    stalls.set()

    def slow(self, start_tokens, length):
        if stalls.is_set() and self.prefix.parent.name == "other":
            stalls.clear()
            time.sleep(0.5)
        return gather(self, start_tokens, length)

    monkeypatch.setattr(TokenFile, "gather", slow)
    with (
        caplog.at_level(logging.WARNING, "cpt.data.stalls"),
        Loader(order, 0, 1, Settings(prefetch, stall_seconds=0.1), num_slots_in_stage=STAGE) as loader,
    ):
        for first in range(0, STAGE, 12):
            assert torch.equal(loader.batch(first, 12).tokens, unread[first // 12])
    waits = [message for message in caplog.messages if message.startswith("waiting for data for ")]
    shard = order.corpora[2].shard(0).file
    assert len(waits) in (2, 3)  # after 0.1, 0.2 and 0.4 seconds
    assert all(message.endswith(f", reading {shard}") for message in waits)
    assert caplog.messages[-1].endswith(" s; going on")
    assert caplog.messages[-1].startswith("data came after ")


def test_a_stall_of_something_read_before_is_named_too(order, monkeypatch, caplog):
    gather = TokenFile.gather
    has_begun = threading.Event()

    def slow(self, start_tokens, length):
        if not has_begun.is_set() and threading.current_thread().name == "reader 0":
            has_begun.set()
            time.sleep(0.5)
        return gather(self, start_tokens, length)

    with Loader(order, 0, 1, Settings(1, stall_seconds=0.1), num_slots_in_stage=STAGE) as loader:
        loader.batch(0, 12)
        loader.batch(12, 12)
        monkeypatch.setattr(TokenFile, "gather", slow)
        loader.batch(24, 6)  # what is read ahead from here is dropped by the next line, and in the way of the last
        assert has_begun.wait(10)
        loader.batch(36, 6)
        with caplog.at_level(logging.WARNING, "cpt.data.stalls"):
            loader.batch(42, 6)
    assert any(re.search("slots (24|30) to 35, reading ", message) for message in caplog.messages)


def test_a_fast_disk_is_not_worth_a_word(order, caplog):
    with Loader(order, 0, 1, num_slots_in_stage=STAGE) as loader:
        for first in range(0, STAGE, 12):
            loader.batch(first, 12)
    assert caplog.messages == []


@pytest.fixture(scope="module")
def long_order(tmp_path_factory) -> StageOrder:
    folder = tmp_path_factory.mktemp("long")
    numbered_corpus(folder / "long", 50_000, num_shards=2)
    return order_of(folder, {"long": 1}, length=2048)


def longest_silence(work) -> float:
    """Seconds for which another thread did not come to run while `work` did."""
    silences, done = [], threading.Event()

    def tick():
        last = time.perf_counter()
        while not done.is_set():
            time.sleep(0.0002)
            now = time.perf_counter()
            silences.append(now - last)
            last = now

    thread = threading.Thread(target=tick)
    thread.start()
    work()
    done.set()
    thread.join()
    return max(silences)


@pytest.mark.parametrize("length", [64, 100_000])
def test_reading_lets_other_threads_run(tmp_path, length):
    """Otherwise a page that a disk is slow to give would stop the whole process, and the log with it."""
    with ShardWriter(tmp_path / "shard", 65_000) as writer:
        writer.add_document(np.arange(2_000_000) % 65_000)
    file = Shard(tmp_path / "shard")
    starts = np.arange(120_000_000 // length) % 1000
    seconds = []

    def work():
        began = time.perf_counter()
        file.gather(starts, length)
        seconds.append(time.perf_counter() - began)

    silence = min(longest_silence(work) for _ in range(3))
    assert silence < max(seconds) / 2


def test_a_batch_is_written_once(long_order):
    """From the map into the batch: what is allocated on the way stays far below the size of the batch."""
    windows = long_order.windows(0, 256)
    tokens = np.empty((256, 2049), dtype=np.int64)
    read_windows(long_order, windows.stream, windows.first_token, tokens)
    tracemalloc.start()
    read_windows(long_order, windows.stream, windows.first_token, tokens)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 400_000 < tokens.nbytes / 10


@pytest.mark.parametrize("within_documents", [False, True])
def test_pinned_memory_is_asked_for_and_read_straight_into(order, unread, monkeypatch, within_documents):
    made = []
    empty = torch.empty

    def pinned_empty(*shape, pin_memory=False, **named):
        assert pin_memory
        made.append(empty(*shape, **named))
        return made[-1]

    monkeypatch.setattr(torch, "empty", pinned_empty)
    monkeypatch.setattr(Corpus, "document_starts", every_seventh, raising=False)
    batch = Loader(order, 0, 1, within_documents=within_documents, pin=True).batch(0, 12)
    assert torch.equal(batch.tokens, unread[0])
    tensors = [batch.tokens, batch.starts] if within_documents else [batch.tokens]
    assert [tensor.data_ptr() for tensor in tensors] == [tensor.data_ptr() for tensor in made]


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="pinning memory takes a CUDA device")
def test_batches_lie_in_pinned_memory(order, unread):
    with Loader(order, 0, 1, pin=True, num_slots_in_stage=STAGE) as loader:
        for first in range(0, STAGE, 12):
            batch = loader.batch(first, 12)
            assert batch.tokens.is_pinned()
            assert torch.equal(batch.tokens, unread[first // 12])


def every_seventh(self, first_tokens, length):
    return (first_tokens[:, None] + np.arange(length)) % 7 == 0


@pytest.mark.parametrize("prefetch", [0, 2])
def test_starts_of_documents_come_with_each_window(order, monkeypatch, prefetch):
    monkeypatch.setattr(Corpus, "document_starts", every_seventh, raising=False)
    with Loader(order, 1, 2, Settings(prefetch), within_documents=True, num_slots_in_stage=STAGE) as loader:
        for first in range(0, STAGE, 12):
            batch = loader.batch(first, 12)
            assert batch.starts.dtype == torch.bool
            first_of_stream = torch.tensor([0, 10_000, 20_000])[batch.sources]
            assert torch.equal(batch.starts, (batch.tokens - first_of_stream[:, None]) % 7 == 0)


def test_across_documents_no_starts_are_looked_up(order):
    assert Loader(order, 0, 1).batch(0, 12).starts is None


def test_no_windows_are_no_tokens(order):
    none = np.array([], dtype=np.int64)
    read_windows(order, none, none, np.empty((0, LENGTH + 1), np.int64))


@pytest.mark.parametrize(
    ("settings", "fault"),
    [
        (Settings(prefetch=-1), "prefetch = -1: at least 0"),
        (Settings(workers=0), "workers = 0: at least 1; prefetch: 0 reads without any"),
        (Settings(stall_seconds=0), "stall_seconds = 0: above 0"),
    ],
)
def test_settings_that_cannot_work_are_told(settings, fault):
    assert settings.faults() == [fault]
    assert Settings(prefetch=0).faults() == []


def test_an_id_that_the_model_has_not_is_told_with_its_file_and_place(tmp_path):
    tokens = np.arange(400, dtype=np.uint32) % 50
    tokens[[333, 391]] = 60, 2**31 + 5
    tokens.tofile(tmp_path / "raw.npy")
    sources = {"raw": Source(f"{tmp_path}/raw.npy:uint32")}
    order = StageOrder(sources, None, Ledger(), LENGTH, 1)
    with Loader(order, 0, 1) as loader:
        loader.batch(0, 40)  # unasked, nothing is looked at
    for vocabulary, told in ((50, "token 333 has the id 60"), (61, "token 391 has the id 2,147,483,653")):
        with Loader(order, 0, 1, vocabulary=vocabulary) as loader, pytest.raises(Fault) as caught:
            loader.batch(0, 49)
        assert f"raw.npy:uint32: {told}, model.vocabulary is {vocabulary}; name the corpus" in str(caught.value)
