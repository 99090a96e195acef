"""Killed thirty times at random moments, each time started again by the same command: the ends of unbroken runs.

Three runs are killed ten times each, so that all but the first kills hit a run that was taken up before. What is
killed, when, and after how many steps is drawn from a seed; the moment itself is as random as the machine.
"""

from __future__ import annotations

import os
import random
import signal
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path

import psutil
import pytest
from cpt_harness import runs

from cpt.checkpoint import find_checkpoint
from cpt.checkpoint.write import checkpoint_folders
from cpt.cli import main
from cpt_launcher.launchers import program_of
from cpt_launcher.rendezvous import pick_free_port

pytestmark = pytest.mark.long

SEED = 5
NUM_KILLS = 10  # of each run
SAVED_EVERY = 3  # steps, so that much of the time a save is under way
SECONDS = 300.0  # for what takes ten on a machine that does nothing else
RANK = "run.py"
BIN = Path(sys.executable).parent


@dataclass(frozen=True)
class Case:
    """How a run is started, and what of it may be killed: programs, and "all" for all ranks at once."""

    launcher: list[object]
    ranks: int
    words: list[str]
    victims: list[str]


CASES = {
    "one rank, python": Case([sys.executable], 1, [], [RANK]),
    "2 ranks, ZeRO 1, deepspeed": Case(
        [sys.executable, BIN / "deepspeed", "--num_accelerators", 2], 2, ["zero=1"],
        [RANK, "all", "deepspeed", "deepspeed.launcher.launch"],
    ),
    "2 ranks, pipeline 2, torchrun": Case(
        [sys.executable, BIN / "torchrun", "--standalone", "--nproc-per-node", 2], 2,
        ["mesh.pipeline=2", "batch.micro_batch=2"], [RANK, "all", "torchrun"],
    ),
}  # fmt: skip
MOMENTS = ["training", "saving", "training", "saving", "starting"]  # of five kills, in random order


@dataclass(frozen=True)
class Kill:
    """What was killed when, and what came of it. `is_torn`: a save that was under way was left behind.

    `seconds`: until what was not killed had ended, too.
    """

    victim: str
    moment: str
    steps_told: int
    is_torn: bool
    goes_on_from: int
    seconds: float

    @property
    def told(self) -> str:
        """A line for a person."""
        torn = ", a save under way" if self.is_torn else ""
        ended = f"the rest ended in {self.seconds:.1f} s"
        steps = f"{self.steps_told} steps told, on from {self.goes_on_from}"
        return f"{self.victim} while {self.moment}{torn}; {ended}; {steps}"


def write_config(data, folder: Path) -> Path:
    """Three stages, the second and the endless third with replay; Reptile with windows that fit no checkpoint."""
    stages = [
        runs.stage(data, "prose", 13),
        runs.stage(data, "code", 17, replay={"share": 0.25}, schedule={"name": "rewarm", "peak": 3e-3}),
        runs.stage(data, "both", 100_000, "prose", replay={"share": 0.5}),
    ]
    plain = runs.settings(
        data, folder / "run", stages,
        checkpoint={"every_tokens": SAVED_EVERY * runs.TOKENS_A_STEP},
        methods=[{"name": "reptile", "every": 7, "step_size": 0.6}],
        mesh={"timeout_seconds": 60},
    )  # fmt: skip
    plain["evaluation"]["every_tokens"] = 20 * runs.TOKENS_A_STEP
    return runs.write_settings(folder / "run.yaml", plain)


@pytest.mark.parametrize("name", CASES)
def test_killed_ten_times_at_random_moments_a_run_ends_as_one_that_was_not(name, data, tmp_path, tell):
    case, config, run = CASES[name], write_config(data, tmp_path), tmp_path / "run"
    draw = random.Random(f"{SEED} {name}")
    began, kills = time.monotonic(), []
    victims, moments = (shuffled(choices, draw) for choices in (case.victims, MOMENTS))
    for number in range(NUM_KILLS):
        kills.append(start_and_kill(case, config, run, victims[number], moments[number], draw))
        print(f"{name}, kill {number + 1}: {kills[-1].told}")
    words, until = (config, *case.words), runs.ask_to_stop_at(kills[-1].goes_on_from + 2 * SAVED_EVERY)
    runs.cpt("train", *words, ranks=case.ranks, before=until, seconds=SECONDS)
    unbroken = tmp_path / "unbroken"
    runs.cpt("train", *words, f"output={unbroken}", ranks=case.ranks, before=until, seconds=SECONDS)
    runs.assert_same_but_for_checkpoints(runs.story(run), runs.story(unbroken))
    assert main(["verify-order", str(run), str(unbroken)]) == 0
    num_torn = sum(kill.is_torn for kill in kills)
    assert num_torn > 0
    took = f"{time.monotonic() - began:.0f} s"
    tell(f"{name}: {len(kills)} kills, {num_torn} of them in a save; ended like the unbroken run; {took}")


