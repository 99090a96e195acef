"""Held-out windows are the same every time, and their mean is the same however many ranks share them."""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
import pytest
import torch
from cpt_harness.numbered import corpus_of_documents, numbered_corpus

from cpt.config import Fault
from cpt.data.corpus import Corpus
from cpt.data.shards import ShardWriter
from cpt.evaluation.held_out import HeldOut, bits_per_byte
from cpt.evaluation.interval import half_width
from cpt.parallel.mesh import ALONE, Mesh

LENGTH = 8


@dataclass(frozen=True)
class OneOfThree(Mesh):
    """A rank of a mesh whose sums are added up by the test: `sum` gives back what this rank has."""

    size: int = 3
    local_rank: int = 0
    device: torch.device = torch.device("cpu")

    def sum(self, tensor: torch.Tensor) -> torch.Tensor:
        SUMS.append(tensor.clone())
        return tensor + torch.tensor([[0.0], [1e-300]], dtype=tensor.dtype)  # a rank without windows has no mean


SUMS: list[torch.Tensor] = []


def loss_of(tokens: torch.Tensor) -> torch.Tensor:
    """Losses [B, S] that tell windows and tokens apart."""
    return (tokens[:, 1:].double() / 100).sqrt()


def brute_force(corpus: Corpus, ids: list[int]) -> float:
    windows = [np.arange(i * LENGTH, i * LENGTH + LENGTH + 1) for i in ids]
    return math.fsum(math.sqrt(token / 100) for window in windows for token in window[1:]) / (len(ids) * LENGTH)


@pytest.fixture(scope="module")
def path(tmp_path_factory):
    return numbered_corpus(tmp_path_factory.mktemp("corpora") / "held-out", 50 * LENGTH + 1)


@pytest.mark.parametrize("micro_batch", [1, 7, 16, 50, 64])
@pytest.mark.parametrize(("num_windows", "ids"), [(0, range(50)), (50, range(50)), (99, range(50)), (1, [0]),
                                                  (2, [0, 25]), (7, [0, 7, 14, 21, 28, 35, 42])])  # fmt: skip
def test_the_loss_is_the_mean_over_its_windows_whatever_the_micro_batch(path, num_windows, ids, micro_batch):
    held_out = HeldOut(path, LENGTH, num_windows)
    score = held_out.score(loss_of, ALONE, micro_batch)
    assert score.num_tokens == len(ids) * LENGTH
    assert score.loss == pytest.approx(brute_force(held_out.corpus, list(ids)), rel=1e-12)


