"""A mapped file that is cut short under its reader is named, whoever reads it; other bus errors end as before."""

from __future__ import annotations

import os
import signal
import subprocess
import sys

import pytest

READER = """
import os, signal, sys, threading
import numpy as np
from cpt.observe.lost_pages import tell_lost_pages

path, how = sys.argv[1:]
tell_lost_pages(lambda line: (os.write(2, line.encode()), sys.stdout.flush()))
tokens = np.asarray(np.memmap(path, dtype=np.uint16, mode="r"))
os.truncate(path, 5000)
places = np.array([0, 1, 90_000])
read = {
    # numpy gives up the interpreter's lock while it takes whole rows, and keeps it for a few elements.
    "rows": lambda: np.lib.stride_tricks.sliding_window_view(tokens, 600)[places],
    "elements": lambda: tokens[places],
    "slice": lambda: tokens[90_000:90_010].copy(),
    "a signal": lambda: os.kill(os.getpid(), signal.SIGBUS),
    "checksum": lambda: bytes(memoryview(tokens)[90_000:]),
}[how.removeprefix("thread ")]
if how.startswith("thread "):
    threading.Thread(target=read).start()
    threading.Event().wait(30)
read()
print("went on")
"""


def read(path, how: str) -> subprocess.CompletedProcess:
    path.write_bytes(bytes(200_000))
    return subprocess.run([sys.executable, "-c", READER, str(path), how], capture_output=True, text=True, timeout=90)


@pytest.mark.parametrize("how", ["rows", "elements", "slice", "checksum", "thread rows", "thread elements"])
def test_a_file_that_is_cut_short_is_named_and_the_process_ends_with_1(tmp_path, how):
    ended = read(tmp_path / "a shard.bin", how)
    assert (ended.returncode, ended.stdout) == (1, "")
    page = 180_000 // os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PAGE_SIZE")
    assert ended.stderr.startswith(f"{tmp_path}/a shard.bin, byte ")
    assert int(ended.stderr.split("byte ")[1].split(":")[0].replace(",", "")) >= page
    assert ": the file was cut short to 5,000 bytes while it was in use; put it back as it was" in ended.stderr


def test_a_bus_error_of_another_kind_ends_the_process_as_before(tmp_path):
    ended = read(tmp_path / "shard.bin", "a signal")
    assert ended.returncode == -signal.SIGBUS and ended.stderr == ""
