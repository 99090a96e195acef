"""A build that is killed at any moment goes on where it stopped and ends in the bytes of one that was not."""

from __future__ import annotations

import gzip
import json
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import tokenizers
from tokenizers import models, pre_tokenizers

# Kills its own group at the n-th time that it touches the disk. With n = 0 it tells how often it does.
SCRIPT = """
import functools, os, signal, sys
from cpt import cli
from cpt.cli import data
from cpt.data.prepare import build, shuffle

build.SECONDS_BETWEEN_CHECKPOINTS = 0
build.BATCH_CHARACTERS = 400
shuffle.NUM_BUCKETS = 5
data.build_corpus = functools.partial(data.build_corpus, shard_tokens=1500)
touches = 0

def count(event, details):
    global touches
    if event in ("open", "os.rename", "os.remove", "os.truncate", "os.mkdir", "os.rmdir", "shutil.rmtree"):
        touches += 1
        if touches == int(sys.argv[1]):
            os.killpg(0, signal.SIGKILL)

sys.addaudithook(count)
status = cli.main(["data", "build", *sys.argv[2:]])
print("touches", touches)
sys.exit(status)
"""


def start(kill_at: int, *words: str | Path) -> subprocess.Popen[str]:
    command = [sys.executable, "-c", SCRIPT, str(kill_at), *map(str, words)]
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
    return subprocess.Popen(command, start_new_session=True, text=True, **pipes)


def build(*words: str | Path) -> tuple[int, str]:
    """Builds undisturbed; how often it touched the disk, and what it said."""
    process = start(0, *words)
    out, told = process.communicate()
    assert process.returncode == 0, told
    return int(out.split()[-1]), told


def files_under(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


@pytest.fixture
def given(tmp_path) -> list[str | Path]:
    """Four input files, the last one damaged, and a tokenizer, as words of the command."""
    folder = tmp_path / "tokenizer"
    folder.mkdir()
    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    made = tokenizers.Tokenizer(models.BPE({letter: index for index, letter in enumerate(letters)}, []))
    made.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    made.add_special_tokens(["</s>"])
    made.save(str(folder / "tokenizer.json"))
    generator = random.Random(0)
    inputs = []
    for name in "abcd":
        lines = []
        for _ in range(70):
            text = "".join(generator.choices("abc é漢\n", k=generator.randint(1, 60)))
            lines.append(json.dumps({"text": text, "kind": generator.choice(["prose", "code"])}) + "\n")
        content = ("".join(lines) + "{broken\n").encode()
        inputs.append(tmp_path / (f"{name}.jsonl.gz" if name in "bd" else f"{name}.jsonl"))
        inputs[-1].write_bytes(gzip.compress(content) if name in "bd" else content)
        if name == "d":
            # The checksum: all of its documents are there before the damage is.
            inputs[-1].write_bytes(inputs[-1].read_bytes()[:-8] + b"\0" * 8)
    return [*inputs, "--tokenizer", folder, "--holdout", "20%", "--on-error", "skip"]


WAYS = {
    "in order": (8, []),
    "shuffled by domain": (8, ["--shuffle-documents", "7", "--domain-key", "kind"]),
    "two workers": (4, ["--workers", "2"]),
}


@pytest.mark.parametrize(("num_kills", "options"), WAYS.values(), ids=WAYS)
def test_kill_9_at_random_moments_gives_the_same_bytes(tmp_path, given, num_kills, options):
    generator = random.Random(1)
    for folder in ("whole", "killed"):
        (tmp_path / folder).mkdir()
    touches, _ = build(*given, "--output", tmp_path / "whole" / "c", *options)
    whole = files_under(tmp_path / "whole")
    assert sum(name.endswith(".bin") for name in whole) >= 5
    killed = [*given, "--output", tmp_path / "killed" / "c", *options]
    num_gone_on = 0
    for kill in range(num_kills):
        process = start(generator.randint(1, touches * 3 // 4), *killed)
        told = process.communicate()[1]
        num_gone_on += "going on after" in told
        if process.returncode == 0:
            # So little was left to do that it was done before the moment came.
            assert files_under(tmp_path / "killed") == whole, kill
            for path in (tmp_path / "killed").glob("c*"):
                path.rename(tmp_path / f"{path.name}-{kill}")
        else:
            assert process.returncode == -signal.SIGKILL, told
    build(*killed)
    assert files_under(tmp_path / "killed") == whole
    assert num_gone_on > 0


def test_a_build_killed_from_outside_while_workers_are_busy_gives_the_same_bytes(tmp_path, given):
    for folder in ("whole", "killed"):
        (tmp_path / folder).mkdir()
    build(*given, "--output", tmp_path / "whole" / "c", "--workers", "2")
    killed = [*given, "--output", tmp_path / "killed" / "c", "--workers", "2"]
    process = start(0, *killed)
    journal = tmp_path / "killed" / "c.partial" / "journal.json"
    while process.poll() is None and not journal.exists():
        time.sleep(0.001)
    os.killpg(process.pid, signal.SIGKILL)
    process.communicate()
    assert "going on after" in build(*killed)[1]
    assert files_under(tmp_path / "killed") == files_under(tmp_path / "whole")


@pytest.mark.parametrize("moment", range(1, 14))
def test_a_kill_at_any_of_the_last_moments_loses_nothing(tmp_path, given, moment):
    for folder in ("whole", "killed"):
        (tmp_path / folder).mkdir()
    touches, _ = build(*given, "--output", tmp_path / "whole" / "c")
    killed = [*given, "--output", tmp_path / "killed" / "c"]
    process = start(touches - moment, *killed)
    process.communicate()
    again = start(0, *killed)
    told = again.communicate()[1]
    # When only the lock was left to remove, the corpus is there.
    assert again.returncode == 0 or "c is there already" in told
    assert files_under(tmp_path / "killed") == files_under(tmp_path / "whole")
