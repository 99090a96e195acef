"""A rank that gets no more memory, for real: one line that names it and what would need less, and all others end."""

from __future__ import annotations

import socket
from types import SimpleNamespace

import pytest
import torch
from cpt_harness import faults, runs

from cpt.config import Fault
from cpt.run.out_of_memory import is_out_of_memory, telling_of_memory, ways_out

OF_CUDA = (
    "CUDA out of memory. Tried to allocate 2.00 GiB. GPU 0 has a total capacity of 79.15 GiB of which 1.10 GiB is free."
    " See documentation for Memory Management (https://docs.pytorch.org/docs)\nand a second line"
)


@pytest.fixture
def config(data, tmp_path):
    stage = runs.stage(data, "prose", 4000)
    batch = {"windows": 12, "micro_batch": 2}
    plain = runs.settings(data, tmp_path / "run", [stage], batch=batch, watch=faults.WATCH)
    return runs.write_settings(tmp_path / "run.yaml", plain)


def no_memory_while_the_model_is_made() -> None:
    import cpt.train

    cpt.train.built_part = lambda *arguments: faults.run_out_of_memory()


def no_memory_while_the_engine_is_built() -> None:
    from cpt.engine import engine

    engine.add_up_gradients = lambda model: faults.run_out_of_memory()


def no_memory_while_it_is_filled() -> None:
    from cpt.engine import Engine

    Engine.fill = lambda *arguments, **named: faults.run_out_of_memory()


def no_memory_in_a_step() -> None:
    faults.at_step(4, faults.run_out_of_memory)


@pytest.mark.parametrize(
    ("short", "when"),
    [
        (1, no_memory_while_the_model_is_made),
        pytest.param(1, no_memory_while_the_engine_is_built, marks=pytest.mark.long),
        pytest.param(0, no_memory_while_it_is_filled, marks=pytest.mark.long),
        (1, no_memory_in_a_step),
        (0, no_memory_in_a_step),
    ],
)
def test_it_is_named_and_the_others_end(config, tmp_path, short, when):
    run = tmp_path / "run"

    def before(rank: int) -> None:
        if rank == short:
            when()

    with faults.started(config, number=3, folder=tmp_path, before=before) as ranks:
        assert ranks.wait() == [1, 1, 1]
        told = [line for rank in range(3) for line in ranks.told(rank).splitlines() if "cpt train: " in line]
        assert not any("Traceback" in ranks.told(rank) for rank in range(3))
    (line,) = told
    assert line.startswith(f"cpt train: {f'rank {short}: ' if short else ''}out of memory: [enforce fail at ")
    assert "can't allocate memory: you tried to allocate 4294967296 bytes" in line
    assert "batch.micro_batch: 1 in place of 2, zero: 3, recompute: {mode: full}, more ranks" in line
    if when is no_memory_in_a_step:
        ended = faults.last_end(run)
        assert (ended["how"], ended["rank"], ended["node"]) == ("failed", short, socket.gethostname())
        assert ended["reason"].startswith("out of memory: ") and not ended["is_final"]
        assert "run_out_of_memory" in (run / "logs" / f"rank-{short:05d}.log").read_text()


def test_where_it_runs_out_on_all_ranks_each_has_a_line_at_most_and_no_traceback(config, tmp_path):
    with faults.started(config, number=3, folder=tmp_path, before=lambda rank: no_memory_in_a_step()) as ranks:
        assert ranks.wait() == [1, 1, 1]
        told = [ranks.told(rank) for rank in range(3)]
    lines = [[line for line in text.splitlines() if "cpt train: " in line] for text in told]
    assert all(len(of_rank) <= 1 for of_rank in lines) and any(lines), told
    assert all("out of memory: " in line for of_rank in lines for line in of_rank)
    assert not any("Traceback" in text for text in told)
    assert faults.last_end(tmp_path / "run")["reason"].startswith("out of memory: ")


@pytest.mark.parametrize(
    ("error", "is_one"),
    [
        (torch.OutOfMemoryError(OF_CUDA), True),
        (RuntimeError("CUDA error: out of memory"), True),
        (RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`"), True),
        (RuntimeError("NCCL error ...\nLast error:\nCuda failure 2 'out of memory'"), True),
        (MemoryError(), True),
        (RuntimeError("unable to mmap 64 bytes from file <x>: Cannot allocate memory (12)"), True),
        (RuntimeError("mat1 and mat2 shapes cannot be multiplied"), False),
        (RuntimeError("CUDA error: an illegal memory access was encountered"), False),
    ],
    ids=str,
)
def test_what_says_so_is_taken_for_it_and_nothing_else(error, is_one):
    assert is_out_of_memory(error) == is_one


def settings(micro_batch=4, zero=1, mode="none", blocks=None, sharing=8, pipeline=1):
    run = SimpleNamespace(
        batch=SimpleNamespace(micro_batch_on=lambda ranks: micro_batch),
        zero=zero,
        recompute=SimpleNamespace(mode=mode, blocks=blocks),
    )
    sizes = {"pipeline": pipeline, "same_parameters": sharing}
    mesh = SimpleNamespace(data_size=sharing, **{name: SimpleNamespace(size=size) for name, size in sizes.items()})
    return run, mesh


LAST = "more ranks (`cpt plan CONFIG --ranks N` says what one holds)"


@pytest.mark.parametrize(
    ("made", "told"),
    [
        ({"mode": "full", "zero": 3}, ["batch.micro_batch: 2 in place of 4", LAST]),
        ({}, ["batch.micro_batch: 2 in place of 4", "zero: 3", "recompute: {mode: full}", LAST]),
        ({"micro_batch": 9, "zero": 2, "mode": "full"}, ["batch.micro_batch: 3 in place of 9", "zero: 3", LAST]),
        ({"micro_batch": 1, "mode": "selective", "sharing": 1}, ["recompute: {mode: full}", LAST]),
        ({"micro_batch": 1, "mode": "full", "pipeline": 2}, [LAST]),
        ({"micro_batch": 1, "mode": "full", "blocks": 3, "zero": 3}, ["recompute: {mode: full}", LAST]),
        ({"micro_batch": 1, "mode": "full", "pipeline": 2, "zero": 0}, ["zero: 1", LAST]),
    ],
    ids=str,
)  # fmt: skip
def test_only_settings_that_would_need_less_are_told(made, told):
    assert ways_out(*settings(**made)) == told


def test_of_torchs_long_message_the_figures_are_kept():
    with pytest.raises(Fault) as found, telling_of_memory(*settings(micro_batch=1, mode="full", sharing=1)):
        raise torch.OutOfMemoryError(OF_CUDA)
    assert found.value.lines == (f"out of memory: {OF_CUDA.partition(' See')[0]}; to need less: {LAST}",)
    assert found.value.is_passing
