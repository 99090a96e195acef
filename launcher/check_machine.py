"""Before anything is installed: can this machine run it? Called by make; prints one clear line for each obstacle.

Kept to the syntax of old Pythons, because telling one that it is too old is part of the work.
"""

import os
import shutil
import sys
import sysconfig

NEEDED = (3, 10)


def main():
    """Exit status: 0 to go on, 2 if something is missing that must be there."""
    here = "%d.%d" % sys.version_info[:2]
    if sys.version_info < NEEDED:
        return refuse(
            "Python %s at %s is too old: 3.10 or newer is needed; install one and name it: make PYTHON=python3.11 ..."
            % (here, sys.executable)
        )
    try:
        import ensurepip  # noqa: F401
        import venv  # noqa: F401
    except ImportError:
        return refuse(
            "this Python cannot make virtual environments; on Debian and Ubuntu: apt-get install python%s-venv" % here
        )
    missing = []
    if not any(shutil.which(name) for name in ("cc", "gcc", "clang")):
        missing.append("a C compiler (Debian, Ubuntu: apt-get install build-essential)")
    if not os.path.exists(os.path.join(sysconfig.get_path("include"), "Python.h")):
        missing.append("Python's headers (Debian, Ubuntu: apt-get install python%s-dev)" % here)
    if missing:
        print("note: without %s the CPU works as it is; GPU kernels need them" % " and ".join(missing))
    return 0


def refuse(line):
    """Tell `line` and give the exit status that goes with it."""
    sys.stderr.write("make: %s\n" % line)
    return 2


if __name__ == "__main__":
    sys.exit(main())
