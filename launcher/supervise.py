"""Keep a run going until it is finished: `python launcher/supervise.py --run FOLDER -- srun launcher/run.py CONFIG`.

Works from a checkout before any install: what lies beside this file comes first.
"""

import sys
from pathlib import Path

_ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(_ROOT), str(_ROOT / "launcher"), str(_ROOT / "kernels")]

if sys.version_info < (3, 10):  # the words here are ones that an old Python reads, too
    sys.exit(f"cpt needs Python 3.10 or newer; this is {sys.version.split()[0]} ({sys.executable})")

from cpt_launcher.supervise_command import main  # noqa: E402 (after the path)

if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