def shuffled(choices: list[str], draw: random.Random) -> list[str]:
    """One choice for each kill, all about as often, in random order."""
    each = [choices[number % len(choices)] for number in range(NUM_KILLS)]
    return draw.sample(each, NUM_KILLS)


def start_and_kill(case: Case, config: Path, run: Path, victim: str, moment: str, draw: random.Random) -> Kill:
    """Start the run, see that it goes on from the last whole checkpoint, and kill a part of it."""
    out, saved_at, num_told = config.parent / "out.txt", last_checkpoint(run), runs.num_lines(run / "metrics.jsonl")
    num_read = out.stat().st_size if out.exists() else 0
    started = time.time()
    port = ["--master_port", pick_free_port()] if "deepspeed" in case.victims else []
    process = runs.start(
        config, *case.words, folder=config.parent, launcher=[*case.launcher, *port], num_cores=case.ranks
    )

    def told() -> str:
        return out.read_bytes()[num_read:].decode(errors="replace")

    begins = "MFU is told against" if saved_at is None else f"going on from {run}/checkpoints/step-{saved_at:08d}: "

    def has_begun() -> bool:
        assert process.poll() is None, told()
        return begins in told()

    runs.wait_for(has_begun, f"{begins!r} in {out}", SECONDS)
    if moment != "starting":
        runs.wait_for_step(run, num_told + draw.randint(1, 2 * SAVED_EVERY), process, SECONDS)
    if moment == "saving":
        runs.wait_for(lambda: is_saving(run, started), "a save", SECONDS)
    time.sleep(draw.uniform(0, {"starting": 1.0, "training": 0.1, "saving": 0.005}[moment]))
    killed = time.monotonic()
    kill(process, victim, draw)
    return after_the_kill(run, victim, moment, is_saving(run, started), time.monotonic() - killed)


def kill(process: subprocess.Popen, victim: str, draw: random.Random) -> None:
    """Kill -9 of a rank, of all ranks or of a launcher; what is left of the run must end by itself."""
    everything = [psutil.Process(process.pid), *psutil.Process(process.pid).children(recursive=True)]
    programs = [(found, program_of(found.cmdline())) for found in everything]
    wanted = [found for found, program in programs if program == (RANK if victim == "all" else victim)]
    assert wanted, programs
    for found in wanted if victim == "all" else [draw.choice(wanted)]:
        os.kill(found.pid, signal.SIGKILL)
    runs.end(process, SECONDS)
    _, alive = psutil.wait_procs(everything[1:], timeout=SECONDS)
    assert not alive, [found.cmdline() for found in alive]


def after_the_kill(run: Path, victim: str, moment: str, is_torn: bool, seconds: float) -> Kill:
    """What lies there now; a launcher's death is no reason to lose a step, and any other none to lose many."""
    saved_at, num_told = last_checkpoint(run) or 0, runs.num_lines(run / "metrics.jsonl")
    if victim not in (RANK, "all") and moment != "starting":
        assert saved_at == num_told
    # A save that was under way is lost, and with it the steps since the one before; and steps are told before a save.
    assert num_told - saved_at <= 3 * SAVED_EVERY
    return Kill(victim, moment, num_told, is_torn, saved_at, seconds)


def last_checkpoint(run: Path) -> int | None:
    """The step of the newest checkpoint, which must be whole: each appears by one rename."""
    folder = run / "checkpoints"
    found = find_checkpoint(folder) if folder.is_dir() else None
    if found is None:
        return None
    assert found.folder == checkpoint_folders(folder)[-1]
    return found.state["progress"]["step"]


def is_saving(run: Path, since: float) -> bool:
    """Whether a checkpoint lies there half, begun after `since` (seconds since 1970)."""
    try:
        return any(aside.stat().st_mtime > since for aside in (run / "checkpoints").glob(".step-*.aside"))
    except FileNotFoundError:  # renamed just now
        return False