def test_windows_are_spread_over_the_whole_corpus(path):
    seen: list[int] = []
    HeldOut(path, LENGTH, 13).score(lambda tokens: (seen.extend(tokens[:, 0].tolist()), loss_of(tokens))[1], ALONE, 4)
    assert len(set(seen)) == 13
    assert set(np.diff(sorted(seen)) // LENGTH) == {3, 4}


def test_scoring_twice_scores_the_same(path):
    held_out = HeldOut(path, LENGTH, 20)
    assert held_out.score(loss_of, ALONE, 6) == held_out.score(loss_of, ALONE, 6)


@pytest.mark.parametrize("num_windows", [1, 2, 3, 10, 12, 13, 20, 50])
@pytest.mark.parametrize("micro_batch", [1, 2, 4])
def test_three_ranks_together_score_what_one_does_in_equally_many_passes(path, num_windows, micro_batch):
    held_out = HeldOut(path, LENGTH, num_windows)
    SUMS.clear()
    passes, largest = [], 0
    for rank in range(3):
        calls = []
        held_out.score(
            lambda tokens, calls=calls: (calls.append(len(tokens)), loss_of(tokens))[1], OneOfThree(rank), micro_batch
        )
        passes.append(len(calls))
        largest = max(largest, *calls)
    total, num_tokens = torch.stack(SUMS).sum(dim=(0, 2)).tolist()
    alone = held_out.score(loss_of, ALONE, micro_batch)
    assert num_tokens == alone.num_tokens == num_windows * LENGTH
    assert total / num_tokens == pytest.approx(alone.loss, rel=1e-12)
    assert len(set(passes)) == 1
    assert largest <= micro_batch


def test_bits_per_byte_are_the_loss_over_the_texts_bytes(path):
    # 401 tokens of 1,604 bytes: a token is 4 bytes, so 4 ln 2 nats a token are 1 bit a byte.
    held_out = HeldOut(path, LENGTH, 0)
    assert bits_per_byte(4 * math.log(2), held_out.corpus) == pytest.approx(1.0, rel=1e-12)
    score = held_out.score(loss_of, ALONE, 16)
    assert score.bits_per_byte == pytest.approx(score.loss / math.log(2) / 4, rel=1e-12)


def test_a_corpus_that_does_not_know_its_bytes_has_no_bits_per_byte(tmp_path):
    with ShardWriter(tmp_path / "bare", 1000) as writer:
        writer.add_document(np.arange(100))
    assert HeldOut(tmp_path / "bare", LENGTH, 0).score(loss_of, ALONE, 4).bits_per_byte is None
    without = numbered_corpus(tmp_path / "empty", 100, num_bytes=0)
    assert bits_per_byte(1.0, Corpus.open(without)) is None


def test_a_corpus_shorter_than_one_window_is_a_fault(tmp_path):
    path = numbered_corpus(tmp_path / "short", LENGTH)
    with pytest.raises(Fault) as caught:
        HeldOut(path, LENGTH, 4)
    assert str(caught.value) == f"{path} holds 8 tokens, not one window of 9; hold out more text"
    assert HeldOut(numbered_corpus(tmp_path / "enough", LENGTH + 1), LENGTH, 4).score(loss_of, ALONE, 4).num_tokens == 8


def loss_within(tokens: torch.Tensor, starts: torch.Tensor) -> torch.Tensor:
    """`loss_of` the targets that begin no document."""
    assert starts.dtype is torch.bool and starts.shape == tokens.shape
    return (tokens[:, 1:].double() / 100).sqrt().masked_fill(starts[:, 1:], 0.0)


@pytest.fixture(scope="module")
def documents(tmp_path_factory):
    """20 windows and a token; documents begin at 0, 10, 13, 14, 15, 50, and from there on at each of 30 tokens."""
    lengths = [[10, 3, 1], [1, 35] + [1] * 30, [81]]
    return corpus_of_documents(tmp_path_factory.mktemp("corpora") / "documents", lengths)


@pytest.mark.parametrize("micro_batch", [1, 7, 64])
def test_within_documents_the_mean_is_over_the_targets_that_begin_none(documents, micro_batch):
    score = HeldOut(documents, LENGTH, 0, within_documents=True).score(loss_within, ALONE, micro_batch)
    targets = sorted(set(range(1, 161)) - {10, 13, 14, 15, *range(50, 81)})
    assert score.num_tokens == len(targets)
    assert score.loss == pytest.approx(math.fsum(math.sqrt(token / 100) for token in targets) / len(targets), rel=1e-12)


def test_across_documents_they_are_not_asked_for(documents):
    score = HeldOut(documents, LENGTH, 0).score(loss_of, ALONE, 4)
    assert score.num_tokens == 160


@pytest.mark.parametrize("num_windows", [2, 20])
def test_three_ranks_together_count_the_targets_that_one_does(documents, num_windows):
    held_out = HeldOut(documents, LENGTH, num_windows, within_documents=True)
    SUMS.clear()
    for rank in range(3):
        held_out.score(loss_within, OneOfThree(rank), 2)
    total, num_tokens = torch.stack(SUMS).sum(dim=(0, 2)).tolist()
    alone = held_out.score(loss_within, ALONE, 2)
    assert num_tokens == alone.num_tokens and total / num_tokens == pytest.approx(alone.loss, rel=1e-12)


def test_text_in_which_every_token_is_a_document_is_a_fault(tmp_path):
    path = corpus_of_documents(tmp_path / "ones", [[1] * 50])
    with pytest.raises(Fault, match=r"ones: every target in its windows begins a document, .* hold out longer doc"):
        HeldOut(path, LENGTH, 0, within_documents=True).score(loss_within, ALONE, 4)


@pytest.mark.parametrize("within_documents", [False, True])
@pytest.mark.parametrize(
    ("first", "stop", "targets"),
    [(0, None, range(1, 161)), (3, 30, range(4, 28)), (144, None, range(145, 161)), (152, 161, range(153, 161))],
)
def test_a_range_of_a_corpus_is_held_out_text_too(documents, first, stop, targets, within_documents):
    seen: list[int] = []

    def score(tokens: torch.Tensor, starts: torch.Tensor | None = None) -> torch.Tensor:
        seen.extend(tokens[:, 1:].flatten().tolist())
        return loss_of(tokens) if starts is None else loss_within(tokens, starts)

    found = HeldOut(documents, LENGTH, 0, within_documents, first, stop).score(score, ALONE, 4)
    assert seen == list(targets)
    counting = set(targets) - ({10, 13, 14, 15, *range(50, 81)} if within_documents else set())
    assert found.num_tokens == len(counting)


def test_a_range_without_a_window_is_a_fault_and_one_outside_an_error(documents):
    with pytest.raises(Fault, match=r"documents holds 8 tokens, not one window of 9; hold out more text"):
        HeldOut(documents, LENGTH, 0, first_token=153)
    for first, stop in ((0, 162), (-1, 50), (50, 40)):
        with pytest.raises(ValueError, match=rf"tokens {first}\.\.{stop} are not within the 161 of"):
            HeldOut(documents, LENGTH, 0, first_token=first, stop_token=stop)


def test_padding_is_no_text_and_has_no_bytes(tmp_path):
    path = corpus_of_documents(tmp_path / "padded", [[60] + [1] * 20], num_bytes=240, num_padding=20)
    assert bits_per_byte(4 * math.log(2), Corpus.open(path)) == pytest.approx(1.0, rel=1e-12)


# ---- which documents the interval is over


def interval_over(documents: dict[int, list[int]], counted: set[int]) -> float:
    """The half width over documents, each given as its tokens."""
    of_each = [[math.sqrt(t / 100) for t in tokens if t in counted] for tokens in documents.values()]
    losses, counts = ([f(tokens) for tokens in of_each] for f in (math.fsum, len))
    return half_width(torch.tensor(losses, dtype=torch.float64), torch.tensor(counts, dtype=torch.float64))


@pytest.mark.parametrize("within_documents", [False, True])
@pytest.mark.parametrize(("num_windows", "ids"), [(0, range(20)), (3, [0, 6, 13]), (7, [0, 2, 5, 8, 11, 14, 17])])
def test_the_interval_is_over_documents_and_one_cut_by_windows_that_are_not_scored_is_its_parts(
    documents, num_windows, ids, within_documents
):
    begun = [10, 13, 14, 15, *range(50, 81)]
    of_each: dict[tuple[int, int], list[int]] = {}
    part, before = 0, None
    for i in ids:
        part += before is not None and i != before + 1
        before = i
        for token in range(i * LENGTH + 1, (i + 1) * LENGTH + 1):
            of_each.setdefault((sum(first <= token for first in begun), part), []).append(token)
    counted = set(range(161)) - (set(begun) if within_documents else set())
    held_out = HeldOut(documents, LENGTH, num_windows, within_documents)
    for micro_batch in (1, 3, 64):
        score = held_out.score(loss_within if within_documents else loss_of, ALONE, micro_batch)
        assert score.interval == pytest.approx(interval_over(of_each, counted), rel=1e-12)
        num_counting = sum(not counted.isdisjoint(tokens) for tokens in of_each.values())
        assert score.interval_over == f"{num_counting} documents"


@pytest.mark.parametrize("num_windows", [1, 5, 20])
def test_three_ranks_together_have_the_interval_that_one_has(documents, num_windows):
    held_out = HeldOut(documents, LENGTH, num_windows, within_documents=True)
    SUMS.clear()
    for rank in range(3):
        held_out.score(loss_within, OneOfThree(rank), 2)
    alone = held_out.score(loss_within, ALONE, 2)
    together = half_width(*torch.stack(SUMS).sum(dim=0))
    assert together == (alone.interval and pytest.approx(alone.interval, rel=1e-12))


def test_where_no_document_begins_windows_stand_for_documents(path):
    score = HeldOut(path, LENGTH, 10).score(loss_of, ALONE, 4)
    windows = {i: list(range(i * LENGTH + 1, (i + 1) * LENGTH + 1)) for i in range(0, 50, 5)}
    assert score.interval_over == "10 windows"
    assert score.interval == pytest.approx(interval_over(windows, set(range(401))), rel=1e-12)


def test_one_window_alone_has_no_interval(path):
    score = HeldOut(path, LENGTH, 1).score(loss_of, ALONE, 4)
    assert (score.interval, score.interval_over) == (None, "1 windows")
