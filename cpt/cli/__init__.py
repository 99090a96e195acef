"""The command `cpt`: one file of this folder a command, found by its name.

A file holds `add_arguments(parser)`, `run(arguments) -> exit status` and `EXAMPLE`; its docstring's first line is its
help. Exit status: 0 done, 1 failed, 2 the request cannot work, 128 + N stopped by signal N after saving.
"""

from __future__ import annotations

import argparse
import ast
import faulthandler
import importlib
import os
import select
import signal
import sys
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from cpt import __version__
from cpt.config import Fault, names_of_choices
from cpt.config.faults import nearest
from cpt.observe.logs import log_to_terminal


def main(words: Sequence[str] | None = None) -> int:
    """Run the command that `words` (the process's own, if None) ask for; its exit status."""
    status = 0
    faulthandler.register(signal.SIGUSR2, 2, all_threads=True)  # `kill -USR2 PID`: what is it doing?
    for stream in (sys.stdout, sys.stderr):  # a terminal that lacks a character gets a stand-in
        if hasattr(stream, "reconfigure"):
            stream.reconfigure(errors="replace")
    os.umask(os.umask(0o022) | 0o022)  # what is written is for nobody else to change, whatever a shell allows
    try:
        status = _status_of(list(sys.argv[1:] if words is None else words))
        sys.stdout.flush()
    except BrokenPipeError:
        if not _reader_has_gone():
            raise
    return status


def _status_of(words: list[str]) -> int:
    commands = {name.replace("_", "-"): name for name in names_of_choices("cpt.cli")}
    if not words or words[0] in ("-h", "--help"):
        print(_overview(commands))
        return 0 if words else 2
    if words[0] == "--version":
        print(f"cpt {__version__}")
        return 0
    if words[0] not in commands:
        print(f"cpt: {words[0]}: there is no such command; {nearest(words[0], commands)}", file=sys.stderr)
        return 2
    with _ending_at_control_c():
        module = importlib.import_module(f"cpt.cli.{commands[words[0]]}")
    parser = argparse.ArgumentParser(
        prog=f"cpt {words[0]}",
        description=(module.__doc__ or "").strip(),
        epilog=f"example:\n  {module.EXAMPLE}",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    module.add_arguments(parser)
    # Options may stand anywhere between the key=value words; argparse cannot do that beside subcommands.
    parse = parser.parse_args if parser._subparsers else parser.parse_intermixed_args
    try:
        return _told(words[0], module.run, parse(words[1:]))
    except SystemExit as ended:  # argparse ends with 0 after --help and with 2 after a wrong word
        return int(ended.code or 0)


def _told(command: str, run, arguments: argparse.Namespace) -> int:
    """Run one command; what a user can mend is told in lines, without a traceback."""
    log_to_terminal()
    try:
        return run(arguments)
    except Fault as fault:
        for line in fault.lines:
            print(f"cpt {command}: {line}", file=sys.stderr)
        return 1 if fault.is_passing else 2
    except BrokenPipeError:
        raise
    except OSError as error:
        where = f"{error.filename}: " if error.filename else ""
        print(f"cpt {command}: {where}{error.strerror or error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print(f"cpt {command}: stopped", file=sys.stderr)
        return 130


@contextmanager
def _ending_at_control_c() -> Iterator[None]:
    """Inside Ctrl-C ends the process silently: imports take seconds, and would show where they were."""
    handler = signal.getsignal(signal.SIGINT)
    is_ours = handler is signal.default_int_handler and threading.current_thread() is threading.main_thread()
    if is_ours:
        signal.signal(signal.SIGINT, signal.SIG_DFL)
    try:
        yield
    finally:
        if is_ours:
            signal.signal(signal.SIGINT, handler)


def _reader_has_gone() -> bool:
    """Whether nobody reads our output any more: `cpt ... | head` took what it wanted. What is left goes nowhere then.

    Asked because a worker that died breaks a pipe too, and that is no success.
    """
    output = select.poll()
    output.register(sys.stdout, 0)  # errors are told unasked
    has_gone = bool(output.poll(0))
    if has_gone:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    return has_gone


def _overview(commands: dict[str, str]) -> str:
    folder = Path(__file__).parent
    lines = ["Continual pre-training: learn the new, keep the old, and prove it.", "", "usage: cpt COMMAND ...", ""]
    for command, name in commands.items():
        text = ast.get_docstring(ast.parse((folder / f"{name}.py").read_text(encoding="utf-8"))) or ""
        lines.append(f"  {command:<14}{text.splitlines()[0] if text else ''}")
    return "\n".join([*lines, "", "cpt COMMAND --help tells more, with an example."])
