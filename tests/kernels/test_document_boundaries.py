"""Where documents begin, told in three ways that agree; and what a model is called with."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from cpt_kernels.cross_entropy import IGNORED
from cpt_kernels.documents import Documents, model_inputs, num_counting

CPU = torch.device("cpu")


def marks(*rows: str) -> torch.Tensor:
    return torch.tensor([[mark == "1" for mark in row] for row in rows])


def test_two_windows_by_hand():
    documents = Documents.from_starts(marks("100101", "000010"))
    assert documents.positions.tolist() == [[0, 1, 2, 0, 1, 0], [0, 1, 2, 3, 0, 1]]
    assert documents.cu_seqlens.tolist() == [0, 3, 5, 6, 10, 12]
    assert (documents.positions.dtype, documents.cu_seqlens.dtype) == (torch.int64, torch.int32)
    assert documents.longest == 4
    assert documents.runs == [(1, 3), (1, 2), (1, 1), (1, 4), (1, 2)]
    assert documents.num_visible == 9 + 4 + 1 + 16 + 4
    assert not documents.are_windows
    assert documents.begins.tolist() == [[0, 0, 0, 3, 3, 5], [0, 0, 0, 0, 4, 4]]
    assert documents.ends.tolist() == [[3, 3, 3, 5, 5, 6], [4, 4, 4, 4, 6, 6]]
    assert (documents.begins.dtype, documents.ends.dtype) == (torch.int32, torch.int32)


def test_what_a_query_may_look_at_by_hand():
    is_visible = Documents.from_starts(marks("10110")).is_visible
    assert is_visible.shape == (1, 1, 5, 5)
    assert is_visible[0, 0].int().tolist() == [
        [1, 0, 0, 0, 0],
        [1, 1, 0, 0, 0],
        [0, 0, 1, 0, 0],
        [0, 0, 0, 1, 0],
        [0, 0, 0, 1, 1],
    ]


@pytest.mark.parametrize("first", ["0", "1"])
def test_windows_that_are_one_document_each_are_known_as_such(first):
    documents = Documents.from_starts(marks(first + "000", "0000"))
    assert documents.are_windows and documents.runs == [(2, 4)] and documents.longest == 4


def test_padding_of_documents_of_one_token_is_one_run():
    documents = Documents.from_starts(torch.ones(3, 5, dtype=torch.bool))
    assert documents.runs == [(15, 1)] and documents.longest == 1 and not documents.are_windows
    assert Documents.from_starts(torch.ones(3, 1, dtype=torch.bool)).are_windows


@settings(max_examples=100, deadline=None)
@given(windows=st.integers(1, 4), length=st.integers(1, 9), draw=st.randoms(use_true_random=False))
def test_positions_lengths_and_visibility_are_those_of_a_walk_over_the_tokens(windows, length, draw):
    starts = torch.tensor([[draw.random() < 0.4 for _ in range(length)] for _ in range(windows)])
    before = starts.clone()
    documents = Documents.from_starts(starts)
    assert torch.equal(starts, before)
    number, walked = -1, []
    for window in range(windows):
        for position in range(length):
            number += bool(position == 0 or starts[window, position])
            walked.append((window, number))
    numbers = [number for _, number in walked]
    assert documents.cu_seqlens.diff().tolist() == [numbers.count(n) for n in range(number + 1)]
    assert documents.cu_seqlens[0] == 0 and documents.cu_seqlens[-1] == windows * length
    flat = documents.positions.flatten().tolist()
    assert flat == [index - numbers.index(n) for index, n in enumerate(numbers)]
    assert documents.longest == max(flat) + 1
    assert documents.are_windows == (number + 1 == windows)
    assert sum(count for count, _ in documents.runs) == number + 1
    same = torch.tensor(numbers).view(windows, 1, length)
    expected = (same == same.mT) & torch.ones(length, length, dtype=torch.bool).tril()
    assert torch.equal(documents.is_visible[:, 0], expected)
    of_windows = [numbers[window * length : (window + 1) * length] for window in range(windows)]
    assert documents.begins.tolist() == [[row.index(n) for n in row] for row in of_windows]
    assert documents.ends.tolist() == [[row.index(n) + row.count(n) for n in row] for row in of_windows]
    assert documents.num_visible == sum(numbers.count(n) ** 2 for n in range(number + 1))


def test_documents_of_the_same_tokens_are_the_same_after_they_moved():
    documents = Documents.from_starts(marks("1010"))
    moved = documents.to(CPU)
    assert torch.equal(moved.positions, documents.positions) and torch.equal(moved.cu_seqlens, documents.cu_seqlens)
    assert moved.longest == documents.longest


def test_a_model_is_given_targets_that_are_ignored_where_a_document_begins():
    tokens = torch.tensor([[1, 2, 3, 4, 5]])
    starts = marks("01011")
    inputs, targets, documents = model_inputs(tokens, starts, CPU)
    assert inputs.tolist() == [[1, 2, 3, 4]]
    assert targets.tolist() == [[IGNORED, 3, IGNORED, IGNORED]]
    assert documents.cu_seqlens.tolist() == [0, 1, 3, 4]
    assert num_counting(tokens, starts).tolist() == [1]
    assert tokens.tolist() == [[1, 2, 3, 4, 5]]


def test_without_starts_a_model_is_given_no_documents_and_every_target():
    tokens = torch.tensor([[1, 2, 3], [4, 5, 6]])
    inputs, targets = model_inputs(tokens, None, CPU)
    assert (inputs.tolist(), targets.tolist()) == ([[1, 2], [4, 5]], [[2, 3], [5, 6]])
    assert num_counting(tokens, None).tolist() == [2, 2]
