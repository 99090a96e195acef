"""The words of `launcher/supervise.py`, and its exit status."""

from __future__ import annotations

import argparse
import logging
import os
from collections.abc import Mapping, Sequence
from pathlib import Path

from cpt.config import Fault
from cpt.observe.logs import log_to_terminal
from cpt_launcher.rendezvous import is_slurm_step, number
from cpt_launcher.supervisor import Supervisor
from cpt_launcher.verdict import CANNOT_WORK, Limits

_log = logging.getLogger(__name__)


def main(words: Sequence[str]) -> int:
    """Supervise what the words of `launcher/supervise.py` ask for; the exit status."""
    parser = argparse.ArgumentParser(
        prog="supervise.py",
        description="Start COMMAND until the run in FOLDER is finished, or starting it again is of no use.",
        epilog="example: python launcher/supervise.py --run runs/mine -- deepspeed launcher/run.py my.yaml",
    )
    parser.add_argument("--run", type=Path, required=True, action="append", metavar="FOLDER", help="the run's folder, "
                        "its `output`; again for each further run of a version plan")  # fmt: skip
    parser.add_argument("--restarts", type=int, default=3, metavar="N", help="failures without a newer checkpoint that "
                        "are followed by another start; default: 3")  # fmt: skip
    parser.add_argument("--backoff", type=float, default=10.0, metavar="SECONDS", help="pause after the first failure, "
                        "twice as long after each more; default: 10")  # fmt: skip
    parser.add_argument("--grace", type=float, default=300.0, metavar="SECONDS", help="time to save in after a request "
                        "to stop; what is left then is killed; default: 300")  # fmt: skip
    parser.add_argument("--no-requeue", action="store_true", help="never requeue the SLURM job this runs in")
    parser.add_argument("command", nargs=argparse.REMAINDER, metavar="-- COMMAND", help="srun, deepspeed, python, ...")
    try:
        arguments = parser.parse_args(words)
        command = arguments.command[1:] if arguments.command[:1] == ["--"] else arguments.command
        if not command:
            parser.error("no command: name it after --")
    except SystemExit as ended:
        return int(ended.code or 0)
    os.umask(os.umask(0o022) | 0o022)  # as the command `cpt` does: what is written is for nobody else to change
    log_to_terminal()
    limits = Limits(arguments.restarts, arguments.backoff)
    try:
        refuse_many(os.environ)
        supervisor = Supervisor(arguments.run, command, limits, arguments.grace, os.environ, not arguments.no_requeue)
        return supervisor.supervise()
    except Fault as fault:
        for line in fault.lines:
            _log.error("%s", line)
        return CANNOT_WORK
    except OSError as error:
        _log.error("%s: %s", error.filename or arguments.run[0], error.strerror)
        return 1


def refuse_many(environment: Mapping[str, str]) -> None:
    """Raise Fault in a SLURM step of several tasks: each would start the whole command."""
    tasks = number(environment, "SLURM_STEP_NUM_TASKS", otherwise=1)
    if tasks > 1 and is_slurm_step(environment):
        raise Fault(
            f"srun started supervise.py {tasks} times; start it once, in the batch script, and srun after its --"
        )
