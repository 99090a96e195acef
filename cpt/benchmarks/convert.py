"""How fast models go in from Hugging Face and out again, and in how much memory: this project beside transformers.

A folder of random bf16 weights in the shape of a known model is imported and exported; every conversion runs in a
process of its own, in turn, with what it writes on the disk at the end (fsync).
"""

from __future__ import annotations

import json
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from cpt.benchmarks.measure import Spread
from cpt.benchmarks.options import option
from cpt.config import Fault, name_of_choice
from cpt.huggingface import architectures
from cpt.huggingface.export import write_json
from cpt.huggingface.shards import INDEX, new_shards
from cpt.models import llama, pythia
from cpt.tensor_writer import Writer, in_order

_TINY = llama.Settings(vocabulary=64, width=16, layers=1, heads=2, mlp_width=24)
SHAPES: dict[str, Any] = {
    "tiny": _TINY,
    "llama-1.1b": llama.Settings(
        vocabulary=32000, width=2048, layers=22, heads=32, kv_heads=4, mlp_width=5632, longest_sequence=2048
    ),
    "pythia-1.4b": pythia.Settings(vocabulary=50304, width=2048, layers=24, heads=16, mlp_width=8192),
    "llama-8b": llama.Settings(
        vocabulary=128256, width=4096, layers=32, heads=32, kv_heads=8, mlp_width=14336, rope_base=500000.0
    ),
}

# What a process of its own runs: `prepare` first, which is not measured, then `measured`.
_AROUND = """
import json, os, sys, time
source, target, tiny = sys.argv[1:4]
def status(line):
    return next(int(text.split()[1]) for text in open("/proc/self/status") if text.startswith(line)) / 1024
marks = {}
def mark(name):
    marks[name] = (time.perf_counter(), time.process_time(), status("VmHWM"))
{prepare}
open("/proc/self/clear_refs", "w").write("5")
base = status("VmRSS")
mark("begin")
{measured}
mark("end")
print(json.dumps({"base": base, "marks": marks}))
"""
_PREPARE_CONVERT = """
from cpt.cli import main
import cpt.huggingface
publishing = sys.modules["cpt.huggingface.publish"]
certify = publishing.certify
def marked(*given):
    mark("written")
    return certify(*given)
assert main(["convert", "{way}", tiny, target + "-tiny"]) == 0
publishing.certify = marked
"""
_CONVERT = 'assert main(["convert", "{way}", source, target]) == 0'
_PREPARE_PEER = """
import torch
from transformers import AutoModelForCausalLM
AutoModelForCausalLM.from_pretrained(tiny, dtype="auto").save_pretrained(target + "-tiny")
"""
_PEER = """
AutoModelForCausalLM.from_pretrained(source, dtype="auto").save_pretrained(target)
mark("written")
for name in os.listdir(target):
    with open(os.path.join(target, name), "rb") as file:
        os.fsync(file.fileno())
"""


@dataclass(frozen=True)
class Settings:
    """What is converted: a name of `SHAPES`; large files go into `folder`, then away."""

    shape: str = option("llama-1.1b", f"of {', '.join(SHAPES)}", "NAME")
    repetitions: int = option(3, "turns of each conversion")
    transformers: bool = option(True, "leave out transformers, which holds the whole model in memory")
    folder: Path | None = option(None, "for large files, which go away again (default: /tmp)", "DIR")

    def faults(self) -> list[str]:
        """Unknown shapes, and counts below what can be measured."""
        faults = [] if self.shape in SHAPES else [f"shape = {self.shape}: known: {', '.join(SHAPES)}"]
        return faults + ([] if self.repetitions >= 1 else [f"repetitions = {self.repetitions}: at least 1"])


@dataclass(frozen=True)
class Conversion:
    """One way of converting. Speeds in GB of the folder's weights a second; the peak in MiB over what was imported."""

    name: str
    gb_per_second: Spread
    gb_per_cpu_second: Spread
    peak_extra_mib: float


@dataclass(frozen=True)
class Result:
    """What was measured; `num_bytes` are those of the weights."""

    settings: Settings
    num_bytes: int
    conversions: list[Conversion]


def compare(settings: Settings) -> Result:
    """Measure every conversion, in a new folder that goes away.

    Raises Fault if the disk has not room for three times the weights.
    """
    model = SHAPES[settings.shape]
    num_bytes = 2 * model.num_parameters
    with tempfile.TemporaryDirectory(dir=settings.folder, prefix="cpt-bench-") as work:
        room = shutil.disk_usage(work).free
        if room < 3 * num_bytes:
            raise Fault(f"{work}: {3 * num_bytes / 1e9:.0f} GB are needed, {room / 1e9:.0f} GB are there")
        source, tiny = Path(work) / "source", Path(work) / "tiny"
        write_random_folder(source, name_of_choice(model), model)
        write_random_folder(tiny, "llama", _TINY)
        taken: dict[str, list[tuple[float, float, float]]] = {}
        _read_all(source)
        for _ in range(settings.repetitions):
            for name, numbers in _turn(source, tiny, settings.transformers):
                taken.setdefault(name, []).append(numbers)
    conversions = [
        Conversion(
            name,
            Spread.of([num_bytes / 1e9 / wall for wall, _, _ in numbers]),
            Spread.of([num_bytes / 1e9 / cpu for _, cpu, _ in numbers]),
            statistics.median(peak for *_, peak in numbers),
        )
        for name, numbers in taken.items()
    ]
    return Result(settings, num_bytes, conversions)


