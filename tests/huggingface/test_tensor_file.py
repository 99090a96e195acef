"""Files in pieces are the library's files: read alike, written to the byte, and never half."""

from __future__ import annotations

import errno
import math
import os

import pytest
import torch
from safetensors.torch import save_file

from cpt import tensor_writer
from cpt.config import Fault
from cpt.huggingface import readers
from cpt.huggingface.architectures import Stored
from cpt.huggingface.readers import Cast, Chained, FirstRows, InMemory, Joined, Part, difference_of, whole
from cpt.huggingface.tensor_file import open_file
from cpt.tensor_writer import Layout, Writer, fill, in_order, memory_for, write_whole


@pytest.fixture(autouse=True)
def small_pieces(monkeypatch):
    """Pieces and blocks smaller than the tensors, and odd."""
    monkeypatch.setattr(readers, "ELEMENTS_A_PIECE", 1001)
    monkeypatch.setattr(tensor_writer, "ELEMENTS_A_PIECE", 1001)
    monkeypatch.setattr(tensor_writer, "_BLOCK_BYTES", 8192)


def some_tensors(seed: int = 1) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return {
        "b": torch.randn(61, 97, generator=generator),
        "a": torch.randn(13, 7, generator=generator).bfloat16(),
        "ä long name": torch.randn(5003, generator=generator).half(),
        "empty": torch.empty(0, 3),
        "c": torch.randn(1, generator=generator).bfloat16(),
    }


def write(path, layout: Layout, tensors: dict[str, torch.Tensor], observe=lambda block: None) -> None:
    with Writer(path, layout, observe) as writer:
        for name in in_order(layout):
            writer.write(name, InMemory(tensors[name]).read_into)


def test_a_new_file_has_the_bytes_that_the_library_would_write(tmp_path):
    tensors = some_tensors()
    save_file(tensors, tmp_path / "theirs", metadata={"format": "pt"})
    layout = Layout.of_tensors({name: (value.dtype, tuple(value.shape)) for name, value in tensors.items()})
    seen = []
    write(tmp_path / "ours", layout, tensors, lambda block: seen.append(bytes(block)))
    written = (tmp_path / "ours").read_bytes()
    assert written == (tmp_path / "theirs").read_bytes() == b"".join(seen)
    assert layout.num_bytes == len(written)


@pytest.mark.parametrize("block", [4096, 8192, 1 << 20])
def test_a_file_made_in_memory_is_the_same_and_is_written_to_the_byte(tmp_path, monkeypatch, block):
    monkeypatch.setattr(tensor_writer, "_BLOCK_BYTES", block)
    tensors = some_tensors()
    layout = Layout.of_tensors({name: (value.dtype, tuple(value.shape)) for name, value in tensors.items()})
    memory, seen = memory_for(layout.num_bytes + 10_000).fill_(7), []  # more than is needed, with something in it
    fill(memory, layout, tensors)
    write_whole(tmp_path / "ours", memory, layout.num_bytes, lambda block: seen.append(bytes(block)))
    write(tmp_path / "in pieces", layout, tensors)
    assert (tmp_path / "ours").read_bytes() == (tmp_path / "in pieces").read_bytes() == b"".join(seen)


@pytest.mark.parametrize("past_the_cache", [True, False])
def test_a_header_word_for_word_gives_the_file_again_however_it_is_aligned(tmp_path, monkeypatch, past_the_cache):
    if not past_the_cache:
        real = os.open

        def refuses(path, flags, mode=0o777):
            if flags & os.O_DIRECT:
                raise OSError(errno.EINVAL, "Invalid argument")
            return real(path, flags, mode)

        monkeypatch.setattr(os, "open", refuses)
    # bf16 first and odd, so that the fp32 tensor is not aligned; and a header that is padded as nobody does.
    generator = torch.Generator().manual_seed(2)
    tensors = {"x": torch.randn(9001, generator=generator).bfloat16(), "y": torch.randn(5000, generator=generator)}
    header = (
        '{"y": {"dtype": "F32", "shape": [5000], "data_offsets": [18002, 38002]},  '
        '"x": {"dtype": "BF16", "shape": [9001], "data_offsets": [0, 18002]}}   '
    )
    raw = b"".join(value.view(torch.uint8).numpy().tobytes() for value in tensors.values())
    (tmp_path / "theirs").write_bytes(len(header).to_bytes(8, "little") + header.encode() + raw)
    stored, found = open_file(tmp_path / "theirs")
    assert found == header
    assert all(torch.equal(whole(stored[name]), tensors[name]) for name in tensors)
    write(tmp_path / "ours", Layout.of_header(found), tensors)
    assert (tmp_path / "ours").read_bytes() == (tmp_path / "theirs").read_bytes()


def test_a_stored_tensor_gives_any_part_of_itself(tmp_path):
    tensors = some_tensors()
    save_file(tensors, tmp_path / "file")
    stored, _ = open_file(tmp_path / "file")
    assert {name: (one.shape, one.dtype) for name, one in stored.items()} == {
        name: (tuple(value.shape), value.dtype) for name, value in tensors.items()
    }
    assert torch.equal(stored["b"].read(17, 3000), tensors["b"].reshape(-1)[17:3000])


