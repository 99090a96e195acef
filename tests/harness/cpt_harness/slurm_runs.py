"""A run that `cpt submit` brought onto a throw-away SLURM: slow until a fault has come, then as fast as it can be.

run = SubmittedRun(cluster, config, "--nodes", 2)
run.wait_for_step(20); cluster.crash(run.nodes()[1]); run.hurry(); run.wait_until_finished()
"""

from __future__ import annotations

import json
import re
import sys
import time
from pathlib import Path
from typing import Any

import yaml

from cpt.observe.attempts import read_attempts
from cpt_harness import runs
from cpt_harness.slurm_cluster import ENDED, SlurmCluster

IN_JOBS = Path(__file__).parents[1] / "in_jobs"  # a sitecustomize.py
SECONDS = 300.0  # a start takes ten seconds; several at once, on a busy machine, a minute
STEPS = 300
LOST_SECONDS, HANG_SECONDS = 10, 20
CPT = (sys.executable, "-c", "import sys; from cpt.cli import main; sys.exit(main(sys.argv[1:]))")


def write_slow_settings(data: Path, folder: Path, steps: int = STEPS, save_every: int = 10) -> Path:
    """A run that is saved every so many steps and scored at its ends, as a file; its folder is `folder`/run."""
    plain = runs.settings(data, folder / "run", [runs.stage(data, "prose", steps)])
    plain["batch"]["micro_batch"] = 2  # for up to four ranks
    plain["evaluation"]["every_tokens"] = None
    plain["checkpoint"] = {"every_tokens": save_every * runs.TOKENS_A_STEP}
    plain["watch"] = {"hang_seconds": HANG_SECONDS, "slow_seconds": 300, "lost_seconds": LOST_SECONDS}
    return runs.write_settings(folder / "run.yaml", plain)


class SubmittedRun:
    """A run of which `cpt submit CONFIG WORDS` made a job, and what becomes of it.

    `rest`: seconds after each step until `hurry()` is called. One rank a node, unless `words` say otherwise.
    """

    def __init__(self, cluster: SlurmCluster, config: Path, *words: object, rest: float = 0.2) -> None:
        self.cluster, self.config = cluster, config
        self.path = Path(yaml.safe_load(config.read_text())["output"])
        self._slow, self._hang = config.parent / "slow", config.parent / "hang"
        self._slow.touch()
        paths = ":".join(map(str, (IN_JOBS, runs.ROOT, runs.ROOT / "launcher", runs.ROOT / "kernels")))
        self._environment = {
            "PYTHONPATH": paths, "CPT_TEST_SLOW": f"{rest} {self._slow}", "CPT_TEST_HANG": str(self._hang),
        }  # fmt: skip
        told = self.cpt("submit", config, "--grace", 60, *words)
        self.job = int(re.search(r"job (\d+)", told)[1])

    def cpt(self, *words: object) -> str:
        """What a command of ours says on the login node."""
        folder = self.config.parent
        return self.cluster.run(*CPT, *words, folder=folder, seconds=SECONDS, **self._environment).stdout

    def status(self) -> dict[str, Any]:
        """What `cpt status --json` says."""
        return json.loads(self.cpt("status", self.path, "--json"))

    def log(self) -> str:
        """What the job wrote, all its tries."""
        return (self.path / "logs" / f"job-{self.job}.log").read_text()

    def events(self, name: str) -> list[dict[str, Any]]:
        """Those of the run's events that have this name."""
        return [event for event in read_attempts(self.path) if event["event"] == name]

    def nodes(self) -> list[str]:
        """The nodes of the newest attempt, rank 0's first."""
        return self.events("started")[-1]["nodes"]

    def step(self) -> int:
        """The newest step that is on disk."""
        return runs.num_lines(self.path / "metrics.jsonl")

    def lost_tokens(self) -> int:
        """Of steps that had to be made again."""
        return sum(event["steps"] for event in self.events("resumed_over")) * runs.TOKENS_A_STEP

    def wait_for_step(self, step: int, seconds: float = SECONDS) -> None:
        """Return when the run has made that step."""
        self.wait_for(lambda: runs.num_lines(self.path / "metrics.jsonl") >= step, f"step {step}", seconds)

    def wait_for(self, what: Any, why: str, seconds: float = SECONDS) -> Any:
        """The first true answer of `what()`; the job's log is in the error if there is none in time."""

        def ask() -> Any:
            time.sleep(0.1)
            return what()

        try:
            return runs.wait_for(ask, why, seconds)
        except AssertionError as error:
            raise AssertionError(f"{error}; {self.cluster.job(self.job)}\n{self.log()[-6000:]}") from None

    def wait_for_event(self, name: str, number: int = 1, seconds: float = SECONDS) -> dict[str, Any]:
        """The event of that name that is the so manieth, once it is there."""
        return self.wait_for(
            lambda: self.events(name)[number - 1] if len(self.events(name)) >= number else None,
            f"event {name} number {number}",
            seconds,
        )

    def hurry(self) -> None:
        """No rests from now on."""
        self._slow.unlink()

    def let_hang(self, rank: int) -> None:
        """That rank does not come back from reading the data of its next step."""
        aside = self._hang.with_suffix(".new")
        aside.write_text(str(rank))
        aside.rename(self._hang)
        self.wait_for(lambda: not self._hang.exists(), f"rank {rank} to hang")

    def wait_until_finished(self, seconds: float = SECONDS) -> dict[str, str]:
        """The job, once it is over and the run says that it is finished; fails if the job ends otherwise."""

        def is_over() -> dict[str, str] | None:
            job = self.cluster.job(self.job)
            return job if job["JobState"] in ENDED and (self.path / "finished.json").exists() else None

        job = self.wait_for(is_over, "the end of the run", seconds)
        assert job["JobState"] == "COMPLETED", (job, self.log()[-6000:])
        return job


def row(run: SubmittedRun, fault: str, injected: str, began: float, seen: str, result: str) -> str:
    """A line of the fault table in docs/CLUSTER.md, for a fault that came at the time `began`.

    Seconds until the run's attempt was over, and until it trained again; tokens that were lost.
    """
    ended, again = run.events("ended")[0], run.events("training")[1:2]
    times = " | ".join(f"{event['time'] - began:.0f} s" for event in (ended, *again)) + (" | " if not again else "")
    told = re.sub(r" \([^)]*\)", "", re.sub(r"\b[a-z]{4}-(\d)", r"n\1", seen))
    return f"| {fault} | {injected} | {times} | {told} | {run.lost_tokens():,} | {result} |"
