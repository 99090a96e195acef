"""How fast samples of text are read, and how soon the first is there: this project beside others, in one run.

Every reader gives shuffled samples of S + 1 token ids as tensors (int64; ours int32), from the same tokens, which lie
in the page cache. One core; CPU time of all threads; repetitions take turns, and ratios are taken turn by turn.
"""

from __future__ import annotations

import importlib
import logging
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from tqdm import tqdm

from cpt import __version__
from cpt.benchmarks import machine, ours
from cpt.benchmarks.material import Material, make_material
from cpt.benchmarks.measure import Reader, Spread, microseconds_a_sample
from cpt.benchmarks.options import option
from cpt.benchmarks.start_up import StartUp, measure_start_up
from cpt.benchmarks.table import table, told
from cpt.config import names_of_choices

_log = logging.getLogger(__name__)
# The reader that all others are compared with.
YARDSTICK = "megatron-core GPTDataset"


@dataclass(frozen=True)
class Settings:
    """What is measured, on the text of `corpus` or on random tokens; large files go into `folder`, then away."""

    sequence_length: int = option(2048, "tokens of a sample", "S")
    batch: tuple[int, ...] = option(
        (64, 256, 1024), "samples at once, for readers that give batches; peers take the first", "B,B"
    )
    tokens: int = option(50_000_000, "length of the text that is read", shown="50M")
    order_tokens: int = option(1_000_000_000, "of the order whose start-up is timed", shown="1B")
    repetitions: int = option(7, "turns of each reader")
    corpus: Path | None = option(None, "text to read (default: random tokens)", "CORPUS", is_positional=True)
    folder: Path | None = option(None, "for large files, which go away again (default: /tmp)", "DIR")

    def faults(self) -> list[str]:
        """Counts below what can be measured."""
        faults = [] if self.sequence_length >= 2 else [f"sequence_length = {self.sequence_length}: at least 2"]
        if not self.batch or min(self.batch) < 1:
            faults.append(f"batch = {', '.join(map(str, self.batch))}: at least 1 each, such as 64,256")
        if self.repetitions < 1:
            faults.append(f"repetitions = {self.repetitions}: at least 1")
        if self.tokens < 1:
            faults.append(f"tokens = {self.tokens}: at least 1")
        if self.order_tokens < 1000 * self.sequence_length:
            faults.append(f"order_tokens = {self.order_tokens}: at least 1000 sequences")
        return faults


@dataclass(frozen=True)
class ReadRate:
    """One reader's CPU microseconds a sample; `speedup`: how many times as fast as the yardstick, None without it."""

    name: str
    batch: int | None
    microseconds: Spread
    speedup: Spread | None


@dataclass(frozen=True)
class Result:
    """What was measured on what; `missing`: name of each peer that could not take part, and why."""

    machine: str
    versions: dict[str, str]
    settings: Settings
    read_rates: list[ReadRate]
    start_ups: list[StartUp]
    missing: dict[str, str]


def compare(settings: Settings) -> Result:
    """Measure everything, in a new folder that goes away.

    Raises Fault if the corpus cannot be opened or is too short.
    """
    with tempfile.TemporaryDirectory(dir=settings.folder, prefix="cpt-bench-") as work, machine.one_core():
        _log.info("writing %s tokens", f"{settings.tokens:,}")
        material = make_material(settings.corpus, Path(work), settings.tokens, settings.sequence_length)
        _warm(material)
        readers = [reader for batch in settings.batch for reader in _our_readers(material, batch)]
        versions, missing = {"cpt-trainer": __version__, **machine.versions("numpy", "torch")}, {}
        peers = []
        for name in names_of_choices("cpt.benchmarks.peers"):
            peer = importlib.import_module(f"cpt.benchmarks.peers.{name}")
            of_peer, reason = _readers_of_peer(peer, material, Path(work), settings.batch[0])
            readers += of_peer
            if reason:
                missing[peer.PACKAGE] = reason
            else:
                peers.append(name)
                versions.update(machine.versions(peer.PACKAGE))
        _log.info("reading, %d readers in turn", len(readers))
        turns = settings.repetitions * len(readers)
        with tqdm(total=turns, unit="turn", disable=not sys.stderr.isatty()) as bar:
            taken = microseconds_a_sample(readers, settings.repetitions, bar.update)
        _log.info("making an order over %s tokens ready", f"{settings.order_tokens:,}")
        start_ups = measure_start_up(
            Path(work), settings.order_tokens, settings.sequence_length, settings.repetitions, peers
        )
    told_machine = f"{machine.processor(torch.device('cpu'))}, one used; {machine.system()}"
    return Result(told_machine, versions, settings, _rates(readers, taken), start_ups, missing)


def _our_readers(material: Material, batch: int) -> list[Reader]:
    return [*ours.readers(material, batch), ours.slice_loop(material, batch)]


def _readers_of_peer(peer, material: Material, folder: Path, batch: int) -> tuple[list[Reader], str | None]:
    """The peer's readers, or why there are none."""
    if not machine.versions(peer.PACKAGE):
        return [], f"not installed (pip install {peer.PACKAGE})"
    _log.info("preparing %s", peer.PACKAGE)
    try:
        return peer.readers(material, folder, batch), None
    except Exception as error:  # whatever is wrong with a peer, the others can be measured
        _log.warning("%s cannot take part", peer.PACKAGE, exc_info=error)
        return [], f"failed: {type(error).__name__}: {str(error).splitlines()[0] if str(error) else ''}"


def _rates(readers: list[Reader], taken: list[list[float]]) -> list[ReadRate]:
    names = [reader.name for reader in readers]
    yardstick = taken[names.index(YARDSTICK)] if YARDSTICK in names else None
    return [
        ReadRate(
            reader.name,
            reader.batch,
            Spread.of(values),
            Spread.of([theirs / own for theirs, own in zip(yardstick, values, strict=True)]) if yardstick else None,
        )
        for reader, values in zip(readers, taken, strict=True)
    ]


def _warm(material: Material) -> None:
    for prefix in (material.whole, *material.halves):
        np.fromfile(f"{prefix}.bin", dtype=np.uint8)


def as_lines(result: Result) -> list[str]:
    """Two Markdown tables with a head and notes."""
    settings = result.settings
    lines = [
        f"Machine: {result.machine}",
        f"Versions: {', '.join(f'{name} {number}' for name, number in result.versions.items())}",
        "",
        f"Reading shuffled samples of {settings.sequence_length} + 1 tokens out of {settings.tokens:,}, CPU time of "
        f"one core, median (smallest to largest) of {settings.repetitions} alternating repetitions; times as fast as "
        f"{YARDSTICK}, by repetition",
        "",
    ]
    rows = [
        (
            rate.name,
            str(rate.batch or 1),
            f"{1e6 / rate.microseconds.median:,.0f}",
            told(rate.microseconds),
            f"{told(rate.speedup)}" if rate.speedup else "",
        )
        for rate in result.read_rates
    ]
    rows += [(package, "", reason, "", "") for package, reason in result.missing.items()]
    lines += table(("reader", "batch", "samples/s", "microseconds a sample", "times as fast"), rows)
    lines += ["", f"Making ready a shuffled order over {settings.order_tokens:,} tokens, CPU time", ""]
    rows = [
        (
            start.name,
            told(start.milliseconds),
            f"{start.index_bytes / 2**20:,.1f} MiB" if start.index_bytes else "none",
        )
        for start in result.start_ups
    ]
    return lines + table(("order", "milliseconds", "index kept"), rows)
