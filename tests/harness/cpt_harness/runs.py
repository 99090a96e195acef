"""Whole runs, small: corpora, settings as YAML, `cpt train` in forked and in real processes, and what they wrote."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import IO, Any

import numpy as np
import tokenizers
import torch
import yaml

from cpt.checkpoint import Checkpoint, RunFolder
from cpt.data.corpus import Manifest, ShardEntry
from cpt.data.prepare.tokenizers import Tokenizer
from cpt.data.shards import ShardWriter
from cpt.observe.journal import Journal
from cpt.parallel import mesh
from cpt_harness.ranks import in_processes
from cpt_launcher.rendezvous import pick_free_port

ROOT = Path(__file__).resolve().parents[3]
MODEL = {"name": "llama", "vocabulary": 67, "width": 24, "layers": 2, "heads": 3, "kv_heads": 1, "mlp_width": 40,
         "longest_sequence": 32}  # fmt: skip
LENGTH, WINDOWS = 12, 8
TOKENS_A_STEP = LENGTH * WINDOWS
SECONDS = 240.0  # for what takes ten on a machine that does nothing else


# ---- data


def write_tokenizer(folder: Path) -> Path:
    """A byte-level BPE of some sixty tokens, in the files that Hugging Face knows."""
    made = tokenizers.Tokenizer(tokenizers.models.BPE())
    made.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    made.decoder = tokenizers.decoders.ByteLevel()
    trainer = tokenizers.trainers.BpeTrainer(vocab_size=100, special_tokens=["<s>", "</s>"], show_progress=False)
    made.train_from_iterator(["the quick brown fox jumps over the lazy dog"] * 3, trainer)
    folder.mkdir(parents=True)
    made.save(str(folder / "tokenizer.json"))
    words = {"tokenizer_class": "PreTrainedTokenizerFast", "bos_token": "<s>", "eos_token": "</s>"}
    (folder / "tokenizer_config.json").write_text(json.dumps(words))
    return folder


def write_corpus(
    folder: Path, tokenizer: Path, num_tokens: int, seed: int, stride: int, lengths: tuple[int, int] = (20, 60)
) -> Path:
    """Documents in which each token is the one before plus `stride`: easy to learn, and each stride another source."""
    folder.mkdir(parents=True)
    numbers = np.random.default_rng(seed)
    opened = Tokenizer.open(tokenizer)
    with ShardWriter(folder / "shard-00000", opened.vocabulary_size) as writer:
        while writer.num_tokens < num_tokens:
            length = int(numbers.integers(*lengths))
            writer.add_document((numbers.integers(0, 50) + stride * np.arange(length)) % 50 + 5)
    opened.copy_to(folder / "tokenizer")
    shard = ShardEntry(
        "shard-00000", writer.num_tokens, writer.num_documents, *(
            (folder / f"shard-00000.{ending}").stat().st_size for ending in ("bin", "idx")
        ), writer.bin_checksum, writer.idx_checksum,
    )  # fmt: skip
    Manifest(
        tokenizer_hash=opened.hash, vocabulary_size=opened.vocabulary_size, end_of_document=None,
        begin_of_document=None, num_tokens=writer.num_tokens, num_documents=writer.num_documents,
        num_bytes=2 * writer.num_tokens, inputs=("made up",), shards=(shard,),
    ).write(folder)  # fmt: skip
    return folder


def write_data(folder: Path) -> Path:
    """`prose` and `code`, each to train on and held out."""
    tokenizer = write_tokenizer(folder / "tokenizer")
    for number, (name, stride) in enumerate((("prose", 1), ("code", 7))):
        write_corpus(folder / name, tokenizer, 5000, 10 + number, stride)
        write_corpus(folder / f"{name}-held-out", tokenizer, 400, 20 + number, stride)
    return folder


# ---- settings


def stage(data: Path, name: str, steps: int, source: str | None = None, **more: Any) -> dict[str, Any]:
    """A stage that learns one source for so many steps."""
    source = source or name
    return {
        "name": name,
        "tokens": steps * TOKENS_A_STEP,
        "sources": {source: {"corpus": str(data / source)}},
        "schedule": {"name": "cosine", "peak": 5e-3, "floor": 5e-4},
        **more,
    }


def settings(data: Path, output: Path, stages: list[dict[str, Any]], **more: Any) -> dict[str, Any]:
    """A run of the tiny model, scored and saved every few steps."""
    held_out = {name: str(data / f"{name}-held-out") for name in ("prose", "code")}
    return {
        "output": str(output),
        "model": MODEL,
        "sequence_length": LENGTH,
        "batch": {"windows": WINDOWS, "micro_batch": 4},
        "precision": "fp32",
        "stages": stages,
        "evaluation": {"held_out": held_out, "windows": 0, "every_tokens": 7 * TOKENS_A_STEP},
        "checkpoint": {"every_tokens": 5 * TOKENS_A_STEP},
        "log": {"peak_tflops": 0.1},
        **more,
    }


def write_settings(path: Path, plain: dict[str, Any]) -> Path:
    """The settings as the YAML file `path`."""
    path.write_text(yaml.safe_dump(plain, sort_keys=False))
    return path


# ---- running


def cpt(
    *words: object, ranks: int = 1, seconds: float = SECONDS, before: Callable[[], None] | None = None
) -> list[tuple[int, str]]:
    """Exit status and standard error of `cpt WORDS` on each rank, in forked processes. `before` is called in each."""
    port = pick_free_port()

    def on_one(rank: int) -> tuple[int, str]:
        from cpt.cli import main

        if ranks > 1:
            os.environ.update(RANK=str(rank), WORLD_SIZE=str(ranks), LOCAL_RANK=str(rank))
            os.environ.update(LOCAL_WORLD_SIZE=str(ranks), MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port))
        # One thread a rank: two that wait for one another on a busy machine take a second for a step of 10 ms.
        mesh.threads_for = lambda local_size: 1
        with _caught() as file:
            if before:
                before()
            status = main([str(word) for word in words])
        file.seek(0)
        return status, file.read().decode()

    return in_processes([lambda rank=rank: on_one(rank) for rank in range(ranks)], seconds)


def trained(*words: object, **named: Any) -> str:
    """What the first rank of `cpt train WORDS` wrote on standard error; fails unless all ended with 0."""
    ended = cpt("train", *words, **named)
    assert [status for status, _ in ended] == [0] * len(ended), ended
    return ended[0][1]


@contextmanager
def _caught() -> Iterator[IO[bytes]]:
    """Standard error goes into a file."""
    sys.stderr.flush()
    kept = os.dup(2)
    file = tempfile.TemporaryFile()  # noqa: SIM115 (it is read after the block)
    os.dup2(file.fileno(), 2)
    old, sys.stderr = sys.stderr, open(2, "w", closefd=False, buffering=1)  # noqa: SIM115 (it must not be closed)
    try:
        yield file
    finally:
        sys.stderr.flush()
        sys.stderr = old
        os.dup2(kept, 2)


def start(
    *words: object, folder: Path, launcher: Sequence[object] = (), num_cores: int | None = None, **environment: str
) -> subprocess.Popen:
    """A real process `[LAUNCHER] launcher/run.py WORDS` in a process group of its own; writes to `folder`/out.txt.

    `num_cores`: how many it may use. Without a launcher one, because two threads that wait for one another are slow on
    a busy machine; with as many as there are ranks each has one thread, as in the forked processes of `cpt`.
    """
    # As a shell would start it: nothing of pytest's path.
    clean = {k: v for k, v in os.environ.items() if k not in ("PYTHONPATH", "LOCAL_SIZE")}
    command = [*(launcher or [sys.executable]), ROOT / "launcher" / "run.py", *words]
    num_cores = num_cores or (None if launcher else 1)
    with (folder / "out.txt").open("ab") as out:
        process = subprocess.Popen(
            list(map(str, command)), cwd=folder, env={**clean, **environment}, stdout=out, stderr=out,
            start_new_session=True, preexec_fn=(lambda: _take_cores(num_cores)) if num_cores else None,
        )  # fmt: skip
    _started.append(process)
    return process


_started: list[subprocess.Popen] = []


def kill_what_was_started() -> None:
    """End what `start` has started and a test that failed has left running, with all of its group."""
    while _started:
        process = _started.pop()
        with suppress(ProcessLookupError):
            os.killpg(process.pid, 9)
        process.wait()


def _take_cores(number: int) -> None:
    if hasattr(os, "sched_setaffinity"):
        os.sched_setaffinity(0, sorted(os.sched_getaffinity(0))[-number:])


def wait_for(what: Callable[[], Any], why: str, seconds: float = SECONDS) -> Any:
    """The first true answer of `what()`; fails with `why` when there was none in time."""
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline:
        if answer := what():
            return answer
        time.sleep(0.002)
    raise AssertionError(f"waited {seconds:.0f} s for: {why}")


def wait_for_step(run: Path, step: int, process: subprocess.Popen | None = None, seconds: float = SECONDS) -> None:
    """Return when the run has told of that step."""

    def is_there() -> bool:
        assert process is None or process.poll() is None, f"ended with {process.returncode} before step {step}"
        return num_lines(run / "metrics.jsonl") >= step

    wait_for(is_there, f"step {step} of {run}", seconds)


def end(process: subprocess.Popen, seconds: float = SECONDS) -> int:
    """The exit status of a process that is about to end; it and its group are killed if it does not."""
    try:
        return process.wait(seconds)
    finally:
        if process.poll() is None:
            os.killpg(process.pid, 9)
            process.wait()


def ask_to_stop() -> None:
    """A SIGTERM to this process: the run saves after its next step, and ends."""
    os.kill(os.getpid(), signal.SIGTERM)


def ask_to_stop_at(step: int) -> Callable[[], None]:
    """For `before`: the run gets SIGTERM right after that step, and saves after the next."""

    def patch() -> None:
        tell = Journal.step

        def tell_and_ask(journal: Journal, record: dict[str, Any], num_tokens: int) -> None:
            tell(journal, record, num_tokens)
            if record["step"] == step:
                ask_to_stop()

        Journal.step = tell_and_ask

    return patch


# ---- what was written


def num_lines(path: Path) -> int:
    return path.read_bytes().count(b"\n") if path.exists() else 0


def lines(path: Path) -> list[dict[str, Any]]:
    """The records of a .jsonl file, every line of which must be whole."""
    text = path.read_text(encoding="utf-8")
    assert text.endswith("\n")
    return [json.loads(line) for line in text.splitlines()]


TIMES = ("step_seconds", "tokens_per_second", "mfu", "evaluation_seconds", "save_seconds")


def story(run: Path) -> dict[str, Any]:
    """Everything that two runs with equal results have equal: records without times, ledger, the last checkpoint."""
    checkpoint = RunFolder(run).latest()
    assert isinstance(checkpoint, Checkpoint)
    metrics, scores = (
        [{k: v for k, v in record.items() if k not in TIMES} for record in lines(run / f"{name}.jsonl")]
        for name in ("metrics", "scores")
    )
    return {
        "metrics": metrics,
        "scores": scores,
        "order": lines(run / "order.jsonl"),
        "ledger": json.loads((run / "ledger.json").read_text()),
        "state": checkpoint.state,
        "checkpoints": sorted(path.name for path in (run / "checkpoints").iterdir()),
        "tensors": {kind: {n: checkpoint.read(kind, n) for n in checkpoint.shapes} for kind in checkpoint.kinds},
    }


def assert_same_story(found: dict[str, Any], expected: dict[str, Any]) -> None:
    """Equal to the bit."""
    for part in ("metrics", "scores", "order", "ledger", "state", "checkpoints"):
        assert found[part] == expected[part], part
    assert found["tensors"].keys() == expected["tensors"].keys()
    for kind, tensors in expected["tensors"].items():
        for name, values in tensors.items():
            assert torch.equal(found["tensors"][kind][name], values), (kind, name)


def assert_same_but_for_checkpoints(found: dict[str, Any], expected: dict[str, Any]) -> None:
    """A run that saved when it was stopped has kept other checkpoints, but as many, and the same last one."""
    assert found["checkpoints"][-1] == expected["checkpoints"][-1]
    assert len(found["checkpoints"]) == len(expected["checkpoints"])
    assert_same_story({**found, "checkpoints": []}, {**expected, "checkpoints": []})


def copy(run: Path, to: Path) -> Path:
    """A copy of a run folder, to be gone on with in another way."""
    return Path(shutil.copytree(run, to))
