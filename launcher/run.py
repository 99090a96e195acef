"""Start a training run: `deepspeed launcher/run.py CONFIG [key=value ...]`, or the same under srun, torchrun or python.

Works from a checkout before any install: what lies beside this file comes first.
"""

import faulthandler
import os
import signal
import sys
from pathlib import Path

_ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(_ROOT), str(_ROOT / "launcher"), str(_ROOT / "kernels")]

if sys.version_info < (3, 10):  # the words here are ones that an old Python reads, too
    sys.exit(f"cpt needs Python 3.10 or newer; this is {sys.version.split()[0]} ({sys.executable})")

# `kill -USR2 PID` tells where it is, from here on: imports from a slow disk may take minutes.
faulthandler.register(signal.SIGUSR2, all_threads=True)

# Before torch is imported. Its C++ warns with a stack on every rank when one has gone, which cpt tells in a line.
os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "ERROR")

from cpt.cli import main  # noqa: E402 (after the path)

if __name__ == "__main__":
    sys.exit(main(["train", *sys.argv[1:]]))
