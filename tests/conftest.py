"""What all tests share: one thread, no accelerator, the modules of tests/harness on the path, and a family of runs."""

from __future__ import annotations

import logging
import os
import signal
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from hypothesis import settings

# Before torch is imported: a pool of threads made here would be lost in the ranks that the harness forks.
os.environ["OMP_NUM_THREADS"] = "1"
os.environ["DS_ACCELERATOR"] = "cpu"
os.environ["TOKENIZERS_PARALLELISM"] = "false"
# Before cpt_kernels is: without a GPU its Triton kernels run in the interpreter.
os.environ.setdefault("TRITON_INTERPRET", "0" if Path("/dev/nvidiactl").exists() else "1")
sys.path.insert(0, str(Path(__file__).parent / "harness"))
# What a shell starts in the background ignores Ctrl-C, and so would all that a test starts and interrupts.
signal.signal(signal.SIGINT, signal.default_int_handler)
# A busy machine takes a second where an idle one takes a millisecond.
settings.register_profile("any machine", deadline=None)
settings.load_profile("any machine")


def pytest_terminal_summary(terminalreporter) -> None:
    reports = [report for kind in ("passed", "failed") for report in terminalreporter.getreports(kind)]
    told = [line for report in reports for name, line in report.user_properties if name == "measured"]
    if told:
        terminalreporter.section("as measured")
        terminalreporter.write_line("\n".join(sorted(told)))


@pytest.fixture
def tell(record_property) -> Callable[[str], None]:
    """Takes a line, or a table, that stands in what is told at the end."""
    return lambda line: record_property("measured", line)


@pytest.fixture(scope="session")
def data(tmp_path_factory) -> Path:
    """Corpora `prose` and `code`, each with its `-held-out`."""
    from cpt_harness import runs

    return runs.write_data(tmp_path_factory.mktemp("a path") / "data")


@pytest.fixture(scope="session")
def base(data, tmp_path_factory) -> Path:
    """A finished run that learned prose: 20 steps, Reptile every 3."""
    from cpt_harness import runs

    folder = tmp_path_factory.mktemp("base run")
    plain = runs.settings(
        data, folder / "base", [runs.stage(data, "prose", 20)], methods=[{"name": "reptile", "every": 3}]
    )
    runs.trained(runs.write_settings(folder / "base.yaml", plain))
    return folder / "base"


@pytest.fixture(scope="session")
def child(data, base, tmp_path_factory) -> Path:
    """A finished child of `base` that learned code for 12 steps, with a quarter of replay on top."""
    from cpt_harness import runs

    folder = tmp_path_factory.mktemp("child")
    replay = {"share": "25%", "accounting": "adds_to_new"}
    rewarm = {"name": "rewarm", "peak": 5e-3, "floor": 5e-4, "warmup": "25%"}
    stages = [runs.stage(data, "code", 12, replay=replay, schedule=rewarm)]
    plain = runs.settings(data, folder / "child", stages, parent={"run": str(base)})
    del plain["model"], plain["sequence_length"]
    runs.trained(runs.write_settings(folder / "child.yaml", plain))
    return folder / "child"


@pytest.fixture(scope="session")
def even(data, tmp_path_factory) -> Path:
    """A Hugging Face folder whose model two tensor or sequence ranks can share."""
    from cpt_harness import runs

    folder = tmp_path_factory.mktemp("even")
    model = {**runs.MODEL, "heads": 4, "kv_heads": 2, "head_width": 6}
    plain = runs.settings(data, folder / "run", [runs.stage(data, "code", 1)], model=model)
    runs.trained(runs.write_settings(folder / "run.yaml", plain))
    assert runs.cpt("convert", "to-hf", folder / "run", folder / "model", "--dtype", "fp32")[0][0] == 0
    return folder / "model"


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    """What opens a mesh takes all cores for torch; the next test has one again, as the ranks that it forks do."""
    yield
    if (torch := sys.modules.get("torch")) and torch.get_num_threads() != 1:
        torch.set_num_threads(1)


@pytest.fixture(autouse=True)
def nothing_left_running() -> Iterator[None]:
    """A test that fails may leave processes behind, which would take the next ones their time."""
    yield
    if runs := sys.modules.get("cpt_harness.runs"):
        runs.kill_what_was_started()


@pytest.fixture(autouse=True)
def environment_as_before() -> Iterator[None]:
    """What opens a mesh tells DeepSpeed by variables such as RANK; the next test must not be taken for that rank."""
    before = dict(os.environ)
    yield
    for name in os.environ.keys() - before.keys():
        del os.environ[name]
    os.environ.update(before)


@pytest.fixture(autouse=True)
def loggers_as_before() -> Iterator[None]:
    """A command sends our log lines to the terminal, a run to a file; the next test begins without either."""
    loggers = [logging.getLogger(name) for name in ("cpt", "cpt_launcher", "py.warnings")]
    before = [(list(logger.handlers), logger.propagate, logger.level) for logger in loggers]
    yield
    for logger, (handlers, propagate, level) in zip(loggers, before, strict=True):
        for handler in set(logger.handlers) - set(handlers):
            handler.close()
        logger.handlers, logger.propagate = handlers, propagate
        logger.setLevel(level)
    logging.captureWarnings(False)