def test_a_file_that_shrinks_while_it_is_read_is_told(tmp_path):
    save_file(some_tensors(), tmp_path / "file")
    stored, _ = open_file(tmp_path / "file")
    os.truncate(tmp_path / "file", 100)
    with pytest.raises(Fault, match="file ends at byte .*, before its tensors do: it was changed meanwhile"):
        stored["b"].read(0, 10)
    (tmp_path / "file").unlink()
    with pytest.raises(Fault, match="file cannot be read: No such file or directory"):
        stored["b"].read(0, 10)


def test_a_disk_that_fills_is_told_by_the_writer(tmp_path, monkeypatch):
    def full(*_):
        raise OSError(errno.ENOSPC, "No space left on device")

    tensors = some_tensors()
    layout = Layout.of_tensors({name: (value.dtype, tuple(value.shape)) for name, value in tensors.items()})
    monkeypatch.setattr(os, "pwrite", full)
    with pytest.raises(OSError, match="No space left") as told:
        write(tmp_path / "file", layout, tensors)
    assert told.value.filename == str(tmp_path / "file")
    with pytest.raises(OSError, match="No space left") as told:
        write_whole(tmp_path / "file", memory_for(layout.num_bytes), layout.num_bytes)
    assert told.value.filename == str(tmp_path / "file")


@pytest.mark.parametrize("shape", [(24, 5), (24,)])
def test_joining_and_taking_apart_in_pieces_is_what_the_architectures_say(shape, monkeypatch):
    monkeypatch.setattr(readers, "ELEMENTS_A_PIECE", 7)
    parts = [torch.randn(shape, generator=torch.Generator().manual_seed(seed)) for seed in range(3)]
    stored = Stored(("a", "b", "c"), rows=4)
    joined = Joined([InMemory(part) for part in parts], 4)
    expected = stored.join(parts)
    assert joined.shape == tuple(expected.shape) and torch.equal(whole(joined), expected)
    for number, part in enumerate(parts):
        apart = Part(InMemory(expected), 3, number, 4)
        assert apart.shape == shape and torch.equal(whole(apart), part)


def test_a_chain_of_parts_reads_as_one(monkeypatch):
    monkeypatch.setattr(readers, "ELEMENTS_A_PIECE", 7)
    values = torch.arange(30.0)
    cuts = [(0, 4), (4, 5), (5, 23), (23, 30)]
    chained = Chained((5, 6), [(first, last, InMemory(values[first:last])) for first, last in cuts])
    assert torch.equal(whole(chained), values.view(5, 6))
    assert torch.equal(whole(FirstRows(Cast(chained, torch.bfloat16), 3)), values[:18].view(3, 6).bfloat16())


def test_a_difference_is_counted_over_all_pieces_and_its_first_place_is_told():
    right = torch.randn(50, 60, generator=torch.Generator().manual_seed(1))
    wrong = right.clone()
    wrong[20, 7], wrong[49, 59] = 3.0, float("nan")
    told = difference_of(InMemory(right), InMemory(wrong))
    assert told == f"2 of 3000 values differ, the first at [20, 7]: 3 in place of {right[20, 7].item():.6g}"
    assert difference_of(InMemory(wrong), InMemory(wrong)) == ""


def test_minus_zero_is_not_zero_to_the_bit():
    assert difference_of(InMemory(torch.zeros(3)), InMemory(-torch.zeros(3))).startswith("3 of 3 values differ")


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_values_that_are_no_numbers_are_counted(dtype):
    values = torch.zeros(2000, dtype=dtype)
    assert readers.count_not_finite(values) == 0 == readers.count_not_finite(values[:0])
    values[[3, 7, 1999]] = torch.tensor([math.nan, math.inf, -math.inf], dtype=dtype)
    assert readers.count_not_finite(values) == 3


class Runtime:
    """Of a GPU that there is not: what is pinned."""

    def __init__(self, error: int = 0) -> None:
        self.error, self.pinned = error, {}

    def cudaHostRegister(self, address: int, num_bytes: int, flags: int) -> int:  # noqa: N802 (CUDA's name)
        if not self.error:
            self.pinned[address] = num_bytes
        return self.error

    def cudaHostUnregister(self, address: int) -> None:  # noqa: N802 (CUDA's name)
        del self.pinned[address]


def test_memory_is_pinned_in_its_own_size_until_the_last_view_of_it_is_gone(monkeypatch):
    runtime = Runtime()
    monkeypatch.setattr(torch.cuda, "cudart", lambda: runtime)
    memory = memory_for(9000, is_pinned=True)
    assert runtime.pinned == {memory.data_ptr(): 12288} and memory.data_ptr() % 4096 == 0
    view = memory[5000:].view(torch.bfloat16)
    del memory
    assert runtime.pinned
    del view
    assert runtime.pinned == {}


def test_memory_that_cannot_be_pinned_serves_as_it_is_with_a_warning(monkeypatch, caplog):
    def told_again(*_, **named):
        raise RuntimeError(f"CUDA error: out of memory, on {named['device']}")

    monkeypatch.setattr(torch.cuda, "cudart", lambda: Runtime(error=2))
    monkeypatch.setattr(torch, "ones", told_again)
    assert len(memory_for(9000, is_pinned=True).fill_(7)) == 12288
    assert "0.0 GB of host memory could not be pinned (CUDA error 2); copies" in caplog.text
