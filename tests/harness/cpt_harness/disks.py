"""Disks that fail as real ones do: small file systems that fill up, have a quota, freeze, break, or are slow.

All is done by the kernel to file systems of their own, in a file or in memory; it takes a machine where root may mount.
"""

from __future__ import annotations

import ctypes
import fcntl
import os
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from pathlib import Path

import pytest

MIB = 1 << 20
_OPTIONS = "errors=remount-ro"
# Of Linux's headers: FIFREEZE and FITHAW of fs.h, EXT4_IOC_SHUTDOWN of ext4.h.
_NEW_MOUNTS = 0x00020000  # CLONE_NEWNS of sched.h
_FREEZE, _THAW, _SHUT_DOWN, _WITHOUT_LOG = 0xC0045877, 0xC0045878, 0x8004587D, 2


def _run(*words: object) -> str:
    done = subprocess.run(list(map(str, words)), capture_output=True, text=True)
    if done.returncode:
        raise OSError(f"{' '.join(map(str, words))}: {done.stderr.strip()}")
    return done.stdout.strip()


@contextmanager
def _mounted(folder: Path, *words: object) -> Iterator[None]:
    """What is mounted there; skips the test where that is not allowed."""
    folder.mkdir()
    try:
        _have_mounts_of_our_own()
        _run("mount", *words, folder)
    except OSError as error:
        pytest.skip(f"this machine mounts no file systems: {error}")
    try:
        yield
    finally:
        _run("umount", "--lazy", folder)


@cache
def _have_mounts_of_our_own() -> None:
    """Others do not see what is mounted from now on: whoever makes a namespace meanwhile would keep it mounted."""
    libc = ctypes.CDLL(None, use_errno=True)
    if libc.unshare(_NEW_MOUNTS):
        raise OSError(ctypes.get_errno(), os.strerror(ctypes.get_errno()), "unshare")
    _run("mount", "--make-rprivate", "/")


@contextmanager
def in_memory(folder: Path, num_bytes: int) -> Iterator[Path]:
    """A file system of that size."""
    with _mounted(folder, "-t", "tmpfs", "-o", f"size={num_bytes},mode=755", "none"):
        yield folder


class Disk:
    """An ext4 file system on a device of its own, mounted at `path`."""

    def __init__(self, path: Path, device: str) -> None:
        self.path, self.device = path, device

    def fail(self) -> None:
        """Let the kernel find an error in it: it becomes read-only, whatever is open."""
        Path(f"/sys/fs/ext4/{Path(self.device).name}/trigger_fs_error").write_text("a test\n")

    def die(self) -> None:
        """From now on whoever asks for a file gets an input/output error."""
        _tell(self.path, _SHUT_DOWN, _WITHOUT_LOG)

    def lose(self) -> None:
        """From now on nothing can be read that is not in memory, also of files that are open; it stays so."""
        os.truncate(_image_of(self.path), 0)

    def mend(self) -> None:
        """Mount it anew: it is whole again, as far as it was written, and nothing of it is in memory."""
        _run("umount", self.path)
        _run("mount", "-o", _OPTIONS, self.device, self.path)

    def freeze(self) -> None:
        """Whoever writes waits, as for a file server that does not answer, until somebody runs `thawing`."""
        _tell(self.path, _FREEZE, 0)

    @contextmanager
    def slow(self, bytes_a_second: int) -> Iterator[None]:
        """It writes so much a second, whoever writes; skips the test where the kernel does not throttle."""
        throttle = Path("/sys/fs/cgroup/blkio/blkio.throttle.write_bps_device")
        if not throttle.exists():
            pytest.skip(f"{throttle} is not there: no disk can be made slow")
        status = os.stat(self.device)
        number = f"{os.major(status.st_rdev)}:{os.minor(status.st_rdev)}"
        throttle.write_text(f"{number} {bytes_a_second}\n")
        try:
            yield
        finally:
            throttle.write_text(f"{number} 0\n")


def _image_of(folder: Path) -> Path:
    return folder.with_name(f"{folder.name}.image")


def thawing(path: Path) -> str:
    """Python that lets a frozen file system answer again."""
    return f"import fcntl, os; fcntl.ioctl(os.open({str(path)!r}, os.O_RDONLY), {_THAW}, 0)"


def _tell(path: Path, request: int, value: int) -> None:
    folder = os.open(path, os.O_RDONLY)
    try:
        fcntl.ioctl(folder, request, ctypes.c_uint32(value))
    finally:
        os.close(folder)


@contextmanager
def on_device(folder: Path, num_bytes: int) -> Iterator[Disk]:
    """An ext4 file system of that size, which an error makes read-only."""
    with _device(folder, num_bytes, "mkfs.ext4", "-q") as device, _mounted(folder, "-o", _OPTIONS, device):
        yield Disk(folder, device)


@contextmanager
def with_quota(folder: Path, num_bytes: int) -> Iterator[Path]:
    """A folder in which files may take so much, of a disk that has far more room."""
    pool = folder.with_name(f"{folder.name}.pool")
    with _device(folder, 256 * MIB, "mkfs.btrfs", "-q") as device, _mounted(pool, device):
        _run("btrfs", "subvolume", "create", pool / folder.name)
        _run("btrfs", "quota", "enable", pool)
        _run("btrfs", "qgroup", "limit", num_bytes, pool / folder.name)
        yield pool / folder.name


@contextmanager
def _device(folder: Path, num_bytes: int, *make: object) -> Iterator[str]:
    """A device made of a file beside `folder`, with a new file system; skips the test where there can be none."""
    image = _image_of(folder)
    with image.open("wb") as file:
        file.truncate(num_bytes)
    try:
        _run(*make, image)
        device = _run("losetup", "--find", "--show", image)
    except OSError as error:
        pytest.skip(f"this machine makes no disk of a file: {error}")
    try:
        yield device
    finally:
        _run("losetup", "--detach", device)