def write_random_folder(folder: Path, model_name: str, model: Any, max_shard_bytes: int = 5 * 10**9) -> None:
    """A Hugging Face folder of random bf16 weights with a tokenizer of bytes, a few MiB in memory at a time."""
    folder.mkdir(parents=True)
    architecture = architectures.of_model(model_name)
    shapes = {name: stored.shape(model.shapes) for name, stored in architecture.tensors(model).items()}
    shards = new_shards({name: (torch.bfloat16, shape) for name, shape in shapes.items()}, max_shard_bytes)
    values = (torch.randn(1 << 21, generator=torch.Generator().manual_seed(1)) * 0.02).bfloat16()
    for file, layout in shards.layouts.items():
        with Writer(folder / file, layout) as writer:
            for number, name in enumerate(in_order(layout)):
                writer.write(name, _random(values.roll(1 + number)))
    if shards.index is not None:
        (folder / INDEX).write_text(shards.index, encoding="utf-8")
    write_json(folder / "config.json", {**architecture.config_of(model), "dtype": "bfloat16"})
    _write_tokenizer(folder)


def _random(values: torch.Tensor) -> Callable[[int, torch.Tensor], None]:
    """Other values in each place of a tensor."""
    return lambda start, out: out.copy_(values.roll(start // 1000)[: len(out)])


def _write_tokenizer(folder: Path) -> None:
    from tokenizers import Tokenizer, models

    Tokenizer(models.WordLevel({"<s>": 0, "</s>": 1, "a": 2}, unk_token="a")).save(str(folder / "tokenizer.json"))


def _turn(source: Path, tiny: Path, with_peer: bool) -> list[tuple[str, tuple[float, float, float]]]:
    """Each conversion once: (name, (wall seconds, CPU seconds, peak MiB))."""
    run, out, peer = (source.with_name(name) for name in ("run", "out", "peer"))
    done = []
    came = _process(
        _PREPARE_CONVERT.replace("{way}", "from-hf"), _CONVERT.replace("{way}", "from-hf"), source, run, tiny
    )
    done.append(("cpt from-hf", _between(came, "begin", "end")))
    _read_all(run)
    tiny_run = run.with_name("run-tiny")
    went = _process(_PREPARE_CONVERT.replace("{way}", "to-hf"), _CONVERT.replace("{way}", "to-hf"), run, out, tiny_run)
    done.append(("cpt to-hf", _between(went, "begin", "written")))
    done.append(("cpt to-hf with its certificate", _between(went, "begin", "end")))
    for file in source.glob("*.safetensors"):
        assert _is_same(file, out / file.name), f"{file.name} came out as other bytes"
    shutil.rmtree(run)
    shutil.rmtree(out)
    if with_peer:
        theirs = _process(_PREPARE_PEER, _PEER, source, peer, tiny)
        done.append(("transformers, load and save", _between(theirs, "begin", "end")))
        shutil.rmtree(peer)
    for left in source.parent.glob("*-tiny"):
        shutil.rmtree(left)
    return done


def _read_all(folder: Path) -> None:
    """Every conversion finds what it reads in the page cache."""
    for file in folder.rglob("*"):
        if file.is_file():
            with file.open("rb") as opened:
                while opened.read(1 << 22):
                    pass


def _process(prepare: str, measured: str, source: Path, target: Path, tiny: Path) -> dict[str, Any]:
    code = _AROUND.replace("{prepare}", prepare).replace("{measured}", measured)
    ended = subprocess.run(
        [sys.executable, "-c", code, str(source), str(target), str(tiny)],
        capture_output=True, text=True, env={**os.environ, "HF_HUB_OFFLINE": "1"},
    )  # fmt: skip
    if ended.returncode:
        raise RuntimeError(f"a conversion failed:\n{ended.stdout}{ended.stderr}")
    return json.loads(ended.stdout.splitlines()[-1])


def _between(told: dict[str, Any], begin: str, end: str) -> tuple[float, float, float]:
    first, last = told["marks"][begin], told["marks"][end]
    return last[0] - first[0], last[1] - first[1], last[2] - told["base"]


def _is_same(a: Path, b: Path) -> bool:
    return subprocess.run(["cmp", "--silent", str(a), str(b)]).returncode == 0


def as_lines(result: Result) -> list[str]:
    """A Markdown table with a head."""
    settings = result.settings
    lines = [
        f"Weights: {settings.shape}, {result.num_bytes / 1e9:.2f} GB in bf16; median (smallest to largest) of "
        f"{settings.repetitions} turns, fsync included",
        "",
        "| conversion | GB/s | GB a CPU second | peak extra memory |",
        "|---|---|---|---|",
    ]
    for one in result.conversions:
        speeds = (
            f"{spread.median:.2f} ({spread.smallest:.2f} to {spread.largest:.2f})"
            for spread in (one.gb_per_second, one.gb_per_cpu_second)
        )
        lines.append(f"| {one.name} | {' | '.join(speeds)} | {one.peak_extra_mib:,.0f} MiB |")
    return lines
